"""Why SGLang could not run a module, a fused group or an expert as stored, and which source could take its place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from ..families.base import Role, expert_parts, fused_groups, gemms, is_down, is_expert
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
    "SHARED_GATE_UP",
    "by_votes",
    "can_give",
    "common_source",
    "decided_groups",
    "described",
    "format_limits",
    "fuse",
    "gives",
    "group_limits",
    "half_only",
    "last_word_of",
    "missing_projections",
    "origin",
    "replacement",
    "role_limit",
    "shared_down",
    "shared_experts_limit",
]


def half_only(modules: Mapping[str, tuple[Format, StoredModule]], config: Mapping[str, object]) -> Iterator[str]:
    """Remarks on modules that SGLang serves in FP16 only; ``config`` is the model's."""
    found: dict[tuple[str, str], list[str]] = {}
    may = [name for name, (fmt, _) in modules.items() if type(fmt).half_only is not Format.half_only]
    for name, members in fused_groups(may).items():
        formats = {modules[member][0] for member in members}
        fmt = formats.pop()
        if is_expert(name) or any(other.fuses_as != fmt.fuses_as for other in formats):
            continue
        if why := fmt.half_only([modules[member][1] for member in members]):
            found.setdefault((fmt.kind, why), []).extend(members)
    half = config.get("dtype", config.get("torch_dtype")) == "float16"
    flag = "" if half else ": start SGLang with --dtype half, or take another source for them"
    for (kind, why), names in found.items():
        yield f"{some(compress(names))} ({kind}): {why}, with FP16 activations only{flag}"


def missing_projections(group: str, parts: Sequence[PlannedModule]) -> str | None:
    """What a quantized expert lacks."""
    names = [part.name for part in parts]
    if not is_expert(group) or expert_parts(names) is not None or not any(part.format.quantized for part in parts):
        return None
    return f"an expert needs its gate, up and down projections, this one has {', '.join(map(last_word_of, names))}"


def format_limits(name: str, parts: Sequence[PlannedModule], reader: ValueReader) -> list[str]:
    """Why SGLang could not run a GEMM whose parts share a format."""
    fmt = parts[0].format
    holder = {tensor.info.name: tensor.source for part in parts for tensor in part.tensors.values()}

    def read(info: TensorInfo) -> np.ndarray | None:
        return reader.read(holder[info.name], info)

    stored, expert = [part.stored for part in parts], is_expert(name)
    return [*_shape_limits(fmt, stored, expert), *fmt.value_limits(stored, read, experts=expert)]


def decided_groups(names: Iterable[str]) -> dict[str, list[str]]:
    """Modules that one source is chosen for: fused groups, and DeepSeek's shared experts, of which SGLang compares gate
    and up with down."""
    groups = {name: list(members) for name, members in fused_groups(names).items()}
    for name in [name for name in groups if name.endswith(SHARED_GATE_UP)]:
        groups[name] += groups.pop(shared_down(name), [])
    return groups


def group_limits(parts: Sequence[PlannedModule], reader: ValueReader) -> list[str]:
    """Why SGLang could not run a group of :func:`decided_groups` that is made of ``parts``; empty where it can."""
    limits = [limit for part in parts if (limit := role_limit(part.name, part.role, part.format)) is not None]
    by_name = {part.name: part for part in parts}
    whole = ((group, [by_name[member] for member in members]) for group, members in fused_groups(by_name).items())
    limits += [limit for group, fused in whole if (limit := missing_projections(group, fused)) is not None]
    for name, members in gemms(by_name).items():
        fused = [by_name[member] for member in members]
        if len({part.format.fuses_as for part in fused}) > 1:
            limits.append(f"{', '.join(described(part.format) for part in fused)} are no one format")
        elif fused[0].format.quantized:
            limits += format_limits(name, fused, reader)
        down = by_name.get(shared_down(name)) if name.endswith(SHARED_GATE_UP) else None
        limit = down and shared_experts_limit(fused[0].format, down.format)
        limits += [limit] if limit else []
    return limits


def fuse(parts: Iterable[PlannedModule]) -> bool:
    """Whether what SGLang fuses among ``parts`` is in one format."""
    by_name = {part.name: part.format.fuses_as for part in parts}
    return all(len({by_name[member] for member in members}) == 1 for members in gemms(by_name).values())


