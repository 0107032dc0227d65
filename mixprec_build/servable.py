"""What SGLang could not serve, found before anything is written.

SGLang runs q/k/v and gate/up as one GEMM each, with one quantization method; its kernels have shape rules; and some
modules have no quantized path. A mix that breaks one of these would fail at start-up, or worse, load and answer
nonsense.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .formats.base import Format
from .formats.registry import ALIASES
from .header import TensorInfo
from .model import Role, expert_parts, fused_groups, gemms, gemms_of, is_down, is_expert
from .patterns import compress

if TYPE_CHECKING:
    import numpy as np

    from .checkpoint import StoredModule, ValueReader
    from .folding import Folding
    from .plan import PlannedModule
    from .recipe import Recipe, Rule
    from .sources import Source, Sources

__all__ = [
    "Mend",
    "Problem",
    "Problems",
    "by_votes",
    "can_give",
    "check_same_weights",
    "check_servable",
    "counted",
    "decided_groups",
    "fuse",
    "gives",
    "group_limits",
    "half_only",
    "origin",
    "some",
]


@dataclass(frozen=True, slots=True)
class Problem:
    """One reason to refuse. ``hard`` ones hold whoever serves the checkpoint."""

    text: str
    hard: bool


class Problems:
    """Collects problems; the same one in many modules is told once, with their names as patterns."""

    def __init__(self, recipe: Recipe):
        self._recipe = recipe
        self._hard: list[str] = []
        self._soft: dict[tuple[str, Mend | None], tuple[list[str], list[str]]] = {}

    def hard(self, text: str) -> None:
        self._hard.append(text)

    def soft(self, modules: Iterable[str], text: str, mend: Mend | None = None, change: Iterable[str] = ()) -> None:
        """``text`` is about all of ``modules``; ``mend`` also says which source ``change`` should come from."""
        about, changed = self._soft.setdefault((text, mend), ([], []))
        about += modules
        changed += change

    def found(self) -> list[Problem]:
        soft = [
            Problem(f"{some(compress(about))}: {text}{self.mended(mend, change)}", hard=False)
            for (text, mend), (about, change) in self._soft.items()
        ]
        return [Problem(text, hard=True) for text in dict.fromkeys(self._hard)] + soft

    def mended(self, mend: Mend | None, change: Sequence[str]) -> str:
        """The sentence that ends a problem."""
        return "" if mend is None else mend.sentence(change, self._recipe)


@dataclass(frozen=True, slots=True)
class Mend:
    """The smallest change: ``source`` for some modules, by changing the exact lines that name them or by new lines.

    ``needless`` are lines to take out.
    """

    source: str | None
    rules: tuple[Rule, ...] = ()
    needless: tuple[Rule, ...] = ()

    @classmethod
    def of(cls, source: str | None, modules: Iterable[tuple[str, Rule | None]]) -> tuple[Mend, list[str]]:
        """For modules with the lines that chose their sources; also which of them need a new line."""
        exact: dict[Rule, None] = {}
        others = []
        for name, rule in modules:
            if rule is not None and rule.pattern.exact:
                exact[rule] = None
            else:
                others.append(name)
        return cls(source, tuple(sorted(exact, key=lambda rule: rule.line))), others

    def sentence(self, modules: Sequence[str], recipe: Recipe) -> str:
        if self.source is None:
            return ". No source of this recipe can take their place: add one that can"
        steps = [f"change line {rule.line} to `{rule.pattern.text}: {self.source}`" for rule in self.rules]
        steps += [f"take out {rule}" for rule in self.needless]
        lines = []
        by_text = {rule.pattern.text: rule for rule in recipe.rules}
        for pattern in compress(modules):
            rule = by_text.get(pattern)  # a line that is there cannot be added
            if rule is not None and not _is_overruled(rule, modules, recipe):
                steps.append(f"change line {rule.line} to `{pattern}: {self.source}`")
                continue
            if rule is not None:
                steps.append(f"take out {rule}")
            lines.append(f"`{pattern}: {self.source}`")
        if lines:
            last = max((rule.line for rule in recipe.rules), default=None)
            where = f"under `{recipe.section}:`" if last is None else f"below line {last}"
            steps.append(f"add {where}: {some(lines, 8)}")
        sentence = ", ".join(steps)
        return f". {sentence[0].upper()}{sentence[1:]}"


def _is_overruled(rule: Rule, modules: Iterable[str], recipe: Recipe) -> bool:
    """Whether a later line decides for one of ``modules`` that ``rule`` matches."""
    matched = [name for name in modules if rule.pattern.matches(name)]
    later = [other.pattern for other in recipe.rules if other.line > rule.line]
    return any(pattern.matches(name) for pattern in later for name in matched)


def check_servable(
    modules: Mapping[str, PlannedModule],
    sources: Sources,
    reader: ValueReader,
    folding: Folding,
    problems: Problems,
) -> None:
    """Adds to ``problems`` all that SGLang's layers would not run as planned."""
    mended = folding.check(modules, problems)
    quantized = any(module.format.quantized for module in modules.values())
    for group, fused in fused_groups(modules if quantized else ()).items():
        around = [modules[member] for member in fused]
        for name, members in gemms_of(group, fused).items():
            parts = [modules[member] for member in members]
            if any(part.format.quantized for part in parts):
                _check_gemm(name, parts, around, sources, reader, problems, mended)
                _check_never_quantized(parts, sources, problems)
                _check_shared_experts(name, parts, modules, sources, problems)
        limit = _missing(group, around)
        if limit is not None:
            _refuse_all(around, limit, sources, problems)
    check_same_weights(modules, sources, folding, problems)


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
        yield (
            f"{some(compress(names))} ({kind}): {why}; SGLang's slower GPTQ kernel, which 0.5.23 has no more, runs "
            f"them, with FP16 activations only{flag}"
        )


