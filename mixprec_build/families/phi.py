"""Phi-3 and Phi-4 (``Phi3ForCausalLM`` in ``models/llama.py``): ``qkv_proj`` and ``gate_up_proj`` joined on disk.

Phi-3.5-MoE (``models/phimoe.py``): Mixtral's experts, norms and linears with biases.
"""

from __future__ import annotations

from .base import Family
from .parts import CutBy

__all__ = ["PHI3", "PHIMOE"]

PHI3 = Family(
    model_types=frozenset({"phi3"}),
    architectures=frozenset({"Phi3ForCausalLM"}),
    checked=True,
    can_be_cut=True,
    cuts={**Family().cuts, "qkv_proj": CutBy.QKV_SECTIONS, "gate_up_proj": CutBy.GATE_AND_UP},
    attention_inputs=frozenset({"qkv_proj"}),
    quantized_head=True,
)

PHIMOE = Family(
    model_types=frozenset({"phimoe"}),
    architectures=frozenset({"PhiMoEForCausalLM"}),
    checked=True,
    can_be_cut=True,
    quantized_head=True,
)
