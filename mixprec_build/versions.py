"""The version of mixprec, and the releases of SGLang that its checkpoints are served with."""

from __future__ import annotations

__all__ = ["INSTALL", "NEWEST", "OLDEST", "__version__", "version_problem"]


__version__ = "0.1.0"

OLDEST, NEWEST = "0.5.15.post1", "0.5.23"
INSTALL = f"pip install 'sglang>={OLDEST},<={NEWEST}'"


def version_problem(version: str) -> str | None:
    """Returns a message if this version of SGLang is not supported, else None."""
    from packaging.version import Version

    if Version(OLDEST) <= Version(version) <= Version(NEWEST):
        return None
    return (
        f"mixprec {__version__} serves with SGLang {OLDEST} to {NEWEST}, and this is SGLang {version}. "
        f"Install one that fits: {INSTALL}"
    )
