"""Compares a compiled checkpoint with its manifest and, bit for bit, with its sources."""

from __future__ import annotations

import os
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import xxhash

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.declaration import METHOD
from ..checkpoint.manifest import MANIFEST, Manifest, TensorEntry, read_manifest
from ..checkpoint.opening import open_checkpoint
from ..errors import MixprecError, OutputError, SourceError, VerifyError
from ..patterns.compress import compress
from ..ranks.merged import CutFolder, open_compiled
from ..storage.disk import source_errors
from ..storage.folder import Files
from ..storage.garbage import no_garbage_collection
from ..storage.header import TensorInfo
from ..storage.owned import OwnedFolder
from ..storage.reader import FileReader, TensorReader
from ..storage.threads import Progress, map_in_order
from ..text import printable, some
from .file_differences import beside, edited_card, file_differences
from .leftovers import leftovers
from .locked import locked, manifest_version
from .rank_differences import rank_differences

__all__ = ["Verification", "verify"]

_BATCH = 4 << 20
_MOST_IN_BATCH = 1000


@dataclass(frozen=True, slots=True)
class Verification:
    """The outcome: how many tensors were compared in which way, and every difference found."""

    bit_for_bit: int
    by_checksum: int
    gone: tuple[str, ...]
    """Sources that could not be read or lack tensors, with the reason. Their tensors were compared by checksum."""
    differences: tuple[str, ...]
    leftovers: tuple[str, ...] = ()
    """Files of a split that was stopped. Nothing reads them."""
    beside: tuple[str, ...] = ()
    """Entries of git, of the hub's downloads and a card of the user's own, no part of the checkpoint. Nothing reads
    them."""
    drops_mtp: bool = False
    """Whether it was built without the draft layers of its sources, with ``--drop-mtp``."""
    card: str | None = None
    """``edited``, ``removed`` or ``unreadable``, if the card that a build wrote is; else None. Nothing reads it."""


@dataclass(frozen=True, slots=True)
class _Compared:
    """The outcome for one tensor."""

    direct: bool = False
    """Whether its bytes were compared with its source's, not its checksum with the manifest's."""
    difference: str | None = None
    unread: tuple[str, str] | None = None
    """A source that could not be read, and why."""


def verify(
    folder: Path,
    *,
    sources: Mapping[str, str] | None = None,
    watch: Callable[[int], Progress] | None = None,
) -> Verification:
    """Checks files, headers, index and manifest against one another, and every tensor against its source.

    A tensor whose source is gone is compared by checksum. Where the merged files were dropped, tensors are put together
    from the files of ranks. A file that is missing, damaged or cannot be read is a difference, and the others are still
    compared. Splits and builds refuse or wait meanwhile.

    Args:
        sources: name of a source -> its new location.
        watch: called with the bytes to be compared; returns the function that is called with bytes as they are done.

    Raises:
        VerifyError: there is no manifest, or it cannot be read; merged files cannot be put together from damaged files
            of ranks; a new location of a source lacks tensors that were taken from it.
        SplitError: merged files were dropped, and files of ranks are missing.
        SourceError: the checkpoint itself cannot be opened.
        OutputError: another command is changing the checkpoint.
    """
    with source_errors(folder / MANIFEST):
        there = (folder / MANIFEST).exists()
    if not there:
        read_manifest(folder)  # raises
    with locked(folder, shared=True) as (owned, check):
        with source_errors(folder / MANIFEST):
            before = manifest_version(owned)

        def require_unchanged(cause: MixprecError | None = None) -> None:
            """Raises if another command changed the checkpoint, as it can where the file system has no locks."""
            try:
                check()
                if manifest_version(owned) == before:
                    return
            except MixprecError:
                pass
            raise OutputError(
                f"{folder}: another mixprec command changed it while it was compared; wait for that and compare again"
            ) from cause

        try:
            result = _verify(folder, owned, sources or {}, watch)
        except MixprecError as error:
            require_unchanged(error)
            raise
        if result.differences:
            require_unchanged()
        return result


