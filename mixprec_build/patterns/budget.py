"""Bounds the CPU time that untrusted patterns may take."""

from __future__ import annotations

from time import thread_time

from .pattern import PatternError

__all__ = ["MatchBudget"]


class MatchBudget:
    """CPU time that matching may take in all, where patterns and names are untrusted: ``with budget: ...``.

    Many thousands of names against a few patterns take a tenth of a second.
    """

    SECONDS = 20.0

    def __init__(self) -> None:
        self._spent = self._began = 0.0

    def __enter__(self) -> None:
        """Raises :class:`PatternError` once the time is spent."""
        if self._spent > self.SECONDS:
            raise PatternError(f"takes more than {self.SECONDS:.0f} seconds to match")
        self._began = thread_time()

    def __exit__(self, *_: object) -> None:
        self._spent += thread_time() - self._began
