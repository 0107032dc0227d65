"""The table of formats that are served."""

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
from .mxfp4 import ServedMxfp4
from .nvfp4 import ServedNvfp4
from .packed import ServedPacked
from .repair import Repair
from .w4afp8 import ServedW4afp8

__all__ = ["SERVED", "model_attributes", "repairs", "served", "with_served"]


SERVED: tuple[Served[Any], ...] = (
    ServedDense(),
    ServedFp8(),
    ServedW4afp8(),
    ServedInt8(),
    ServedGptq(),
    ServedAwq(),
    ServedPacked(),
    ServedNvfp4(),
    ServedMxfp4(),
)
"""One instance for each class of the compiler's ``FORMATS``."""


@contextmanager
def with_served(one: Served[Any]) -> Iterator[None]:
    """Adds a format from outside this package while the context lasts, as ``with_format`` does in the compiler."""
    global SERVED
    before = SERVED
    SERVED = (one, *before)
    try:
        yield
    finally:
        SERVED = before


def served(fmt: Format) -> Served[Any]:
    """The entry of :data:`SERVED` for ``fmt``. Raises ``ValueError`` where there is none."""
    for one in SERVED:
        if isinstance(fmt, one.format):
            return one
    raise ValueError(f"{fmt.kind} has no file in mixprec_runtime/formats that says how SGLang serves it")


def repairs() -> list[tuple[str, Repair]]:
    """All repairs, each with the name of its format."""
    return [(one.format.name, repair) for one in SERVED for repair in one.repairs]


def model_attributes() -> dict[str, object]:
    """Attributes that layers of some format read from the config of the model."""
    return {name: value for one in SERVED for name, value in one.model_attributes.items()}
