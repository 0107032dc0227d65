"""The SGLang releases that compiled checkpoints are served with."""

from __future__ import annotations

from packaging.version import Version

from . import __version__

__all__ = ["INSTALL", "NEWEST", "OLDEST", "version_problem"]


OLDEST, NEWEST = Version("0.5.15.post1"), Version("0.5.23")
INSTALL = f"pip install 'sglang>={OLDEST},<={NEWEST}'"


def version_problem(version: str) -> str | None:
    """Why this SGLang does not fit; None if it does."""
    if OLDEST <= Version(version) <= NEWEST:
        return None
    return (
        f"mixprec {__version__} serves with SGLang {OLDEST} to {NEWEST}, and this is SGLang {version}. "
        f"Install one that fits: {INSTALL}"
    )
