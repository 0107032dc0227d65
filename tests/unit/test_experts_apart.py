"""A release that keeps all experts of a layer in one tensor is mixed expert by expert, byte for byte."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.files import folder_tensors
from support.write import QWEN3_MOE, Config, Tensors, write_tiny

from mixprec_build.checkpoint.typed import open_source
from mixprec_build.errors import RefusedError
from mixprec_build.output import copier
from mixprec_build.output.build import plan_recipe, run_plan
from mixprec_build.output.verify import verify
from mixprec_build.planning.types import Plan
from mixprec_build.report.facts import inspect_facts
from mixprec_build.storage.transposed import PANEL

LINES = "{'model.layers.*.mlp.experts.*': int4, 'model.layers.1.mlp.experts.{1..2}.*': bf16}"


def named(_: Tensors, config: Config) -> None:
    config |= {"model_type": "qwen3_5_moe_text", "architectures": ["Qwen3_5MoeForCausalLM"]}


def stacked(tensors: Tensors, config: Config) -> None:
    named(tensors, config)
    for layer in range(2):
        block = f"model.layers.{layer}.mlp.experts"
        experts = [
            {part: tensors.pop(f"{block}.{e}.{part}.weight") for part in ("gate_proj", "up_proj", "down_proj")}
            for e in range(4)
        ]
        tensors[f"{block}.gate_up_proj"] = np.stack([np.concatenate([e["gate_proj"], e["up_proj"]]) for e in experts])
        tensors[f"{block}.down_proj"] = np.stack([e["down_proj"] for e in experts])


def transposed(tensors: Tensors, config: Config) -> None:
    """As Qwen3-VL-MoE's release."""
    stacked(tensors, config)
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        tensors[name] = np.ascontiguousarray(tensors[name].transpose(0, 2, 1))
    config |= {"model_type": "qwen3_vl_moe", "architectures": ["Qwen3VLMoeForConditionalGeneration"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experts")
    write_tiny(folder / "stacked", QWEN3_MOE, "bf16", edit=stacked)
    write_tiny(folder / "transposed", QWEN3_MOE, "bf16", edit=transposed)
    write_tiny(folder / "apart", QWEN3_MOE, "bf16", edit=named)
    write_tiny(folder / "int4", QWEN3_MOE, "gptq_int4", edit=named)
    return folder


def plan(folder: Path, source: str, default: str = "bf16", lines: str = LINES, *, link: bool = False) -> Plan:
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"model: {source}\nsources: {{bf16: {source}, int4: int4}}\ndefault: {default}\nweights: {lines}\n"
    )
    return plan_recipe(recipe, link=link)


def test_columns_are_read_as_the_tensors_that_they_are(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for size in (PANEL, 1000):  # no multiple of a row's bytes
        monkeypatch.setattr(copier, "PANEL", size)
        monkeypatch.setattr(copier, "_BUFFER", 4096)
        outs = {source: tmp_path / f"{source}-{size}" for source in ("transposed", "apart")}
        for source, out in outs.items():
            lines = "{'model.layers.0.self_attn.*': int4}"
            run_plan(plan(folder, source, lines=lines), out)
            assert not verify(out, sources={"bf16": str(folder / source)}).differences
        assert folder_tensors(outs["transposed"]) == folder_tensors(outs["apart"])


@pytest.mark.parametrize("default", ["bf16", "int4"])
def test_the_output_is_that_of_a_release_with_experts_apart(folder: Path, tmp_path: Path, default: str) -> None:
    for source in ("stacked", "apart"):
        run_plan(plan(folder, source, default), tmp_path / source)
        assert not verify(tmp_path / source).differences
    ours, theirs = (folder_tensors(tmp_path / source) for source in ("stacked", "apart"))
    assert ours == theirs
    assert "model.layers.1.mlp.experts.2.up_proj.weight" in ours


def test_a_file_with_such_a_tensor_is_never_taken_over_as_it_is(folder: Path, tmp_path: Path) -> None:
    linked = plan(folder, "stacked", lines="{}", link=True)
    assert [shard.link for shard in linked.shards] == [None]
    assert [shard.link for shard in plan(folder, "apart", lines="{}", link=True).shards] != [None]
    run_plan(linked, tmp_path / "out")
    assert not verify(tmp_path / "out").differences


def test_inspect_shows_each_expert(folder: Path) -> None:
    facts = [inspect_facts(open_source(str(folder / name)), folder / name) for name in ("stacked", "apart")]
    assert facts[0]["layers"] == facts[1]["layers"]


def test_the_source_is_compared_with_by_verify(folder: Path, tmp_path: Path) -> None:
    run_plan(plan(folder, "stacked"), tmp_path / "out")
    found = verify(tmp_path / "out", sources={"bf16": str(folder / "stacked")})
    assert not found.differences and found.bit_for_bit


@pytest.mark.parametrize("shape", [(4, 511, 128), (3, 512, 128)], ids=["odd", "too few experts"])
def test_what_is_no_such_tensor_is_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    def damaged(tensors: Tensors, config: Config) -> None:
        stacked(tensors, config)
        name = "model.layers.0.mlp.experts.gate_up_proj"
        tensors[name] = np.zeros(shape, tensors[name].dtype)

    write_tiny(tmp_path / "bf16", QWEN3_MOE, "bf16", edit=damaged)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: bf16\nsources: {bf16: bf16}\ndefault: bf16\n")
    with pytest.raises(RefusedError, match=r"gate_up_proj|gate, up and down"):
        plan_recipe(recipe)
