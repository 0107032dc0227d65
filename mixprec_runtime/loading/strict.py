"""Checks that SGLang's loader loads every tensor and fills every parameter.

SGLang's models drop tensors without a parameter, some silently, and serve uninitialized memory where no tensor was
loaded. Here tensors are a subclass of ``torch.Tensor`` that keeps their names through views, casts and concatenations,
and reports each copy into a parameter. After loading, every tensor must have been copied, and every element of every
parameter must have been written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from math import prod
from typing import Any

import torch
from torch.nn import Module

from mixprec_build.checkpoint.manifest import TensorEntry
from mixprec_build.families.draft_class import Draft
from mixprec_build.families.expected import is_expected, tower_of
from mixprec_build.families.facts import ModelFacts
from mixprec_build.families.names import layer_of, numbered_part
from mixprec_build.formats.names import name_forms
from mixprec_build.patterns.compress import compress
from mixprec_build.text import some

from ..formats.lm_head import filled_elements
from ..formats.places import local_places
from ..formats.registry import served
from ..native import format_of
from .ledger import Convert, Ledger, LoadError

__all__ = [
    "OF_THE_MODEL",
    "draft_of",
    "expected_on_this_rank",
    "has_no_towers",
    "incomplete",
    "load_strictly",
    "may_be_empty",
]


OF_THE_MODEL = frozenset({"model.embed_tokens.weight", "lm_head.weight"})
"""Parameters of a class for draft layers that SGLang replaces by the model's (``set_embed_and_head``)."""


def draft_of(model: Module) -> Draft | None:
    """The draft layers that ``model``, SGLang's class for them, is made of; None for other models."""
    return Draft.of(ModelFacts.of_loaded(getattr(model, "config", None)), type(model).__name__)


def load_strictly(
    model: Module,
    load_weights: Callable[..., Any],
    weights: Iterable[tuple[str, torch.Tensor]],
    declared: Mapping[str, TensorEntry],
    convert: Convert = lambda name, tensor: tensor,
) -> Any:
    """Returns ``load_weights(weights)``, after a check that it was complete.

    Args:
        model: the model whose parameters are filled.
        load_weights: its method, or a function around it.
        weights: names and tensors of the checkpoint's files.
        declared: the tensors that the manifest lists, by name.
        convert: returns a tensor, by its name, in the dtype that SGLang's loaders take.

    Raises:
        LoadError: tensors were lost, changed or cast, or parameters were not filled; the message names them.
    """
    ledger = Ledger(declared, model.named_parameters())
    try:
        result = load_weights(ledger.follow(weights, convert))
    except KeyError as error:
        raise LoadError(
            f"SGLang's {type(model).__name__} has no parameter {error}: the layer was not made in the format that the "
            "checkpoint declares"
        ) from error
    lost, unfilled = incomplete(ledger, model)
    problems = []
    if lost:
        missing = [name for name in lost if name not in ledger.arrived]
        what = "not in its files" if missing else "dropped by SGLang's model, or not loaded in full"
        problems.append(f"{_listed(missing or lost)}: {what}")
    if unfilled:
        problems.append(f"{_listed(unfilled)}: parameters that were not filled")
    if problems:
        raise LoadError(f"the checkpoint was not loaded completely: {'; '.join(problems)}")
    return result


def _filled_rows(module: Any) -> Iterator[tuple[str, int]]:
    """Yields the parameters of an embedding or head, and how many of their elements are filled from the checkpoint."""
    fmt = format_of(module)
    if fmt is not None:
        yield from filled_elements(module, fmt)
    elif hasattr(module, "weight"):
        yield "weight", module.shard_indices.num_org_elements * prod(module.weight.shape[1:])


def incomplete(ledger: Ledger, model: Module) -> tuple[list[str], list[str]]:
    """Tensors that this rank should have taken more of, and parameters that were not filled."""
    from sglang.srt.layers.vocab_parallel_embedding import VocabParallelEmbedding
    from sglang.srt.runtime_context import get_parallel

    belongs, ranks = expected_on_this_rank(model), get_parallel().tp_size
    # Vocabularies are padded: no tensor fills the padding, and the last ranks take fewer rows than others.
    vocabularies = {path: m for path, m in model.named_modules() if isinstance(m, VocabParallelEmbedding)}
    padded = {f"{path}.{leaf}": due for path, module in vocabularies.items() for leaf, due in _filled_rows(module)}
    # Encoders' have other beginnings in the checkpoint.
    ends = tuple(f".{path}" for path in vocabularies) if ranks > 1 else ()
    in_part = ModelFacts.of_loaded(getattr(model, "config", None)).family.taken_in_part
    lost = [
        name
        for name in ledger.unused(ranks)
        if belongs(name)
        and not (ends and f".{name.rpartition('.')[0]}".endswith(ends))
        and not (name.endswith(in_part) and ledger.used[name])
    ]
    empty = may_be_empty(model)
    return lost, [name for name in ledger.unfilled(padded) if not empty(name)]


def _listed(names: list[str]) -> str:
    return f"{len(names)} tensors ({some(compress(names))})" if len(names) > 1 else names[0]


def may_be_empty(model: Module) -> Callable[[str], bool]:
    """Returns a predicate for the names of parameters that need no tensor, by the formats of their layers."""
    formats = {path: fmt for path, module in model.named_modules() if (fmt := format_of(module)) is not None}
    replaced = frozenset[str]() if draft_of(model) is None else OF_THE_MODEL

    def empty(parameter: str) -> bool:
        path, _, leaf = parameter.rpartition(".")
        if parameter in replaced:
            return True
        if leaf in ("k_scale", "v_scale"):  # SGLang recognizes one that was not filled, and uses the other for both
            return True
        fmt = formats.get(path)
        return fmt is not None and served(fmt).may_be_empty(leaf, fmt)

    return empty


def expected_on_this_rank(model: Module) -> Callable[[str], bool]:
    """Returns a predicate for the names of tensors that ``model`` must load on this rank."""
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
    from sglang.srt.runtime_context import get_parallel

    facts = ModelFacts.of_loaded(getattr(model, "config", None))
    inner: Any = getattr(model, "model", model)
    end = getattr(inner, "end_layer", facts.layers)
    stage = None if end is None else range(getattr(inner, "start_layer", 0), end)
    without_towers = has_no_towers(model)
    moe = {name: module for name, module in model.named_modules() if isinstance(module, FusedMoE)}
    draft = draft_of(model)

    def belongs(name: str) -> bool:
        if draft is not None:
            if not draft.expects(name):
                return False
        elif not is_expected(name, facts, stage) or (without_towers and tower_of(name) is not None):
            return False
        elif layer_of(name) is None:
            return bool(get_parallel().pp_size == 1)  # with stages, only the first or last has it
        part = numbered_part(name.rpartition(".")[0])
        # The family is that of the config that the class keeps, perhaps of its decoder alone.
        block_name = "" if part is None else facts.family.sglang_name(part[0])
        forms = () if part is None else name_forms(block_name if draft is None else draft.sglang_name(block_name))
        block = next((form for form in forms if form in moe), None)
        if part is not None and block is not None:
            return bool(local_places(moe[block], part[1]))
        return True

    return belongs


def has_no_towers(model: Module) -> bool:
    """Whether SGLang serves text only: the attributes of all encoders (of images or sound) are None.

    See models/mllama4.py and models/inkling.py.
    """
    none = any(value is None and tower_of(f"{name}.weight") for name, value in vars(model).items())
    return none and not any(tower_of(f"{name}.weight") for name, _ in model.named_children())
