"""Models that draft tokens for speculative decoding: which of them are served from a compiled checkpoint.

They are its own layers for multi-token prediction, in SGLang's class for them, or a complete small model
(``STANDALONE``). SGLang loads drafts that mixprec did not build by itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch.nn import Module

from mixprec_build.families.draft_class import Draft
from mixprec_build.families.facts import ModelFacts
from mixprec_build.patterns.compress import compress
from mixprec_build.text import some

from . import launch

__all__ = ["check_own", "check_shared", "of_model"]


_ELSEWHERE = (
    "give --speculative-draft-model-path a checkpoint with a draft that mixprec did not build, such as the original "
    "release, or leave out --speculative-algorithm"
)


def check_own(facts: ModelFacts, modules: Iterable[str]) -> None:
    """Checks that a model has the layers that the arguments want drafts from. ``modules``: those of the checkpoint.

    Raises:
        RuntimeError: it has none, or none that SGLang's class for them would load. SGLang would start all the same, and
            no draft would be accepted.
    """
    algorithm = launch.draws_on_own_drafts()
    if algorithm is not None:
        _check(Draft.of(facts), facts, modules, f"--speculative-algorithm {algorithm}")


def of_model(model_config: Any, facts: ModelFacts, modules: Iterable[str]) -> Draft | None:
    """The draft layers that SGLang is about to load; None where the draft is a complete model.

    Raises:
        RuntimeError: the checkpoint does not have them, or mixprec does not serve them.
    """
    from sglang.srt.model_loader.utils import get_model_architecture

    name = get_model_architecture(model_config)[0].__name__
    draft = Draft.of(facts, name)
    if launch.speculative_algorithm() != "STANDALONE":
        _check(draft, facts, modules, f"SGLang's {name}")
        return draft
    if draft is not None:
        raise RuntimeError(
            f"--speculative-algorithm STANDALONE runs complete models, and SGLang makes {name}, its draft layers only, "
            "of this one; use EAGLE"
        )
    return None


def _check(draft: Draft | None, facts: ModelFacts, modules: Iterable[str], what: str) -> None:
    if draft is None:
        raise RuntimeError(f"{what}: mixprec serves no draft layers of this family of models; {_ELSEWHERE}")
    found = [name for name in modules if draft.expects(name)]
    if not found:
        promised = f", of which config.json promises {facts.draft_layers}" if facts.draft_layers else ""
        raise RuntimeError(
            f"{what}: this checkpoint has no layers for drafts{promised}; build it with them (`mtp: SOURCE` in the "
            f"recipe takes them from a source that has them), or {_ELSEWHERE}"
        )
    beyond = [name for name in found if not draft.has_place_for(name)]
    if beyond:
        name = draft.described.architectures[0]
        raise RuntimeError(f"{what}: SGLang's {name} has no place for {some(compress(beyond))}; {_ELSEWHERE}")


def check_shared(model: Module, draft: Module) -> None:
    """Raises ``RuntimeError`` if draft layers have another embedding than ``model``: theirs is not loaded."""
    embedding: Any = model.get_embed_and_head()[0]  # type: ignore[operator]
    own: Any = draft.model.embed_tokens.weight  # type: ignore[union-attr]
    if own.data_ptr() != embedding.data_ptr():
        raise RuntimeError(
            f"SGLang did not pass the embedding of {type(model).__name__} on to {type(draft).__name__}, which cannot "
            "draft without it; leave out --speculative-algorithm"
        )
