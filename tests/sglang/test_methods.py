"""Each layer of SGLang's own models gets SGLang's own method for the format that the checkpoint declares."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.serving import QWEN3_MOE
from support.sglang.harness import build, groups_of, make, parameters_of, rank_of, serve, sources
from support.sglang.mixes import ALL, FLOATS, MIXES, Expected, mix

pytestmark = pytest.mark.usefixtures("sglang")

COMPRESSED = ("ct_fp8_weight", "ct_int4", "ct_int4_g32", "ct_int4_asym", "ct_int4_act", "ct_int8")
LINEAR = {
    "bf16": "UnquantizedLinearMethod",
    "fp8_block": "Fp8LinearMethod",
    "fp8_channel": "W8A8Fp8LinearMethod",
    "fp8_tensor": "Fp8LinearMethod",
    "int8_channel": "W8A8Int8LinearMethod",
    "int8_block": "BlockInt8LinearMethod",
    "gptq_int4": "GPTQMarlinLinearMethod",
    "gptq_int4_act": "GPTQMarlinLinearMethod",
    "gptq_int4_g64": "GPTQMarlinLinearMethod",
    "gptq_int8": "GPTQMarlinLinearMethod",
    "awq_int4": "AWQLinearMethod",
    "awq_int4_g64": "AWQLinearMethod",
    "ct_fp8_block": "Fp8LinearMethod",
    **dict.fromkeys(COMPRESSED, "CompressedTensorsLinearMethod"),
}
EXPERTS = {
    "bf16": "UnquantizedFusedMoEMethod",
    "fp8_block": "Fp8MoEMethod",
    "fp8_channel": "W8A8FP8MoEMethod",
    "fp8_tensor": "Fp8MoEMethod",
    "int8_channel": "W8A8Int8MoEMethod",
    "int8_block": "BlockInt8MoEMethod",
    "gptq_int4": "GPTQMarlinMoEMethod",
    "gptq_int4_g64": "GPTQMarlinMoEMethod",
    "gptq_int8": "GPTQMarlinMoEMethod",
    "awq_int4": "AWQMoEMethod",
    "awq_int4_g64": "AWQMoEMethod",
    **dict.fromkeys(COMPRESSED, "CompressedTensorsFusedMoEMethod"),
    **dict.fromkeys(("mxfp4", "ct_mxfp4", "deepseek_mxfp4"), "Mxfp4MarlinMoEMethod"),
}


@pytest.mark.parametrize(("tp", "ep"), [(1, 1), (2, 1), (4, 2)])
@pytest.mark.parametrize("name", [*MIXES, *FLOATS])
def test_every_layer_is_of_the_class_and_shape_of_its_format(folder: Path, name: str, tp: int, ep: int) -> None:
    from sglang.srt.layers.linear import LinearBase
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.layers.vocab_parallel_embedding import VocabParallelEmbedding

    with rank_of(tp - 1, tp, ep):
        model, _ = make(mix(folder, name))
    expected = Expected(folder, ALL[name], tp - 1, tp, ep)
    seen = set()
    for path, module in model.named_modules():
        method = type(getattr(module, "quant_method", None)).__name__
        seen.add(method)
        if isinstance(module, LinearBase):
            assert method == LINEAR[expected.variant(expected.parts(path)[0])], path
            alike(path, module, expected.linear(path))
        elif path.endswith(".experts"):
            groups = expected.groups(path)
            mixed = len(expected.groups(path, everywhere=True)) > 1
            assert (method == "MixedExpertsMethod") == mixed, path
            for layer, (variant, ups, downs) in zip(groups_of(module), groups, strict=True):
                assert type(layer.quant_method).__name__ == EXPERTS[variant], path
                alike(path, layer, expected.experts(path, ups, downs))
        elif isinstance(module, VocabParallelEmbedding):
            assert method == "UnquantizedEmbeddingMethod", path
            alike(path, module, {"weight": expected.plain(f"{path}.weight")})
        elif isinstance(module, RadixAttention):
            assert method == "NoneType", path
    assert seen >= {LINEAR[v] for line, v in ALL[name][1].items() if "experts" not in line}


@pytest.mark.parametrize("variant", ["gptq_int4_g64", "awq_int4_g64", "ct_int4_g32", "mxfp4"])
def test_experts_are_chosen_by_the_columns_that_they_will_have(folder: Path, tmp_path: Path, variant: str) -> None:
    """Of 192 columns a rank of two has 96, which Marlin does not take, and 32 of zeros."""
    shape = QWEN3_MOE.of(hidden=256, expert_intermediate=192, layers=1)
    paths = sources(folder, shape, ["bf16", variant])
    out = build(paths, {"model.layers.*.mlp.experts.*": variant}, tmp_path / "out")
    with rank_of(1, 2):
        experts = serve(out).get_submodule("model.layers.0.mlp.experts")
    assert type(experts.quant_method).__name__ == EXPERTS[variant]
    assert experts.intermediate_size_per_partition == 128


def alike(path: str, layer: torch.nn.Module, expected: dict[str, torch.Tensor]) -> None:
    """Names, shapes and dtypes. SGLang makes Marlin's scales in the model's dtype."""
    made = {name: (tuple(p.shape), p.dtype) for name, p in parameters_of(layer).items() if "sort_indices" not in name}
    assert made == {
        name: (tuple(t.shape), torch.bfloat16 if name.endswith("scales") else t.dtype) for name, t in expected.items()
    }, path
