"""DeepSeek-V4 as its releases store it: FP8 with E8M0 scales, experts in MXFP4 or FP8, each as SGLang loads it itself.

``test_families.py``, ``test_drafts.py`` and ``test_asking.py`` have mixes of it, its draft layer and its names.
"""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sglang.version
import torch
from support.families import TINY
from support.sglang.families import family_mix, write_family, write_recipe
from support.sglang.harness import change_config, change_tensors, rank_of, serve, tensors_of

from mixprec_build.checkpoint.degree import Degree
from mixprec_build.errors import RefusedError
from mixprec_build.families.deepseek import DEEPSEEK
from mixprec_build.families.deepseek_v4 import DEEPSEEK_V4
from mixprec_build.output.build import plan_recipe, run_plan
from mixprec_build.output.split import split
from mixprec_build.output.verify import verify
from mixprec_build.report.doctor import examine

pytestmark = pytest.mark.usefixtures("sglang", "streams")

NAME = "deepseek_v4"
DECLARED = {
    "quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128], "fmt": "e4m3",
    "scale_fmt": "ue8m0",
}  # fmt: skip
ATTENTION = {"*.attn.*": "v4_fp8", "layers.3.attn.{wq_a,wkv}": "v4_fp8", "*.shared_experts.*": "v4_fp8"}


def release(folder: Path, experts: str) -> Path:
    """All linears of the model in FP8 and its routed experts in the variant ``experts``, compiled from one source."""
    layers = (f"layers.{layer}.ffn.experts.*" for layer in range(4))
    return family_mix(folder, NAME, lines={**ATTENTION, **dict.fromkeys(layers, experts)})


def natively(checkpoint: Path, folder: Path) -> Path:
    """The same tensors, declared as a release declares them, for SGLang's own method; without draft layers."""
    shutil.copytree(checkpoint, folder)
    change_config(folder, {"quantization_config": DECLARED})
    change_tensors(folder, lambda tensors: [tensors.pop(name) for name in [*tensors] if name.startswith("mtp.")])
    return folder


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8) if tensor.dim() and tensor.numel() else tensor


@pytest.mark.parametrize(("experts", "backend"), [("v4_fp8", "auto"), ("v4_mxfp4", "marlin")])
def test_a_release_is_loaded_as_sglang_loads_it(folder: Path, tmp_path: Path, experts: str, backend: str) -> None:
    """Every parameter has the bytes that stock SGLang gives it, wo_a in BF16 included; a zero is one of either sign."""
    out = release(folder, experts)
    ours = dict(serve(out).named_parameters())  # also has the class take wo_a in BF16
    theirs = dict(serve(natively(out, tmp_path / "release"), moe_runner_backend=backend).named_parameters())
    held = {name for name, value in ours.items() if value.numel()}
    # Scales of a cache that releases have none of, which SGLang's method makes and sets to 1.
    assert held == {name for name, value in theirs.items() if value.numel() and ".attn_mqa." not in name}
    kind = torch.int8 if experts == "v4_mxfp4" else torch.float8_e4m3fn
    assert ours["model.layers.1.mlp.experts.w13_weight"].dtype == kind
    assert ours["model.layers.1.self_attn.wo_a.weight"].dtype == torch.bfloat16
    for name in held:
        mine, due = ours[name].data, theirs[name].data
        same = torch.equal(bits(mine), bits(due)) if mine.dtype == due.dtype else torch.equal(mine.float(), due.float())
        assert same, name


def test_a_table_of_experts_and_biases_of_routers_are_those_of_the_checkpoint(folder: Path) -> None:
    """By names that SGLang changes: tid2eid, of 64 bits in releases, and gate.bias."""
    stored, held = tensors_of(family_mix(folder, NAME)), dict(serve(family_mix(folder, NAME)).named_parameters())
    table = held["model.layers.0.mlp.topk.tid2eid"]
    assert table.dtype == torch.int32 and torch.equal(table.long(), stored["layers.0.ffn.gate.tid2eid"])
    bias = held["model.layers.2.mlp.gate.e_score_correction_bias"]
    assert torch.equal(bias, stored["layers.2.ffn.gate.bias"])


@pytest.mark.parametrize("how", [{}, {"load_format": "safetensors"}], ids=["mixprec", "sglang"])
def test_wo_a_may_be_in_fp8_in_some_layers_only(folder: Path, how: dict[str, Any], caplog: Any) -> None:
    """SGLang's class by itself misses the scales of the others; and warns of what mixprec has filled."""
    out = family_mix(folder, NAME, lines={"layers.2.attn.wo_a": "bf16"})
    stored = tensors_of(out)
    with caplog.at_level(logging.WARNING, "sglang"):
        held = dict(serve(out, **how).named_parameters())
    assert "not initialized" not in caplog.text
    assert torch.equal(held["model.layers.2.self_attn.wo_a.weight"], stored["layers.2.attn.wo_a.weight"])
    assert stored["layers.1.attn.wo_a.weight"].dtype == torch.float8_e4m3fn
    due = stored["layers.1.attn.wo_a.weight"].float() * stored["layers.1.attn.wo_a.scale"].float().repeat_interleave(
        128, 0
    ).repeat_interleave(128, 1)
    assert torch.equal(held["model.layers.1.self_attn.wo_a.weight"], due.to(torch.bfloat16))


