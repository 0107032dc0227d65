"""A suggestion as plain data, for ``--json``."""

from __future__ import annotations

from typing import Any

import numpy as np

from .allocate import Suggestion

__all__ = ["suggestion_facts"]


_POINTS = 13
"""Number of points of the frontier to show."""


def suggestion_facts(suggestion: Suggestion) -> dict[str, Any]:
    """The data that ``mixprec suggest --json`` prints. Losses are in the objective's unit.

    Bytes are those of files, except that those of ``sources`` are of the tensors chosen.
    """
    sources: dict[str, dict[str, Any]] = {}
    for group, option in suggestion.picked():
        entry = sources.setdefault(option.source, {"groups": 0, "modules": 0, "bytes": 0, "loss": 0.0})
        entry["groups"] += 1
        entry["modules"] += len(group.members)
        entry["bytes"] += option.nbytes
        entry["loss"] += option.loss
    line = suggestion.frontier
    at = np.linspace(line.cost[0], line.cost[-1], _POINTS)
    corners = sorted({int(np.abs(line.cost - cost).argmin()) for cost in at})
    return {
        "budget": suggestion.request.budget,
        "bytes": suggestion.nbytes,
        "objective": suggestion.objective.value,
        "exponent": suggestion.exponent,
        "loss": suggestion.solution.loss,
        "bound": suggestion.solution.bound,
        "gap": suggestion.solution.gap,
        "choices": sum(len(group.allowed) for group in suggestion.groups),
        "groups": len(suggestion.groups),
        "sources": [{"name": name, **entry} for name, entry in sources.items()],
        "uniform": [
            {"source": u.source, "bytes": u.nbytes, "loss": u.loss, "elsewhere": u.elsewhere}
            for u in suggestion.uniform
        ],
        "frontier": [{"bytes": int(line.cost[i]), "loss": float(line.loss[i])} for i in corners],
        "notes": [*suggestion.notes, *suggestion.plan.notes],
    }
