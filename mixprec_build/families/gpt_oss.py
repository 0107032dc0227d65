"""gpt-oss (``models/gpt_oss.py``): attention without a quantization config, and experts with biases.

All experts of a layer are in one tensor, in which columns of gate and up alternate.
"""

from __future__ import annotations

from .base import Family
from .parts import never_quantized

__all__ = ["GPT_OSS"]

GPT_OSS = Family(
    model_types=frozenset({"gpt_oss"}),
    architectures=frozenset({"GptOssForCausalLM"}),
    restrictions=(never_quantized("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),),
)
