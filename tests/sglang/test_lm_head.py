"""A quantized ``lm_head`` is loaded into SGLang's ``ParallelLMHead``, also cut for ranks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.formats import dequantize
from support.serving import LLAMA, MIXTRAL, QWEN3_MOE, Shape
from support.sglang.harness import VARIANTS, build, make, rank_of, serve, sources, tensors_of

from mixprec_build.checkpoint.degree import Degree
from mixprec_build.errors import RefusedError
from mixprec_build.output.split import split
from mixprec_runtime import launch
from mixprec_runtime.cpu import reference
from mixprec_runtime.formats.registry import served
from mixprec_runtime.native import format_of

pytestmark = pytest.mark.usefixtures("sglang")

ROWS = 512
SHAPE = LLAMA.of(layers=1, hidden=256, vocab=ROWS)
METHODS = {
    "fp8_block": "Fp8LinearMethod",
    "fp8_channel": "W8A8Fp8LinearMethod",
    "fp8_tensor": "Fp8LinearMethod",
    "int8_channel": "W8A8Int8LinearMethod",
    "int8_block": "BlockInt8LinearMethod",
    "gptq_int4": "GPTQMarlinLinearMethod",
    "gptq_int4_act": "GPTQMarlinLinearMethod",
    "gptq_int8": "GPTQMarlinLinearMethod",
    "awq_int4": "AWQLinearMethod",
    "ct_fp8_block": "Fp8LinearMethod",
    "ct_fp8_weight": "CompressedTensorsLinearMethod",
    "ct_int4": "CompressedTensorsLinearMethod",
    "ct_int4_asym": "CompressedTensorsLinearMethod",
    "ct_int4_act": "CompressedTensorsLinearMethod",
    "ct_int8": "CompressedTensorsLinearMethod",
    "nvfp4": "ModelOptNvFp4A16LinearMethod",
    "nvfp4_weights": "ModelOptNvFp4A16LinearMethod",
    "ct_nvfp4": "ModelOptNvFp4A16LinearMethod",
    # Under other producers' names, one with static activations, as ModelOpt's are.
    "fp8_block_scale": "Fp8LinearMethod",
    # With powers of two as scales
    "fp8_bytes": "Fp8LinearMethod",
    "fp8_e8m0_32": "Fp8LinearMethod",
    "fp8_static": "Fp8LinearMethod",
}
PADDED = ("fp8_block", "fp8_channel", "fp8_tensor", "int8_channel", "int8_block", "ct_fp8_block")
"""Variants whose kernels support a padded vocabulary of any size."""


def with_head(folder: Path, variant: str, shape: Shape = SHAPE) -> Path:
    """A checkpoint in which only the head is quantized, built once."""
    out = folder / f"head-{shape.vocab}-{variant}"
    if not out.exists():
        variants = METHODS if shape.vocab == ROWS else PADDED
        build(sources(folder, shape, ["bf16", *variants], head=True), {"lm_head": variant}, out)
    return out


def head_of(checkpoint: Path, **options: Any) -> Any:
    return serve(checkpoint, **options).get_submodule("lm_head")


def held(layer: Any) -> dict[str, torch.Tensor]:
    """The parameters that tensors of the checkpoint fill."""
    fmt = format_of(layer)
    empty = served(fmt).may_be_empty
    return {n: p.data for n, p in layer.named_parameters(recurse=False) if p.numel() and not empty(n, fmt)}


def meant(layer: Any) -> torch.Tensor:
    """The dequantized weight of the layer, ``[rows of this rank, hidden]``."""
    fmt = format_of(layer)
    assert fmt is not None
    reference._dequantize_linear(layer, fmt, served(fmt).as_stored)
    weight: torch.Tensor = layer.weight.data
    return weight.float()


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("variant", METHODS)
def test_each_rank_has_its_rows(folder: Path, tmp_path: Path, variant: str, tp: int) -> None:
    """Loads by SGLang's loader, from a share of the merged files, and from the rank's own files."""
    checkpoint = with_head(folder, variant)
    due = expected(checkpoint)
    own = checkpoint
    if tp > 1:
        own = Path(shutil.copytree(checkpoint, tmp_path / "own"))
        split(own, Degree(tp), layout="presplit")
    for rank in range(tp):
        with rank_of(rank, tp):
            layer = head_of(checkpoint, load_format="safetensors")
            others = [head_of(checkpoint), head_of(own)]
        assert type(layer.quant_method).__name__ == METHODS[variant]
        stock = held(layer)
        for other in map(held, others):
            assert other.keys() == stock.keys()
            assert all(torch.equal(bits(other[name]), bits(stock[name])) for name in stock)
        torch.testing.assert_close(meant(layer), due.chunk(tp)[rank], rtol=0, atol=0.01 * due.abs().max().item())


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("variant", PADDED)
def test_rows_that_pad_the_vocabulary_are_zero(folder: Path, tmp_path: Path, variant: str, tp: int) -> None:
    """SGLang pads 504 entries to 512 rows; with blocks, the last scale is of a smaller block."""
    checkpoint = with_head(folder, variant, SHAPE.of(vocab=504))
    due = torch.zeros(ROWS, SHAPE.hidden)
    due[:504] = expected(checkpoint)
    own = Path(shutil.copytree(checkpoint, tmp_path / "own"))
    split(own, Degree(tp), layout="presplit")
    for rank in range(tp):
        for files, options in ((checkpoint, {"load_format": "safetensors"}), (checkpoint, {}), (own, {})):
            with rank_of(rank, tp):
                layer = head_of(files, **options)
            torch.testing.assert_close(meant(layer), due.chunk(tp)[rank], rtol=0, atol=0.01 * due.abs().max().item())


def expected(checkpoint: Path) -> torch.Tensor:
    """The head's weight, ``[vocabulary, hidden]``, dequantized by the tests."""
    parts = (name.rpartition(".") for name in tensors_of(checkpoint))
    leaves = [leaf for module, _, leaf in parts if module == "lm_head"]
    stored = {leaf: tensors_of(checkpoint)[f"lm_head.{leaf}"] for leaf in leaves}
    return dequantize({"weight_scale_inv" if leaf == "scale" else leaf: t for leaf, t in stored.items()}).float()


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def test_a_head_that_lacks_scales_stops_the_server(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for variant, gone in (("fp8_channel", "weight_scale"), ("gptq_int4", "scales"), ("ct_fp8_block", "weight_scale")):
        out = Path(shutil.copytree(with_head(folder, variant), tmp_path / variant))
        (file,) = out.glob("*.safetensors")
        tensors = load_file(file)
        del tensors[f"lm_head.{gone}"]
        save_file(tensors, file, metadata={"format": "pt"})
        index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, file.name)}
        (out / "model.safetensors.index.json").write_text(json.dumps(index))
        for load_format in ("auto", "safetensors"):
            with pytest.raises(RuntimeError, match=rf"lm_head\.{gone}.*not in its files"):
                serve(out, load_format=load_format)


