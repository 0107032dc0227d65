"""Repairs of stock SGLang's mistakes with a format, as data, and the function that installs them.

A repair wraps calls of one instance of a method; SGLang's classes stay unchanged. Each is inert with a later SGLang
that is correct, and one that SGLang never calls is an error. Files and lines are those of SGLang 0.5.17, below
``python/sglang``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

from sglang.srt.layers.quantization.base_config import QuantizeMethodBase

from mixprec_build.formats.base import Format
from mixprec_build.patterns.compress import compress
from mixprec_build.text import some
from mixprec_build.versions import between

from ..contact.check import installed

__all__ = ["ADVICE", "ISSUES", "PULLS", "Call", "Repair", "install", "never_called"]


ADVICE = "Serve with fewer tensor-parallel ranks, or build the checkpoint with another format for this module."
ISSUES = "https://github.com/sgl-project/sglang/issues"
PULLS = "https://github.com/sgl-project/sglang/pull"
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
    issues: tuple[str, ...] = ()
    """URLs of reports and of changes proposed to SGLang (or vLLM, for code that SGLang has from there)."""
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
    def source(self) -> str:
        """The URL of :attr:`where` at GitHub."""
        file, _, line = self.where.partition(":")
        return f"{_UPSTREAM}{file}{f'#L{line}' if line else ''}"

    def needed_by(self, version: str) -> bool:
        """Whether a release of SGLang needs it."""
        return between(self.since, self.until, version)


@dataclass(slots=True)
class _Installed:
    """A repair of one layer, and the calls of SGLang's that it waits for."""

    repair: Repair
    prefix: str
    waiting: set[str]


def install(method: QuantizeMethodBase, fmt: Format, repairs: Iterable[Repair], layer: str, prefix: str) -> None:
    """Installs the repairs for ``layer`` (``linear`` or ``experts``) that apply to ``fmt``; the last is outermost."""
    taken: list[_Installed] = []
    for repair in repairs:
        if repair.layer != layer or not repair.applies(fmt) or not repair.needed_by(installed()):
            continue
        calls = {
            "create_weights": repair.create,
            "process_weights_after_loading": repair.process,
            "create_moe_runner": repair.runner,
            "apply": repair.run,
        }
        mine = _Installed(repair, prefix, {name for name, around in calls.items() if around is not None})
        taken.append(mine)
        if repair.check is not None:
            mine.waiting.add("create_weights")
            _check_first(method, fmt, repair.check, mine)
        for name, around in calls.items():
            if around is not None:
                _wrap(method, name, fmt, around, mine)
    method.mixprec_repairs = taken
    _name_errors(method, fmt, prefix)


def never_called(modules: Iterable[Any], *, without: Collection[str] = ("apply",)) -> list[str]:
    """One line for each repair of the layers ``modules`` that SGLang did not call, once the model is loaded.

    ``without``: calls that may come later, or not at all.
    """
    missed: dict[tuple[str, str], list[str]] = {}
    for module in modules:
        for mine in getattr(getattr(module, "quant_method", None), "mixprec_repairs", ()):
            for name in mine.waiting.difference(without):
                missed.setdefault((mine.repair.name, name), []).append(mine.prefix)
    return [
        f"the repair {repair!r} waits for {name}, which SGLang never called for {some(compress(layers))}"
        for (repair, name), layers in missed.items()
    ]


def _wrap(method: QuantizeMethodBase, name: str, fmt: Format, around: Around, mine: _Installed) -> None:
    call = Call(getattr(method, name), fmt, method)

    def wrapped(layer: Any, *args: Any, **kwargs: Any) -> Any:
        mine.waiting.discard(name)
        return around(call, layer, *args, **kwargs)

    setattr(method, name, wrapped)


def _check_first(
    method: QuantizeMethodBase,
    fmt: Format,
    check: Callable[[Any, Any, list[int], int, tuple[int, int]], None],
    mine: _Installed,
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
        mine.waiting.discard("create_weights")
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
