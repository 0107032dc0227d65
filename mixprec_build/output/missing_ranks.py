"""What a split on many machines lacks when it is to be finished."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..checkpoint.degree import Degree
from ..checkpoint.manifest import Manifest
from ..errors import MissingRanksError
from ..text import as_word, counted, some

__all__ = ["missing_ranks"]


def missing_ranks(folder: Path, manifest: Manifest, degree: Degree, ranks: Sequence[int]) -> MissingRanksError:
    """The error of a finish that lacks ``ranks``: it says what is wrong with each, and which command cuts it."""
    layout = "" if manifest.rest is None else " --layout presplit"
    reasons = []
    for rank in ranks:
        name = degree.folder(rank)
        why = "is missing"
        if name in manifest.ranks:
            why = "is damaged"
        elif (folder / name).exists():
            why = "is not of this checkpoint and this mixprec, or is damaged"
        command = f"mixprec split {as_word(folder)} {degree.cut_options}{layout} --ranks {rank}"
        reasons.append(f"rank {rank} {why}: `{command}`")
    verb, each = ("is", "it") if len(ranks) == 1 else ("are", "each")
    return MissingRanksError(
        f"{folder}: {len(ranks)} of the {counted(degree.tp, 'rank')} of {degree} {verb} not complete; cut {each}, on "
        f"any machine, before --finish: {some(reasons, 16)}",
        ranks,
    )
