"""Degrees that SGLang's class for a model refuses, and what is to be said of those that it takes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from ..checkpoint.degree import Degree
from ..families.expected import tower_of
from ..families.facts import ModelFacts
from ..patterns.compress import compress
from .shares import Share

__all__ = ["refused_degree", "remarks_on_encoder", "remarks_on_zeros"]

WASTEFUL = 0.4


def refused_degree(facts: ModelFacts, degree: Degree, modules: Iterable[str], *, experts: bool) -> str | None:
    """The reason why SGLang makes no layers of a model for ``degree``; None if it does, or heads and columns decide.

    ``modules``: names of those of an encoder, if there is one, and perhaps of others. ``experts``: whether the
    checkpoint has any.
    """
    limits = facts.family.degrees
    if experts and limits.ranks_up_to_experts and facts.experts is not None and degree.tp > facts.experts:
        return f"SGLang's class for {facts.own_model_type} takes no more ranks than there are experts ({facts.experts})"
    uneven = "" if limits.whole_encoder else _uneven(facts, degree, modules)
    return f"the {uneven} of its encoder cannot be shared by {degree.attention_tp} ranks" if uneven else None


def remarks_on_encoder(facts: ModelFacts, degree: Degree, modules: Iterable[str]) -> Iterator[str]:
    """Yields a remark for the user, if ranks can only have all of the encoder. ``modules`` are as above."""
    uneven = _uneven(facts, degree, modules) if facts.family.degrees.whole_encoder else ""
    if uneven:
        yield (
            f"{degree}: the {uneven} of its encoder cannot be shared by {degree.attention_tp} ranks; start SGLang with "
            "--mm-enable-dp-encoder, by which each has all of it"
        )


def _uneven(facts: ModelFacts, degree: Degree, modules: Iterable[str]) -> str:
    if all(tower_of(name) is None for name in modules):
        return ""
    return " and ".join(facts.family.degrees.uneven(facts.encoder_sizes, degree.attention_tp))


def remarks_on_zeros(degree: Degree, padded: Mapping[str, Share]) -> Iterator[str]:
    """Yields remarks for the user on added zeros; ``padded``: MLP or ``...experts`` -> its share."""
    by_share: dict[Share, list[str]] = {}
    for name, share in padded.items():
        by_share.setdefault(share, []).append(name)
    for share, names in by_share.items():
        fitting = [n for n in range(share.ranks - 1, 0, -1) if share.total % (n * share.step) == 0]
        advice = f"; {fitting[0]} ranks would need none" if share.padding > WASTEFUL and fitting else ""
        yield (
            f"{degree}: a rank's {share.native} columns of {', '.join(compress(names)[:3])} are filled up to "
            f"{share.columns} with zeros ({share.padding:.0%} more weights there){advice}"
        )
