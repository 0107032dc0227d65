"""ERNIE-4.5 (``models/ernie4.py``): dense layers first, shared experts, biases of routers in ``moe_statics``."""

from __future__ import annotations

from .base import Family
from .draft_class import DraftClass
from .draft_layers import ERNIE_MTP

__all__ = ["ERNIE"]

ERNIE = Family(
    model_types=frozenset({"ernie4_5", "ernie4_5_moe"}),
    architectures=frozenset({"Ernie4_5_ForCausalLM", "Ernie4_5_MoeForCausalLM"}),
    shared_experts=("shared_experts",),
    checked=True,
    draft_layout=ERNIE_MTP,
    draft_class=DraftClass(
        ("Ernie4_5_MoeForCausalLMMTP",),
        renamed=tuple(
            (f"model.{name}.0.", f"model.{name}.")
            for name in ("mtp_block", "mtp_emb_norm", "mtp_hidden_norm", "mtp_linear_proj")
        ),
        needs_tensors=True,
    ),
    can_be_cut=True,
    quantized_head=True,
    inner=(("moe_statics", "gate"),),
)
