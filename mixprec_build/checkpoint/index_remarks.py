"""What the index of a checkpoint says otherwise than its files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Set
from typing import TYPE_CHECKING

from ..patterns.compress import compress
from ..text import some

if TYPE_CHECKING:
    from ..storage.header import TensorInfo

__all__ = ["remarks_on_index"]


def remarks_on_index(
    index: Mapping[str, str], tensors: Mapping[str, TensorInfo], beside: frozenset[str], twice: Set[str]
) -> Iterator[str]:
    """Yields remarks on differences between the index and its files; those ``beside`` it are not its own.

    What the files have counts: SGLang loads all of it. ``twice``: tensors that two files have.
    """
    if twice:
        yield f"lists {_listed(twice)} in one of two files that hold it: that one is read"
    if index == {tensor.name: tensor.file for tensor in tensors.values()}:
        return
    absent, moved = [], []
    for name, shard in index.items():
        tensor = tensors.get(name)
        if tensor is None:
            absent.append(name)
        elif tensor.file != shard:
            moved.append(name)
    unlisted = []
    if len(tensors) > len(index) - len(absent):
        unlisted = [name for name in tensors.keys() - index.keys() if tensors[name].file not in beside]
    if absent:
        yield f"lists {_listed(absent)}, which its files do not hold"
    if moved:
        yield f"lists {_listed(moved)} in another file than the one that holds it"
    if unlisted:
        yield f"does not list {_listed(unlisted)}, which its files hold"


def _listed(names: Iterable[str]) -> str:
    return some(compress(names))