def _check_gemm(
    name: str,
    parts: list[PlannedModule],
    around: Sequence[PlannedModule],
    sources: Sources,
    reader: ValueReader,
    problems: Problems,
    mended: Set[str],
) -> None:
    """``around``: all parts of the fused group or expert that these are of. ``mended`` are modules that another
    problem's mend gives one source: to mend them once more would undo it."""
    if len({part.format.fuses_as for part in parts}) > 1:
        what = "gate and up of one expert" if is_expert(name) else f"parts of {name.rpartition('.')[2]}"
        owners = "; ".join(f"{_last(part.name)} is {_described(part.format)} from {origin(part)}" for part in parts)
        source = _common_source(parts, sources, around)
        change = [part for part in parts if part.source != source]
        text = f"{what}, one GEMM in SGLang, must share a format, but {owners}"
        names = [part.name for part in parts]
        problems.soft(names, text, *(_mend(source, change) if mended.isdisjoint(names) else ()))
        return
    for limit in _format_limits(name, parts, reader):
        _refuse_all(parts, limit, sources, problems)


def _refuse_all(parts: list[PlannedModule], limit: str, sources: Sources, problems: Problems) -> None:
    source = _common_source(parts, sources, other_than=parts[0].source)
    text = f"{_described(parts[0].format)} from {origin(parts[0])}: {limit}"
    problems.soft([part.name for part in parts], text, *_mend(source, parts))


def _missing(group: str, parts: Sequence[PlannedModule]) -> str | None:
    """What a quantized expert lacks."""
    names = [part.name for part in parts]
    if not is_expert(group) or expert_parts(names) is not None or not any(part.format.quantized for part in parts):
        return None
    return f"an expert needs its gate, up and down projections, this one has {', '.join(map(_last, names))}"


def _format_limits(name: str, parts: Sequence[PlannedModule], reader: ValueReader) -> list[str]:
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
    for name in [name for name in groups if name.endswith(_SHARED_GATE_UP)]:
        groups[name] += groups.pop(_shared_down(name), [])
    return groups


