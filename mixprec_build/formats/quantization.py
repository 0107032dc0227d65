"""The ``quantization_config`` of one checkpoint, as formats read it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

__all__ = ["Quantization"]

T = TypeVar("T")


class Quantization(Mapping[str, object]):
    """What a checkpoint declares of its quantization, and what formats work out from it once for all modules.

    One value belongs to one checkpoint, whose modules are looked up one after another, by one thread.
    """

    def __init__(self, declared: Mapping[str, object]):
        self._declared = declared
        self._derived: dict[object, Any] = {}

    @classmethod
    def of(cls, declared: Mapping[str, object]) -> Quantization:
        """``declared`` itself where it is one already."""
        return declared if isinstance(declared, cls) else cls(declared)

    def derive(self, make: Callable[[Quantization], T]) -> T:
        """``make(self)``, made on the first call and kept. What ``make`` raises is raised on every call."""
        if make not in self._derived:
            self._derived[make] = make(self)
        found: T = self._derived[make]
        return found

    def __getitem__(self, key: str) -> object:
        return self._declared[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._declared)

    def __len__(self) -> int:
        return len(self._declared)
