"""gpt-oss's experts, taken apart: compared with transformers' dequantization, built, cut for ranks and verified."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
from support.files import folder_tensors
from support.gpt_oss import SMALL, tensors, unquantized, write

from mixprec_build.checkpoint.degree import Degree
from mixprec_build.checkpoint.typed import open_source
from mixprec_build.errors import MixprecError
from mixprec_build.output import copier
from mixprec_build.output.build import plan_recipe, run_plan
from mixprec_build.output.split import split
from mixprec_build.output.verify import verify
from mixprec_build.storage import transposed

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors


EXPERTS, HIDDEN, COLUMNS, HEADS, *_ = SMALL


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("gpt-oss") / "release", tensors())


def built(release: Path, out: Path) -> Path:
    recipe = out.with_suffix(".yaml")
    recipe.write_text(f"model: {release}\n")
    run_plan(plan_recipe(recipe), out)
    return out


def test_experts_are_what_transformers_makes_of_them(release: Path) -> None:
    source, made = open_source(str(release)), tensors()
    for name, parts in (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",))):
        home = f"model.layers.1.mlp.experts.{name}"
        blocks, scales = (torch.from_numpy(made[f"{home}_{leaf}"]) for leaf in ("blocks", "scales"))
        theirs = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).numpy()
        for expert in range(EXPERTS):
            for at, part in enumerate(parts):
                module = f"model.layers.1.mlp.experts.{expert}.{part}"
                assert source.format_of(module).kind == "mxfp4"
                due = theirs[expert][:, at :: len(parts)].T
                np.testing.assert_array_equal(source.dequantize(module), due)
                bias = source.checkpoint.read(source.checkpoint.modules[module].tensors["bias"])
                np.testing.assert_array_equal(bias, made[f"{home}_bias"][expert, at :: len(parts)])


@pytest.mark.parametrize("sizes", [(4096, 1000, 1 << 20), (64, 70, 96)])
def test_it_is_built_and_verified(
    release: Path, tmp_path: Path, sizes: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the sizes of reads are, and where they end."""
    for (module, name), size in zip(
        ((copier, "_BUFFER"), (copier, "PANEL"), (transposed, "_BLOCK")), sizes, strict=True
    ):
        monkeypatch.setattr(module, name, size)
    out = built(release, tmp_path / "out")
    assert not verify(out, sources={"model": str(release)}).differences
    found, made = folder_tensors(out), tensors()
    home = "model.layers.0.mlp.experts"
    for expert in range(EXPERTS):
        for at, part in enumerate(("gate_proj", "up_proj")):
            due = made[f"{home}.gate_up_proj_blocks"][expert, at::2]
            assert found[f"{home}.{expert}.{part}.weight"][2] == due.tobytes()
            due = made[f"{home}.gate_up_proj_scales"][expert, at::2]
            assert found[f"{home}.{expert}.{part}.weight_scale"][2] == due.tobytes()
        assert found[f"{home}.{expert}.down_proj.weight"][2] == made[f"{home}.down_proj_blocks"][expert].tobytes()


@pytest.mark.parametrize("degree", [Degree(2), Degree(2, 2)], ids=str)
def test_it_is_cut_for_ranks(release: Path, tmp_path: Path, degree: Degree) -> None:
    out = built(release, tmp_path / "out")
    files = split(out, degree)
    assert not verify(out).differences
    made, share = tensors(), HEADS // 2
    for rank, folder in enumerate(files):
        found = folder_tensors(folder)
        sinks = made["model.layers.0.self_attn.sinks"][rank * share : (rank + 1) * share]
        assert found["model.layers.0.self_attn.sinks"][2] == sinks.tobytes()
        bias = made["model.layers.0.mlp.experts.down_proj_bias"]
        experts = slice(2 * rank, 2 * rank + 2) if degree.ep == 2 else slice(None)
        assert found["model.layers.0.mlp.experts.w2_bias"][2] == bias[experts].tobytes()