def _verify(
    folder: Path, owned: OwnedFolder, sources: Mapping[str, str], watch: Callable[[int], Progress] | None
) -> Verification:
    unread: dict[str, str] = {}
    with no_garbage_collection():
        manifest = read_manifest(folder)
        checkpoint = open_compiled(folder.absolute(), manifest, unread)
    if isinstance(checkpoint.storage, CutFolder):
        checkpoint.storage.prepare()
    left = leftovers(folder, manifest)
    with no_garbage_collection():
        origins, stores, gone = _open_sources(manifest, sources)
    recorded, stored = manifest.tensors(), checkpoint.tensors()
    progress = None if watch is None else watch(sum(entry.nbytes for entry in recorded.values()))
    differences = [
        *(reason for file, reason in unread.items() if owned.entry(file) is not None),
        *file_differences(owned, manifest, checkpoint, left, unread),
        *_structure_differences(manifest, checkpoint, stored, unread),
        *rank_differences(folder, manifest, checkpoint, not unread),
    ]
    bit_for_bit = 0
    sources_unread: dict[str, list[str]] = {}

    with ExitStack() as stack:
        reader = stack.enter_context(checkpoint.storage.reader())
        readers = {name: stack.enter_context(_fetching(storage)) for name, storage in stores.items()}

        def check(name: str, entry: TensorEntry) -> _Compared:
            origin = origins[entry.source].get(name) if entry.source in origins else None
            theirs = None if origin is None else (readers[entry.source], origin)
            try:
                result = _compare(reader, stored[name], entry, theirs)
            except SourceError as error:  # of the checkpoint's own file; the others can still be compared
                result = _Compared(difference=str(error))
            if progress is not None:
                progress(entry.nbytes)
            return result

        def check_all(batch: Sequence[tuple[str, TensorEntry]]) -> list[_Compared]:
            return [check(name, entry) for name, entry in batch]

        there = [item for item in recorded.items() if item[0] in stored]
        jobs = min(8, os.cpu_count() or 1)
        # Closed before the readers, also on Ctrl-C.
        results = stack.enter_context(closing(map_in_order(check_all, _batches(there), jobs)))
        for compared in chain.from_iterable(results):
            bit_for_bit += compared.direct
            if compared.difference is not None:
                differences.append(compared.difference)
            if compared.unread is not None:
                sources_unread.setdefault(compared.unread[0], []).append(compared.unread[1])
    for name, reasons in sources_unread.items():
        more = f" (and {len(reasons) - 1:,} more tensors)" if len(reasons) > 1 else ""
        gone.append(f"`{name}`: {reasons[0]}{more}")
    return Verification(
        bit_for_bit,
        len(there) - bit_for_bit,
        gone=tuple(map(printable, gone)),
        differences=tuple(map(printable, differences)),
        leftovers=tuple(map(printable, left)),
        beside=tuple(map(printable, beside(owned, manifest))),
        drops_mtp=manifest.drops_mtp,
        card=edited_card(folder, manifest),
    )


def _batches(items: Iterable[tuple[str, TensorEntry]]) -> Iterator[list[tuple[str, TensorEntry]]]:
    """Yields tensors in groups of some bytes, for a thread's turn costs more than comparing a small one."""
    batch: list[tuple[str, TensorEntry]] = []
    size = 0
    for item in items:
        batch.append(item)
        size += item[1].nbytes
        if size >= _BATCH or len(batch) >= _MOST_IN_BATCH:
            yield batch
            batch, size = [], 0
    yield batch


