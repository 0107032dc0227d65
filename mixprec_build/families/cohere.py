"""Command-R and Command-A (``models/commandr.py``): attention and MLP in parallel, after one norm.

Norms of q and k, where there are any, have a row for each head, and are cut with these.
"""

from __future__ import annotations

from .base import Family
from .parts import CutBy

__all__ = ["COHERE"]

COHERE = Family(
    model_types=frozenset({"cohere", "cohere2"}),
    architectures=frozenset({"CohereForCausalLM", "Cohere2ForCausalLM"}),
    checked=True,
    can_be_cut=True,
    cuts={**Family().cuts, "q_norm": CutBy.QUERY_HEADS, "k_norm": CutBy.KEY_VALUE_HEADS},
)