def test_what_lacks_a_tensor_or_has_other_sizes_is_refused_by_name(tmp_path: Path) -> None:
    home = "model.layers.0.mlp.experts"
    for at, (name, change) in enumerate(
        {
            f"{home}.gate_up_proj_scales": None,
            f"{home}.down_proj_scales": np.zeros((EXPERTS, HIDDEN, 4), np.uint8),
            f"{home}.gate_up_proj_blocks": np.zeros((EXPERTS, 2 * COLUMNS - 1, HIDDEN // 32, 16), np.uint8),
        }.items()
    ):
        made = tensors()
        if change is None:
            del made[name]
        else:
            made[name] = change
        recipe = tmp_path / f"{at}.yaml"
        recipe.write_text(f"model: {write(tmp_path / str(at), made)}\n")
        with pytest.raises(MixprecError, match=r"gate_proj|down_proj|gate_up_proj"):
            plan_recipe(recipe)


def test_bf16_experts_are_copied_from_every_other_column(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the sizes of reads are: of many rows of inputs at once, and of a part of one."""
    made, home = unquantized(), "model.layers.0.mlp.experts"
    plain = write(tmp_path / "plain", made, quantization_config=None)
    for at, (buffer, short) in enumerate([(4096, 16 << 10), (70, 1)]):
        monkeypatch.setattr(copier, "PANEL", buffer)
        monkeypatch.setattr(transposed, "_SHORT", short)
        out = built(plain, tmp_path / f"out{at}")
        assert not verify(out, sources={"model": str(plain)}).differences
        found = folder_tensors(out)
        for expert in range(EXPERTS):
            for part, name in enumerate(("gate_proj", "up_proj")):
                due = np.ascontiguousarray(made[f"{home}.gate_up_proj"][expert][:, part::2].T)
                assert found[f"{home}.{expert}.{name}.weight"][1:] == ([COLUMNS, HIDDEN], due.tobytes())
                bias = made[f"{home}.gate_up_proj_bias"][expert, part::2]
                assert found[f"{home}.{expert}.{name}.bias"][2] == bias.tobytes()
            due = np.ascontiguousarray(made[f"{home}.down_proj"][expert].T)
            assert found[f"{home}.{expert}.down_proj.weight"][2] == due.tobytes()


@pytest.mark.parametrize("degree", [Degree(2), Degree(2, 2)], ids=str)
def test_bf16_experts_beside_mxfp4_are_cut_for_ranks(release: Path, tmp_path: Path, degree: Degree) -> None:
    """A layer of BF16, and one of both; without its merged files, each tensor is put together again."""
    recipe, out = mixed(release, tmp_path), tmp_path / "out"
    run_plan(plan_recipe(recipe), out)
    split(out, degree, layout="presplit")
    assert not verify(out).differences
    split(out, None, layout="merged")
    assert not verify(out).differences


def mixed(release: Path, folder: Path) -> Path:
    """A recipe: all experts of layer 0 and two of layer 1 in BF16, the others in MXFP4."""
    plain = write(folder / "plain", unquantized(), quantization_config=None)
    recipe = folder / "mix.yaml"
    recipe.write_text(
        f"model: {release}\nsources: {{mx: {release}, bf16: {plain}}}\ndefault: mx\n"
        "weights: {'model.layers.0.mlp.experts.*': bf16, 'model.layers.1.mlp.experts.{1,2}.*': bf16}\n"
    )
    return recipe


def test_projections_of_an_expert_have_one_format(release: Path, tmp_path: Path) -> None:
    recipe = mixed(release, tmp_path)
    recipe.write_text(recipe.read_text().replace("{1,2}.*", "{1,2}.down_proj"))
    with pytest.raises(MixprecError, match="computed format by format, and need one: down_proj is bf16"):
        plan_recipe(recipe)
