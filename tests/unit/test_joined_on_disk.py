"""Linears that a checkpoint stores as one, as Phi-3 does q, k and v, and gate and up: cut for ranks part by part."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support import formats
from support.families import TINY, tensors_of

from mixprec_build.checkpoint.degree import Degree
from mixprec_build.checkpoint.typed import open_source
from mixprec_build.errors import SplitError
from mixprec_build.ranks.merged import splitter_of
from mixprec_build.ranks.pieces import Parameter
from mixprec_build.ranks.splitter import Splitter

# q has 512 rows, k and v 256 each, and gate and up 768 each.
SIZES = {"hidden_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 768}
QKV, GATE_UP = "model.layers.0.self_attn.qkv_proj.weight", "model.layers.0.mlp.gate_up_proj.weight"


def splitter(folder: Path, tp: int, declared: dict[str, Any] | None = None, **sizes: int) -> Splitter:
    """The cut of a model of one layer in blocks of FP8; ``declared`` changes its ``config.json`` alone."""
    config = {**TINY["phi3"].config, **SIZES, **sizes, "num_hidden_layers": 1}
    tensors: dict[str, torch.Tensor] = {}
    for tensor in tensors_of(config):
        module = tensor.name.removesuffix(".weight")
        value = torch.zeros(tensor.shape)
        parts = formats.fp8_block(value) if tensor.linear else {"weight": value.bfloat16()}
        tensors |= {f"{module}.{leaf}": part for leaf, part in parts.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config |= {"quantization_config": formats.fp8_config(), **(declared or {})}
    (folder / "config.json").write_text(json.dumps(config))
    return splitter_of(open_source(str(folder)), Degree(tp))


def parameters(cut: Splitter, rank: int) -> dict[str, Parameter]:
    return {parameter.name: parameter for parameter in cut.parameters(rank)}


def rows(parameter: Parameter) -> list[tuple[tuple[int, int], int]]:
    """Stored rows, and where they begin in the parameter."""
    return [(band.down, band.top) for band in parameter.bands()]


def test_a_rank_has_its_heads_of_each_part(tmp_path: Path) -> None:
    cut = splitter(tmp_path, 2)
    second = parameters(cut, 1)
    assert rows(second[QKV]) == [((256, 512), 0), ((640, 768), 256), ((896, 1024), 384)]
    assert rows(second[f"{QKV}_scale_inv"]) == [((2, 4), 0), ((5, 6), 2), ((7, 8), 3)]
    assert rows(second[GATE_UP]) == [((384, 768), 0), ((1152, 1536), 384)]
    assert not cut.padded


def test_ranks_share_key_value_heads_and_are_filled_up(tmp_path: Path) -> None:
    cut = splitter(tmp_path, 4)
    third, last = parameters(cut, 2), parameters(cut, 3)
    assert rows(third[QKV]) == [((256, 384), 0), ((640, 768), 128), ((896, 1024), 256)]
    assert rows(third[QKV])[1:] == rows(last[QKV])[1:]
    # 192 columns of each of gate and up are 256 with zeros, and three ranks have all 768.
    assert {share.columns for share in cut.padded.values()} == {256}
    assert rows(third[GATE_UP]) == [((512, 768), 0), ((1280, 1536), 256)]
    assert rows(last[GATE_UP]) == [] and last[GATE_UP].shape == (512, 512)


def test_one_rank_has_all_in_one_piece(tmp_path: Path) -> None:
    first = parameters(splitter(tmp_path, 1), 0)
    assert rows(first[QKV]) == [((0, 1024), 0)] and rows(first[GATE_UP]) == [((0, 1536), 0)]


@pytest.mark.parametrize(
    ("sizes", "declared", "message"),
    [
        (
            {"intermediate_size": 320},
            {},
            r"gate_up_proj \(fp8_block\): a part of its rows begins at 320, inside of a block of 128",
        ),
        (
            {"hidden_size": 256, "num_key_value_heads": 1},
            {},
            r"qkv_proj \(fp8_block\): a part of its rows begins at 320, inside of a block of 128",
        ),
        ({}, {"num_key_value_heads": 3}, "1024 rows are not those of the heads in config.json"),
        (
            {},
            {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
            "is stored as one, and how ranks share it is not known for llama",
        ),
    ],
)
def test_parts_that_cannot_be_cut_are_named(
    tmp_path: Path, sizes: dict[str, int], declared: dict[str, Any], message: str
) -> None:
    with pytest.raises(SplitError, match=message):
        cut = splitter(tmp_path, 2, declared, **sizes)
        cut.parameters(0)
