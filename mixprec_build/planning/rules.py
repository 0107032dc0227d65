"""Reasons why SGLang could not run a module, a fused group or an expert as stored, and sources to replace it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from ..families.base import Family
from ..families.facts import ModelFacts
from ..families.names import last_word, layer_of
from ..formats.base import Format
from ..formats.registry import kinds_of_word
from ..patterns.compress import compress
from ..storage.header import TensorInfo
from ..text import some
from .problems import Replacement

if TYPE_CHECKING:
    import numpy as np

    from ..checkpoint.checkpoint import ValueReader
    from ..checkpoint.typed import Source
    from ..recipe.sources import Sources
    from ..storage.module import StoredModule
    from .types import PlannedModule

__all__ = [
    "by_votes",
    "can_serve_from",
    "common_source",
    "decided_groups",
    "described",
    "format_limits",
    "fused_rows_limits",
    "group_limits",
    "half_only",
    "half_only_groups",
    "missing_projections",
    "offers",
    "origin",
    "replacement",
    "share_one_format",
    "whole_expert",
]


def half_only(modules: Mapping[str, tuple[Format, StoredModule]], facts: ModelFacts) -> Iterator[str]:
    """Yields remarks on modules that SGLang serves in FP16 only."""
    found: dict[tuple[str, str], list[str]] = {}
    for kind, why, members in half_only_groups(modules, facts.family):
        found.setdefault((kind, why), []).extend(members)
    flag = "" if facts.dtype == "float16" else ": start SGLang with --dtype half, or take another source for them"
    for (kind, why), names in found.items():
        yield f"{some(compress(names))} ({kind}): {why}, with FP16 activations only{flag}"


def half_only_groups(
    modules: Mapping[str, tuple[Format, StoredModule]], family: Family
) -> Iterator[tuple[str, str, Sequence[str]]]:
    """Yields fused groups that SGLang serves in FP16 only: their kind, the reason, and their modules."""
    may = [name for name, (fmt, _) in modules.items() if type(fmt).half_only is not Format.half_only]
    for name, members in family.fused_groups(may).items():
        formats = {modules[member][0] for member in members}
        fmt = formats.pop()
        if family.is_expert(name) or any(other.fuses_as != fmt.fuses_as for other in formats):
            continue
        if why := fmt.half_only([modules[member][1] for member in members]):
            yield fmt.kind, why, members


def missing_projections(group: str, parts: Sequence[PlannedModule], family: Family) -> str | None:
    """A message on the projections that a quantized expert lacks; None if it lacks none."""
    if not family.is_expert(group) or not any(part.format.quantized for part in parts):
        return None
    words = [last_word(part.name) for part in parts]
    expected = family.missing_of(words)
    if expected is None:
        return None
    needed = "up and down" if expected.gate is None else "gate, up and down"
    return f"an expert needs its {needed} projections, this one has {', '.join(words)}"


def format_limits(name: str, parts: Sequence[PlannedModule], reader: ValueReader, family: Family) -> list[str]:
    """Reasons why SGLang could not run a GEMM whose ``parts`` share a format; empty if it can."""
    fmt = parts[0].format
    holder = {tensor.info.name: tensor.source for part in parts for tensor in part.tensors.values()}

    def read(info: TensorInfo) -> np.ndarray | None:
        return reader.read(holder[info.name], info)

    stored, expert = [part.stored for part in parts], family.is_expert(name)
    return [*_shape_limits(fmt, stored, expert, family), *fmt.value_limits(stored, read, experts=expert)]


def decided_groups(names: Iterable[str], family: Family) -> dict[str, list[str]]:
    """Groups of modules that get one source: fused groups, with modules whose formats SGLang compares with theirs."""
    groups = {name: list(members) for name, members in family.fused_groups(names).items()}
    for name in list(groups):
        compared = family.compared_with(name)
        if compared is not None:
            groups[name] += groups.pop(compared[0], [])
    return groups


def group_limits(parts: Sequence[PlannedModule], reader: ValueReader, family: Family) -> list[str]:
    """Reasons why SGLang could not run ``parts``, a group of :func:`decided_groups`; empty if it can."""
    limits = [limit for p in parts if (limit := family.format_limit(p.name, p.role, p.format)) is not None]
    by_name = {part.name: part for part in parts}
    for group, members in family.fused_groups(by_name).items():
        around = [by_name[member] for member in members]
        limit, whole = missing_projections(group, around, family), whole_expert(group, around, family)
        limits += [limit] if limit else []
        limits += [f"SGLang runs gate, up and down of an expert in {whole.kind} as one"] if whole else []
    for name, members in family.gemms(by_name).items():
        fused = [by_name[member] for member in members]
        if len({part.format.fuses_as for part in fused}) > 1:
            limits.append(f"{', '.join(described(part.format) for part in fused)} are no one format")
        elif fused[0].format.quantized:
            limits += format_limits(name, fused, reader, family)
        compared = family.compared_with(name)
        if compared is not None and compared[0] in by_name:
            limit = compared[1].limit(fused[0].format, by_name[compared[0]].format)
            limits += [limit] if limit else []
    return limits


def whole_expert(group: str, parts: Iterable[PlannedModule], family: Family) -> Format | None:
    """The format of an expert in several ones that SGLang runs complete experts in only; None for others."""
    formats = {part.format.fuses_as: part.format for part in parts}
    if len(formats) < 2 or not family.is_expert(group):
        return None
    return next((fmt for fmt in formats.values() if fmt.experts_whole), None)


def share_one_format(parts: Iterable[PlannedModule], family: Family) -> bool:
    """Whether those of ``parts`` that SGLang runs as one GEMM share a format."""
    by_name = {part.name: part.format.fuses_as for part in parts}
    return all(len({by_name[member] for member in members}) == 1 for members in family.gemms(by_name).values())


def replacement(source: str | None, parts: Iterable[PlannedModule]) -> tuple[Replacement, list[str]]:
    """The arguments ``replacement`` and ``change`` of :meth:`Problems.soft` that take ``parts`` from ``source``."""
    return Replacement.of(source, [(part.name, part.rule) for part in parts])


def _shape_limits(fmt: Format, parts: Sequence[StoredModule], expert: bool, family: Family) -> list[str]:
    if not fmt.quantized:
        return []
    if not expert:
        return [*fused_rows_limits(fmt, parts, family), *fmt.linear_limits(parts)]
    size = fmt.shape(parts[0])
    hidden, intermediate = size if family.is_down(parts[0].name) else reversed(size)
    limits = fmt.expert_limits(parts, hidden, intermediate)
    activation = family.activation.in_layer(layer_of(parts[0].name))
    if (limit := activation.limit_on(fmt.experts_run_on)) is not None:
        limits.append(limit)
    if activation.name in fmt.expert_activations_refused:
        limits.append(f"SGLang's method for {fmt.name} experts refuses their activation ({activation.name})")
    if fmt.gated_experts_only and not activation.gated:
        limits.append(f"SGLang runs no {fmt.name} experts without a gate")
    return limits


def fused_rows_limits(fmt: Format, parts: Sequence[StoredModule], family: Family) -> Iterator[str]:
    """Reasons for parts of a fused linear that end inside of a block of scales, where SGLang does not allow it."""
    ragged = family.ragged_end(part.name for part in parts)
    for part in parts if len(parts) > 1 else ():
        outputs = fmt.shape(part)[0]
        if outputs % fmt.rows_in_fused and part.name != ragged:
            yield (
                f"{last_word(part.name)} has {outputs} outputs, no multiple of its block {fmt.rows_in_fused}, "
                "and is fused"
            )


def common_source(
    parts: Sequence[PlannedModule],
    sources: Sources,
    around: Sequence[PlannedModule] = (),
    other_than: str | None = None,
) -> str | None:
    """A source that has all of ``parts`` in a form that SGLang can serve; None if there is none.

    Prefers the one that most of ``around`` come from, or of ``parts`` where ``around`` is empty.
    """
    others = [source for source in by_votes(around or parts, sources) if source.name != other_than]
    return next((source.name for source in others if can_serve_from(source, parts, sources.family)), None)


def by_votes(parts: Iterable[PlannedModule], sources: Sources) -> list[Source]:
    """All sources, the one that most of ``parts`` come from first."""
    votes = Counter(part.source for part in parts)
    return sorted(sources.by_name.values(), key=lambda source: -votes[source.name])


def _offers_one_gemm(source: Source, parts: Sequence[PlannedModule], expert: bool, family: Family) -> bool:
    if not offers(source, [part.name for part in parts]):
        return False
    formats = [source.format_of(part.name) for part in parts]
    if any(family.format_limit(part.name, part.role, fmt) for part, fmt in zip(parts, formats, strict=True)):
        return False
    stored = [source.checkpoint.modules[part.name] for part in parts]
    return len({fmt.fuses_as for fmt in formats}) == 1 and not _shape_limits(formats[0], stored, expert, family)


def can_serve_from(source: Source, modules: Iterable[PlannedModule], family: Family) -> bool:
    """Whether SGLang could serve all of ``modules`` if they came from ``source``."""
    by_name = {module.name: module for module in modules}
    for group, members in family.fused_groups(by_name).items():
        formats = [source.known_format(name) for name in members]
        if any(fmt is not None and fmt.experts_whole for fmt in formats) and len(family.gemms_of(group, members)) < 2:
            return False
    return all(
        _offers_one_gemm(source, [by_name[n] for n in members], family.is_expert(group), family)
        for group, members in family.gemms(by_name).items()
    )


def offers(source: Source, modules: Iterable[str]) -> bool:
    """Whether ``source`` has all of ``modules``; if it is named after a format, in that format."""
    claimed = kinds_of_word(source.name)
    formats = [source.known_format(name) for name in modules]
    return all(fmt is not None and (not claimed or fmt.kind in claimed) for fmt in formats)


def origin(module: PlannedModule) -> str:
    """The source of a module and the line that chose it, for messages."""
    default = "the default, for no line names these draft layers" if module.draft else "the default"
    return f"`{module.source}` ({module.rule or ('what it feeds' if module.follows else default)})"


def described(fmt: Format) -> str:
    """``gptq_int4 (group_size 128, sym true, ...)``: parameters tell two formats of one kind apart."""
    parameters = ", ".join(f"{k} {str(v).lower()}" for k, v in fmt.to_json().items() if k != "kind")
    return f"{fmt.kind} ({parameters})" if parameters else fmt.kind
