"""Lays the tensors of a plan out in files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from ..checkpoint.typed import Source
from ..recipe.sources import Sources
from ..storage.header import MOST_TENSORS
from .types import PlannedModule, PlannedShard, PlannedTensor

__all__ = ["lay_out"]


def lay_out(modules: Mapping[str, PlannedModule], shard_size: int, link: Sources | None) -> list[PlannedShard]:
    """Fills shards of at most ``shard_size`` bytes (a larger module has one to itself) in checkpoint order.

    A module lies in one shard, except that with ``link`` source files whose every tensor is used become shards as they
    are.
    """
    linked: list[tuple[tuple[str, str], list[PlannedTensor]]] = []
    taken: set[tuple[str, str]] = set()
    if link is not None:
        linked = list(_files_used_completely(modules, link))
        taken = {(t.source, t.info.name) for _, tensors in linked for t in tensors}
    bins: list[list[PlannedTensor]] = []
    room = 0
    for module in modules.values():
        tensors = list(module.tensors.values())
        if taken:
            tensors = [t for t in tensors if (t.source, t.info.name) not in taken]
        if not tensors:
            continue
        need = sum([tensor.info.nbytes for tensor in tensors])
        if not bins or need > room or len(bins[-1]) + len(tensors) > MOST_TENSORS:
            bins.append([])
            room = shard_size
        bins[-1] += tensors
        room -= need
    count = len(bins) + len(linked)
    parts: list[tuple[list[PlannedTensor], tuple[str, str] | None]] = [(_aligned(tensors), None) for tensors in bins]
    parts += [(tensors, origin) for origin, tensors in linked]
    return [
        PlannedShard(f"model-{i:05d}-of-{count:05d}.safetensors", tuple(tensors), origin)
        for i, (tensors, origin) in enumerate(parts, start=1)
    ]


def _aligned(tensors: list[PlannedTensor]) -> list[PlannedTensor]:
    """Moves tensors of odd sizes to the end, wide dtypes first, so that each starts at a multiple of its dtype."""

    def odd(tensor: PlannedTensor) -> int:
        if tensor.info.nbytes % 8 == 0:
            return 0
        dtype = tensor.info.dtype
        return 16 - {"F32": 4, "I32": 4, "U32": 4}.get(dtype, 2 if "16" in dtype else 1)

    return sorted(tensors, key=odd)


def _files_used_completely(
    modules: Mapping[str, PlannedModule], sources: Sources
) -> Iterable[tuple[tuple[str, str], list[PlannedTensor]]]:
    """Yields source files whose every tensor is in the output, and whose metadata says ``pt``, as some readers need."""
    wanted: dict[tuple[str, str], list[PlannedTensor]] = {}
    for module in modules.values():
        for tensor in module.tensors.values():
            wanted.setdefault((tensor.source, tensor.info.file), []).append(tensor)
    in_files = {name: _tensors_in_files(source) for name, source in sources.by_name.items()}
    for (source, file), tensors in wanted.items():
        checkpoint = sources.by_name[source].checkpoint
        if file in checkpoint.taken_apart:
            continue
        metadata = checkpoint.shards[file].metadata
        if in_files[source][file] == len(tensors) and isinstance(metadata, dict) and metadata.get("format") == "pt":
            yield (source, file), sorted(tensors, key=lambda tensor: tensor.info.start)


def _tensors_in_files(source: Source) -> Counter[str]:
    """The number of tensors in each file of a source."""
    return Counter(tensor.file for module in source.checkpoint.modules.values() for tensor in module.tensors.values())
