"""Checks that the output has every weight that the model of its config.json needs.

SGLang starts even if nothing is loaded into a parameter, which then has arbitrary values. A model needs an embedding, a
head unless it is tied, every decoder layer with all modules that layers of its kind have, every expert, and the last
norm.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from ..families.base import Family
from ..families.expected import layers_due, ties_head
from ..families.facts import ModelFacts
from ..families.names import last_word, numbered_part
from ..families.parts import Role
from ..patterns.compress import compress
from ..text import counted, some
from .problems import Problems, Replacement

if TYPE_CHECKING:
    from ..checkpoint.checkpoint import ValueReader
    from ..recipe.sources import Sources
    from .types import PlannedModule

__all__ = ["check_complete", "check_tied_head", "expert_gaps", "kinds_of_blocks", "modules_within"]


_LAYER = re.compile(r"(?P<stack>(?:[^.]+\.)*(?:layers|h|blocks|block))\.(?P<number>\d+)\.(?P<inner>.+)")
_BESIDE_THE_DECODER = re.compile(r"(^|\.|_)(mtp|visual|vision|audio|speech|image|encoder|tower|draft|eagle)", re.I)
_BUFFER = re.compile(r"(.+\.)?(inv_freq|cos_cached|sin_cached|masked_bias|[kvq]_scale|kv_scale|[kvq]_zero_point)")
_MOST_EXPERTS = 65_536


def check_complete(
    modules: Mapping[str, PlannedModule],
    facts: ModelFacts,
    offered: Mapping[str, Collection[str]],
    problems: Problems,
) -> list[str]:
    """Adds to ``problems`` what is certainly missing. Returns notes on what may be missing.

    Args:
        modules: the planned output, without draft layers.
        facts: of the ``config.json`` that it is served with.
        offered: source -> the modules that a line may take from it.
    """
    family, notes = facts.family, list[str]()
    _check_ends(modules, facts, offered, problems)
    stack, layers = _decoder(modules, family)
    if layers:
        due = layers_due(facts)
        if due is not None:
            _check_layers(stack, layers, due, problems)
            layers = {number: inner for number, inner in layers.items() if number in due}
        notes += _check_peers(stack, layers, offered, family, problems)
        if family.checked and not any(last_word(n) in family.last_norms for n in modules if not _LAYER.fullmatch(n)):
            norm = f"{_parent(stack)}{family.last_norms[0]}"
            problems.hard(f"no source of the mix has the norm after the last layer ({norm})", code="incomplete_model")
    _check_experts(modules, facts, problems)
    return notes


def check_tied_head(
    modules: Mapping[str, PlannedModule], sources: Sources, reader: ValueReader, problems: Problems
) -> None:
    """Adds to ``problems`` a head that the config.json of ``model:`` ties to the embedding but that differs from it.

    SGLang ignores a tied head, which is right only where it equals the embedding.
    """
    if not ties_head(sources.model.facts) or sources.model.facts.expects_head is None:
        return

    def first(role: Role) -> PlannedModule | None:
        return next((m for m in modules.values() if m.role is role and not _is_aside(m.name)), None)

    head, embedding = first(Role.HEAD), first(Role.EMBEDDING)
    if head is None or embedding is None:
        return
    values = [
        None if "weight" not in module.tensors else reader.read(module.source, module.tensors["weight"].info)
        for module in (head, embedding)
    ]
    if values[0] is None or values[1] is None:
        own = sources.by_name[head.source].facts.expects_head is True
    else:
        ours, theirs = (value.astype("float32") for value in values if value is not None)
        size = min(len(ours), len(theirs))
        own = head.shape[1:] != embedding.shape[1:] or bool(
            abs(ours[:size] - theirs[:size]).max(initial=0) > 2**-7 * abs(theirs[:size]).max(initial=0)
        )
    if own:
        problems.hard(
            f"config.json of `model:` ties the head to the embedding (tie_word_embeddings), but {head.name} from "
            f"`{head.source}` holds other values than {embedding.name}: SGLang would leave it out; point `model:` to "
            "the config.json that these weights came with, which says tie_word_embeddings false",
            code="different_models",
            modules=[head.name, embedding.name],
        )


def _check_ends(
    modules: Mapping[str, PlannedModule],
    facts: ModelFacts,
    offered: Mapping[str, Collection[str]],
    problems: Problems,
) -> None:
    vocabulary, hidden, family = facts.vocabulary, facts.hidden_size, facts.family
    if vocabulary is None or hidden is None:
        return

    def of_role(role: Role) -> list[PlannedModule]:
        return [m for m in modules.values() if m.role is role and not _is_aside(m.name)]

    embeddings, heads = of_role(Role.EMBEDDING), of_role(Role.HEAD)
    # An embedding or head may have an unknown name: any table of the vocabulary outside of layers counts as one.
    tables = [
        m.name
        for m in modules.values()
        if m.role not in (Role.EMBEDDING, Role.HEAD) and m.shape == (vocabulary, hidden) and not _is_aside(m.name)
    ]
    lacking = (not embeddings) + (not heads and facts.expects_head is True)
    if lacking > len(tables):
        if not embeddings:
            _report_lack(f"an embedding ({family.embedding})", last_word(family.embedding), offered, problems)
        if not heads and facts.expects_head:
            why = f"an {family.head}, which config.json does not tie to the embedding (tie_word_embeddings)"
            _report_lack(why, last_word(family.head), offered, problems)
    for module in (*embeddings, *heads):
        if len(module.shape) == 2 and module.shape[0] != vocabulary:
            problems.hard(
                f"{module.name} from `{module.source}` has {module.shape[0]} rows, and config.json of `model:` says "
                f"vocab_size {vocabulary}; take it from a source whose vocabulary has that size, or `model:` from one "
                "whose config.json says so",
                code="different_models",
                modules=[module.name],
            )


def _report_lack(what: str, word: str, offered: Mapping[str, Collection[str]], problems: Problems) -> None:
    """Adds to ``problems`` a missing module whose name ends with ``word``, and the source that has one."""
    having = (
        (source, name)
        for source, names in offered.items()
        for name in names
        if name.endswith(word) and not _is_aside(name)  # draft layers may have a copy
    )
    source, name = next(having, (None, ""))
    text = f"the model needs {what}, and the mix has none"
    if source is None:
        problems.hard(f"{text}; add a source that has it, and name it in a line of its own", code="incomplete_model")
    else:
        problems.hard(text, Replacement(source), [name], code="incomplete_model", modules=[name])


def _is_aside(name: str) -> bool:
    return _LAYER.fullmatch(name) is not None or _BESIDE_THE_DECODER.search(name) is not None


def _parent(stack: str) -> str:
    return stack.rpartition(".")[0] and stack.rpartition(".")[0] + "."


def _stacks(names: Iterable[str], family: Family) -> dict[str, dict[int, set[str]]]:
    """Stack of decoder layers -> layer -> its modules, all experts as one. Vision towers and drafts are left out."""
    stacks: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    numbered = _experts_as_one(family)
    for name in names:
        found = _LAYER.fullmatch(name)
        if found is None or _BESIDE_THE_DECODER.search(found["stack"]) or _BUFFER.fullmatch(name):
            continue
        inner = numbered.sub(rf"\1{family.experts}", found["inner"])
        stacks[found["stack"]][int(found["number"])].add(inner)
    return stacks


def _check_layers(stack: str, layers: Mapping[int, set[str]], due: range, problems: Problems) -> None:
    missing = [f"{stack}.{number}" for number in due if number not in layers]
    if missing:
        problems.hard(
            f"config.json says num_hidden_layers {len(due)}, and the mix has nothing of {some(compress(missing))}; "
            "point `default:` to a checkpoint that has all layers, or `model:` to the config.json of this one",
            code="incomplete_model",
            modules=missing,
        )


def _check_peers(
    stack: str,
    layers: Mapping[int, set[str]],
    offered: Mapping[str, Collection[str]],
    family: Family,
    problems: Problems,
) -> Iterator[str]:
    """Adds to ``problems`` layers that lack modules which as many other layers have, and have nothing else instead.

    Yields notes instead where no source has them, in families that were not compared with SGLang.
    """
    trees = {number: _children(inner) for number, inner in layers.items()}
    kinds: dict[str, dict[frozenset[str], list[int]]] = defaultdict(lambda: defaultdict(list))
    for number, tree in trees.items():
        for node, children in tree.items():
            kinds[node][frozenset(children)].append(number)
    lacking: dict[str, None] = {}
    for node, by_children in kinds.items():
        for have, numbers in by_children.items():
            fuller = [other for other in by_children if have < other and len(by_children[other]) >= len(numbers)]
            if fuller:
                more = max(fuller, key=lambda other: len(by_children[other])) - have
                for child in sorted(more - family.in_some_layers):
                    path = f"{node}.{child}" if node else child
                    lacking.update(dict.fromkeys(f"{stack}.{number}.{path}" for number in numbers))
    if not lacking:
        return

    def having(place: str) -> str | None:
        return next(
            (s for s, names in offered.items() if place in names or any(n.startswith(place + ".") for n in names)), None
        )

    elsewhere = {place: source for place in lacking if (source := having(place)) is not None}
    for source in dict.fromkeys(elsewhere.values()):
        places = [place for place in elsewhere if elsewhere[place] == source]
        problems.hard(
            f"{some(compress(places))}: the mix lacks {_it(places)}, other layers have {_it(places)}, and so has "
            f"`{source}`; make it the default, or name {_it(places)} in lines of their own",
            Replacement(source),
            [name for name in offered[source] if any(name == p or name.startswith(f"{p}.") for p in places)],
            code="incomplete_model",
            modules=places,
        )
    rest = [place for place in lacking if place not in elsewhere]
    if rest and family.checked:
        problems.hard(
            f"{some(compress(rest))}: no source of the mix has {_it(rest)}, which other layers have; fetch the default "
            "source again, or take a complete one",
            code="incomplete_model",
            modules=rest,
        )
    elif rest:
        yield f"{some(compress(rest))}: other layers have {_it(rest)}, these have not"


def _it(places: Collection[str]) -> str:
    return "it" if len(places) == 1 else "them"


def kinds_of_blocks(modules: Mapping[str, PlannedModule], facts: ModelFacts) -> dict[str, set[frozenset[str]]]:
    """Path of a block within a decoder layer -> the names directly below it, for each kind of layer."""
    _, layers = _decoder(modules, facts.family)
    due = layers_due(facts)
    kinds: dict[str, set[frozenset[str]]] = defaultdict(set)
    for number, inner in layers.items():
        for node, children in _children(inner).items() if due is None or number in due else ():
            kinds[node].add(frozenset(children))
    return kinds


def modules_within(inner: Iterable[str], family: Family) -> dict[str, set[str]]:
    """The same of one layer with the modules ``inner``."""
    return _children(_experts_as_one(family).sub(rf"\1{family.experts}", name) for name in inner)


def _experts_as_one(family: Family) -> re.Pattern[str]:
    return re.compile(rf"(^|\.){re.escape(family.experts)}\.\d+\..+")


def _decoder(modules: Mapping[str, PlannedModule], family: Family) -> tuple[str, dict[int, set[str]]]:
    """The largest stack of decoder layers, and its layers with their modules; none where there is none."""
    # A bare parameter may be in some layers only, such as a hash table of experts or a router's bias.
    stacks = _stacks((name for name, module in modules.items() if "" not in module.tensors), family)
    if not stacks:
        return "", {}
    stack = max(stacks, key=lambda name: sum(map(len, stacks[name].values())))
    return stack, stacks[stack]


def _children(inner: Iterable[str]) -> dict[str, set[str]]:
    """Path of a block within a layer -> the names directly below it."""
    tree: dict[str, set[str]] = defaultdict(set)
    for name in inner:
        parts = name.split(".")
        for depth in range(len(parts)):
            tree[".".join(parts[:depth])].add(parts[depth])
    return tree


def _check_experts(modules: Iterable[str], facts: ModelFacts, problems: Problems) -> None:
    missing, beyond, most = expert_gaps((n for n in modules if not _BESIDE_THE_DECODER.search(n)), facts)
    if missing:
        problems.hard(
            f"the model has {counted(most, 'expert')} a layer, and the mix has nothing of {some(compress(missing))}; "
            "take them from a checkpoint that has all experts",
            code="incomplete_model",
            modules=missing,
        )
    if beyond:
        problems.hard(
            f"config.json says {counted(most, 'expert')} a layer, and the mix has {some(compress(beyond))} beside "
            "them; point `model:` to the config.json that these weights came with",
            code="different_models",
            modules=beyond,
        )


def expert_gaps(modules: Iterable[str], facts: ModelFacts) -> tuple[list[str], list[str], int]:
    """Experts and projections that layers lack, experts that they have beyond their number, and that number."""
    experts: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    ending = f".{facts.family.experts}"
    for name in modules:
        found = numbered_part(name)
        if found is not None and found[0].endswith(ending):
            layer, number, part = found
            experts[layer][number].add(part)
    count = facts.experts
    missing, beyond, most = [], [], 0
    for layer, numbers in experts.items():
        due = range(count) if count is not None and count <= _MOST_EXPERTS else range(max(numbers) + 1)
        parts = set().union(*numbers.values())
        missing += [f"{layer}.{number}" for number in due if number not in numbers]
        missing += [f"{layer}.{n}.{part}" for n, have in numbers.items() for part in sorted(parts - have)]
        beyond += [f"{layer}.{number}" for number in numbers if number not in due]
        most = max(most, len(due))
    return missing, beyond, most
