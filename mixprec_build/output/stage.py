"""The hidden folder beside its output that a build writes into, and what survives there when a build is stopped.

    .out.mixprec/
        lock        locked (flock) by the build that is writing, and names it: host, pid, boot, a random word
        made        shows that mixprec made this folder here: one that came with a download is not used
        names       the files that builds write into out/; others there are not mixprec's, and stay
        journal     a line for each finished shard: its key and its tensors' checksums, with a checksum of the line
        plan        of a part of a build only: what its plan depends on, see :mod:`.parts`
        out/        the checkpoint, renamed to its final name when it is complete
        replaced/   the output that is being replaced: put back as long as out/ is still here, else removed

A shard enters the journal only when its bytes and its name are on the disk; one that a part has finished, when they are
in the part's stage, before it is moved. Its key is a digest of everything that its bytes depend on, so the next build
takes over a shard only where it would write the same one.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import xxhash

from ..checkpoint.manifest import MANIFEST, is_new_manifest
from ..errors import OutputError
from ..ranks.layout import is_ours
from ..storage.owned import Entry, OwnedFolder
from .lock_file import Lock, beating
from .stage_lock import mark, stage_name, take_lock, write_and_close

__all__ = ["FinishedShard", "Stage", "remove_output"]


_MOST_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class FinishedShard:
    """A line of the journal."""

    key: str
    nbytes: int
    checksums: Mapping[str, str]
    """Name of a tensor -> hexadecimal xxh3_128."""


@dataclass(slots=True)
class Stage:
    """An opened and locked stage; see :func:`Stage.open`."""

    out: Path
    root: OwnedFolder
    """The folder that ``out`` is in; everything is opened relative to it."""
    lock: Lock
    finished: dict[str, FinishedShard] = field(default_factory=dict)
    names: set[str] = field(default_factory=set)
    """The files that builds write into the payload."""
    _recovered: bool = False

    @property
    def folder(self) -> Path:
        return self.out.with_name(stage_name(self.out))

    @property
    def payload(self) -> Path:
        """The folder that becomes the output."""
        return self.folder / "out"

    @property
    def replaced(self) -> Path:
        """The place of an output that is being replaced, until it is removed."""
        return self.folder / "replaced"

    @property
    def published(self) -> bool:
        """Whether the payload has become the output."""
        return self._recovered and self.root.stat(self.inner("out")) is None

    def inner(self, name: str) -> str:
        """An entry of the stage, as ``root`` names it."""
        return f"{stage_name(self.out)}/{name}"

    @classmethod
    @contextmanager
    def open(cls, out: Path, *, take_over: bool = False) -> Iterator[Stage]:
        """Opens and locks the stage of ``out``, new or left by an earlier build.

        At the end it is removed, unless the next build can take over finished shards. With ``take_over`` it may also be
        one that was not made here, or that a build on another machine may still be writing.

        Raises:
            OutputError: another build is writing to ``out``, or the stage is not this user's mixprec's.
            OSError: the folder cannot be written.
        """
        with OwnedFolder.open(out.parent) as root:
            stage = cls(out, root, take_lock(root, out, take_over))
            try:
                with beating(stage.lock):
                    stage.lock.sign()
                    mark(root, stage_name(out))
                    stage._recover()
                    yield stage
            finally:
                with suppress(OSError, OutputError):  # the next build tidies up, too
                    stage._leave()
                with suppress(OSError):  # nothing was written through it that matters
                    os.close(stage.lock.fd)

    @classmethod
    def tidy(cls, out: Path) -> None:
        """Removes the stage of a build that was stopped after its output was in place."""
        with suppress(OSError, OutputError), OwnedFolder.open(out.parent) as root:
            if root.entry(stage_name(out)) is not None:
                with cls.open(out):
                    pass

    def record(self, shard: str, key: str, checksums: Mapping[str, str]) -> None:
        """Writes a finished shard, whose data must have been synced, into the journal."""
        self.check()
        self.root.sync(self.inner("out"))
        entry = FinishedShard(key, (self.payload / shard).stat().st_size, checksums)
        fd = self.root.open_file(self.inner("journal"), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        write_and_close(fd, _line(shard, entry))
        if not self.finished:
            self.root.sync(stage_name(self.out))
        self.finished[shard] = entry

    def check(self) -> None:
        """Raises :class:`OutputError` where another build has taken the stage over."""
        if not self.lock.is_signed():
            raise OutputError(f"{self.out}: another build has taken over {self.folder}; nothing more was written there")

    def kept(self, shards: int) -> str:
        """The part of a stopped build's message that says what is left and how to continue."""
        if self.published:
            left = self.root.entry(self.inner("replaced"))
            rest = f"; the next build into {self.out} removes {self.replaced}, what it replaced"
            return f"the new checkpoint is complete and in place{'' if left is None else rest}"
        if not self.finished:
            return "nothing was left behind"
        which = "its one file is" if shards == 1 else f"{len(self.finished)} of {shards} files are"
        return f"{which} finished and kept in {self.folder}: the same command goes on from there"

    def expect(self, names: Iterable[str]) -> None:
        """Notes the names of files before they are written into the payload.

        Raises:
            OutputError: the payload has an entry that no build wrote.
        """
        if not self.names.issuperset(names):
            self.names.update(names)
            self._replace("names", json.dumps(sorted(self.names)).encode())
        self.refuse_others()

    def refuse_others(self) -> None:
        """Raises :class:`OutputError` where the payload has an entry that no build wrote."""
        for entry in self.root.below(self.inner("out"), self._is_mine):
            if not self._is_mine(entry):
                raise OutputError(
                    f"{self.root.path / entry.name}: {entry.kind} that mixprec did not write; move it away, a "
                    "checkpoint is being written there"
                )

    def keep(self, keys: Mapping[str, str]) -> None:
        """Forgets finished shards that this build would write differently. ``keys``: file -> key of its shard now."""
        self.expect(keys)
        kept = {shard: entry for shard, entry in self.finished.items() if self.is_kept(shard, entry, keys)}
        if kept != self.finished:
            # Before files of these names are written again: the build that wrote them may come back.
            self.finished = kept
            self._replace("journal", b"".join(_line(shard, entry) for shard, entry in kept.items()))
        self._drop_unfinished()

    def adopt(self, other: Stage, shards: Sequence[str]) -> None:
        """Moves shards that ``other``, the stage of a part, has finished into this one, and enters them in the journal.

        Unfinished files must have been dropped (:meth:`keep`), for a file of a shard's name and size counts as finished
        from now on. After a kill each shard is either here or still there.
        """
        self.check()
        other.check()
        self.root.sync(self.inner("out"))
        fd = self.root.open_file(self.inner("journal"), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        write_and_close(fd, b"".join(_line(shard, other.finished[shard]) for shard in shards))
        self.root.sync(stage_name(self.out))
        for shard in shards:
            self.root.rename(other.inner(f"out/{shard}"), self.inner(f"out/{shard}"))
            self.finished[shard] = other.finished.pop(shard)
        self.root.sync(self.inner("out"))
        self.root.sync(other.inner("out"))

    def write_plan(self, data: bytes) -> None:
        """Notes what the plan of a part depends on."""
        self.check()
        self._replace("plan", data)

    def read_plan(self) -> bytes:
        """What :meth:`write_plan` noted; empty where it noted nothing."""
        return self._read("plan")

    def is_kept(self, shard: str, entry: FinishedShard, keys: Mapping[str, str]) -> bool:
        """Whether a shard of the journal is there and is the one that ``keys`` (file -> key) asks for."""
        if keys.get(shard) != entry.key:
            return False
        state = self.root.stat(self.inner(f"out/{shard}"))
        return state is not None and stat.S_ISREG(state.st_mode) and state.st_size == entry.nbytes

    def _replace(self, name: str, data: bytes) -> None:
        """Replaces a file of the stage by one rename."""
        fresh = self.inner(f"{name}.new")
        with suppress(FileNotFoundError):
            self.root.unlink(fresh)
        write_and_close(self.root.create(fresh), data)
        self.root.rename(fresh, self.inner(name))
        self.root.sync(stage_name(self.out))

    def _read(self, name: str) -> bytes:
        """A file of the stage, empty where there is none."""
        try:
            fd = self.root.open_file(self.inner(name), os.O_RDONLY)
        except FileNotFoundError:
            return b""
        with os.fdopen(fd, "rb") as file:
            if not stat.S_ISREG(os.fstat(fd).st_mode) or os.fstat(fd).st_size > _MOST_BYTES:
                raise OutputError(f"{self.folder / name}: is no file that mixprec wrote; remove it")
            return file.read()

    def _recover(self) -> None:
        """Puts back or removes what was being replaced, and reads the journal."""
        waiting = self.root.entry(self.inner("replaced"))
        if waiting is not None:
            if not waiting.is_folder:
                raise OutputError(f"{self.replaced}: is {waiting.kind}; remove it")
            if self.root.entry(self.inner("out")) is None or self.root.entry(self.out.name) is not None:
                self.discard_replaced()  # the new output was in place, and part of the old one may be gone
            else:  # killed between the two renames that replace an output
                self.root.rename(self.inner("replaced"), self.out.name)
        self.root.make_folder(self.inner("out"))
        self.root.sync()
        with suppress(ValueError):  # garbled: what it named stays
            self.names = {name for name in json.loads(self._read("names") or b"[]") if isinstance(name, str)}
        self._read_journal()
        self.names.update(self.finished)
        # Only now: what is left without a line of the journal is removed at the end.
        self._recovered = True

    def _read_journal(self) -> None:
        """Reads the journal up to the first line that is incomplete or garbled, and cuts it off there."""
        data = self._read("journal")
        valid = 0
        for line in data.splitlines(keepends=True):
            digest, _, text = line.rstrip(b"\n").partition(b" ")
            if not line.endswith(b"\n") or xxhash.xxh3_128_hexdigest(text).encode() != digest:
                break
            entry = json.loads(text)
            shard = entry.pop("shard")
            self.finished[shard] = FinishedShard(**entry)
            valid += len(line)
        if valid < len(data):
            fd = self.root.open_file(self.inner("journal"), os.O_WRONLY)
            try:
                os.ftruncate(fd, valid)
            finally:
                os.close(fd)

    def discard_replaced(self) -> bool:
        """Removes the output that was replaced. Returns whether nothing is left of it."""
        return remove_output(self.root, self.inner("replaced"))

    def _is_mine(self, entry: Entry) -> bool:
        """Whether it is the payload, a file that a build writes into it, or one of its files cut for ranks."""
        name = entry.name.removeprefix(self.inner("out")).removeprefix("/")
        if not name:
            return entry.is_folder
        return (name in self.names and entry.is_file) or is_ours(Entry(name, entry.mode))

    def _drop_unfinished(self) -> None:
        """Removes the payload's files except finished shards, and files cut for ranks, which have their own index."""
        for entry in self.root.entries(self.inner("out")):
            if entry.is_file and self._is_mine(entry) and entry.name.rpartition("/")[2] not in self.finished:
                self.root.unlink(entry.name)

    def _leave(self) -> None:
        """Keeps what the next build can take over, or removes the stage."""
        if not self.lock.is_signed():
            return  # it is another build's now
        name = stage_name(self.out)
        worth = any(self.root.stat(self.inner(f"out/{shard}")) is not None for shard in self.finished)
        if self._recovered and not worth:
            for part in ("journal", "journal.new", "names.new", "plan", "plan.new"):
                self.root.remove(self.inner(part), lambda entry: entry.is_file)
            if self.root.remove(self.inner("out"), self._is_mine):
                self.root.remove(self.inner("names"), lambda entry: entry.is_file)
        elif self._recovered:
            self._drop_unfinished()
        elif self.root.entry(self.inner("replaced")) is None:  # nothing was read: only a payload that is empty goes
            self.root.remove(self.inner("out"), lambda entry: entry.name == self.inner("out"))
        left = {entry.name for entry in self.root.entries(name)} - {self.inner("lock"), self.inner("made")}
        if left:
            self.lock.release()
            return
        # The lock goes last, so that a build that opens it before finds it locked.
        for part in ("made", "lock"):
            with suppress(FileNotFoundError):
                self.root.unlink(self.inner(part))
        self.root.remove(name, lambda entry: entry.is_folder)


def remove_output(root: OwnedFolder, name: str) -> bool:
    """Removes the files that a checkpoint's manifest lists, and its folder. Returns whether nothing is left of it.

    The manifest goes last, so that a removal that was stopped can be continued.
    """
    entry = root.entry(name)
    if entry is None:
        return True
    if not entry.is_folder:
        return False
    listed = _listed(root, name)

    def is_mine(entry: Entry) -> bool:
        inner = entry.name.removeprefix(name).removeprefix("/")
        written = inner in listed or (bool(listed) and is_new_manifest(inner))
        return (written and entry.is_file) or is_ours(Entry(inner, entry.mode))

    for inner in root.entries(name):
        root.remove(inner.name, is_mine)
    for last in root.entries(name) if listed else ():
        if last.name == f"{name}/{MANIFEST}" and len(root.entries(name)) == 1:
            root.unlink(last.name)
    return root.remove(name, lambda entry: entry.name == name)


def _listed(root: OwnedFolder, name: str) -> set[str]:
    """The files that a checkpoint's manifest lists; none where it has none."""
    try:
        with os.fdopen(root.open_file(f"{name}/{MANIFEST}", os.O_RDONLY), "rb") as file:
            return {*json.loads(file.read(_MOST_BYTES))["files"]}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return set()


def _line(shard: str, entry: FinishedShard) -> bytes:
    fields = {"shard": shard, "key": entry.key, "nbytes": entry.nbytes, "checksums": entry.checksums}
    line = json.dumps(fields).encode()
    return b"%s %s\n" % (xxhash.xxh3_128_hexdigest(line).encode(), line)