def _open_sources(
    manifest: Manifest, moved: Mapping[str, str]
) -> tuple[dict[str, dict[str, TensorInfo]], dict[str, Files], list[str]]:
    """Opens the sources, one after the other, and keeps of each the tensors that were taken from it.

    Returns these by source and name, the sources' storages, and the sources that are gone, with the reason.
    """
    found: dict[str, dict[str, TensorInfo]] = {}
    stores: dict[str, Files] = {}
    gone: list[str] = []
    recorded = manifest.tensors()
    unknown = moved.keys() - manifest.sources.keys()
    if unknown:
        known = ", ".join(manifest.sources)
        raise VerifyError(f"the checkpoint has no source `{min(unknown)}`; its sources are {known}")
    for name, place in manifest.sources.items():
        location = moved.get(name) or place.place
        try:
            source = open_checkpoint(location)
        except SourceError as error:
            if name in moved:
                raise
            gone.append(f"`{name}`: {error}")
            continue
        stores[name], tensors = source.storage, source.tensors()
        taken = [tensor for tensor, entry in recorded.items() if entry.source == name]
        # With the manifest's names: those of the source are let go with it.
        found[name] = {tensor: tensors[tensor]._replace(name=tensor) for tensor in taken if tensor in tensors}
        lacking = [tensor for tensor in taken if tensor not in tensors]
        if lacking:
            reason = f"`{name}`: {location} lacks {len(lacking):,} of its tensors: {some(compress(lacking))}"
            if name in moved:
                raise VerifyError(f"source {reason}; is this the right folder?")
            gone.append(reason)
        del source, tensors
    return found, stores, gone


def _structure_differences(
    manifest: Manifest, checkpoint: Checkpoint, stored: Mapping[str, TensorInfo], unread: Container[str]
) -> Iterator[str]:
    """Yields differences of config and headers. The tensors of files that are ``unread`` are reported elsewhere."""
    if checkpoint.quantization.get("quant_method") != METHOD:
        yield f"config.json: quant_method is not {METHOD}"
    elif checkpoint.quantization.get("formats") != manifest.head["formats"]:
        yield "config.json: its formats are not those of the manifest"
    for name, entry, info in manifest.differences(stored):
        if entry is not None and info is not None:
            yield (
                f"{name}: {info.dtype} {list(info.shape)} in {info.file}, "
                f"built as {entry.dtype} {list(entry.shape)} in {entry.file}"
            )
        elif entry is not None and entry.file not in unread:
            yield f"{name}: missing from {entry.file}"
        elif info is not None:
            yield f"{name}: in {info.file}, but not in the manifest"


def _fetching(storage: Files) -> FileReader:
    """Reads the files of a source, after fetching those on the hub."""
    return FileReader(lambda file: storage.cached(file) or storage.fetch([file])[file])


def _compare(
    reader: TensorReader, info: TensorInfo, entry: TensorEntry, source: tuple[FileReader, TensorInfo] | None
) -> _Compared:
    """Compares a tensor with its source's bytes, or by checksum where that lacks it or cannot be read.

    Raises:
        SourceError: the checkpoint's own file cannot be read.
    """
    where = f"{info.name} in {info.file}"
    if source is not None and (source[1].dtype, source[1].shape) != (info.dtype, info.shape):
        theirs = f"{source[1].dtype} {list(source[1].shape)} in its source"
        return _Compared(True, f"{where}: {info.dtype} {list(info.shape)}, {theirs}")
    unread: tuple[str, str] | None = None
    first: int | None = None
    digest = xxhash.xxh3_128()
    at = 0
    for mine in reader.chunks(info):
        digest.update(mine)
        if source is not None and first is None:
            try:
                original = source[0].read(source[1], at, len(mine))
            except SourceError as error:
                source, unread = None, (entry.source, str(error))
            else:
                if mine != original:
                    first = at + next(i for i, (a, b) in enumerate(zip(mine, original, strict=True)) if a != b)
        at += len(mine)
    direct = source is not None
    intact = digest.hexdigest() == entry.checksum
    if first is not None and intact:
        changed = f"{info.name}: source `{entry.source}` has changed since the build (byte {first})"
        return _Compared(True, changed, unread)
    if first is not None or not intact:
        at_byte = f"byte {first} is not its source's" if first is not None else "its checksum is not the manifest's"
        return _Compared(direct, f"{where}: {at_byte}", unread)
    return _Compared(direct, None, unread)
