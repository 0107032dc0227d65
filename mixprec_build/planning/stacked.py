"""Checks experts that a source stores in one tensor a layer, which no line of a recipe can take apart."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING

from ..families.expected import tower_of
from ..families.names import layer_prefix
from ..families.stacked import block_of_stacked
from ..patterns.compress import compress
from ..text import some
from .problems import Problems, Replacement

if TYPE_CHECKING:
    from ..checkpoint.typed import Source
    from ..recipe.sources import Sources
    from .choose import Chosen

__all__ = ["check_stacked", "why_kept", "why_missing"]


def _blocks_of(source: Source, names: Iterable[str] | None = None) -> dict[str, str]:
    """Module that stores all experts of a layer -> its block of experts, among ``names`` or all modules of a source."""
    facts = source.facts
    found = {}
    for name in source.checkpoint.modules if names is None else names:
        module = source.checkpoint.modules.get(name)
        shapes = [] if module is None else [tensor.shape for tensor in module.tensors.values()]
        block = block_of_stacked(facts.family, name, shapes, facts.experts)
        if block is not None:
            found[name] = block
    return found


def _source_with_experts_apart(sources: Sources, block: str) -> str | None:
    """A source that stores each expert of ``block`` in modules of its own."""
    having = (
        source.name
        for source in sources.by_name.values()
        if any(name.startswith(f"{block}.0.") for name in source.checkpoint.modules)
    )
    return next(having, None)


def check_stacked(chosen: Chosen, default: Source, sources: Sources, problems: Problems) -> None:
    """Adds to ``problems`` stacked experts that SGLang cannot load, and lines for experts that cannot apply to them."""
    facts, rules = sources.model.facts, chosen.rules
    names: dict[str, list[str]] = {}
    for name, choice in chosen.choices.items():
        names.setdefault(choice.source.name, []).append(name)
    for source_name, of_source in names.items():
        source = sources.by_name[source_name]
        blocks = _blocks_of(source, of_source)
        if not blocks:
            continue
        what = f"`{source_name}` keeps all experts of a layer in one tensor"
        apart = _source_with_experts_apart(sources, next(iter(blocks.values())))
        edit = () if apart is None or source is not default else _other_default(apart, blocks, chosen)
        instead = (
            "save it with each expert on its own"
            if apart is None
            else f"`{apart}` stores each expert on its own"
            if edit
            else f"take all experts from `{apart}`, which stores each on its own"
        )
        if facts.family.checked:
            problems.hard(
                f"{what}, and SGLang's class for {facts.model_type} has no parameter for such a tensor "
                f"({some(compress(blocks))}); {instead}",
                *edit,
                code="stacked_experts",
                modules=blocks,
            )
            continue
        missed: dict[int, list[str]] = {}
        for name in blocks:
            line = next((i for i in reversed(range(len(rules))) if rules[i][0].pattern.matches(name)), None)
            if line is not None and rules[line][1].name != source_name:
                missed.setdefault(line, []).append(name)
        for line, missing in missed.items():
            problems.soft(
                missing,
                f"{what}, which {rules[line][0]} does not reach: {instead}; lines that leave experts out are planned, "
                "too",
                *edit,
                code="stacked_experts",
            )


def why_kept(default: Source, names: Iterable[str], sources: Sources) -> tuple[str, list[str]]:
    """The reason why no source can be chosen for modules with all experts of a layer; and these, of ``names``."""
    blocks = _blocks_of(default, names)
    if not blocks:
        return "", []
    apart = _source_with_experts_apart(sources, next(iter(blocks.values())))
    instead = "" if apart is None else f"; it can with `default: {apart}`, which stores each expert on its own"
    return f"`{default.name}` keeps all experts of a layer in one tensor{instead}", list(blocks)


def _other_default(apart: str, blocks: Collection[str], chosen: Chosen) -> tuple[Replacement, list[str]]:
    """A fix that makes ``apart`` the default source, for ``blocks`` only: other modules keep their sources."""
    stay = [
        name
        for name, choice in chosen.choices.items()
        if choice.rule is None and name not in blocks and not chosen.roles[name].never_quantized
    ]
    return Replacement(apart, is_default=True), stay


def _under_another_prefix(source: Source, name: str) -> str | None:
    """The name of a module in a source that puts another prefix before its layers; None where it has no such module."""
    inner = layer_prefix(name)
    if not inner:
        return None
    start = inner.rstrip(".").rpartition(".")[0].rpartition(".")[2]  # "layers"
    tail = name[name.index(f"{start}.") :]
    there = (other for other in source.checkpoint.modules if other.endswith(f".{tail}") or other == tail)
    return next((other for other in there if tower_of(other) is None), None)


def why_missing(
    source: Source, default: Source, names: Sequence[str], chosen: Chosen, sources: Sources
) -> tuple[str, tuple[Replacement | None, list[str]] | None]:
    """Explains why ``source`` lacks modules, where stacked experts or another prefix are the reason.

    Returns the end of a sentence, and what resolves it: an edit, no edit, or None where the reason is another one.
    """
    elsewhere = _under_another_prefix(source, names[0])
    if elsewhere is not None:
        return (
            f": its names begin with another prefix, {names[0]} is {elsewhere} there. It was saved from another class "
            "of the same model; take a release with the same names"
        ), (None, [])
    what = "keeps all experts of a layer in one tensor"
    if any(names[0].startswith(f"{block}.") for block in {*_blocks_of(source).values()}):
        return f": `{source.name}` {what}", None
    blocks = _blocks_of(default, names)
    if len(blocks) < len(names):
        return "", None
    apart = _source_with_experts_apart(sources, next(iter(blocks.values())))
    why = f": `{default.name}` {what}, which no line can take apart"
    if apart is None:
        return why, None
    return f"{why}, and `{apart}` stores each expert on its own", _other_default(apart, blocks, chosen)
