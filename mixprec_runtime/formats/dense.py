"""BF16, FP16 and FP32: SGLang's layers make their own method."""

from __future__ import annotations

from typing import ClassVar

from mixprec_build.formats.base import Format
from mixprec_build.formats.dense import Dense

from .base import Served

__all__ = ["ServedDense"]


class ServedDense(Served[Dense]):
    format: ClassVar[type[Format]] = Dense

    def sglang_config(self, fmt: Dense) -> None:
        return None
