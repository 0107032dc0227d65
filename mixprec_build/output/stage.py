"""The hidden folder a build is written in, beside its output, and what survives there when a build is stopped.

    .out.mixprec/
        lock        locked (flock) by the build that is writing, and naming it: host and pid
        journal     a line for each finished shard: its key and its tensors' checksums, with a checksum of the line
        out/        the checkpoint, renamed to its final name when it is whole

A shard enters the journal only when its bytes and its name are on the disk. Its key stands for everything that
its bytes depend on, so the next build takes over a shard only where it would write the same one.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import xxhash

from ..errors import OutputError
from ..storage.disk import read_regular, sync_folder

__all__ = ["FinishedShard", "Stage"]


@dataclass(frozen=True, slots=True)
class FinishedShard:
    """A line of the journal."""

    key: str
    nbytes: int
    checksums: Mapping[str, str]
    """By tensor."""


@dataclass(slots=True)
class Stage:
    """An opened and locked stage; see :func:`Stage.open`."""

    out: Path
    folder: Path
    finished: dict[str, FinishedShard] = field(default_factory=dict)

    @property
    def payload(self) -> Path:
        """Where the checkpoint grows."""
        return self.folder / "out"

    @property
    def replaced(self) -> Path:
        """Where an output that is being replaced waits to be removed."""
        return self.folder / "replaced"

    @property
    def _journal(self) -> Path:
        return self.folder / "journal"

    @classmethod
    @contextmanager
    def open(cls, out: Path) -> Iterator[Stage]:
        """The stage of ``out``, new or left by an earlier build, for one build at a time.

        Leaving it removes it, unless shards are finished in it that the next build can take over.

        Raises:
            OutputError: another build is writing to ``out``.
            OSError: the folder cannot be written.
        """
        folder = out.with_name(f".{out.name}.mixprec")
        lock = _lock(folder, out)
        stage = cls(out, folder)
        try:
            stage._recover()
            yield stage
        finally:
            with suppress(OSError):  # the next build tidies up, too
                if not stage.payload.exists() or not stage.finished:
                    shutil.rmtree(folder, ignore_errors=True)
                else:
                    stage._drop_unfinished()
                    os.ftruncate(lock, 0)
            with suppress(OSError):  # nothing was written through it that matters
                os.close(lock)

    def record(self, shard: str, key: str, checksums: Mapping[str, str]) -> None:
        """Notes a shard as finished. Its data must have been synced."""
        sync_folder(self.payload)
        entry = FinishedShard(key, (self.payload / shard).stat().st_size, checksums)
        fd = os.open(self._journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        _write_and_close(fd, _line(shard, entry))
        if not self.finished:
            sync_folder(self.folder)
        self.finished[shard] = entry

    def kept(self, shards: int) -> str:
        """What a stopped build leaves and how to go on, for its message."""
        if not self.finished:
            return "nothing was left behind"
        which = "its one file is" if shards == 1 else f"{len(self.finished)} of {shards} files are"
        return f"{which} finished and kept in {self.folder}: the same command goes on from there"

    def keep(self, keys: Mapping[str, str]) -> None:
        """Forgets finished shards that this build, whose shards have ``keys``, would not write the same."""
        kept = {
            shard: entry
            for shard, entry in self.finished.items()
            if keys.get(shard) == entry.key
            and (path := self.payload / shard).is_file()
            and path.stat().st_size == entry.nbytes
        }
        if kept != self.finished:
            # Before anything else is written under the names it forgets: the build whose they were may come back.
            self.finished = kept
            fresh = self.folder / "journal.new"
            fd = os.open(fresh, os.O_WRONLY | os.O_TRUNC | os.O_CREAT | os.O_CLOEXEC, 0o666)
            _write_and_close(fd, b"".join(_line(shard, entry) for shard, entry in kept.items()))
            fresh.rename(self._journal)
            sync_folder(self.folder)
        self._drop_unfinished()

    def _recover(self) -> None:
        """Reads the journal. A line that was cut short or garbled ends it: what follows was never promised."""
        self.payload.mkdir(exist_ok=True)
        sync_folder(self.folder.parent)
        if self.replaced.exists():
            if self.out.exists():
                shutil.rmtree(self.replaced)
            else:
                self.replaced.rename(self.out)  # killed between the two renames that replace an output
        data = read_regular(self._journal) if self._journal.exists() else b""
        whole = 0
        for line in data.splitlines(keepends=True):
            digest, _, text = line.rstrip(b"\n").partition(b" ")
            if not line.endswith(b"\n") or xxhash.xxh3_128_hexdigest(text).encode() != digest:
                break
            entry = json.loads(text)
            shard = entry.pop("shard")
            self.finished[shard] = FinishedShard(**entry)
            whole += len(line)
        if whole < len(data):
            os.truncate(self._journal, whole)

    def _drop_unfinished(self) -> None:
        """All but finished shards and the folder of files cut for ranks, which say themselves what they are."""
        for path in self.payload.iterdir():
            if path.name not in self.finished and not path.is_dir():
                path.unlink()


def _line(shard: str, entry: FinishedShard) -> bytes:
    fields = {"shard": shard, "key": entry.key, "nbytes": entry.nbytes, "checksums": entry.checksums}
    line = json.dumps(fields).encode()
    return b"%s %s\n" % (xxhash.xxh3_128_hexdigest(line).encode(), line)


def _write_and_close(fd: int, data: bytes) -> None:
    with os.fdopen(fd, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(fd)


def _lock(folder: Path, out: Path) -> int:
    """The locked lock file's descriptor."""
    path = folder / "lock"
    while True:
        folder.mkdir(exist_ok=True)
        if folder.is_symlink():
            raise OutputError(f"{folder}: is a link; remove it, a build of {out} is written there")
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:
            continue  # a build that finished removed the folder just now
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(fd) or "unknown"
            os.close(fd)
            raise OutputError(
                f"{out}: another mixprec build is writing there ({holder}); wait for it or name another folder"
            ) from None
        # Locks of other hosts are not always seen on network file systems; a name left by a killed build is.
        holder = _holder(fd)
        host = holder.partition(" ")[0]
        if host and host != socket.gethostname():
            os.close(fd)
            raise OutputError(
                f"{out}: a mixprec build on another host ({holder}) may still be writing there; "
                f"if it is not, remove {folder}"
            )
        try:
            if os.fstat(fd).st_ino == path.stat().st_ino:
                os.ftruncate(fd, 0)
                os.pwrite(fd, f"{socket.gethostname()} pid {os.getpid()}".encode(), 0)
                return fd
        except FileNotFoundError:
            pass  # locked a file that its build had removed: try the new one
        except OSError:
            os.close(fd)
            if not (folder / "journal").exists():
                shutil.rmtree(folder, ignore_errors=True)
            raise
        os.close(fd)


def _holder(fd: int) -> str:
    """What a lock file says, ``""`` if nothing; after a power loss it may hold zero bytes instead of a name."""
    return os.pread(fd, 200, 0).strip(b"\0").decode(errors="replace")
