"""Makes a :class:`Plan`, which says where every tensor comes from and which file it goes to. Writes nothing.

Each stage returns the input of the next: :mod:`.choose` the source of every module, :mod:`.collect` its tensors, check
them (:mod:`.complete`, :mod:`.servable` and others), lay them out in files, and account for every line and tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ..checkpoint.checkpoint import ValueReader
from ..checkpoint.declared import differences
from ..checkpoint.degree import Degree
from ..checkpoint.typed import Source
from ..errors import RecipeError, RefusedError, SplitError
from ..families.registry import checked_types
from ..formats.registry import kinds_of_word
from ..ranks.splitter import Splitter
from ..recipe.recipe import Recipe
from ..recipe.sources import Sources
from ..versions import beside
from .accounts import left_out, notes_on_heads, notes_on_rules
from .choose import Chosen, check_same_model, choose, with_followers
from .collect import collect, without_zero_biases
from .companions import companion_files
from .complete import check_complete, check_tied_head
from .drafts import check_draft_formats, check_drafts, planned_drafts
from .folding import Folding
from .lacking import check_biases, check_lacking
from .moved import check_moved
from .problems import Problem, Problems
from .releases import check_release
from .rules import half_only, offers
from .servable import check_servable
from .shards import lay_out
from .stacked import check_stacked
from .stored import as_stored
from .types import Plan, PlannedModule
from .untraced import check_untraced
from .weights import check_weights

__all__ = ["make_plan", "plan_modules"]


def make_plan(
    recipe: Recipe,
    sources: Sources,
    *,
    allow_unservable: bool = False,
    link: bool = False,
    check_all: bool = False,
    sglang: str | None = None,
) -> Plan:
    """Makes a plan and checks it.

    Args:
        allow_unservable: plan a mix even if SGLang could not serve it.
        link: plan links to source files of which every tensor is used.
        check_all: compare the weights of every quantized module with other sources', not of a sample.
        sglang: the release of SGLang whose rules the plan follows; by default see :func:`.versions.beside`.

    Raises:
        RecipeError: a line names a module that no source has, or a format that none or several have.
        SourceError: a module that is needed is damaged or in a format that is not supported.
        RefusedError: the mix is impossible, or SGLang could not serve it and ``allow_unservable`` is not set.
    """
    default, problems = sources.by_name[recipe.default], Problems(recipe)
    chosen = choose(recipe, sources)
    notes_on_configs = check_same_model(chosen, sources, problems)
    notes_on_checks: list[str] = []
    release, needs = sglang or beside(), dict[str, list[str]]()
    with ValueReader({s.name: s.checkpoint for s in sources.by_name.values()}) as reader:
        folding = Folding(chosen.choices, sources, reader)
        chosen = with_followers(chosen, folding, sources)
        collected = collect(chosen, default, sources, problems)
        modules = collected.modules
        check_stacked(chosen, default, sources, problems)
        if not problems:  # else the same modules would be reported twice
            mains = {name: module for name, module in modules.items() if not module.draft}
            notes_on_checks += check_complete(mains, sources.model.facts, _offered(sources), problems)
            notes_on_checks += check_drafts(modules, chosen, recipe, sources, problems)
        if not problems:
            check_lacking({name: module for name, module in modules.items() if not module.draft}, sources, problems)
            check_biases(modules, sources, reader, problems)
            modules = without_zero_biases(modules, default, sources, reader, problems)
            modules, remarks = as_stored(modules, reader)
            notes_on_checks += remarks
            check_tied_head(modules, sources, reader, problems)
            check_servable(modules, sources, reader, folding, problems)
            check_draft_formats(modules, sources, problems)
            needs = check_release(modules, sources, problems, release)
            notes_on_checks += check_untraced(modules, sources, folding, problems)
            check_moved(modules, sources, problems)
            notes_on_checks += folding.unseen()
        companion_files(sources.model)  # refuses what a build could not copy
        _refuse(problems, allow_unservable)
        notes_on_checks += check_weights(modules, sources, folding, problems, full=check_all)
        found = _refuse(problems, allow_unservable)
    quantized = {name: (m.format, m.stored) for name, m in modules.items() if m.format.quantized}
    notes_on_checks += half_only(quantized, sources.model.facts)
    splitters = list(_splitters(recipe, sources, modules))
    return Plan(
        recipe=recipe,
        sources=sources,
        modules=modules,
        shards=tuple(lay_out(modules, recipe.shard_size, sources if link else None)),
        rules=chosen.uses,
        left_out=tuple(left_out(modules, default, recipe, sources)),
        notes=(
            *_notes_on_sources(default, sources),
            *notes_on_configs,
            *chosen.notes,
            *collected.notes,
            *notes_on_checks,
            *notes_on_heads(modules, default, chosen, sources),
            *(remark for splitter, _ in splitters for remark in splitter.remarks()),
            *notes_on_rules(chosen, recipe, sources),
        ),
        problems=tuple(found),
        sglang=release,
        needs=needs,
        warnings=problems.warnings(),
        drafts=planned_drafts(modules.values(), chosen, recipe, sources),
        presplit={str(splitter.degree): nbytes for splitter, nbytes in splitters},
    )


def _refuse(problems: Problems, allow_unservable: bool) -> list[Problem]:
    """The problems that were found. Raises :class:`RefusedError` where any is not allowed."""
    found = problems.found()
    if any(p.hard for p in found) or (found and not allow_unservable):
        raise RefusedError(found)
    return found


def plan_modules(chosen: Chosen, recipe: Recipe, sources: Sources) -> Mapping[str, PlannedModule]:
    """Collects the modules that were chosen, whether SGLang could serve them or not. Norms follow no other module.

    Raises:
        SourceError: as :func:`make_plan`.
        RefusedError: the mix is impossible.
    """
    default, problems = sources.by_name[recipe.default], Problems(recipe)
    check_same_model(chosen, sources, problems)
    modules = collect(chosen, default, sources, problems).modules
    if not problems:
        with ValueReader({s.name: s.checkpoint for s in sources.by_name.values()}) as reader:
            modules = without_zero_biases(modules, default, sources, reader, problems)
    found = problems.found()
    if found:
        raise RefusedError(found)
    return modules


def _notes_on_declarations(source: Source) -> Iterator[str]:
    """Yields notes on declarations of a source that differ, where any of its modules is quantized."""
    declared = source.checkpoint.declared if any(fmt.quantized for fmt in source.distinct_formats) else ()
    for other in declared[1:]:
        if differ := "; ".join(differences(declared[0], other)):
            yield (
                f"`{source.name}`: {declared[0].described} and {other.described} declare its quantization differently "
                f"({differ}); each module is read by the one that its tensors agree with"
            )


def _notes_on_sources(default: Source, sources: Sources) -> Iterator[str]:
    for source in sources.by_name.values():
        index = source.checkpoint.path_of(source.checkpoint.index_file)
        yield from (f"`{source.name}`: {index} {remark}" for remark in source.checkpoint.remarks)
        yield from (f"`{source.name}`: {note}" for note in source.checkpoint.notes_on_files())
        yield from _notes_on_declarations(source)
        if source.checkpoint.offline is not None:
            yield f"`{source.name}` is read from the cache: {source.checkpoint.offline}"
    if not default.facts.family.checked:
        yield (
            f"model_type {default.facts.model_type!r} is not among the families checked against SGLang "
            f"({', '.join(checked_types())}); the common rules are used for what it fuses and leaves unquantized. "
            "`mixprec doctor` compares what is built with the SGLang that is installed"
        )


def _offered(sources: Sources) -> dict[str, set[str]]:
    """Source -> the modules that a line may take from it, including those in files that the hub's cache lacks."""
    found = {}
    for name, source in sources.by_name.items():
        has = source.checkpoint.modules.keys() | source.checkpoint.absent.keys()
        found[name] = {module for module in has if offers(source, [module])} if kinds_of_word(name) else has
    return found


def _splitters(
    recipe: Recipe, sources: Sources, modules: Mapping[str, PlannedModule]
) -> Iterator[tuple[Splitter, int]]:
    """Yields a splitter for each degree that the recipe asks for, and the bytes that it writes."""
    stored = {name: (module.format, module.stored) for name, module in modules.items()} if recipe.tp else {}
    for tp in recipe.tp:
        try:
            splitter = Splitter(stored, sources.model.facts, Degree(tp))
            yield splitter, splitter.total_bytes()
        except SplitError as error:
            raise RecipeError(f"tp {tp}: {error}", path=recipe.path, line=recipe.tp_line) from error
