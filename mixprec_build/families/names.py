"""Parses names of modules as all families have them: numbered layers, numbered experts."""

from __future__ import annotations

import re

__all__ = ["SHARDS", "last_word", "layer_of", "layer_prefix", "numbered_part", "with_words"]

_FIRST_NUMBER = re.compile(r"\.(\d+)\.")
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_NUMBERED = re.compile(r"(.+)\.(\d+)\.([^.]+)")


def last_word(name: str) -> str:
    """``"up_proj"`` of ``"model.layers.7.mlp.up_proj"``."""
    return name.rpartition(".")[2]


def layer_prefix(name: str) -> str:
    """``"model.layers.7."`` of a module of that layer; empty outside of layers."""
    found = _FIRST_NUMBER.search(name)
    return name[: found.end()] if found else ""


def layer_of(name: str) -> int | None:
    """The number of the layer that a module or tensor is in, by the word ``layers`` before it; None outside."""
    found = _LAYER.search(name)
    return int(found[1]) if found else None


SHARDS = ("w1", "w3", "w2")
"""What SGLang's loaders call gate, up and down of an expert."""


def numbered_part(name: str) -> tuple[str, int, str] | None:
    """``("model.layers.7.mlp.experts", 3, "up_proj")``: a module right below a number; None for any other name."""
    found = _NUMBERED.fullmatch(name)
    return (found[1], int(found[2]), found[3]) if found else None


def with_words(name: str, words: str, others: str) -> str:
    """``name`` with ``others`` in the place of ``words``, where these stand between dots."""
    return f".{name}.".replace(f".{words}.", f".{others}.")[1:-1]