@pytest.mark.parametrize("ep", [1, 2])
def test_ranks_read_their_own_files(folder: Path, tmp_path: Path, ep: int, caplog: pytest.LogCaptureFixture) -> None:
    """The second of two; merged files are gone. wo_a is complete in them, and the class cuts it."""
    out = Path(shutil.copytree(family_mix(folder, NAME), tmp_path / "out"))
    with rank_of(1, 2, ep):
        theirs = dict(serve(out, load_format="safetensors").named_parameters())
    split(out, Degree(2, ep), layout="presplit")
    assert not verify(out).differences
    with rank_of(1, 2, ep), caplog.at_level("DEBUG", "mixprec_runtime"):
        ours = dict(serve(out).named_parameters())
    assert "mixprec: read the files in" in caplog.text
    assert len(ours["model.layers.1.self_attn.wo_a.weight"]) == 128  # of 256
    for name, value in ours.items():
        assert torch.equal(bits(value.data), bits(theirs[name].data)), name


def test_ranks_that_cannot_share_the_groups_of_its_output_are_refused(folder: Path) -> None:
    """SGLang's class would have none of its two groups on each rank, and stop at the first request."""
    with (
        rank_of(3, 4),
        pytest.raises(RuntimeError, match=r"projected in 2 groups .* 4 ranks cannot share: .* divides 2"),
    ):
        serve(family_mix(folder, "deepseek_v4"))


def test_groups_of_outputs_are_told_by_how_ranks_share_them() -> None:
    from mixprec_runtime.loading.output_groups import are_in

    assert are_in(replace(DEEPSEEK_V4, model_types=frozenset({"another"}))) and not are_in(DEEPSEEK)


def test_mixed_experts_have_the_models_limit(folder: Path) -> None:
    """swiglu_limit of config.json, in the groups of a mixed layer and in layers of one format."""
    model = serve(family_mix(folder, NAME))
    mixed, alone = (model.model.layers[layer].mlp.experts for layer in (1, 2))
    assert len(mixed.groups) == 2
    assert {group.moe_runner_config.swiglu_limit for group in (*mixed.groups, mixed, alone)} == {10.0}


def test_doctor_asks_its_class_and_that_of_its_draft_layer(folder: Path) -> None:
    if sglang.version.__version__ == "0.5.23":
        pytest.skip("this SGLang makes no such rotary embeddings without a GPU, which doctor says")
    (found,) = (finding for finding in examine(family_mix(folder, NAME)) if finding.subject == "model class")
    assert found.status == "ok", found.text
    assert found.text.startswith(
        "DeepseekV4ForCausalLM, with DeepseekV4ForCausalLMNextN for its draft layers, takes all"
    )


# What is refused


def refused(folder: Path, lines: dict[str, str]) -> str:
    """The message of a plan of the tiny model with these lines alone."""
    model = TINY[NAME]
    sources = write_family(folder, model.__class__(model.config, lines))
    with pytest.raises(RefusedError) as error:
        plan_recipe(write_recipe(folder / "recipe.yaml", sources, lines))
    return str(error.value)


def test_what_the_class_has_no_place_for_is_refused_with_its_line(tmp_path: Path) -> None:
    text = refused(tmp_path, {"layers.1.attn.wo_a": "fp8", "layers.2.ffn.shared_experts.*": "int4"})
    assert "layers.1.attn.wo_a" in text and "whose scales are called `scale`" in text and "(line " in text
    assert "shared_experts" in text


def test_linears_in_mxfp4_and_parts_of_wqkv_a_in_two_formats_are_refused(tmp_path: Path) -> None:
    text = refused(tmp_path, {"layers.1.attn.wq_b": "v4_mxfp4", "layers.2.attn.wq_a": "v4_fp8"})
    assert "layers.1.attn.wq_b" in text and "no kernel for linears in MXFP4" in text
    assert "parts of wqkv_a, one GEMM in SGLang" in text


def test_a_compressor_is_planned_unquantized_only(tmp_path: Path) -> None:
    """Its wkv is joined with its wgate, and not with the attention's wq_a."""
    from mixprec_build.families.deepseek_v4 import DEEPSEEK_V4

    p = "layers.1.attn."
    names = [f"{p}{name}" for name in ("wq_a", "wkv", "compressor.wkv", "compressor.wgate", "indexer.compressor.wkv")]
    assert DEEPSEEK_V4.fused_groups(names) == {
        f"{p}wqkv_a": names[:2], f"{p}compressor.wkv_gate": names[2:4], f"{p}indexer.compressor.wkv_gate": names[4:],
    }  # fmt: skip
    lines = {"layers.1.attn.*": "v4_fp8"}
    sources = write_family(tmp_path, TINY[NAME])
    plan = plan_recipe(write_recipe(tmp_path / "recipe.yaml", sources, lines))
    assert not plan.modules["layers.1.attn.compressor.wkv"].format.quantized
    run_plan(plan, tmp_path / "out")
    serve(tmp_path / "out")
