"""Compares a compiled checkpoint with its manifest and, bit for bit, with its sources."""

from __future__ import annotations

import os
from collections.abc import Callable, Container, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import xxhash

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.declaration import METHOD
from ..checkpoint.manifest import MANIFEST, Manifest, TensorEntry, read_manifest
from ..checkpoint.opening import open_checkpoint
from ..errors import MixprecError, OutputError, SourceError, VerifyError
from ..patterns.compress import compress
from ..ranks.assemble import contents
from ..ranks.merged import CutFolder, open_compiled, reader_of
from ..storage.disk import open_regular, pread_all
from ..storage.header import TensorInfo
from ..storage.owned import OwnedFolder
from ..storage.threads import Progress
from ..text import printable, some
from .file_differences import beside, file_differences
from .leftovers import leftovers
from .locked import locked
from .rank_differences import rank_differences

__all__ = ["Verification", "verify"]


_BUFFER = 4 << 20


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
    """Entries of git and of the hub's downloads, which do not belong to the checkpoint. Nothing reads them."""


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
    if not (folder / MANIFEST).exists():
        read_manifest(folder)  # raises
    with locked(folder, shared=True) as (owned, check):
        before = owned.stat(MANIFEST)

        def require_unchanged(cause: MixprecError | None = None) -> None:
            """Raises if another command changed the checkpoint, as it can where the file system has no locks."""
            try:
                check()
                if _version(owned.stat(MANIFEST)) == _version(before):
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


def _version(state: os.stat_result | None) -> tuple[int, ...]:
    """Differs between any two manifests that were put into one place."""
    return () if state is None else (state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns)


def _verify(
    folder: Path, owned: OwnedFolder, sources: Mapping[str, str], watch: Callable[[int], Progress] | None
) -> Verification:
    manifest = read_manifest(folder)
    unread: dict[str, str] = {}
    checkpoint = open_compiled(folder.absolute(), manifest, unread)
    if isinstance(checkpoint.storage, CutFolder):
        checkpoint.storage.reader.prepare()
    left = leftovers(folder, manifest)
    opened, gone = _open_sources(manifest, sources)
    recorded = manifest.tensors()
    progress = None if watch is None else watch(sum(entry.nbytes for entry in recorded.values()))
    differences = [
        *(reason for file, reason in unread.items() if owned.entry(file) is not None),
        *file_differences(owned, manifest, checkpoint, left, unread),
        *_structure_differences(manifest, checkpoint, unread),
        *rank_differences(folder, manifest, checkpoint, not unread),
    ]
    bit_for_bit = 0
    sources_unread: dict[str, list[str]] = {}

    def check(item: tuple[str, TensorEntry]) -> _Compared:
        name, entry = item
        try:
            result = _compare(checkpoint, checkpoint.tensors[name], entry, opened.get(entry.source))
        except SourceError as error:  # of the checkpoint's own file; the others can still be compared
            result = _Compared(difference=str(error))
        if progress is not None:
            progress(entry.nbytes)
        return result

    there = [item for item in recorded.items() if item[0] in checkpoint.tensors]
    with reader_of(checkpoint), ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        for compared in pool.map(check, there):
            bit_for_bit += compared.direct
            if compared.difference is not None:
                differences.append(compared.difference)
            if compared.unread is not None:
                sources_unread.setdefault(compared.unread[0], []).append(compared.unread[1])
    for name, reasons in sources_unread.items():
        more = f" (and {len(reasons) - 1:,} more tensors)" if len(reasons) > 1 else ""
        gone.append(f"`{name}`: {reasons[0]}{more}")
    texts = (tuple(map(printable, lines)) for lines in (gone, differences, left, beside(owned)))
    return Verification(bit_for_bit, len(there) - bit_for_bit, *texts)


def _open_sources(manifest: Manifest, moved: Mapping[str, str]) -> tuple[dict[str, Checkpoint], list[str]]:
    opened, gone = {}, []
    taken: dict[str, list[str]] = {}
    for name, entry in manifest.tensors().items():
        taken.setdefault(entry.source, []).append(name)
    unknown = moved.keys() - manifest.sources.keys()
    if unknown:
        known = ", ".join(manifest.sources)
        raise VerifyError(f"the checkpoint has no source `{min(unknown)}`; its sources are {known}")
    for name, source in manifest.sources.items():
        location = moved.get(name) or source.place
        try:
            opened[name] = open_checkpoint(location)
        except SourceError as error:
            if name in moved:
                raise
            gone.append(f"`{name}`: {error}")
            continue
        lacking = [tensor for tensor in taken.get(name, ()) if tensor not in opened[name].tensors]
        if lacking:
            reason = f"`{name}`: {location} lacks {len(lacking):,} of its tensors: {some(compress(lacking))}"
            if name in moved:
                raise VerifyError(f"source {reason}; is this the right folder?")
            gone.append(reason)
    return opened, gone


