"""Where stock SGLang is wrong about a format it has, as data; one function installs what a method needs.

A repair wraps calls of one method's instance: SGLang's classes stay as they are. Each is inert where a later SGLang
does the right thing by itself. Line numbers are those of SGLang 0.5.17, below ``python/sglang``.
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
    """One of SGLang's calls that a repair goes around."""

    stock: Callable[..., Any]
    """The call as it was; takes the arguments that the repair gets."""
    fmt: Any
    """The layer's format."""
    method: QuantizeMethodBase


Around = Callable[..., Any]
"""``(call, layer, ...)``: runs instead of ``call.stock(layer, ...)``."""


@dataclass(frozen=True, slots=True)
class Repair:
    """One thing that stock SGLang does wrong, or says badly."""

    name: str
    why: str
    where: str
    """File and line in SGLang: ``srt/layers/quantization/fp8.py:478``."""
    layer: str
    """``linear`` or ``experts``."""
    applies: Callable[[Any], bool] = lambda fmt: True
    """Whether a format needs it."""
    since: str = ""
    """The first release that needs it; empty for all that are supported."""
    until: str = ""
    """The first release that is known not to need it any more; empty where none is."""
    check: Callable[[Any, Any, list[int], int, tuple[int, int]], None] | None = None
    """Runs before a linear's weights are made: takes the format, the layer, the outputs of each part and the inputs on
    this rank, and ``(N, K)`` of the whole. Raises ``ValueError``."""
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
        """A link to the place."""
        file, _, line = self.where.partition(":")
        return f"{_UPSTREAM}{file}{f'#L{line}' if line else ''}"


def install(method: QuantizeMethodBase, fmt: Format, repairs: Iterable[Repair], layer: str, prefix: str) -> None:
    """Puts the repairs of ``layer``, ``linear`` or ``experts``, around a method's calls, the last one outermost."""
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

    # ReplicatedLinear gives the sizes by position, the others by name.
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
    """SGLang's complaints about shapes do not say which layer they are about, nor what to do."""
    create = method.create_weights

    def create_weights(layer: Any, *args: Any, **kwargs: Any) -> None:
        try:
            create(layer, *args, **kwargs)
        except (ValueError, AssertionError) as error:
            raise ValueError(f"{prefix} ({fmt.kind}): {error} {ADVICE}") from error

    method.create_weights = create_weights
