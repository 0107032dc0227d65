"""What ``mixprec suggest`` keeps small."""

from __future__ import annotations

from enum import Enum

__all__ = ["Objective"]


class Objective(str, Enum):
    """What is added up over modules and kept small. ``f`` is the share of tokens that a module runs for: 1 for dense
    ones, an expert's share of its layer's tokens from ``--stats``, ``top_k / experts`` without.

    ============================  ===================================================================================
    ``weight``                    ``f ‖Δ‖²``. Large weights count most, whatever they are multiplied with.
    ``relative``                  ``f ‖Δ‖² / ‖W‖²``: noise to signal, if all inputs were alike.
    ``output``                    ``f Σ_k m_k ‖Δ_k‖²``: the error of the module's output, given the inputs' second
                                  moments ``m``. Modules with large outputs count most.
    ``relative-output``           ``f Σ_k m_k ‖Δ_k‖² / Σ_k m_k ‖W_k‖²``: noise to signal of the module's output.
    ============================  ===================================================================================

    For experts the signal is that of all experts of a layer together (a sum over them, weighted by ``f``), for it is
    their sum that the next layer sees: noise of an expert whose output is small is small.
    """

    WEIGHT = "weight"
    RELATIVE = "relative"
    OUTPUT = "output"
    RELATIVE_OUTPUT = "relative-output"

    @property
    def needs_moments(self) -> bool:
        return self in (Objective.OUTPUT, Objective.RELATIVE_OUTPUT)

    @property
    def relative(self) -> bool:
        return self in (Objective.RELATIVE, Objective.RELATIVE_OUTPUT)
