"""Nothing is lost on the way from the checkpoint to the GPU.

SGLang's models drop a tensor that finds no parameter, some with a warning and some without a word, and serve
whatever lay in a parameter that none was loaded into. Here tensors are followed while a model loads them: they
arrive as a subclass of ``torch.Tensor`` that remembers its names in the checkpoint through every view, cast and
concatenation, and notes each parameter that it is copied into. Afterwards every tensor must have been copied
somewhere, and every element of every parameter must have been written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from math import prod
from typing import Any

import torch
from torch.nn import Module

from mixprec_build.checkpoint.manifest import TensorEntry
from mixprec_build.families.expected import is_buffer, left_out_of_builds, tower_of
from mixprec_build.families.facts import ModelFacts
from mixprec_build.families.names import layer_of, numbered_part
from mixprec_build.patterns.compress import compress
from mixprec_build.text import some

from ..formats.lm_head import filled_elements
from ..formats.registry import served
from ..native import format_of
from .ledger import Ledger, LoadError

__all__ = ["expected_on_this_rank", "load_strictly", "may_be_empty"]


def load_strictly(
    model: Module,
    load_weights: Callable[..., Any],
    weights: Iterable[tuple[str, torch.Tensor]],
    declared: Mapping[str, TensorEntry],
) -> Any:
    """``model.load_weights(weights)``, and the check that all of it arrived.

    Raises:
        LoadError: names the tensors that were lost and the parameters that were not filled.
    """
    ledger = Ledger(declared, model.named_parameters())
    try:
        result = load_weights(ledger.follow(weights))
    except KeyError as error:
        raise LoadError(
            f"SGLang's {type(model).__name__} has no parameter {error}: the layer was not made in the format that the "
            "checkpoint declares"
        ) from error
    from sglang.srt.layers.vocab_parallel_embedding import VocabParallelEmbedding
    from sglang.srt.runtime_context import get_parallel

    belongs, ranks = expected_on_this_rank(model), get_parallel().tp_size
    # Vocabularies are padded: their parameters have rows that no tensor fills, and the last ranks take fewer.
    vocabularies = {path: m for path, m in model.named_modules() if isinstance(m, VocabParallelEmbedding)}
    padded = {f"{path}.{leaf}": due for path, module in vocabularies.items() for leaf, due in _filled_rows(module)}
    whole = {name.rpartition(".")[0] for name in padded} if ranks > 1 else set()
    lost = [name for name in ledger.unused(ranks) if belongs(name) and name.rpartition(".")[0] not in whole]
    empty = may_be_empty(model)
    unfilled = [name for name in ledger.unfilled(padded) if not empty(name)]
    problems = []
    if lost:
        missing = [name for name in lost if name not in ledger.arrived]
        what = "not in its files" if missing else "dropped by SGLang's model, or not loaded in full"
        problems.append(f"{_listed(missing or lost)}: {what}")
    if unfilled:
        problems.append(f"{_listed(unfilled)}: parameters that were not filled")
    if problems:
        raise LoadError(f"the checkpoint did not reach the model whole: {'; '.join(problems)}")
    return result


def _filled_rows(module: Any) -> Iterator[tuple[str, int]]:
    """Parameters of an embedding or a head, and how many of their elements tensors fill."""
    fmt = format_of(module)
    if fmt is not None:
        yield from filled_elements(module, fmt)
    elif hasattr(module, "weight"):
        yield "weight", module.shard_indices.num_org_elements * prod(module.weight.shape[1:])


def _listed(names: list[str]) -> str:
    return f"{len(names)} tensors ({some(compress(names))})" if len(names) > 1 else names[0]


def may_be_empty(model: Module) -> Callable[[str], bool]:
    """Tells which parameters need no tensor, by the formats of their layers."""
    formats = {path: fmt for path, module in model.named_modules() if (fmt := format_of(module)) is not None}

    def empty(parameter: str) -> bool:
        path, _, leaf = parameter.rpartition(".")
        if leaf in ("k_scale", "v_scale"):  # SGLang tells one that was not filled, and takes the other for both
            return True
        fmt = formats.get(path)
        return fmt is not None and served(fmt).may_be_empty(leaf, fmt)

    return empty


def expected_on_this_rank(model: Module) -> Callable[[str], bool]:
    """Tells which tensors of a checkpoint a model on this rank is meant to take."""
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
    from sglang.srt.runtime_context import get_parallel

    facts = ModelFacts.of_loaded(getattr(model, "config", None))
    family = facts.family
    inner: Any = getattr(model, "model", model)
    first, end = getattr(inner, "start_layer", 0), getattr(inner, "end_layer", facts.layers)
    without_towers = _has_no_towers(model)
    moe = {name: module for name, module in model.named_modules() if isinstance(module, FusedMoE)}

    def belongs(name: str) -> bool:
        if is_buffer(name) or left_out_of_builds(name):
            return False
        if (facts.tied_embeddings and name == f"{family.head}.weight") or family.is_draft(name, facts.layers):
            return False
        if without_towers and tower_of(name) is not None:
            return False
        layer = layer_of(name)
        if layer is None:
            return bool(get_parallel().pp_size == 1)  # the first and the last stage have what is in no layer
        if end is not None and not (first <= layer < end):  # of another stage
            return False
        part = numbered_part(name.rpartition(".")[0])
        if part is not None and part[0] in moe:
            return bool(moe[part[0]]._map_global_expert_id_to_local_expert_id(part[1]) >= 0)
        return True

    return belongs


def _has_no_towers(model: Module) -> bool:
    """Whether SGLang was to serve text only: it sets what would be an encoder of images or sound to None
    (models/mllama4.py, models/inkling.py), and makes no part of any."""
    none = any(value is None and tower_of(f"{name}.weight") for name, value in vars(model).items())
    return none and not any(tower_of(f"{name}.weight") for name, _ in model.named_children())
