"""Ranks of model families: files cut for them equal, bit for bit, what SGLang loads from the merged files."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.families import TINY
from support.sglang.families import dense_parameters, family_mix, skip_unless_made
from support.sglang.harness import rank_of, serve, tensors_of

from mixprec_build.checkpoint.degree import Degree
from mixprec_build.families.base import Family
from mixprec_build.families.registry import find_family
from mixprec_build.output.split import split
from mixprec_build.output.verify import verify

pytestmark = pytest.mark.usefixtures("sglang", "streams")

NOT_LOADED = "g_idx_sort_indices"


def family_of(name: str) -> Family:
    family = find_family(TINY[name].config["model_type"], TINY[name].config["architectures"])
    assert family is not None
    return family


CUT = [
    ("mistral3", Degree(2)), ("ernie4_5_moe", Degree(2, 2)), ("ernie4_5", Degree(2)), ("gemma3", Degree(2)),
    ("cohere", Degree(2)), ("phi3", Degree(2)), ("granite", Degree(2)), ("olmoe", Degree(2, 2)),
    ("llama4", Degree(2)), ("nemotron_h", Degree(2, 2)), ("mimo_v2", Degree(2, 2)), ("bailing_moe", Degree(2)),
    ("hunyuan", Degree(2, 2)), ("granitemoe", Degree(2)), ("phimoe", Degree(2, 2)),
    ("apertus", Degree(2)), ("internlm2", Degree(2)), ("gemma3_images", Degree(2)), ("gemma4", Degree(2)),
    ("gemma4_images", Degree(2, 2)),
]  # fmt: skip
REPLICAS = [
    (name, Degree(2, tiny.degrees[-1][1], 2)) for name, tiny in TINY.items() if family_of(name).attention_replicas
]
CASES = [*CUT, *REPLICAS]


@pytest.mark.parametrize(("name", "degree"), CASES, ids=[f"{name}-{degree}" for name, degree in CASES])
def test_a_ranks_files_hold_what_sglang_would_load(folder: Path, tmp_path: Path, name: str, degree: Degree) -> None:
    """With replicas of attention, both ranks have all of it, and half of the rest. What SGLang cannot load of merged
    files is loaded by mixprec, and compared with SGLang's load in ``test_families.py``."""
    skip_unless_made(name)
    merged = family_mix(folder, name)
    out = Path(shutil.copytree(merged, tmp_path / "out"))
    options: dict[str, Any] = dict(TINY[name].options)
    if degree.dp > 1:
        options |= {"tp_size": degree.tp, "dp_size": degree.dp, "enable_dp_attention": True}
    if not family_of(name).needs_own_loader:
        options["load_format"] = "safetensors"
    left = () if any(tensor.endswith(".g_idx") for tensor in tensors_of(merged)) else ("_g_idx",)
    left_to_class = family_of(name).is_left_to_class
    files = split(out, degree)
    for rank in range(degree.tp):
        with rank_of(rank, degree.tp, degree.ep, degree.dp):
            due = dict(serve(merged, **options).named_parameters())
        held = tensors_of(files[rank])
        for key, parameter in due.items():
            if parameter.numel() and not key.endswith((NOT_LOADED, *left)) and not left_to_class(key):
                assert key in held, f"rank {rank}: {key}"
                assert held[key].shape == parameter.shape, f"rank {rank}: {key}"
                assert torch.equal(bits(held[key].to(parameter.dtype)), bits(parameter.data)), f"rank {rank}: {key}"
    assert not verify(out).differences