def replacement(source: str | None, parts: Iterable[PlannedModule]) -> tuple[Replacement, list[str]]:
    """``parts`` from ``source``, as :meth:`Problems.soft` takes it."""
    return Replacement.of(source, [(part.name, part.rule) for part in parts])


def _shape_limits(fmt: Format, parts: Sequence[StoredModule], expert: bool) -> list[str]:
    if not fmt.quantized:
        return []
    if not expert:
        return fmt.linear_limits(parts)
    size = fmt.shape(parts[0])
    hidden, intermediate = size if is_down(parts[0].name) else reversed(size)
    return fmt.expert_limits(parts, hidden, intermediate)


def common_source(
    parts: Sequence[PlannedModule],
    sources: Sources,
    around: Sequence[PlannedModule] = (),
    other_than: str | None = None,
) -> str | None:
    """A source that could give all of ``parts`` as SGLang can serve them: the commonest among them, or those
    ``around``, first."""
    others = [source for source in by_votes(around or parts, sources) if source.name != other_than]
    return next((source.name for source in others if can_give(source, parts)), None)


def by_votes(parts: Iterable[PlannedModule], sources: Sources) -> list[Source]:
    """All sources, the commonest among ``parts`` first."""
    votes = Counter(part.source for part in parts)
    return sorted(sources.by_name.values(), key=lambda source: -votes[source.name])


def _gives_one_gemm(source: Source, parts: Sequence[PlannedModule], expert: bool) -> bool:
    if not gives(source, [part.name for part in parts]):
        return False
    formats = [source.format_of(part.name) for part in parts]
    if any(role_limit(part.name, part.role, fmt) for part, fmt in zip(parts, formats, strict=True)):
        return False
    stored = [source.checkpoint.modules[part.name] for part in parts]
    return len({fmt.fuses_as for fmt in formats}) == 1 and not _shape_limits(formats[0], stored, expert)


def can_give(source: Source, modules: Iterable[PlannedModule]) -> bool:
    """Whether all of ``modules`` could come from ``source`` and be served, whatever they are fused of."""
    by_name = {module.name: module for module in modules}
    groups = gemms(by_name).items()
    return all(_gives_one_gemm(source, [by_name[n] for n in members], is_expert(group)) for group, members in groups)


def gives(source: Source, modules: Iterable[str]) -> bool:
    """Whether a recipe may take all of ``modules`` from ``source``, as what the source's name says they are."""
    claimed = kinds_of_word(source.name)
    formats = [source.known_format(name) for name in modules]
    return all(fmt is not None and (not claimed or fmt.kind in claimed) for fmt in formats)


SHARED_GATE_UP = ".shared_experts.gate_up_proj"


def shared_down(gate_up: str) -> str:
    return gate_up.replace("gate_up_proj", "down_proj")


def shared_experts_limit(gate: Format, down: Format) -> str | None:
    return gate.shared_experts_limit(down)


def role_limit(name: str, role: Role, fmt: Format) -> str | None:
    """Why SGLang has no place for a module in ``fmt``, whatever its shape."""
    if not fmt.quantized:
        return None
    last = last_word_of(name)
    if role in (Role.EMBEDDING, Role.HEAD, Role.ROUTER):
        return f"SGLang has no quantized {role.value}"
    if last == "kv_b_proj":
        return "SGLang reads kv_b_proj outside its quantization methods and needs it unquantized"
    if last == "q_b_proj" and not fmt.has_weight:
        return "SGLang 0.5.17 looks for a weight in q_b_proj, and packed formats have none of that name"
    if last in ("q_a_proj", "kv_a_proj_with_mqa") and fmt.row_join_limit is not None:
        # deepseek_weight_loader.py: torch.cat along the first axis, or the first of two scalars
        return f"SGLang joins q_a_proj and kv_a_proj {fmt.row_join_limit}"
    return None


def origin(module: PlannedModule) -> str:
    """Where a module comes from and why, for messages."""
    return f"`{module.source}` ({module.rule or ('what it feeds' if module.follows else 'the default')})"


def described(fmt: Format) -> str:
    """``gptq_int4 (group_size 128, sym true, ...)``: the parameters matter where two of one kind clash."""
    parameters = ", ".join(f"{k} {str(v).lower()}" for k, v in fmt.to_json().items() if k != "kind")
    return f"{fmt.kind} ({parameters})" if parameters else fmt.kind


def last_word_of(name: str) -> str:
    return name.rpartition(".")[2]
