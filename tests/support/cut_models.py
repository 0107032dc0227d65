"""A model that several tests cut for ranks, with sizes that are no multiples of blocks."""

from __future__ import annotations

from support.serving import QWEN3_MOE

__all__ = ["LINES", "MOE", "SIZES", "VARIANTS"]

# 384 columns are 192 on each of two ranks, one and a half blocks.
SIZES = {"hidden": 256, "intermediate": 768, "expert_intermediate": 384, "heads": 4, "kv_heads": 2, "head_dim": 128}
MOE = QWEN3_MOE.of(**SIZES, layers=2, vocab=100)
VARIANTS = ["bf16", "fp8_block", "fp8_channel", "gptq_int4", "gptq_int8"]
LINES = {
    "model.layers.*.self_attn.*": "fp8_block",
    "model.layers.0.mlp.experts.*": "gptq_int4",
    "model.layers.0.mlp.experts.{0..2}.*": "fp8_block",
    "model.layers.0.mlp.experts.3.*": "bf16",
    "model.layers.1.mlp.experts.*": "fp8_channel",
    "model.layers.1.mlp.experts.{1,6}.*": "gptq_int8",
}
