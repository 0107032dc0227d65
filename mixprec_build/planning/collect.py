"""Collects the tensors of every module of the output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..checkpoint.checkpoint import ValueReader
from ..checkpoint.typed import Source
from ..formats.registry import kinds_of_word
from ..patterns.compress import compress
from ..recipe.recipe import Rule
from ..recipe.sources import Sources
from ..text import counted, some
from .cache_scales import with_cache_scales
from .choose import Chosen
from .problems import Problems, Replacement
from .rules import offers
from .stacked import why_missing
from .types import PlannedModule, PlannedTensor

__all__ = ["Collected", "collect", "without_zero_biases"]


@dataclass(frozen=True, slots=True, eq=False)
class Collected:
    """Modules in checkpoint order."""

    modules: Mapping[str, PlannedModule]
    notes: tuple[str, ...] = ()


def collect(chosen: Chosen, default: Source, sources: Sources, problems: Problems) -> Collected:
    """Takes every module from the source that was chosen for it.

    Adds biases that only ``default`` has, since packers of quantized formats leave some out, and scales of an FP8 KV
    cache. Adds to ``problems`` modules that are missing or have another shape than in ``default``.

    Raises:
        SourceError: a module that is needed is damaged or in a format that is not supported.
    """
    modules = {}
    missing: dict[tuple[str, Rule | None], list[str]] = {}
    downgraded: dict[tuple[str, Rule], list[str]] = {}
    clashes: dict[tuple[tuple[int, ...], tuple[int, ...], str], list[str]] = {}
    for name, (source, rule, follows) in chosen.choices.items():
        stored = source.module(name)
        if stored is None:
            missing.setdefault((source.name, rule), []).append(name)
            continue
        fmt, role = source.format_of(name), chosen.roles[name]
        shape = fmt.shape(stored)
        if rule is not None and not role.never_quantized:
            asked = kinds_of_word(rule.source)
            if asked and fmt.kind not in asked:
                downgraded.setdefault((fmt.kind, rule), []).append(name)
        tensors = {leaf: PlannedTensor(source.name, stored.tensors[leaf]) for leaf in sorted(stored.tensors)}
        base = stored if source is default else default.module(name)
        if base is not None and base is not stored:
            due = _shape_in(default, name)
            if due is not None and due != shape:
                clashes.setdefault((due, shape, source.name), []).append(name)
            if "bias" in base.tensors and "bias" not in tensors and "" not in tensors:
                tensors["bias"] = PlannedTensor(default.name, base.tensors["bias"])
        draft = name in chosen.drafts.globs
        modules[name] = PlannedModule(name, role, fmt, source.name, rule, shape, tensors, follows, draft)
    for (source_name, rule), names in missing.items():
        _report_missing(sources.by_name[source_name], rule, names, default, chosen, sources, problems)
    for (due, shape, source_name), names in clashes.items():
        problems.hard(
            f"{some(compress(names))}: {list(due)} in `{default.name}` and {list(shape)} in `{source_name}`, "
            f"these are different models; point `{source_name}` (line {sources.by_name[source_name].line}) "
            "to a checkpoint of the same model",
            code="different_models",
            modules=names,
        )
    asked_for = {module.rule for module in modules.values() if module.rule is not None and _is_as_asked(module)}
    notes = [
        f"{rule}: {len(names)} of its modules are stored as {kind} there ({some(compress(names))})"
        for (kind, rule), names in downgraded.items()
        if not (rule.mtp and rule in asked_for)  # some of draft layers are never quantized
    ]
    with_scales, more = with_cache_scales(modules, sources)
    return Collected(with_scales, (*notes, *more))


def _is_as_asked(module: PlannedModule) -> bool:
    """Whether a module is in a format that its line names."""
    return module.rule is not None and module.format.kind in kinds_of_word(module.rule.source)


def _shape_in(source: Source, name: str) -> tuple[int, ...] | None:
    fmt = source.known_format(name)
    return None if fmt is None else fmt.shape(source.checkpoint.modules[name])


def _report_missing(
    source: Source,
    rule: Rule | None,
    names: list[str],
    default: Source,
    chosen: Chosen,
    sources: Sources,
    problems: Problems,
) -> None:
    patterns = compress(names)
    absent = sorted({source.checkpoint.absent[n] for n in names if n in source.checkpoint.absent})
    if absent:
        problems.hard(
            f"`{source.name}` is read from the cache, which lacks {some(absent)} with {some(patterns)}; "
            "run once with the hub in reach",
            code="not_cached",
            modules=names,
        )
        return
    holders = [s.name for s in sources.by_name.values() if offers(s, names)]
    replacement, new = Replacement.of(holders[0] if holders else None, [(name, rule) for name in names])
    taken = f"which {rule} takes from it" if rule is not None else "which are taken from it by default"
    text = f"`{source.name}` has no {some(patterns)} ({counted(len(names), 'module')}), {taken}"
    why, edit = why_missing(source, default, names, chosen, sources)
    problems.hard(text + why, *(edit or (replacement, new)), code="missing_module", modules=names)


def without_zero_biases(
    modules: Mapping[str, PlannedModule], default: Source, sources: Sources, reader: ValueReader, problems: Problems
) -> dict[str, PlannedModule]:
    """Drops biases of zeros that ``default`` does not have: GPTQ packers write one for every linear.

    Adds to ``problems`` a bias that ``default`` does not have and that is not zero.
    """
    out = dict(modules)
    for name, module in modules.items():
        bias = module.tensors.get("bias")
        if bias is None or module.source == default.name:
            continue
        base = default.module(name)
        if base is None or "bias" in base.tensors:
            continue
        values = reader.read(bias.source, bias.info)
        if values is not None and values.any():
            problems.hard(
                f"{name} has a bias in `{bias.source}` that is not zero, and none in `{default.name}`: these are "
                f"different models; point `{bias.source}` (line {sources.by_name[bias.source].line}) to a "
                "checkpoint of the same model",
                code="different_models",
                modules=[name],
            )
            continue
        out[name] = module._replace(tensors={leaf: t for leaf, t in module.tensors.items() if leaf != "bias"})
    return out
