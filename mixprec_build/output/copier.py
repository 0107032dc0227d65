"""Copies planned tensors from sources to shards, byte for byte, hashing them on the way.

Bytes are read with ``pread`` and written with ``pwrite`` through one small buffer a thread: no mapping that a
truncated source could turn into a crash, no memory that grows with a tensor.
"""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import xxhash

from ..errors import SourceError
from ..planning.companions import companion_files
from ..planning.types import Plan, PlannedShard, PlannedTensor
from ..storage.disk import (
    check_space,
    open_regular,
    pread_all,
    pwrite_all,
    source_errors,
    start_writeback,
    write_errors,
)
from ..storage.reader import read_tensor
from ..storage.threads import MOST_JOBS, Progress, run_all
from ..storage.transposed import PANEL
from .stage import Stage

__all__ = ["Copier"]


# Small enough to stay in a core's second-level cache between read, hash and write: 4 MiB took four times as long.
_BUFFER = 256 << 10
_WRITEBACK = 16 << 20
_FICLONE = 0x40049409  # linux/fs.h


@dataclass(slots=True)
class _Output:
    """A shard being written. The thread that finishes its last batch syncs and closes its file."""

    shard: PlannedShard
    path: Path
    fd: int
    pending: int = 0
    dirty: int = 0
    """Bytes written since the last start of write-back."""
    queued: bool = False
    """Whether all of its batches have been handed out."""
    checksums: dict[str, str] = field(default_factory=dict)
    """Name of a tensor that was copied -> hexadecimal xxh3_128."""


@dataclass(frozen=True, slots=True)
class _Batch:
    """Consecutive tensors of a shard, from the byte ``start`` on. Without ``write`` they are only hashed."""

    output: _Output
    write: bool
    start: int
    tensors: Sequence[PlannedTensor]