def group_limits(parts: Sequence[PlannedModule], reader: ValueReader) -> list[str]:
    """Why SGLang could not run a group of :func:`decided_groups` that is made of ``parts``; empty where it can."""
    limits = [limit for part in parts if (limit := _role_limit(part.name, part.role, part.format)) is not None]
    by_name = {part.name: part for part in parts}
    whole = ((group, [by_name[member] for member in members]) for group, members in fused_groups(by_name).items())
    limits += [limit for group, fused in whole if (limit := _missing(group, fused)) is not None]
    for name, members in gemms(by_name).items():
        fused = [by_name[member] for member in members]
        if len({part.format.fuses_as for part in fused}) > 1:
            limits.append(f"{', '.join(_described(part.format) for part in fused)} are no one format")
        elif fused[0].format.quantized:
            limits += _format_limits(name, fused, reader)
        down = by_name.get(_shared_down(name)) if name.endswith(_SHARED_GATE_UP) else None
        limit = down and _shared_experts_limit(fused[0].format, down.format)
        limits += [limit] if limit else []
    return limits


def fuse(parts: Iterable[PlannedModule]) -> bool:
    """Whether what SGLang fuses among ``parts`` is in one format."""
    by_name = {part.name: part.format.fuses_as for part in parts}
    return all(len({by_name[member] for member in members}) == 1 for members in gemms(by_name).values())


def _mend(source: str | None, parts: Iterable[PlannedModule]) -> tuple[Mend, list[str]]:
    return Mend.of(source, [(part.name, part.rule) for part in parts])


def _shape_limits(fmt: Format, parts: Sequence[StoredModule], expert: bool) -> list[str]:
    if not fmt.quantized:
        return []
    if not expert:
        return fmt.linear_limits(parts)
    size = fmt.shape(parts[0])
    hidden, intermediate = size if is_down(parts[0].name) else reversed(size)
    return fmt.expert_limits(parts, hidden, intermediate)


