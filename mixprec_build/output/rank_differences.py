"""Compares the files of ranks with the manifest and with the merged tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import xxhash

from ..checkpoint.checkpoint import REST, Checkpoint
from ..checkpoint.degree import Degree, rank_of
from ..checkpoint.manifest import CHECKSUM, Manifest
from ..checkpoint.typed import Source
from ..errors import SourceError, VerifyError
from ..ranks.assemble import as_parameter, contents
from ..ranks.files import RankIndex, changed_headers, open_rank, read_index
from ..ranks.merged import splitter_of
from ..ranks.pieces import Parameter
from ..ranks.splitter import Splitter
from ..storage.header import TensorInfo
from ..storage.reader import TensorReader, checksum_on_disk
from .leftovers import unknown_entries

__all__ = ["differences_of", "rank_differences"]


def rank_differences(folder: Path, manifest: Manifest, checkpoint: Checkpoint, complete: bool = True) -> Iterator[str]:
    """Yields every difference between the files of ranks, what the manifest lists, and the merged tensors.

    Where merged files were dropped, what was kept of them is compared as well. Where the merged tensors are not
    ``complete``, the files are compared with their own indexes only.
    """
    for name in unknown_entries(folder, manifest, cached=True):
        yield f"{name}: not in the manifest"
    if manifest.rest is not None:
        try:
            yield from differences_of(read_index(folder, REST, manifest.rest))
        except VerifyError as error:
            yield str(error)
    if not manifest.ranks:
        return
    source = Source.of("", checkpoint)
    splitters: dict[Degree, Splitter] = {}
    with checkpoint.storage.reader() as reader:
        for name, entry in manifest.ranks.items():
            degree, rank = rank_of(name)
            try:
                index = read_index(folder, name, entry)
            except VerifyError as error:
                yield str(error)
                continue
            if not complete:
                yield from differences_of(index)
                continue
            if degree not in splitters:
                splitters[degree] = splitter_of(source, degree)
            yield from differences_of(index, splitters[degree].parameters(rank), reader)


def differences_of(
    index: RankIndex, parameters: Sequence[Parameter] | None = None, reader: TensorReader | None = None
) -> Iterator[str]:
    """Yields differences between a folder's files and its index and, if given, the parameters that it should have."""
    try:
        stored = open_rank(index)
        changed = changed_headers(index)
    except SourceError as error:
        yield str(error)
        return
    for path in changed:
        yield f"{path}: its header was changed"
    due = {parameter.name: parameter for parameter in parameters or map(as_parameter, stored.values())}
    for name in sorted(due.keys() ^ stored.keys()):
        yield f"{index.folder}: {name} is {'missing' if name in due else 'no parameter of this rank'}"
    for name, parameter in due.items():
        if (tensor := stored.get(name)) is None:
            continue
        try:
            difference = _difference(index, parameter, tensor, reader)
        except SourceError as error:  # the others can still be compared
            difference = str(error)
        if difference is not None:
            yield difference


def _difference(index: RankIndex, parameter: Parameter, tensor: TensorInfo, reader: TensorReader | None) -> str | None:
    where = f"{parameter.name} in {index.folder / tensor.file}"
    if (tensor.dtype, tensor.shape) != (parameter.dtype, parameter.shape):
        return f"{where}: {tensor.dtype} {list(tensor.shape)}, cut as {parameter.dtype} {list(parameter.shape)}"
    checksum = checksum_on_disk(index.folder / tensor.file, tensor)
    if checksum != index.parameters[parameter.name][CHECKSUM]:
        return f"{where}: its bytes were changed"
    if reader is not None:
        digest = xxhash.xxh3_128()
        for chunk in contents(parameter, reader):
            digest.update(chunk)
        if digest.hexdigest() != checksum:
            return f"{where}: not what the merged tensors would be cut into"
    return None
