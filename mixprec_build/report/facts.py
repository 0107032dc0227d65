"""Describes a checkpoint or a plan as plain data, for ``--json``."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..checkpoint.declaration import METHOD, name_formats
from ..checkpoint.manifest import CHECKSUM, MANIFEST, read_head
from ..families.base import Family
from ..families.parts import Role
from ..families.stacked import block_of_stacked
from ..formats.base import Format, FormatError
from ..patterns.compress import compress
from ..planning.rules import half_only
from ..text import as_word, human, some
from .drafts import draft_facts, planned_draft_facts
from .projections import ShownModule, projections

if TYPE_CHECKING:
    from ..checkpoint.typed import Source
    from ..planning.types import Plan

__all__ = ["inspect_facts", "plan_facts"]


class _Stored(NamedTuple):
    name: str
    role: Role
    format: Format
    shape: tuple[int, ...]
    nbytes: int


def plan_facts(plan: Plan) -> dict[str, Any]:
    """The data that ``mixprec plan --json`` prints."""
    counts = Counter(module.source for module in plan.modules.values())
    nbytes: Counter[str] = Counter()
    for shard in plan.shards:
        for tensor in shard.tensors:
            nbytes[tensor.source] += tensor.info.nbytes
    sources = [
        {
            "name": name,
            "location": source.location,
            "commit": source.checkpoint.commit,
            "holds": sorted(source.kinds),
            "modules": counts[name],
            "bytes": nbytes[name],
        }
        for name, source in plan.sources.by_name.items()
    ]
    facts, names = _facts(plan.modules.values(), plan.sources.family, {*plan.drafts.modules})
    return {
        **facts,
        "mtp": planned_draft_facts(plan, names),
        "file_bytes": sum(shard.file_bytes(plan.sources) for shard in plan.shards),
        "shards": len(plan.shards),
        "layout": plan.recipe.layout,
        "presplit": dict(plan.presplit),
        "rules": [
            {"line": use.rule.line, "pattern": use.rule.pattern.text, "source": use.rule.source}
            | {"matched": use.matched, "won": use.won}
            for use in plan.rules
        ],
        "sources": sources,
        "left_out": [asdict(left_out) for left_out in plan.left_out],
        "notes": list(plan.notes),
        "warnings": [warning.to_json() for warning in plan.warnings],
        "unservable": list(plan.unservable),
        "problems": [problem.to_json() for problem in plan.problems],
    }


def inspect_facts(source: Source, folder: Path) -> dict[str, Any]:
    """The data that ``mixprec inspect --json`` prints, for a compiled checkpoint or any other.

    ``folder`` has the manifest, if there is one.
    """
    stored, family = [], source.facts.family
    unread: dict[str, list[str]] = {}
    for name, module in source.checkpoint.modules.items():
        fmt = source.formats[name]
        if isinstance(fmt, FormatError):
            unread.setdefault(str(fmt), []).append(name)
        else:
            shape = fmt.shape(module)
            stored.append(_Stored(name, family.role_of(name, shape, module.tensors), fmt, shape, module.nbytes))
    compiled = source.checkpoint.quantization.get("quant_method") == METHOD
    recorded = read_head(folder) if compiled and (folder / MANIFEST).exists() else None
    drafts = [module for module in stored if family.is_draft(module.name, source.facts.layers)]
    about, names = _facts(stored, family, {module.name for module in drafts})
    dropped = recorded is not None and recorded.drops_mtp
    facts = {
        "location": source.checkpoint.location,
        "model_type": source.facts.model_type,
        **about,
        "mtp": draft_facts(drafts, names, family, source.facts.draft_layers, dropped=dropped),
        "file_bytes": sum(shard.size for shard in source.checkpoint.shards.values()),
        "shards": len(source.checkpoint.shards),
        "unread": [{"reason": reason, "modules": compress(names)} for reason, names in unread.items()],
        "serve": f"python -m sglang.launch_server --model-path {as_word(source.checkpoint.location)}"
        + (f" --quantization {METHOD}" if compiled else ""),
    }
    opened = source.checkpoint
    remarks = [
        *(f"{opened.index_file} {remark}" for remark in opened.remarks),
        *opened.notes_on_files(),
        *_stacked(source),
    ]
    if remarks or compiled:
        facts["notes"] = remarks
    if compiled:
        modules = source.checkpoint.modules
        served = {name: (fmt, modules[name]) for name, fmt in source.formats.items() if isinstance(fmt, Format)}
        half = list(half_only(served, source.facts))
        facts["notes"] = [*remarks, *half]
        facts["serve"] += " --dtype half" if half else ""
    if recorded is not None:
        if recorded.rest is not None:
            from ..ranks.merged import smallest_complete_degree

            facts["serve"] += f" {smallest_complete_degree(folder, recorded.ranks).options}"
        facts |= {
            "sources": [{"name": name, **entry._asdict()} for name, entry in recorded.sources.items()],
            "checksum": CHECKSUM,
            "layout": recorded.layout,
            "presplit": {name: entry.nbytes for name, entry in recorded.ranks.items()},
            "manifest_checksum": recorded.checksum,
            "unservable": recorded.unservable,
            "problems": recorded.head.get("problems", []),
        }
    return facts


def _stacked(source: Source) -> Iterator[str]:
    """Yields remarks on experts that are stored in one tensor a layer, which the layer map does not show."""
    modules, facts = source.checkpoint.modules, source.facts
    found: dict[str, list[str]] = defaultdict(list)
    for name, module in modules.items():
        if block_of_stacked(facts.family, name, [t.shape for t in module.tensors.values()], facts.experts):
            found[" + ".join(f"{t.dtype} {list(t.shape)}" for t in module.tensors.values())].append(name)
    for stored, names in found.items():
        nbytes = sum(modules[name].nbytes for name in names)
        yield (
            f"{some(compress(names))}: all experts of a layer in one tensor, {stored} ({human(nbytes)} in all); "
            "lines of a recipe cannot take one of them from elsewhere"
        )


def _facts(
    modules: Collection[ShownModule], family: Family, drafts: Collection[str]
) -> tuple[dict[str, Any], dict[Format, str]]:
    """The data of modules, and the name of each format. ``drafts``: those of draft layers, which no map shows."""
    by_format: dict[Format, list[ShownModule]] = defaultdict(list)
    for module in modules:
        by_format[module.format].append(module)
    names = name_formats(by_format)
    formats: list[dict[str, Any]] = []
    for fmt, members in by_format.items():
        parameters = sum(prod(module.shape) for module in members)
        nbytes = sum(module.nbytes for module in members)
        formats.append(
            {
                "name": names[fmt],
                **fmt.to_json(),
                "modules": len(members),
                "parameters": parameters,
                "bytes": nbytes,
                "bits_per_weight": round(8 * nbytes / parameters, 3) if parameters else None,
            }
        )
    parameters = sum(entry["parameters"] for entry in formats)
    nbytes = sum(entry["bytes"] for entry in formats)
    facts = {
        "modules": len(modules),
        "parameters": parameters,
        "bytes": nbytes,
        "fp16_bytes": 2 * parameters,
        "bits_per_weight": round(8 * nbytes / parameters, 3) if parameters else None,
        "compression": round(2 * parameters / nbytes, 3) if nbytes else None,
        "formats": formats,
        "layers": _layer_map([m for m in modules if m.name not in drafts], names, family),
    }
    return facts, names


def _layer_map(modules: Collection[ShownModule], names: Mapping[Format, str], family: Family) -> list[dict[str, Any]]:
    """For each decoder layer, projection -> format name -> number of modules; an expert counts once."""
    layers: dict[int, list[tuple[str, ShownModule]]] = defaultdict(list)
    for module in modules:
        layer, projection = family.place_of(module.name)
        if layer is not None:
            layers[layer].append((projection, module))
    return [{"layer": layer, "projections": projections(layers[layer], names, family)} for layer in sorted(layers)]