def test_a_rank_whose_rows_end_inside_a_block_is_refused(folder: Path, tmp_path: Path) -> None:
    """640 rows are five blocks, two and a half on each of two ranks."""
    checkpoint = with_head(folder, "fp8_block", SHAPE.of(vocab=640))
    with pytest.raises(Exception, match=r"a rank.s rows have 320 of its 640") as raised:
        split(Path(shutil.copytree(checkpoint, tmp_path / "own")), Degree(2))
    assert "heads cannot" not in str(raised.value)
    with rank_of(0, 2), pytest.raises(ValueError, match=r"lm_head \(fp8_block\).*\b320\b"):
        make(checkpoint)


def test_a_model_whose_class_asks_nobody_keeps_its_head(folder: Path, tmp_path: Path) -> None:
    """models/mixtral.py makes its head without quant_config."""
    shape = MIXTRAL.of(layers=1)
    paths = sources(folder, shape, ["bf16", "fp8_channel"], head=True)
    with pytest.raises(RefusedError, match=r"serves no quantized lm_head of this family.*`lm_head: from_bf16`"):
        build(paths, {"lm_head": "fp8_channel"}, tmp_path / "out")


@pytest.mark.parametrize("shape", [SHAPE, QWEN3_MOE.of(layers=1)], ids=["llama", "qwen3_moe"])
def test_flags_that_do_not_go_with_it(folder: Path, tmp_path: Path, shape: Shape) -> None:
    out = build(sources(folder, shape, ["bf16", *METHODS], head=True), {"lm_head": "fp8_channel"}, tmp_path / "out")
    with pytest.raises(RuntimeError, match=r"--enable-fp32-lm-head multiplies an lm_head in 16 bits.*fp8_channel"):
        make(out, enable_fp32_lm_head=True)
    args = SimpleNamespace(
        speculative_algorithm="EAGLE", enable_fp32_lm_head=False, enable_lora=True, lora_target_modules={"lm_head"}
    )
    found = launch.quantized_head_problems(args, "fp8_channel")
    assert [problem.split()[0] for problem in found] == ["--speculative-algorithm", "--lora-target-modules"]
    args.speculative_algorithm, args.lora_target_modules = "NGRAM", {"q_proj"}
    assert launch.quantized_head_problems(args, "fp8_channel") == []


def test_every_kind_is_here() -> None:
    """Those of the harness that differ in no more than the size of their groups are not."""
    assert {variant for variant in VARIANTS if not variant.endswith(("_g32", "_g64"))} - {"bf16"} <= METHODS.keys()
