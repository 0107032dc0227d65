"""The loss that ``mixprec suggest`` minimizes."""

from __future__ import annotations

from enum import Enum

__all__ = ["Objective"]


class Objective(str, Enum):
    """The loss of a module; the sum over modules is minimized.

    ``f`` is the share of tokens that a module runs for: 1 for a dense one; for an expert its share of the layer's
    tokens from ``--stats``, or ``top_k / experts`` without.

    ============================  ===================================================================================
    ``weight``                    ``f ‖Δ‖²``. Large weights count most, whatever they are multiplied with.
    ``relative``                  ``f ‖Δ‖² / ‖W‖²``: noise to signal, if all inputs were alike.
    ``output``                    ``f Σ_k m_k ‖Δ_k‖²``: the error of the module's output, given the inputs' second
                                  moments ``m``. Modules with large outputs count most.
    ``relative-output``           ``f Σ_k m_k ‖Δ_k‖² / Σ_k m_k ‖W_k‖²``: noise to signal of the module's output.
    ``measured``                  What the whole model loses, in powers of nats a token, by swaps that were measured
                                  (:mod:`.measured`), shared out by ``relative-output`` with moments, else ``relative``.
    ============================  ===================================================================================

    For experts the divisor is summed over all experts of a layer, weighted by ``f``, because the next layer sees the
    sum of their outputs.
    """

    WEIGHT = "weight"
    RELATIVE = "relative"
    OUTPUT = "output"
    RELATIVE_OUTPUT = "relative-output"
    MEASURED = "measured"

    @property
    def needs_moments(self) -> bool:
        return self in (Objective.OUTPUT, Objective.RELATIVE_OUTPUT)

    @property
    def relative(self) -> bool:
        return self in (Objective.RELATIVE, Objective.RELATIVE_OUTPUT)