@pytest.mark.parametrize("name", ["llama4", "nemotron_h", "longcat", "apertus", "internlm2", "gemma4_images"])
def test_what_its_class_computes_is_computed_of_a_ranks_files(
    folder: Path, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Rows that are moved, an exponential, a norm that is scaled after loading, keys as values, and buffers."""
    skip_unless_made(name)
    options = TINY[name].options
    out = Path(shutil.copytree(family_mix(folder, name), tmp_path / "out"))
    with rank_of(1, 2):
        model = serve(out, load_format="safetensors", **options)
        due = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    split(out, Degree(2), layout="presplit")
    with rank_of(1, 2), caplog.at_level("DEBUG", "mixprec_runtime"):
        model = serve(out, **options)
        assert "mixprec: read the files in" in caplog.text
        held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for key, value in due.items():
        if not key.endswith(NOT_LOADED):
            assert torch.equal(bits(held[key].data), bits(value.data)), key


def test_qkv_and_gate_with_up_in_one_tensor_are_cut_in_parts(folder: Path, tmp_path: Path) -> None:
    """Phi-3 on four ranks: two have the same key-value head, and 192 columns of each of gate and up are filled up."""
    merged = family_mix(folder, "phi3")
    out = Path(shutil.copytree(merged, tmp_path / "out"))
    alone = {key: parameter.data for key, parameter in serve(merged).named_parameters()}
    files = split(out, Degree(4))
    qkv, gate_up = "model.layers.0.self_attn.qkv_proj.weight", "model.layers.1.mlp.gate_up_proj.weight"
    query, key, value = alone[qkv].split([512, 256, 256])
    gate, up = alone[gate_up].split(768)
    for rank in range(4):
        with rank_of(rank, 4):
            own = {key: parameter.data for key, parameter in serve(merged).named_parameters()}
        head = rank // 2
        starts = (query, 128 * rank), (key, 128 * head), (value, 128 * head)
        parts = [part[start : start + 128] for part, start in starts]
        assert torch.equal(bits(own[qkv]), torch.cat([bits(part) for part in parts]))
        start, end = min(256 * rank, 768), min(256 * (rank + 1), 768)
        assert own[gate_up].shape == (512, 512)
        for part, of in ((own[gate_up][:256], gate), (own[gate_up][256:], up)):
            assert torch.equal(bits(part[: end - start]), bits(of[start:end]))
            assert not part[end - start :].float().any()
        stored = tensors_of(files[rank])
        for key_, tensor in own.items():
            if tensor.numel() and not key_.endswith(NOT_LOADED):
                assert torch.equal(bits(stored[key_].to(tensor.dtype)), bits(tensor)), key_


def test_experts_whose_share_is_one_and_a_half_blocks_are_filled_up(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MiniMax-M2's 1536 columns on eight ranks, in FP8 blocks and groups of Int4: six ranks have 256, and two zeros."""
    tiny = TINY["minimax_m2"]
    sizes = {"intermediate_size": 1536, "num_attention_heads": 8, "num_key_value_heads": 8}
    monkeypatch.setitem(TINY, "minimax_m2_wide", replace(tiny, config={**tiny.config, **sizes}))
    merged = family_mix(folder, "minimax_m2_wide", lines={"*.layers.0.*.experts.*": "fp8"})
    out = Path(shutil.copytree(merged, tmp_path / "out"))
    split(out, Degree(8), layout="presplit")
    alone = dict(dense_parameters(serve(merged)))
    for rank in (0, 5, 6):
        with rank_of(rank, 8):
            own, shared = (dict(dense_parameters(serve(checkpoint))) for checkpoint in (out, merged))
            with pytest.raises(ValueError, match="192"):
                serve(merged, load_format="safetensors")
        start, end = min(256 * rank, 1536), min(256 * (rank + 1), 1536)
        for layer in range(tiny.config["num_hidden_layers"]):
            w13, w2 = (f"model.layers.{layer}.block_sparse_moe.experts.{name}_weight" for name in ("w13", "w2"))
            due = torch.zeros(8, 512, 256), torch.zeros(8, 256, 256)
            for part, row in zip(alone[w13].split(1536, 1), (0, 256), strict=True):
                due[0][:, row : row + end - start] = part[:, start:end]
            due[1][:, :, : end - start] = alone[w2][:, :, start:end]
            for held in (own, shared):
                assert torch.equal(held[w13], due[0]) and torch.equal(held[w2], due[1])


@pytest.mark.parametrize("wk", ["fp8", "bf16"])
def test_an_indexers_parameter_of_two_tensors_is_loaded_by_the_class(
    folder: Path, tmp_path: Path, wk: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """GLM-5 on NVIDIA's GPUs: ``wk``, dequantized if it is FP8, and ``weights_proj``, from merged and own files."""
    from sglang.srt.layers.attention.dsa import dsa_indexer

    gpu = SimpleNamespace(get_num_sms=lambda: 132)
    monkeypatch.setattr(dsa_indexer, "_is_cuda", True)
    monkeypatch.setattr(dsa_indexer, "deep_gemm", gpu, raising=False)
    monkeypatch.setattr(dsa_indexer, "resolve_num_sms", gpu.get_num_sms, raising=False)  # by which 0.5.23 asks
    merged = family_mix(folder, "glm_moe_dsa", lines={} if wk == "fp8" else {"*.indexer.wk": "bf16"})
    own = Path(shutil.copytree(merged, tmp_path / "own"))
    split(own, Degree(2, 2), layout="presplit")
    with rank_of(1, 2, 2), caplog.at_level("DEBUG", "mixprec_runtime"):
        due = {key: value.data for key, value in serve(merged, load_format="safetensors").named_parameters()}
        assert sum("wk_weights_proj" in key for key in due) == 3
        for checkpoint, files in ((merged, "the weights in"), (own, "the files in")):
            held = {key: value.data for key, value in serve(checkpoint).named_parameters()}
            assert f"mixprec: read {files}" in caplog.text
            same = [torch.equal(bits(held[key]), bits(due[key])) for key in due if not key.endswith(NOT_LOADED)]
            assert same and all(same)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8) if tensor.dim() and tensor.numel() else tensor
