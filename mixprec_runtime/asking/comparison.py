"""Compares how SGLang's class loads a checkpoint with the rules of the model's family."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from mixprec_build.families.base import Family
from mixprec_build.families.draft_class import Draft
from mixprec_build.families.expected import is_expected, tower_of
from mixprec_build.families.facts import ModelFacts
from mixprec_build.families.names import last_word
from mixprec_build.families.parts import Role
from mixprec_build.patterns.compress import compress
from mixprec_build.text import some

from ..loading.strict import OF_THE_MODEL
from .answer import Answer

__all__ = ["Disagreement", "Module", "compare"]


class Module(NamedTuple):
    """A module of the checkpoint, with its unquantized tensors."""

    shape: tuple[int, ...]
    leaves: tuple[str, ...]
    """Last words of its tensors, empty for a bare parameter."""
    quantized: bool
    """Whether it may be quantized: all linears of a family, or those that are in one checkpoint."""


class Disagreement(NamedTuple):
    """A difference between the class and the family."""

    serious: bool
    """Whether a server could not load the checkpoint."""
    text: str


class _Any:
    """A quantized format that no rule of a family refuses."""

    kind = "any"
    quantized = True
    has_weight = True
    rows_in_fused = 1
    row_join_limit = None
    fp8_blocks = None

    def shared_experts_limit(self, down: object) -> None:
        return None


def compare(answer: Answer, facts: ModelFacts, modules: Mapping[str, Module]) -> list[Disagreement]:
    """The differences: tensors that the class drops, parameters that it does not fill, and linears that it joins, names
    or quantizes in another way than the family. Of a class for draft layers, these only."""
    family, draft = facts.family, Draft.of(facts, answer.model)
    if draft is not None:
        modules = {name: module for name, module in modules.items() if draft.expects(name)}
    if family.needs_own_loader:  # the class cannot load single experts
        modules = {name: module for name, module in modules.items() if family.expert_of(name) is None}
    roles = {name: family.role_of(name, module.shape, module.leaves) for name, module in modules.items()}
    lost = [*_lost(answer, facts, modules, draft)]
    found = [Disagreement(answer.stopped is None, text) for text in _dropped(answer, lost)]
    if answer.stopped is None:
        replaced = frozenset[str]() if draft is None else OF_THE_MODEL
        found += [Disagreement(True, text) for text in _unfilled(answer, replaced)]
    partial = [name for name in answer.partial if not name.endswith(family.taken_in_part)]
    if partial:
        found.append(Disagreement(True, f"{answer.model} loads only a part of {some(compress(partial))}"))
    found += [Disagreement(False, text) for text in _misplaced(answer, family, modules, roles, draft)]
    found += [Disagreement(True, text) for text in _not_offered(answer, family, modules, roles)]
    found += [Disagreement(True, text) for text in _moved(answer, family, modules, roles)]
    return found


def _tensors(name: str, module: Module) -> Iterator[str]:
    return (f"{name}.{leaf}" if leaf else name for leaf in module.leaves)


def _lost(
    answer: Answer, facts: ModelFacts, modules: Mapping[str, Module], draft: Draft | None = None
) -> Iterator[str]:
    """Tensors that are not copied, although the model needs them."""
    names = [tensor for name, module in modules.items() for tensor in _tensors(name, module)]
    # SGLang makes no encoders where it serves text only.
    without_towers = not any(tower_of(name) is not None for name in answer.reached)
    for name in names:
        expected = draft is not None or is_expected(name, facts)
        expected = expected and not (without_towers and tower_of(name) is not None)
        if expected and name not in answer.reached:
            yield name


def _dropped(answer: Answer, lost: list[str]) -> Iterator[str]:
    if lost and answer.stopped is not None:
        yield f"{answer.model} could not load {some(compress(lost))} here: {answer.stopped}"
    elif lost:
        yield f"{answer.model} has no parameter for {some(compress(lost))}"


def _unfilled(answer: Answer, replaced: frozenset[str]) -> Iterator[str]:
    filled = {parameter for parameters in answer.reached.values() for parameter in parameters}
    empty = sorted(answer.parameters - filled - replaced)
    if empty:
        yield f"nothing of the checkpoint goes into {some(compress(empty))} of {answer.model}"


def _layers_of(family: Family, modules: Iterable[str], draft: Draft | None) -> dict[str, str]:
    """Module -> SGLang's layer for it, by the rules of the family."""
    layers = {}
    singles = []
    for name in modules:
        expert, stacked = family.expert_of(name), family.stacked_experts_of(f"{name}.weight")
        if stacked is not None:
            layers[name] = family.sglang_name(stacked.block_of(f"{name}.weight", family.experts) or name)
        elif expert is None:
            singles.append(name)
        else:
            layers[name] = family.sglang_name(expert[0])
    for joined, members in family.joined_groups(singles).items():
        layers |= dict.fromkeys(members, family.sglang_name(joined))
    return layers if draft is None else {name: draft.sglang_name(layer) for name, layer in layers.items()}


def _reached_layers(answer: Answer, name: str, module: Module) -> set[str]:
    return {
        parameter.rpartition(".")[0]
        for tensor in _tensors(name, module)
        for parameter in answer.reached.get(tensor, ())
    }


def _misplaced(
    answer: Answer,
    family: Family,
    modules: Mapping[str, Module],
    roles: Mapping[str, Role],
    draft: Draft | None,
) -> Iterator[str]:
    compared = [name for name, role in roles.items() if role is not Role.PARAMETER]
    wrong: dict[str, list[str]] = {}
    for name, layer in _layers_of(family, compared, draft).items():
        reached = _reached_layers(answer, name, modules[name])
        head = family.sglang_name(family.head)
        if (reached and layer not in reached) or reached - {layer, head}:
            wrong.setdefault(f"{last_word(sorted(reached)[0])}, and not into {last_word(layer)}", []).append(name)
    for where, names in wrong.items():
        yield f"{answer.model} loads {some(compress(names))} into {where} as the rules for this model say"


def _not_offered(
    answer: Answer, family: Family, modules: Mapping[str, Module], roles: Mapping[str, Role]
) -> Iterator[str]:
    never = []
    for name, role in roles.items():
        if role not in (Role.LINEAR, Role.EXPERT) or not modules[name].quantized:
            continue
        layers = _reached_layers(answer, name, modules[name])
        if layers and not layers & answer.offered and family.format_limit(name, role, _Any()) is None:
            never.append(name)
    if never:
        unquantized = "without a quantization config: they can be served unquantized"
        yield f"{answer.model} makes {some(compress(never))} {unquantized}"


def _moved(answer: Answer, family: Family, modules: Mapping[str, Module], roles: Mapping[str, Role]) -> Iterator[str]:
    moved = [
        name
        for name, role in roles.items()
        if role in (Role.LINEAR, Role.EXPERT)
        and modules[name].quantized
        and any(tensor in answer.moved for tensor in _tensors(name, modules[name]))
        and not any(move.modules.fullmatch(name) for move in family.moved)
    ]
    if moved:
        unquantized = "as it loads them: they can be served unquantized"
        yield f"{answer.model} moves values of {some(compress(moved))} {unquantized}"
