"""What SGLang could not serve, found before anything is written.

SGLang runs q/k/v, gate/up and the three projections of an expert as one GEMM each, with one quantization
method; its kernels have shape rules; and some modules have no quantized path. A mix that breaks one of these
would fail at start-up, or worse, load and answer nonsense.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .formats.base import Format
from .header import TensorInfo
from .model import Role, expert_parts, fused_groups, is_expert
from .patterns import compress

if TYPE_CHECKING:
    from .checkpoint import StoredModule, ValueReader
    from .plan import PlannedModule
    from .recipe import Recipe, Rule
    from .sources import Sources

__all__ = ["Problem", "Problems", "check_servable"]


@dataclass(frozen=True, slots=True)
class Problem:
    """One reason to refuse. ``hard`` ones hold whoever serves the checkpoint."""

    text: str
    hard: bool


class Problems:
    """Collects problems; the same one in many modules is told once, with their names as patterns."""

    def __init__(self, recipe: Recipe):
        self._last_line = max((rule.line for rule in recipe.rules), default=None)
        self._hard: list[str] = []
        self._soft: dict[tuple[str, _Mend], tuple[list[str], list[str]]] = {}

    def hard(self, text: str) -> None:
        self._hard.append(text)

    def soft(self, modules: Iterable[str], text: str, mend: _Mend, mend_modules: Iterable[str]) -> None:
        """``text`` is about all of ``modules``; ``mend`` says how to change the source of ``mend_modules``."""
        about, change = self._soft.setdefault((text, mend), ([], []))
        about += modules
        change += mend_modules

    def found(self) -> list[Problem]:
        soft = [
            Problem(f"{_some(compress(about))}: {text}{mend.sentence(change, self._last_line)}", hard=False)
            for (text, mend), (about, change) in self._soft.items()
        ]
        return [Problem(text, hard=True) for text in dict.fromkeys(self._hard)] + soft


@dataclass(frozen=True, slots=True)
class _Mend:
    """The smallest change: ``source`` for some modules, by a new line or (``rule``) by changing an exact one."""

    source: str | None
    rule: Rule | None = None

    def sentence(self, modules: Sequence[str], last_line: int | None) -> str:
        if self.source is None:
            return ". No source of this recipe can take their place: add one that can"
        if self.rule is not None:
            return f". Change line {self.rule.line} to `{self.rule.pattern.text}: {self.source}`"
        where = "under `weights:`" if last_line is None else f"below line {last_line}"
        lines = ", ".join(f"`{pattern}: {self.source}`" for pattern in compress(modules)[:4])
        return f". Add {where}: {lines}"


def check_servable(
    modules: Mapping[str, PlannedModule], sources: Sources, reader: ValueReader, problems: Problems
) -> None:
    """Adds to ``problems`` all that SGLang's layers would not run as planned."""
    for name, members in fused_groups(modules).items():
        parts = [modules[member] for member in members]
        if any(part.format.quantized for part in parts):
            _check_group(name, parts, sources, reader, problems)
    for module in modules.values():
        _check_never_quantized(module, sources, problems)
    _check_same_weights(modules, sources, reader, problems)


def _check_group(
    name: str, parts: list[PlannedModule], sources: Sources, reader: ValueReader, problems: Problems
) -> None:
    expert = is_expert(name)
    if len({part.format.fuses_as for part in parts}) > 1:
        what = "the projections of one expert" if expert else f"parts of {name.rpartition('.')[2]}, one GEMM in SGLang,"
        owners = "; ".join(f"{_last(part.name)} is {_described(part.format)} from {_origin(part)}" for part in parts)
        source = _common_source(parts, sources, expert)
        change = [part for part in parts if part.source != source]
        exact = next((part.rule for part in change if part.rule is not None and part.rule.pattern.exact), None)
        problems.soft(
            [part.name for part in parts],
            f"{what} must share a format, but {owners}",
            _Mend(source, exact),
            [part.name for part in change],
        )
        return
    fmt = parts[0].format
    origin = {tensor.info.name: tensor.source for part in parts for tensor in part.tensors.values()}

    def read(info: TensorInfo) -> np.ndarray | None:
        return reader.read(origin[info.name], info)

    stored = [part.stored for part in parts]
    limits = [*_shape_limits(fmt, stored, expert), *fmt.value_limits(stored, read, experts=expert)]
    for limit in limits:
        source = _common_source(parts, sources, expert, other_than=parts[0].source)
        exact = next((part.rule for part in parts if part.rule is not None and part.rule.pattern.exact), None)
        names = [part.name for part in parts]
        problems.soft(names, f"{_described(fmt)} from {_origin(parts[0])}: {limit}", _Mend(source, exact), names)