def _common_source(
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
    if any(_role_limit(part.name, part.role, fmt) for part, fmt in zip(parts, formats, strict=True)):
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
    claimed = ALIASES.get(source.name)
    formats = [source.known_format(name) for name in modules]
    return all(fmt is not None and (claimed is None or fmt.kind in claimed) for fmt in formats)


def _check_never_quantized(parts: Sequence[PlannedModule], sources: Sources, problems: Problems) -> None:
    for module in parts:
        limit = _role_limit(module.name, module.role, module.format)
        if limit is not None:
            source = _common_source(parts, sources)  # for all: they must share a format still
            text = f"{_described(module.format)} from {origin(module)}: {limit}"
            problems.soft([module.name], text, *_mend(source, [part for part in parts if part.source != source]))


def _check_shared_experts(
    name: str,
    parts: Sequence[PlannedModule],
    modules: Mapping[str, PlannedModule],
    sources: Sources,
    problems: Problems,
) -> None:
    """DeepSeek looks into the methods of its shared experts (models/deepseek_v2.py:774 in 0.5.17)."""
    down = modules.get(_shared_down(name))
    if not name.endswith(_SHARED_GATE_UP) or down is None or len({part.format for part in parts}) > 1:
        return
    limit = _shared_experts_limit(parts[0].format, down.format)
    if limit is None:
        return
    trio = [*parts, down]

    def fits(source: Source) -> bool:
        if not can_give(source, trio):
            return False
        return _shared_experts_limit(*(source.format_of(part.name) for part in (parts[0], down))) is None

    chosen = next((source.name for source in by_votes(trio, sources) if fits(source)), None)
    text = f"{_described(parts[0].format)} from {origin(parts[0])}: {limit}"
    problems.soft([part.name for part in trio], text, *_mend(chosen, [p for p in trio if p.source != chosen]))


_SHARED_GATE_UP = ".shared_experts.gate_up_proj"


def _shared_down(gate_up: str) -> str:
    return gate_up.replace("gate_up_proj", "down_proj")


def _shared_experts_limit(gate: Format, down: Format) -> str | None:
    if gate.kind.startswith("gptq"):
        return "SGLang looks for a weight in shared experts' gate and up, and GPTQ has none of that name"
    if not gate.kind.startswith("fp8_"):
        return None
    ours, theirs = gate.to_json(), down.to_json()
    quantizes, quantized = (fmt.get("activations", "none") != "none" for fmt in (ours, theirs))
    if gate.kind == "fp8_channel" and quantizes:
        return "SGLang asks shared experts for a config that its method for FP8 by channels has not"
    # Fp8Config's and compressed-tensors' have one, with blocks or None.
    asked = down.kind.startswith(("fp8_", "ct_")) and not (down.kind == "fp8_channel" and quantized)
    if not asked or ours.get("block") != theirs.get("block"):
        return f"SGLang compares blocks of shared experts' gate and up with those of down, which is {down.kind}"
    return None


def _role_limit(name: str, role: Role, fmt: Format) -> str | None:
    """Why SGLang has no place for a module in ``fmt``, whatever its shape."""
    if not fmt.quantized:
        return None
    last = _last(name)
    if role in (Role.EMBEDDING, Role.HEAD, Role.ROUTER):
        return f"SGLang has no quantized {role.value}"
    if last == "kv_b_proj":
        return "SGLang reads kv_b_proj outside its quantization methods and needs it unquantized"
    if last == "q_b_proj" and fmt.kind.startswith(("gptq", "awq", "ct_")):
        return "SGLang 0.5.17 looks for a weight in q_b_proj, and packed formats have none of that name"
    if last in ("q_a_proj", "kv_a_proj_with_mqa"):
        # deepseek_weight_loader.py: torch.cat along the first axis, or the first of two scalars
        if fmt.kind.startswith(("gptq", "awq")):
            return "SGLang joins q_a_proj and kv_a_proj by rows, and packed formats hold outputs in columns"
        if fmt.kind.startswith("ct_"):
            return "SGLang joins q_a_proj and kv_a_proj and would join their weight_shape as well"
        if fmt.kind == "fp8_tensor":
            return "SGLang joins q_a_proj and kv_a_proj and would keep one of their two per-tensor scales"
    return None


def check_same_weights(
    modules: Mapping[str, PlannedModule], sources: Sources, folding: Folding, problems: Problems
) -> None:
    """Norms must agree between all sources that weights come from: where they do not, one is another model's.

    Those that scales may be folded into are left to :mod:`.folding`.
    """
    users = {module.source for module in modules.values() if module.role not in (Role.NORM, Role.PARAMETER)}
    norms = [module for module in modules.values() if module.role is Role.NORM]
    for name in sources.by_name:
        differing: dict[str, list[str]] = {}
        for norm in norms if name in users else ():
            explained = norm.name in folding.fed and folding.between(norm.source, name)
            if not explained and folding.differ(norm.name, norm.source, name):
                differing.setdefault(norm.source, []).append(norm.name)
        for against, names in differing.items():
            problems.soft(
                names,
                f"`{name}` (line {sources.by_name[name].line}) and `{against}` (line {sources.by_name[against].line}) "
                "hold different values, so they do not hold the same weights (another revision or fine-tune, or "
                "scales folded into the norms); point one of them to a checkpoint of the other's weights",
            )


def origin(module: PlannedModule) -> str:
    """Where a module comes from and why, for messages."""
    return f"`{module.source}` ({module.rule or ('what it feeds' if module.follows else 'the default')})"


def _described(fmt: Format) -> str:
    """``gptq_int4 (group_size 128, sym true, ...)``: the parameters matter where two of one kind clash."""
    parameters = ", ".join(f"{k} {str(v).lower()}" for k, v in fmt.to_json().items() if k != "kind")
    return f"{fmt.kind} ({parameters})" if parameters else fmt.kind


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def counted(number: int, what: str) -> str:
    """``"1 file"``, ``"2 files"``."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def some(words: Sequence[str], most: int = 4) -> str:
    """The first few, and how many more, for messages."""
    more = f" and {len(words) - most} more" if len(words) > most else ""
    return ", ".join(words[:most]) + more
