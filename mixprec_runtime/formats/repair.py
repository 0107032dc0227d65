"""Repairs of stock SGLang's mistakes with a format, as data, and the function that installs them.

A repair wraps calls of one instance of a method; SGLang's classes stay unchanged. Each is inert with a later SGLang
that is correct. Files and lines are those of SGLang 0.5.17, below ``python/sglang``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from sglang.srt.layers.quantization.base_config import QuantizeMethodBase

from mixprec_build.formats.base import Format

__all__ = ["ADVICE", "Call", "Repair", "install"]


ADVICE = "Serve with fewer tensor-parallel ranks, or build the checkpoint with another format for this module."
_UPSTREAM = "https://github.com/sgl-project/sglang/blob/v0.5.17/python/sglang/"


@dataclass(frozen=True, slots=True)
class Call:
    """The call of a method that a repair wraps."""

    stock: Callable[..., Any]
    """The method's function before this repair; takes the repair's arguments without ``call``."""
    fmt: Any
    """The layer's format."""
    method: QuantizeMethodBase


Around = Callable[..., Any]
"""``(call, layer, ...)``: runs instead of ``call.stock(layer, ...)``."""


@dataclass(frozen=True, slots=True)
class Repair:
    """One mistake or unclear error of stock SGLang, and how it is repaired."""

    name: str
    why: str
    where: str
    """File and line in SGLang: ``srt/layers/quantization/fp8.py:478``."""
    layer: str
    """``linear`` or ``experts``."""
    applies: Callable[[Any], bool] = lambda fmt: True
    """Whether a layer in this format needs the repair."""
    since: str = ""
    """The first release that needs it; empty where all supported ones do."""
    until: str = ""
    """The first release known not to need it; empty where none is known."""
    check: Callable[[Any, Any, list[int], int, tuple[int, int]], None] | None = None
    """Called before a linear's ``create_weights``, with the format, the layer, the outputs of each module on this rank,
    the inputs on this rank, and ``(N, K)`` of the uncut weight. Raises ``ValueError``."""
    create: Around | None = None
    """Around ``create_weights``."""
    process: Around | None = None
    """Around ``process_weights_after_loading``."""
    runner: Around | None = None
    """Around ``create_moe_runner``."""
    run: Around | None = None
    """Around ``apply``."""

    @property
    def upstream(self) -> str:
        """The URL of :attr:`where` at GitHub."""
        file, _, line = self.where.partition(":")
        return f"{_UPSTREAM}{file}{f'#L{line}' if line else ''}"


def install(method: QuantizeMethodBase, fmt: Format, repairs: Iterable[Repair], layer: str, prefix: str) -> None:
    """Installs the repairs for ``layer`` (``linear`` or ``experts``) that apply to ``fmt``; the last is outermost."""
    for repair in repairs:
        if repair.layer == layer and repair.applies(fmt):
            if repair.check is not None:
                _check_first(method, fmt, repair.check)
            for name, around in (
                ("create_weights", repair.create),
                ("process_weights_after_loading", repair.process),
                ("create_moe_runner", repair.runner),
                ("apply", repair.run),
            ):
                if around is not None:
                    _wrap(method, name, fmt, around)
    _name_errors(method, fmt, prefix)


def _wrap(method: QuantizeMethodBase, name: str, fmt: Format, around: Around) -> None:
    call = Call(getattr(method, name), fmt, method)

    def wrapped(layer: Any, *args: Any, **kwargs: Any) -> Any:
        return around(call, layer, *args, **kwargs)

    setattr(method, name, wrapped)


def _check_first(
    method: QuantizeMethodBase, fmt: Format, check: Callable[[Any, Any, list[int], int, tuple[int, int]], None]
) -> None:
    create = method.create_weights

    # Named as SGLang names them: ReplicatedLinear passes them by position, other layers by name.
    def create_weights(
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        check(fmt, layer, output_partition_sizes, input_size_per_partition, (output_size, input_size))
        create(layer, input_size_per_partition, output_partition_sizes, input_size, output_size, *args, **kwargs)

    method.create_weights = create_weights


def _name_errors(method: QuantizeMethodBase, fmt: Format, prefix: str) -> None:
    """Adds the layer's name and advice to errors of ``create_weights``."""
    create = method.create_weights

    def create_weights(layer: Any, *args: Any, **kwargs: Any) -> None:
        try:
            create(layer, *args, **kwargs)
        except (ValueError, AssertionError) as error:
            raise ValueError(f"{prefix} ({fmt.kind}): {error} {ADVICE}") from error

    method.create_weights = create_weights
