"""Granite (``models/granite.py``): the common rules. Granite with experts (``models/granitemoe.py``): Mixtral's names,
and in releases all experts of a layer in one tensor beside the router.
"""

from __future__ import annotations

from .base import Family
from .parts import StackedExperts

__all__ = ["GRANITE", "GRANITE_MOE"]

GRANITE = Family(
    model_types=frozenset({"granite"}),
    architectures=frozenset({"GraniteForCausalLM"}),
    checked=True,
    can_be_cut=True,
    quantized_head=True,
)

GRANITE_MOE = Family(
    model_types=frozenset({"granitemoe"}),
    architectures=frozenset({"GraniteMoeForCausalLM"}),
    inner=(("router.layer", "gate"),),
    routers=frozenset({"gate", "router.layer"}),
    stacked_experts=(
        StackedExperts("input_linear.weight", ("w1", "w3"), beside=True),
        StackedExperts("output_linear.weight", ("w2",), beside=True),
    ),
    checked=True,
    can_be_cut=True,
    quantized_head=True,
)
