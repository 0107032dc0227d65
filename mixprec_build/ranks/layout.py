"""Tells entries that mixprec writes in a checkpoint's folder ``presplit`` from all others."""

from __future__ import annotations

import re

from ..checkpoint.checkpoint import REST
from ..checkpoint.degree import Degree
from ..storage.owned import Entry

__all__ = ["PRESPLIT", "RANK_FILE", "RESTORED", "SPLIT_LOCK", "beside_rank", "is_degree_folder", "is_ours"]


PRESPLIT = "presplit"
RESTORED = f"{PRESPLIT}/.merged.part"
"""The folder of merged files that are being restored, until all are complete."""
SPLIT_LOCK = f"{PRESPLIT}/.lock"
"""The lock of a split that may change all of the checkpoint. One that cuts some ranks only has a lock for each."""
RANK_FILE = re.compile(r"index\.json|model-\d{5,}-of-\d{5,}\.safetensors")
_RANK = re.compile(r"(rank-\d+-of-\d+)|\.(rank-\d+-of-\d+)\.part")
_LOCK = re.compile(r"\.(rank-\d+-of-\d+)\.lock")
_REST = {REST, f"{PRESPLIT}/.rest.part", RESTORED}


def is_ours(entry: Entry) -> bool:
    """Whether an entry is the folder ``presplit``, or has a name and kind that a build or split uses in it.

    These are regular files in folders, as ``presplit/tp2-ep1/rank-0-of-2/model-00001-of-00001.safetensors``, and locks.
    """
    parts = entry.name.split("/")
    if parts[0] != PRESPLIT or len(parts) > 4:
        return False
    if len(parts) == 1 or entry.name in _REST or (len(parts) == 2 and is_degree_folder(parts[1])):
        return entry.is_folder
    if entry.name == SPLIT_LOCK:
        return entry.is_file
    parent = "/".join(parts[:-1])
    if len(parts) == 3 and parent not in _REST:
        pattern = _RANK if entry.is_folder else _LOCK
        return (entry.is_folder or entry.is_file) and _is_of_rank(pattern, parts[1], parts[2])
    in_folder = parent in _REST or (len(parts) == 4 and _is_of_rank(_RANK, parts[1], parts[2]))
    return in_folder and entry.is_file and RANK_FILE.fullmatch(parts[-1]) is not None


def beside_rank(name: str, suffix: str) -> str:
    """The entry beside a rank's folder that is its ``part``, as which it is written, or its ``lock``."""
    parent, _, last = name.rpartition("/")
    return f"{parent}/.{last}.{suffix}"


def is_degree_folder(name: str) -> bool:
    """Whether a folder's name is that of a degree, as ``"tp4-ep1"``."""
    return _degree(name) is not None


def _degree(name: str) -> Degree | None:
    try:
        return Degree.parse(name)
    except ValueError:
        return None


def _is_of_rank(pattern: re.Pattern[str], degree: str, name: str) -> bool:
    """Whether a name that ``pattern`` matches, with the rank in one of its groups, is of a rank of this degree."""
    match, parsed = pattern.fullmatch(name), _degree(degree)
    if match is None or parsed is None:
        return False
    rank = next(filter(None, match.groups()))
    number = int(rank.split("-")[1])
    return number < parsed.tp and parsed.folder(number) == f"{PRESPLIT}/{degree}/{rank}"
