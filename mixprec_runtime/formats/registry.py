"""The formats that are served, and their repairs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mixprec_build.formats.base import Format

from .awq import ServedAwq
from .base import Served
from .dense import ServedDense
from .fp8 import ServedFp8
from .gptq import ServedGptq
from .int8 import ServedInt8
from .packed import ServedPacked
from .repair import Repair

__all__ = ["SERVED", "model_attributes", "repairs", "served", "with_served"]


SERVED: tuple[Served[Any], ...] = (
    ServedDense(),
    ServedFp8(),
    ServedInt8(),
    ServedGptq(),
    ServedAwq(),
    ServedPacked(),
)
"""One for each of the compiler's ``FORMATS``."""


@contextmanager
def with_served(one: Served[Any]) -> Iterator[None]:
    """While it lasts, a format from outside this package is served; the compiler's ``with_format`` reads it."""
    global SERVED
    before = SERVED
    SERVED = (one, *before)
    try:
        yield
    finally:
        SERVED = before


def served(fmt: Format) -> Served[Any]:
    """How SGLang serves a format. Raises ``ValueError`` for one that nothing here serves."""
    for one in SERVED:
        if isinstance(fmt, one.format):
            return one
    raise ValueError(f"{fmt.kind} has no file in mixprec_runtime/formats that says how SGLang serves it")


def repairs() -> list[tuple[str, Repair]]:
    """Every repair with the name of its format."""
    return [(one.format.name, repair) for one in SERVED for repair in one.repairs]


def model_attributes() -> dict[str, object]:
    """What SGLang reads off the whole model's config in layers of any format."""
    return {name: value for one in SERVED for name, value in one.model_attributes.items()}
