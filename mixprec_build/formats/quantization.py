"""The ``quantization_config`` of one checkpoint, as formats read it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

__all__ = ["Quantization"]

T = TypeVar("T")


class Quantization(Mapping[str, object]):
    """A checkpoint's declaration of its quantization, with what formats derive from it once for all modules.

    Not for several threads.
    """

    def __init__(self, declared: Mapping[str, object]):
        self._declared = declared
        self._derived: dict[object, Any] = {}

    @classmethod
    def of(cls, declared: Mapping[str, object]) -> Quantization:
        """``declared`` as a :class:`Quantization`, itself if it is one."""
        return declared if isinstance(declared, cls) else cls(declared)

    def derive(self, make: Callable[[Quantization], T]) -> T:
        """``make(self)``, computed on the first call and cached; an exception is raised on every call."""
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
