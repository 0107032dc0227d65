"""Degrees of parallelism that a checkpoint is cut for, and the folders of its ranks."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..errors import SplitError

__all__ = ["Degree", "parse_folder", "rank_of"]


@dataclass(frozen=True, slots=True)
class Degree:
    """``tp`` ranks in all, of which groups of ``tp / ep`` share each expert and groups of ``tp / dp`` the attention."""

    tp: int
    ep: int = 1
    dp: int = 1
    """Replicas of attention, each of which takes requests of its own (``--enable-dp-attention``)."""

    def __post_init__(self) -> None:
        for name, parts in (("ep", self.ep), ("dp", self.dp)):
            if self.tp < 1 or parts < 1 or self.tp % parts:
                raise SplitError(f"tp {self.tp} and {name} {parts}: tp must be a multiple of {name}")

    def __str__(self) -> str:
        return f"tp{self.tp}-ep{self.ep}" + (f"-dp{self.dp}" if self.dp > 1 else "")

    @classmethod
    def parse(cls, text: str) -> Degree:
        """Inverse of ``str``. Raises :class:`ValueError` for any other text."""
        found = re.fullmatch(r"tp(\d{1,6})-ep(\d{1,6})(?:-dp(\d{1,6}))?", text, re.ASCII)
        if not found:
            raise ValueError(f"{text!r} is no degree")
        try:
            degree = cls(*(int(number or 1) for number in found.groups()))
        except SplitError as error:
            raise ValueError(str(error)) from error
        if str(degree) != text:
            raise ValueError(f"{text!r} is {degree}")
        return degree

    @property
    def moe_tp(self) -> int:
        """The number of ranks that share an expert."""
        return self.tp // self.ep

    @property
    def attention_tp(self) -> int:
        """The number of ranks that share a replica of attention."""
        return self.tp // self.dp

    @property
    def cut_options(self) -> str:
        """The options to cut a checkpoint with."""
        parts = (("tp", self.tp), ("ep", self.ep), ("dp", self.dp))
        return " ".join(f"--{name} {number}" for name, number in parts if name == "tp" or number > 1)

    @property
    def options(self) -> str:
        """The options to start SGLang with."""
        experts = f" --ep-size {self.ep}" if self.ep > 1 else ""
        attention = f" --dp {self.dp} --enable-dp-attention" if self.dp > 1 else ""
        return f"--tp {self.tp}{experts}{attention}"

    def folder(self, rank: int) -> str:
        """The folder of a rank's files in a checkpoint."""
        return f"presplit/{self}/rank-{rank}-of-{self.tp}"


def rank_of(name: str) -> tuple[Degree, int]:
    """The degree and rank of a folder that a manifest lists. Raises :class:`ValueError` for any other name."""
    found = parse_folder(name)
    if found is None:
        raise ValueError(f"{name!r:.200} is no name of a rank's folder")
    return found


def parse_folder(name: str) -> tuple[Degree, int] | None:
    """``"presplit/tp4-ep1/rank-0-of-4"`` -> its degree and rank; None for any other name."""
    try:
        _, degree, rank = name.split("/")
        found = Degree.parse(degree)
        number = int(rank.split("-")[1])
    except (ValueError, IndexError):
        return None
    return (found, number) if number < found.tp and found.folder(number) == name else None
