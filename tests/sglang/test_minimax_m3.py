"""MiniMax-M3 as on GPUs: what its class joins after loading, and shared experts that it takes for routed ones."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.families import TINY
from support.family_parts import EXPERTS
from support.sglang.asked import ASKED, answer_of, modules_of
from support.sglang.families import dense_parameters, dequantized, family_mix, skip_unless_made
from support.sglang.harness import rank_of, serve, tensors_of

from mixprec_build.checkpoint.degree import Degree
from mixprec_build.families.facts import ModelFacts
from mixprec_build.output.split import split
from mixprec_runtime.asking.comparison import compare
from mixprec_runtime.memory import measure

pytestmark = pytest.mark.usefixtures("sglang", "streams")

NAME = "minimax_m3"
ATTENTION, DECODER = "layers.2.self_attn", {"minimax_m3": "model", "minimax_m3_images": "language_model.model"}
WITHOUT_FUSION: dict[str, Any] = {"disable_shared_experts_fusion": True}
UNIFORM = {"*.experts.*": "fp8", "*.shared_experts.*": "fp8"}


@pytest.fixture(params=DECODER)
def name(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A tiny model, whose class takes this machine for one with a GPU."""
    skip_unless_made(request.param)
    from sglang.srt.models import minimax_m3, minimax_m3_vl

    for module in (minimax_m3, minimax_m3_vl):
        monkeypatch.setattr(module, "_is_cuda", True)
        monkeypatch.setattr(module, "_device_sm", 90)
    return str(request.param)


@pytest.mark.parametrize("how", [{}, {"load_format": "safetensors"}], ids=["mixprec", "sglang"])
def test_q_k_v_and_the_index_are_joined_where_both_are_unquantized(
    folder: Path, name: str, how: dict[str, Any]
) -> None:
    """Layer 2 is in BF16, layer 1 in FP8; by mixprec's loader, which gives the class no tensor, and by SGLang's."""
    mix = family_mix(folder, name)
    model = serve(mix, **WITHOUT_FUSION, **how)
    held, stored = dict(model.named_parameters()), tensors_of(mix)
    parts = ("q_proj", "k_proj", "v_proj", "index_q_proj", "index_k_proj")
    due = torch.cat([stored[f"{DECODER[name]}.{ATTENTION}.{part}.weight"] for part in parts])
    assert torch.equal(held[f"model.{ATTENTION}.fused_qkv_index_proj.weight"], due)
    assert not held[f"model.{ATTENTION}.qkv_proj.weight"].numel()
    assert held["model.layers.1.self_attn.index_qkv_proj.weight"].dtype == torch.float8_e4m3fn
    assert "model.layers.1.self_attn.fused_qkv_index_proj.weight" not in held
    sizes = {value.data_ptr(): value.nbytes for value in held.values() if value.numel()}
    assert sum(measure(model)["bytes_by_format"].values()) == sum(sizes.values())


def test_the_class_is_asked_as_on_a_gpu(name: str, tmp_path: Path) -> None:
    """What it joins after loading has other memory, and was filled before."""
    asked = ASKED[TINY[name].config["architectures"][0]]
    answer = answer_of(asked, tmp_path)
    assert compare(answer, ModelFacts.of(asked.config), modules_of(asked)) == []


def test_shared_experts_in_another_format_than_routed_ones_are_not_fused(folder: Path, name: str) -> None:
    """SGLang makes them one more routed expert by default, where there is no expert parallelism."""
    with pytest.raises(ValueError, match="--disable-shared-experts-fusion"):
        serve(family_mix(folder, name))
    with pytest.raises(ValueError, match=r"shared experts are in another format.*--disable-shared-experts-fusion"):
        serve(family_mix(folder, name, lines={"*.experts.*": "fp8"}))


def test_fused_shared_experts_are_those_of_a_native_load(folder: Path, tmp_path: Path, name: str) -> None:
    """All experts in FP8: the shared one is the ninth, by SGLang's loader."""
    mix = family_mix(folder, name, lines=UNIFORM)
    ours = dict(dense_parameters(serve(mix)))
    theirs = dict(dense_parameters(serve(dequantized(mix, tmp_path / "dense"))))
    experts = [key for key in theirs if ".mlp.experts." in key]
    assert len(experts) == 4 and all(len(ours[key]) == EXPERTS + 1 for key in experts)
    for key in ours.keys() & theirs.keys():  # attention in FP8 is not joined
        assert (ours[key] - theirs[key]).abs().max() <= 0.01 * theirs[key].abs().max(), key


def test_ranks_that_share_heads_of_the_index(folder: Path, tmp_path: Path) -> None:
    """Two heads on four ranks, the second of which is that of the last two, as the second head of keys and values."""
    skip_unless_made(NAME)
    merged = family_mix(folder, NAME, lines={"*.shared_experts.*": "bf16"})
    files = split(Path(shutil.copytree(merged, tmp_path / "out")), Degree(4, 4))
    query, key = (tensors_of(merged)[f"model.{ATTENTION}.index_{part}_proj.weight"] for part in "qk")
    for rank in range(4):
        with rank_of(rank, 4, 4):
            due = dict(serve(merged, load_format="safetensors").named_parameters())
        held, joined = tensors_of(files[rank]), f"model.{ATTENTION}.index_qkv_proj.weight"
        assert torch.equal(held[joined], torch.cat([query[128 * (rank // 2) :][:128], key]))
        assert torch.equal(held[joined], due[joined])