def _shape_limits(fmt: Format, parts: Sequence[StoredModule], expert: bool) -> list[str]:
    if not fmt.quantized:
        return []
    if not expert:
        return fmt.linear_limits(parts)
    by_name = {part.name: part for part in parts}
    trio = expert_parts(by_name)
    if trio is None:
        missing = "gate, up and down projections"
        return [f"an expert needs its {missing}, this one has {', '.join(_last(n) for n in by_name)}"]
    return fmt.expert_limits(*(by_name[name] for name in trio))


def _common_source(
    parts: Sequence[PlannedModule], sources: Sources, expert: bool, other_than: str | None = None
) -> str | None:
    """A source that could give all of ``parts`` in one servable format: the commonest among them first."""
    votes = [part.source for part in parts]
    order = sorted(sources.by_name, key=lambda name: -votes.count(name))
    for name in order:
        source = sources.by_name[name]
        if name == other_than or not all(isinstance(source.formats.get(part.name), Format) for part in parts):
            continue
        formats = [source.format_of(part.name) for part in parts]
        stored = [source.checkpoint.modules[part.name] for part in parts]
        if len({fmt.fuses_as for fmt in formats}) == 1 and not _shape_limits(formats[0], stored, expert):
            return name
    return None


def _check_never_quantized(module: PlannedModule, sources: Sources, problems: Problems) -> None:
    if not module.format.quantized:
        return
    last = _last(module.name)
    if module.role in (Role.EMBEDDING, Role.HEAD, Role.ROUTER):
        limit = f"SGLang has no quantized {module.role.value}"
    elif last == "kv_b_proj":
        limit = "SGLang reads kv_b_proj outside its quantization methods and needs it unquantized"
    elif last.endswith("a_proj") or last == "kv_a_proj_with_mqa":
        if "int4" not in module.format.kind:
            return
        limit = "SGLang joins q_a_proj and kv_a_proj along an axis that packed Int4 does not have"
    else:
        return
    dense = [
        name
        for name, source in sources.by_name.items()
        if isinstance(fmt := source.formats.get(module.name), Format) and not fmt.quantized
    ]
    rule = module.rule if module.rule is not None and module.rule.pattern.exact else None
    mend = _Mend(dense[0] if dense else None, rule)
    problems.soft([module.name], f"{_described(module.format)} from {_origin(module)}: {limit}", mend, [module.name])


def _check_same_weights(
    modules: Mapping[str, PlannedModule], sources: Sources, reader: ValueReader, problems: Problems
) -> None:
    """Norms must agree between sources: where they do not, linears were quantized from other weights."""
    users: dict[str, list[str]] = {}
    for module in modules.values():
        if module.format.quantized:
            users.setdefault(module.source, []).append(module.name)
    norms = [module for module in modules.values() if module.role is Role.NORM and "weight" in module.tensors]
    for name in users:
        differing = []
        for norm in norms:
            mine, other = norm.tensors["weight"], sources.by_name[name].module(norm.name)
            if mine.source == name or other is None or "weight" not in other.tensors:
                continue
            a, b = reader.read(mine.source, mine.info), reader.read(name, other.tensors["weight"])
            if a is None or b is None:
                continue
            # One rounding to FP16 or BF16 lies between releases of one model, no more.
            if not np.allclose(a.astype(np.float32), b.astype(np.float32), rtol=2**-7, atol=1e-6):
                differing.append(norm)
        if differing:
            against = differing[0].source
            problems.soft(
                [norm.name for norm in differing],
                f"`{name}` and `{against}` hold different values, so the linears of `{name}` were quantized from "
                "other weights (another revision or fine-tune, or scales folded into the norms); take them from one",
                _Mend(name),
                [norm.name for norm in differing],
            )


def _origin(module: PlannedModule) -> str:
    return f"`{module.source}` ({module.rule or 'the default'})"


def _described(fmt: Format) -> str:
    """``gptq_int4 (group_size 128, sym true, ...)``: the parameters matter where two of one kind clash."""
    parameters = ", ".join(f"{k} {str(v).lower()}" for k, v in fmt.to_json().items() if k != "kind")
    return f"{fmt.kind} ({parameters})" if parameters else fmt.kind


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _some(patterns: Sequence[str], most: int = 4) -> str:
    more = f" and {len(patterns) - most} more" if len(patterns) > most else ""
    return ", ".join(patterns[:most]) + more