class Copier:
    """Writes the shards of ``plan`` into ``stage`` from source files at ``paths``.

    Shards that an interrupted build has finished there are taken over.

    Args:
        shards: those of the plan to write, as one part of a build; all by default.
        adopt: called with file -> key of all shards before anything is written; it may bring finished ones.
    """

    def __init__(
        self,
        plan: Plan,
        paths: Mapping[tuple[str, str], Path],
        stage: Stage,
        progress: Progress,
        *,
        shards: Sequence[PlannedShard] | None = None,
        adopt: Callable[[Mapping[str, str]], None] | None = None,
    ):
        self._plan, self._paths, self._stage, self._progress = plan, paths, stage, progress
        self._shards, self._complete = (plan.shards, True) if shards is None else (shards, False)
        self._adopt = adopt
        self._lock = threading.Lock()
        self._failed = threading.Event()
        self._sources: dict[tuple[str, str], int] = {}
        self._unfinished: set[int] = set()
        self._keys: dict[str, str] = {}

    def run(self, jobs: int) -> dict[str, Mapping[str, str]]:
        """Copies everything with ``jobs`` threads; returns file -> tensor -> hexadecimal xxh3_128.

        Raises:
            SourceError: a source cannot be read, or has changed since it was planned.
            WriteError: the disk fails.
        """
        with ExitStack() as stack:
            stack.callback(self._close_unfinished)
            for key, path in self._paths.items():
                self._sources[key] = stack.enter_context(self._source(key, path))
            self._keys = {shard.file: self._key(shard) for shard in self._shards}
            self._stage.keep(self._keys)
            if self._adopt is not None:
                self._adopt(self._keys)
            self._check_space()
            batches = self._batches()
            jobs = min(jobs, MOST_JOBS)
            run_all([lambda: self._work(batches)] * jobs, jobs, self._failed, self._stage.out)
        return {shard.file: self._stage.finished[shard.file].checksums for shard in self._shards}

    def _close_unfinished(self) -> None:
        for fd in self._unfinished:
            with suppress(OSError):  # their contents are thrown away, and the first error is reported
                os.close(fd)

    @contextmanager
    def _source(self, key: tuple[str, str], path: Path) -> Iterator[int]:
        """Opens a source file. Raises :class:`SourceError` if it changed since it was planned, or while it was open."""
        checkpoint = self._plan.sources.by_name[key[0]].checkpoint
        shard = checkpoint.shards[key[1]]
        fd = open_regular(path)
        try:
            with source_errors(path):
                before = os.fstat(fd)
                header_checksum = xxhash.xxh3_128_hexdigest(pread_all(fd, shard.header_bytes, 0))
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
            same = before.st_size == shard.size and shard.modified in (None, before.st_mtime_ns)
            if not same or header_checksum != shard.header_checksum:
                raise SourceError("changed since it was planned; start again", path=path)
            yield fd
            with source_errors(path):
                after = os.fstat(fd)
            if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
                raise SourceError("changed while it was copied; start again", path=path)
        finally:
            with source_errors(path):
                os.close(fd)

    def _batches(self) -> Iterator[_Batch]:
        """Yields all batches, shard by shard; a shard's file is created just before its first batch."""
        for shard in self._shards:
            if shard.file in self._stage.finished:
                self._progress(shard.data_bytes)
                continue
            output, copy, at = self._create(shard)
            group: list[PlannedTensor] = []
            size = 0
            start = at
            for tensor in shard.tensors:
                if group and size + tensor.info.nbytes > _BUFFER:
                    output.pending += 1
                    yield _Batch(output, copy, start, group)
                    group, size, start = [], 0, at
                group.append(tensor)
                size += tensor.info.nbytes
                at += tensor.info.nbytes
            output.pending += 1
            output.queued = True
            yield _Batch(output, copy, start, group)

    def _check_space(self) -> None:
        unfinished = (s for s in self._shards if s.file not in self._stage.finished and not self._can_link(s))
        need = sum(shard.file_bytes(self._plan.sources) for shard in unfinished)
        if not self._complete:
            check_space(self._stage.folder.parent, need)
            return
        need += sum(companion_files(self._plan.sources.model).values())
        there = sum(path.stat().st_size for path in self._stage.payload.glob("presplit/*/*/*"))
        check_space(self._stage.folder.parent, need + max(0, sum(self._plan.presplit.values()) - there))

    def _can_link(self, shard: PlannedShard) -> bool:
        """Whether a shard is planned as a link and can be one on this file system, which is tried."""
        if shard.link is None:
            return False
        path = self._stage.payload / shard.file
        with write_errors(path):
            linked = _link(self._paths[shard.link], path)
            if linked:
                path.unlink()
        return linked

    def _key(self, shard: PlannedShard) -> str:
        """A digest of all that a shard's bytes depend on: its header, and the ranges and states of its sources."""
        digest = xxhash.xxh3_128(shard.header)
        states = {key: self._state(*key) for key in dict.fromkeys((t.source, t.info.file) for t in shard.tensors)}
        for tensor in shard.tensors:
            state = states[tensor.source, tensor.info.file]
            origin = (*state, tensor.info.start, shard.link is None, *(tensor.info.columns or ()))
            if tensor.info.step > 1:
                origin = (*origin, "step", tensor.info.step)
            digest.update(repr((tensor.source, tensor.info.file, *origin)).encode())
        return digest.hexdigest()

    def _state(self, source: str, file: str) -> tuple[str, int, int]:
        with source_errors(self._paths[source, file]):
            state = os.fstat(self._sources[source, file])
        checksum = self._plan.sources.by_name[source].checkpoint.shards[file].header_checksum
        return checksum, state.st_size, state.st_mtime_ns

    def _create(self, shard: PlannedShard) -> tuple[_Output, bool, int]:
        """The output file, whether its data is still to be written, and where its data section starts."""
        path = self._stage.payload / shard.file
        if shard.link is not None:
            source, file = shard.link
            data_start = self._plan.sources.by_name[source].checkpoint.shards[file].header_bytes
            if _link(self._paths[shard.link], path):
                with write_errors(path):
                    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                self._unfinished.add(fd)
                return _Output(shard, path, fd), False, data_start
            with source_errors(self._paths[shard.link]):
                header = pread_all(self._sources[shard.link], data_start, 0)
        else:
            header = shard.header
        with write_errors(path):
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            self._unfinished.add(fd)
            os.posix_fallocate(fd, 0, len(header) + shard.data_bytes)
            pwrite_all(fd, memoryview(header), 0)
        return _Output(shard, path, fd), True, len(header)

    def _work(self, batches: Iterator[_Batch]) -> None:
        buffer = memoryview(bytearray(_BUFFER))
        while not self._failed.is_set():
            with self._lock:
                batch = next(batches, None)
            if batch is None:
                return
            self._copy(batch, buffer)
            self._finish(batch.output)

    def _copy(self, batch: _Batch, buffer: memoryview) -> None:
        if len(batch.tensors) == 1:
            self._stream(batch, buffer)
            return
        filled = 0
        for tensor in batch.tensors:
            window = buffer[filled : filled + tensor.info.nbytes]
            self._read(tensor, window)
            batch.output.checksums[tensor.info.name] = xxhash.xxh3_128_hexdigest(window)
            filled += tensor.info.nbytes
        self._write(batch, buffer[:filled], batch.start)

    def _stream(self, batch: _Batch, buffer: memoryview) -> None:
        """Copies one tensor of any size through the buffer."""
        (tensor,) = batch.tensors
        digest = xxhash.xxh3_128()
        if not tensor.info.contiguous:
            buffer = memoryview(bytearray(PANEL))
        for at in range(0, tensor.info.nbytes, len(buffer)):
            window = buffer[: min(len(buffer), tensor.info.nbytes - at)]
            self._read(tensor, window, at)
            digest.update(window)
            self._write(batch, window, batch.start + at)
            if self._failed.is_set():
                return
        batch.output.checksums[tensor.info.name] = digest.hexdigest()

    def _write(self, batch: _Batch, data: memoryview, at: int) -> None:
        output = batch.output
        if batch.write:
            with write_errors(output.path):
                pwrite_all(output.fd, data, at)
            output.dirty += len(data)
            if output.dirty >= _WRITEBACK:
                output.dirty = 0
                start_writeback(output.fd)
        self._progress(len(data))

    def _read(self, tensor: PlannedTensor, window: memoryview, at: int = 0) -> None:
        """Fills ``window`` from the byte ``at`` of a tensor on."""
        key = tensor.source, tensor.info.file
        read_tensor(self._sources[key], self._paths[key], tensor.info, window, at)

    def _finish(self, output: _Output) -> None:
        with self._lock:
            output.pending -= 1
            last = output.queued and output.pending == 0
            if last:
                self._unfinished.discard(output.fd)
        if last:
            with write_errors(output.path):
                try:
                    os.fsync(output.fd)
                finally:
                    os.close(output.fd)
            file = output.shard.file
            with self._lock, write_errors(self._stage.folder):
                self._stage.record(file, self._keys[file], output.checksums)


def _link(source: Path, target: Path) -> bool:
    """Makes a reflink or, where the file system cannot, a hard link. Returns whether it made one."""
    real = source.resolve()
    try:
        with real.open("rb") as old, target.open("xb") as new:
            fcntl.ioctl(new.fileno(), _FICLONE, old.fileno())
        return True
    except OSError:
        target.unlink(missing_ok=True)
    try:
        os.link(real, target)
    except OSError:
        return False
    return True
