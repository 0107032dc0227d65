"""gpt-oss (``models/gpt_oss.py``): attention and head without a quantization config, and experts with biases.

All experts of a layer are in one tensor, in which rows of gate and up alternate; columns, in BF16, where inputs come
first. They are taken apart, and mixprec's loader fills SGLang's layers with single experts, which the class's own
cannot load.
"""

from __future__ import annotations

from .base import Family
from .parts import CutBy, ExpertActivation, Restriction, StackedExperts, StoredFormat, never_quantized

__all__ = ["GPT_OSS"]


def _only_mxfp4(fmt: StoredFormat) -> str | None:
    if fmt.kind == "mxfp4":
        return None
    return "of SGLang's classes for quantized experts with biases, mixprec serves that of MXFP4 only"


_UPS, _DOWN = ("gate_proj", "up_proj"), ("down_proj",)
_BYTES = ("U8",)

GPT_OSS = Family(
    model_types=frozenset({"gpt_oss"}),
    architectures=frozenset({"GptOssForCausalLM"}),
    restrictions=(
        never_quantized("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
        Restriction((*_UPS, *_DOWN), _only_mxfp4),
    ),
    stacked_experts=(
        StackedExperts("gate_up_proj_blocks", _UPS, interleaved=True, dtypes=_BYTES),
        StackedExperts("gate_up_proj_scales", _UPS, interleaved=True, leaf="weight_scale", dtypes=_BYTES),
        StackedExperts("gate_up_proj", _UPS, interleaved=True, transposed=True),
        StackedExperts(
            "gate_up_proj_bias",
            _UPS,
            interleaved=True,
            leaf="bias",
            together_with=("gate_up_proj_blocks", "gate_up_proj"),
        ),
        StackedExperts("down_proj_blocks", _DOWN, dtypes=_BYTES),
        StackedExperts("down_proj_scales", _DOWN, leaf="weight_scale", dtypes=_BYTES),
        StackedExperts("down_proj", _DOWN, transposed=True),
        StackedExperts("down_proj_bias", _DOWN, leaf="bias", together_with=("down_proj_blocks", "down_proj")),
    ),
    activation=ExpertActivation("swiglu_oai"),
    cuts={**Family().cuts, "sinks": CutBy.QUERY_HEADS},
    checked=True,
    can_be_cut=True,
    needs_own_loader=True,
    attention_replicas=True,
)
