"""Finds what SGLang could not serve before anything is written.

SGLang runs q/k/v and gate/up as one GEMM each, with one quantization method; its kernels have shape rules; and some
modules have no quantized path. A mix that breaks a rule would fail at start-up or, worse, load and compute nonsense.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import TYPE_CHECKING

from ..families.names import last_word, layer_of
from ..families.parts import Role
from ..families.unserved import why_unserved
from .problems import Problems
from .rules import (
    by_votes,
    can_serve_from,
    common_source,
    described,
    format_limits,
    missing_projections,
    origin,
    replacement,
    share_one_format,
    whole_expert,
)

if TYPE_CHECKING:
    from ..checkpoint.checkpoint import ValueReader
    from ..checkpoint.typed import Source
    from ..recipe.sources import Sources
    from .folding import Folding
    from .types import PlannedModule

__all__ = ["check_same_weights", "check_servable"]


def check_servable(
    modules: Mapping[str, PlannedModule],
    sources: Sources,
    reader: ValueReader,
    folding: Folding,
    problems: Problems,
) -> None:
    """Adds to ``problems`` all that SGLang's layers would not run as planned."""
    family, unserved = sources.family, why_unserved(sources.model.facts)
    if unserved is not None:
        problems.soft((), unserved, code="unserved_model")
        return
    fixed = folding.check(modules, problems)
    quantized = any(module.format.quantized for module in modules.values())
    for group, fused in family.fused_groups(modules if quantized else ()).items():
        around = [modules[member] for member in fused]
        for name, members in family.gemms_of(group, fused).items():
            parts = [modules[member] for member in members]
            if any(part.format.quantized for part in parts):
                _check_gemm(name, parts, around, sources, reader, problems, fixed)
                _check_never_quantized(parts, sources, problems)
                _check_compared(name, parts, modules, sources, problems)
        _check_whole(group, around, sources, problems)
        limit = missing_projections(group, around, family)
        if limit is not None:
            _refuse_all(around, limit, sources, problems, "incomplete_model")
        elif family.is_expert(group):
            limit = family.activation.in_layer(layer_of(group)).split_limit
            if limit is not None:
                _check_one_format(around, limit, sources, problems, fixed)
    check_same_weights(modules, sources, folding, problems)


def _check_gemm(
    name: str,
    parts: list[PlannedModule],
    around: Sequence[PlannedModule],
    sources: Sources,
    reader: ValueReader,
    problems: Problems,
    fixed: Set[str],
) -> None:
    """Adds to ``problems`` what prevents one GEMM.

    Args:
        around: all members of the fused group or expert that has ``parts``.
        fixed: modules that another problem's fix takes from one source; a second fix would undo it.
    """
    if len({part.format.fuses_as for part in parts}) > 1:
        what = "gate and up of one expert" if sources.family.is_expert(name) else f"parts of {name.rpartition('.')[2]}"
        owners = "; ".join(f"{last_word(part.name)} is {described(part.format)} from {origin(part)}" for part in parts)
        source = common_source(parts, sources, around)
        change = [part for part in parts if part.source != source]
        text = f"{what}, one GEMM in SGLang, must share a format, but {owners}"
        names = [part.name for part in parts]
        edit = replacement(source, change) if fixed.isdisjoint(names) else ()
        problems.soft(names, text, *edit, code="fused_formats")
        return
    for limit in format_limits(name, parts, reader, sources.family):
        _refuse_all(parts, limit, sources, problems, "kernel_limit")


def _check_whole(group: str, around: Sequence[PlannedModule], sources: Sources, problems: Problems) -> None:
    """Adds to ``problems`` an expert of several formats, of which one is for complete experts only."""
    whole = whole_expert(group, around, sources.family)
    if whole is None or not share_one_format(around, sources.family):
        return  # gate and up of two formats are refused by themselves
    owners = "; ".join(f"{last_word(part.name)} is {described(part.format)} from {origin(part)}" for part in around)
    source = common_source(around, sources)
    change = [part for part in around if part.source != source]
    text = f"SGLang runs gate, up and down of an expert in {whole.kind} as one, so they must share it, but {owners}"
    problems.soft([part.name for part in around], text, *replacement(source, change), code="fused_formats")


def _check_one_format(
    parts: list[PlannedModule], limit: str, sources: Sources, problems: Problems, fixed: Set[str]
) -> None:
    """Adds a problem if the projections of an expert, ``parts``, have several formats; ``limit`` says why not."""
    if len({part.format.fuses_as for part in parts}) < 2:
        return
    owners = "; ".join(f"{last_word(part.name)} is {described(part.format)} from {origin(part)}" for part in parts)
    source = common_source(parts, sources, parts)
    change = [part for part in parts if part.source != source]
    names = [part.name for part in parts]
    edit = replacement(source, change) if fixed.isdisjoint(names) else ()
    problems.soft(names, f"{limit}, and need one: {owners}", *edit, code="fused_formats")


def _refuse_all(parts: list[PlannedModule], limit: str, sources: Sources, problems: Problems, code: str) -> None:
    source = common_source(parts, sources, other_than=parts[0].source)
    text = f"{described(parts[0].format)} from {origin(parts[0])}: {limit}"
    problems.soft([part.name for part in parts], text, *replacement(source, parts), code=code)


def _check_never_quantized(parts: Sequence[PlannedModule], sources: Sources, problems: Problems) -> None:
    for module in parts:
        limit = sources.family.format_limit(module.name, module.role, module.format)
        if limit is not None:
            source = common_source(parts, sources)  # for all parts, which must still share a format
            text = f"{described(module.format)} from {origin(module)}: {limit}"
            change = [part for part in parts if part.source != source]
            problems.soft([module.name], text, *replacement(source, change), code="role_limit")


def _check_compared(
    name: str,
    parts: Sequence[PlannedModule],
    modules: Mapping[str, PlannedModule],
    sources: Sources,
    problems: Problems,
) -> None:
    compared = sources.family.compared_with(name)
    down = None if compared is None else modules.get(compared[0])
    if compared is None or down is None or len({part.format for part in parts}) > 1:
        return
    find_limit = compared[1].limit
    limit = find_limit(parts[0].format, down.format)
    if limit is None:
        return
    trio = [*parts, down]

    def fits(source: Source) -> bool:
        if not can_serve_from(source, trio, sources.family):
            return False
        return find_limit(*(source.format_of(part.name) for part in (parts[0], down))) is None

    chosen = next((source.name for source in by_votes(trio, sources) if fits(source)), None)
    text = f"{described(parts[0].format)} from {origin(parts[0])}: {limit}"
    change = [part for part in trio if part.source != chosen]
    problems.soft([part.name for part in trio], text, *replacement(chosen, change), code="shared_experts")


def check_same_weights(
    modules: Mapping[str, PlannedModule], sources: Sources, folding: Folding, problems: Problems
) -> None:
    """Adds to ``problems`` sources whose norms differ, which are of different weights.

    :mod:`.folding` checks norms that scales may be folded into.
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
                code="different_weights",
            )
