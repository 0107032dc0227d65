"""Does a compiled checkpoint equal its sources, bit for bit; and how far are its weights from FP16?"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import xxhash

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.declaration import METHOD
from ..checkpoint.manifest import (
    MANIFEST,
    Manifest,
    TensorEntry,
    checksum_of,
    read_manifest,
)
from ..checkpoint.opening import open_checkpoint
from ..errors import SourceError, VerifyError
from ..patterns.compress import compress
from ..ranks.assemble import contents
from ..ranks.merged import CutFolder, open_compiled, reader_of
from ..storage.disk import inside, open_regular, pread_all, read_regular
from ..storage.header import TensorInfo
from ..text import printable, some
from .leftovers import leftovers
from .rank_differences import rank_differences

__all__ = ["Verification", "verify"]


_BUFFER = 4 << 20


@dataclass(frozen=True, slots=True)
class Verification:
    """The outcome: how tensors were compared, and every difference found."""

    bit_for_bit: int
    by_checksum: int
    gone: tuple[str, ...]
    """Sources that could not be opened or lack tensors, with the reason: these were compared by checksum."""
    differences: tuple[str, ...]
    leftovers: tuple[str, ...] = ()
    """Files of a split that was stopped. Nothing reads them."""


def verify(
    folder: Path, *, sources: Mapping[str, str] | None = None, progress: Callable[[int], None] | None = None
) -> Verification:
    """Checks files, headers, index and manifest against one another, and every tensor against its source.

    ``sources`` gives new locations of sources by name. A tensor whose source is gone is compared by checksum. Where the
    merged files were dropped, tensors are put together from the files of ranks.

    Raises:
        VerifyError: there is no manifest, or it cannot be read; files of ranks that nothing can be put together from;
            a source of ``sources`` has not the tensors that were taken from it.
        SplitError: merged files were dropped, and not all ranks were ever cut.
        SourceError: the checkpoint itself cannot be opened.
    """
    manifest = read_manifest(folder)
    checkpoint = open_compiled(folder.absolute(), manifest)
    if isinstance(checkpoint.storage, CutFolder):
        checkpoint.storage.reader.prepare()
    left = leftovers(folder, manifest)
    opened, gone = _open_sources(manifest, sources or {})
    differences = [
        *_file_differences(folder, manifest, checkpoint, left),
        *_structure_differences(manifest, checkpoint),
    ]
    recorded = {name: entry for name, entry in manifest.tensors().items() if name in checkpoint.tensors}
    differences += rank_differences(folder, manifest, checkpoint)
    bit_for_bit = 0

    def check(item: tuple[str, TensorEntry]) -> tuple[bool, str | None]:
        name, entry = item
        result = _compare(checkpoint, checkpoint.tensors[name], entry, opened.get(entry.source))
        if progress is not None:
            progress(entry.nbytes)
        return result

    with reader_of(checkpoint), ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        for direct, difference in pool.map(check, recorded.items()):
            bit_for_bit += direct
            if difference is not None:
                differences.append(difference)
    texts = (tuple(map(printable, lines)) for lines in (gone, differences, left))
    return Verification(bit_for_bit, len(recorded) - bit_for_bit, *texts)


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


def _file_differences(folder: Path, manifest: Manifest, checkpoint: Checkpoint, left: Sequence[str]) -> Iterator[str]:
    present = {entry.name for entry in folder.iterdir() if entry.is_file()}
    # Hidden folders are those of git and of the hub's downloads.
    folders = {entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")}
    for name in sorted((present | folders) - manifest.files.keys() - {MANIFEST, "presplit", *left}):
        yield f"{name}: not in the manifest"
    for name, entry in manifest.files.items():
        path = folder / name
        if entry.shard and manifest.rest is not None:
            continue  # its header was compared when it was opened
        if name not in present:
            yield f"{name}: missing"
        elif path.stat().st_size != entry.nbytes:
            yield f"{name}: {path.stat().st_size} bytes, {entry.nbytes} were written"
        elif entry.shard:
            shard = checkpoint.shards.get(name)
            if shard is None:
                yield f"{name}: not in the index"
            elif shard.header_checksum != entry.checksum:
                yield f"{name}: its header was changed"
        elif checksum_of(read_regular(inside(folder, name))) != entry.checksum:
            yield f"{name}: its bytes were changed"


def _structure_differences(manifest: Manifest, checkpoint: Checkpoint) -> Iterator[str]:
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
        elif entry is not None:
            yield f"{name}: missing from {entry.file}"
        elif info is not None:
            yield f"{name}: in {info.file}, but not in the manifest"


def _compare(
    checkpoint: Checkpoint, info: TensorInfo, entry: TensorEntry, source: Checkpoint | None
) -> tuple[bool, str | None]:
    """Whether a tensor was compared with its source's bytes (else by checksum), and the difference if any."""
    digest = xxhash.xxh3_128()
    direct = source is not None and info.name in source.tensors
    first = None
    if source is not None and direct:
        origin = source.tensors[info.name]
        where = f"{info.name} in {info.file}"
        if (origin.dtype, origin.shape) != (info.dtype, info.shape):
            return True, f"{where}: {info.dtype} {list(info.shape)}, {origin.dtype} {list(origin.shape)} in its source"
        at = 0
        with _opened(source, origin) as read:
            for mine in _chunks(checkpoint, info):
                digest.update(mine)
                theirs = read(at, len(mine))
                if first is None and mine != theirs:
                    first = at + next(i for i, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a != b)
                at += len(mine)
    else:
        for mine in _chunks(checkpoint, info):
            digest.update(mine)
    intact = digest.hexdigest() == entry.checksum
    if first is not None and intact:
        return True, f"{info.name}: source `{entry.source}` has changed since the build (byte {first})"
    if first is not None or not intact:
        at_byte = f"byte {first} is not its source's" if first is not None else "its checksum is not the manifest's"
        return direct, f"{info.name} in {info.file}: {at_byte}"
    return direct, None


def _chunks(checkpoint: Checkpoint, info: TensorInfo) -> Iterator[bytes]:
    """A tensor's bytes, a few MiB at a time."""
    if isinstance(checkpoint.storage, CutFolder):
        reader = checkpoint.storage.reader
        # As bytes: views are compared byte by byte, ten times as slow.
        yield from map(bytes, contents(reader.parameter(info), reader.files))
        return
    with _opened(checkpoint, info) as read:
        for at in range(0, info.nbytes, _BUFFER):
            yield read(at, min(_BUFFER, info.nbytes - at))


@contextmanager
def _opened(checkpoint: Checkpoint, info: TensorInfo) -> Iterator[Callable[[int, int], bytes]]:
    """Reads so many bytes of a tensor, from a byte of it on."""
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
