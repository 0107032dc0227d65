"""Checks experts that a source stores in one tensor a layer, which no line of a recipe can take apart."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from ..families.expected import tower_of
from ..families.names import layer_prefix
from ..families.stacked import block_of_stacked
from ..patterns.compress import compress
from ..text import some
from .problems import Problems

if TYPE_CHECKING:
    from ..checkpoint.typed import Source
    from ..recipe.sources import Sources
    from .choose import Chosen

__all__ = ["check_stacked", "why_missing"]


def _blocks_of(source: Source, names: Iterable[str] | None = None) -> dict[str, str]:
    """Module that stores all experts of a layer -> its block of experts, among ``names`` or all modules of a source."""
    facts = source.facts
    found = {}
    for name in source.checkpoint.modules if names is None else names:
        module = source.checkpoint.modules.get(name)
        shapes = () if module is None else (tensor.shape for tensor in module.tensors.values())
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


def check_stacked(
    chosen: Chosen,
    sources: Sources,
    problems: Problems,
) -> None:
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
        instead = (
            "save it with each expert on its own"
            if apart is None
            else f"make `{apart}`, which stores each expert on its own, the default"
        )
        if facts.family.checked:
            problems.hard(
                f"{what}, and SGLang's class for {facts.model_type} has no parameter for such a tensor "
                f"({some(compress(blocks))}); {instead}",
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
                f"{what}, which {rules[line][0]} does not reach: {instead}, or write lines that leave experts out",
                code="stacked_experts",
            )


def _under_another_prefix(source: Source, name: str) -> str | None:
    """The name of a module in a source that puts another prefix before its layers; None where it has no such module."""
    inner = layer_prefix(name)
    if not inner:
        return None
    start = inner.rstrip(".").rpartition(".")[0].rpartition(".")[2]  # "layers"
    tail = name[name.index(f"{start}.") :]
    there = (other for other in source.checkpoint.modules if other.endswith(f".{tail}") or other == tail)
    return next((other for other in there if tower_of(other) is None), None)


def why_missing(source: Source, default: Source, names: Sequence[str], sources: Sources) -> tuple[str, bool]:
    """Explains why ``source`` lacks modules, where stacked experts or another prefix are the reason.

    Returns the end of a sentence, and whether it says what to do instead.
    """
    elsewhere = _under_another_prefix(source, names[0])
    if elsewhere is not None:
        return (
            f": its names begin with another prefix, {names[0]} is {elsewhere} there. It was saved from another class "
            "of the same model; take a release with the same names"
        ), True
    what = "keeps all experts of a layer in one tensor"
    if any(names[0].startswith(f"{block}.") for block in {*_blocks_of(source).values()}):
        return f": `{source.name}` {what}", False
    blocks = _blocks_of(default, names)
    if len(blocks) < len(names):
        return "", False
    apart = _source_with_experts_apart(sources, next(iter(blocks.values())))
    instead = f"; make `{apart}`, which stores each expert on its own, the default" if apart is not None else ""
    return f": `{default.name}` {what}, which no line can take apart{instead}", apart is not None