def _structure_differences(manifest: Manifest, checkpoint: Checkpoint, unread: Container[str]) -> Iterator[str]:
    """``unread``: files that were not opened, whose tensors are known to be missing."""
    if checkpoint.quantization.get("quant_method") != METHOD:
        yield f"config.json: quant_method is not {METHOD}"
    elif checkpoint.quantization.get("formats") != manifest.head["formats"]:
        yield "config.json: its formats are not those of the manifest"
    for name, entry, info in manifest.differences(checkpoint.tensors):
        if entry is not None and info is not None:
            yield (
                f"{name}: {info.dtype} {list(info.shape)} in {info.file}, "
                f"built as {entry.dtype} {list(entry.shape)} in {entry.file}"
            )
        elif entry is not None and entry.file not in unread:
            yield f"{name}: missing from {entry.file}"
        elif info is not None:
            yield f"{name}: in {info.file}, but not in the manifest"


def _compare(checkpoint: Checkpoint, info: TensorInfo, entry: TensorEntry, source: Checkpoint | None) -> _Compared:
    """Compares a tensor with its source's bytes, or by checksum where that lacks it or cannot be read.

    Raises:
        SourceError: the checkpoint's own file cannot be read.
    """
    where = f"{info.name} in {info.file}"
    origin = None if source is None else source.tensors.get(info.name)
    unread: tuple[str, str] | None = None
    first: int | None = None
    digest = xxhash.xxh3_128()
    with ExitStack() as stack:
        read: Callable[[int, int], bytes] | None = None
        if source is not None and origin is not None:
            if (origin.dtype, origin.shape) != (info.dtype, info.shape):
                theirs = f"{origin.dtype} {list(origin.shape)} in its source"
                return _Compared(True, f"{where}: {info.dtype} {list(info.shape)}, {theirs}")
            try:
                read = stack.enter_context(_opened(source, origin))
            except SourceError as error:
                unread = entry.source, str(error)
        at = 0
        for mine in _chunks(checkpoint, info):
            digest.update(mine)
            if read is not None and first is None:
                try:
                    theirs_bytes = read(at, len(mine))
                except SourceError as error:
                    read, unread = None, (entry.source, str(error))
                else:
                    if mine != theirs_bytes:
                        pairs = enumerate(zip(mine, theirs_bytes, strict=True))
                        first = at + next(i for i, (a, b) in pairs if a != b)
            at += len(mine)
    direct = read is not None
    intact = digest.hexdigest() == entry.checksum
    if first is not None and intact:
        changed = f"{info.name}: source `{entry.source}` has changed since the build (byte {first})"
        return _Compared(True, changed, unread)
    if first is not None or not intact:
        at_byte = f"byte {first} is not its source's" if first is not None else "its checksum is not the manifest's"
        return _Compared(direct, f"{where}: {at_byte}", unread)
    return _Compared(direct, None, unread)


def _chunks(checkpoint: Checkpoint, info: TensorInfo) -> Iterator[bytes]:
    """Yields a tensor's bytes, a few MiB at a time."""
    if isinstance(checkpoint.storage, CutFolder):
        reader = checkpoint.storage.reader
        # As bytes: memory views are compared byte by byte, which takes ten times as long.
        yield from map(bytes, contents(reader.parameter(info), reader.files))
        return
    with _opened(checkpoint, info) as read:
        for at in range(0, info.nbytes, _BUFFER):
            yield read(at, min(_BUFFER, info.nbytes - at))


@contextmanager
def _opened(checkpoint: Checkpoint, info: TensorInfo) -> Iterator[Callable[[int, int], bytes]]:
    """Opens a tensor's file; yields a function that returns bytes of the tensor for a start and a length."""
    path = checkpoint.storage.cached(info.file)
    if path is None:
        path = checkpoint.storage.fetch([info.file])[info.file]
    fd = open_regular(path)

    def read(at: int, want: int) -> bytes:
        try:
            data = pread_all(fd, want, info.start + at)
        except OSError as error:
            raise SourceError(f"cannot read {info.name}: {error.strerror}", path=path) from error
        if len(data) != want:
            raise SourceError(f"ends inside {info.name}", path=path)
        return data

    try:
        yield read
    finally:
        os.close(fd)
