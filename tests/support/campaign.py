"""Stops a command at each of its file-system calls in turn: the call fails, is replaced by a kill, or waits.

    python -m support.campaign RECIPE BUILT FOLDER build ENOSPC,kill 1

builds ``RECIPE`` into copies of ``BUILT`` below ``FOLDER``, and prints the number of calls and of exit codes. Runs in a
process of its own, without torch. With ``unlocked`` as a last argument no file can be locked (flock).

A run must leave the output from before or after it, and the same command must then finish, leaving nothing else.
Each state is finished only once. Kills are made before calls that change the disk, since others leave the same state.
"""

from __future__ import annotations

import builtins
import errno
import fcntl
import io
import json
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import xxhash

from mixprec_build.checkpoint.degree import Degree
from mixprec_build.checkpoint.manifest import MANIFEST
from mixprec_build.errors import MissingPartsError, MissingRanksError, MixprecError, VerifyError
from mixprec_build.output.build import plan_recipe, run_plan
from mixprec_build.output.parts import Part, shards_of
from mixprec_build.output.split import split
from mixprec_build.output.verify import verify
from mixprec_build.planning.planner import make_plan
from mixprec_build.planning.types import Plan

__all__ = ["COMMANDS", "Campaign"]

_CALLS = (
    "open", "pwrite", "pread", "preadv", "write", "read", "posix_fallocate", "ftruncate", "lseek", "fstat", "stat",
    "lstat", "statvfs", "scandir", "listdir", "mkdir", "rmdir", "unlink", "rename", "replace", "link", "readlink",
    "fsync",
)  # fmt: skip
"""Functions of ``os``, without ``close``, which no file system fails for a folder."""
_CHANGES = {
    "pwrite", "write", "posix_fallocate", "ftruncate", "mkdir", "rmdir", "unlink", "rename", "replace", "link",
    "writelines", "flush",
}  # fmt: skip
_OF_FILES = ("write", "writelines", "read", "flush")
_SIGNED = ("/lock", ".lock", "/made")
"""Endings of files with numbers of processes and inodes."""

COMMANDS = ("build", "part", "finish", "split", "rank", "other", "ranks", "verify")
_PARTS = (Part(1, 2), Part(2, 2))
"""Those of a build; `part` writes the first one, `finish` is given both."""
_RANK, _OTHER = 1, 0
"""Those of a split; `rank` and `other` each cut one, `ranks` finishes it with both."""


class Campaign:
    """Runs a command on copies of an output, and stops each run at one call.

    Args:
        built: the output before the command.
        what: the command, one of :data:`COMMANDS`.
    """

    def __init__(self, recipe: Path, built: Path, folder: Path, what: str):
        self._plan = plan_recipe(recipe)
        if what in ("part", "finish"):
            small = replace(self._plan.recipe, shard_size=200_000)  # smaller than a recipe may ask for
            self._plan = make_plan(small, self._plan.sources)
            assert all(shards_of(self._plan, part) for part in _PARTS)
        self._built, self._folder, self._what = built, folder, what
        if what in ("rank", "other", "ranks"):
            plain = Path(shutil.copytree(built, folder / "plain"))
            split(plain, Degree(2), jobs=1)
            self._plain = _tree(plain)
            """The output with both ranks, cut by one command."""
        if what == "ranks":  # both are complete, and none is listed
            self._built = Path(shutil.move(plain, folder / "cut"))
            shutil.copy(built / MANIFEST, self._built)
        self.before = _tree(self._built)
        self._finished: set[str] = set()
        self._beside = [folder / "parts" / part.stage(folder / "out") for part in _PARTS]
        """The stages of complete parts."""
        if what in ("part", "finish"):
            for part in _PARTS:
                run_plan(self._plan, folder / "parts" / "out", part=part, jobs=1)
        self.wrong: list[str] = []
        """Expectations that failed, as sentences."""
        out = self._copy("due")
        with _Calls() as calls:
            _command(what, self._plan, out)
        self.calls = calls.made
        self.changes = calls.changes
        """The numbers of calls that may change the disk."""
        self.due = _tree(out)
        assert verify(out).differences == ()

    def sweep(self, error: str, step: int = 1) -> Counter[int]:
        """Counts the exit codes of the command when each of its calls fails with ``error`` (or a kill).

        Except for ``EIO``, only calls that may change the disk fail.
        """
        codes: Counter[int] = Counter()
        points = range(1, self.calls + 1) if error == "EIO" else self.changes
        for nth in points[::step]:
            out, case = self._copy(str(nth)), f"{self._what}, {error} at call {nth}"
            files = _open_files()
            kills = error == "kill"
            code = _ended(self._start(out, nth, error)) if kills else self._failing(out, nth, error)
            codes[code] += 1
            for lock in out.rglob(".*.lock") if kills else ():
                os.utime(lock, (0, 0))  # as long ago as a file system without locks needs to tell
            there = _tree(out) if out.exists() else None
            self._expect(code == -signal.SIGKILL if kills else code in (0, 1, 2, 3), f"{case}: exit {code}")
            self._expect(_open_files() == files, f"{case}: a file stays open")
            if self._what in ("build", "part", "finish"):
                old_or_new = there in (self.before, self.due) or (code < 0 and there is None)
                self._expect(old_or_new, f"{case}: neither the old output nor the new one")
            # A lock that could not be removed in the end is removed by the next split.
            done = {name: data for name, data in (there or {}).items() if not name.endswith(".lock")}
            self._expect(code != 0 or done == self.due, f"{case}: not finished")
            self._finish(out, case)
        return codes

    def pairs(self, other: str, count: int) -> Counter[str]:
        """Counts how the command and ``other`` end when ``other`` runs while the command waits at one of its calls.

        Stops at ``count`` of the calls.
        """
        codes: Counter[str] = Counter()
        for nth in sorted({1 + i * self.calls // count for i in range(count)}):
            out, case = self._copy(str(nth)), f"{other} while {self._what} waits at call {nth}"
            first = self._start(out, nth, "stop")
            _, status = os.waitpid(first, os.WUNTRACED)
            self._expect(os.WIFSTOPPED(status), f"{case}: it does not")
            waiting = self._start(out, 0, "none", other)
            second = _ended_within(waiting, 2)  # a build waits for those that read what it replaces
            os.kill(first, signal.SIGCONT)
            code = _ended(first)
            second = _ended(waiting) if second is None else second
            codes[f"{code} {second}"] += 1
            self._expect({code, second} <= {0, 2} and 0 in (code, second), f"{case}: exit {code} and {second}")
            if other == "verify":
                self._expect(_tree(out) == (self.due if code == 0 else self.before), f"{case}: it is not what it was")
            if second:  # a build that was refused keeps what it has finished
                _command(other, self._plan, out)
            if self._what == "verify":  # which leaves what the other one made
                self.due = _tree(out)
            self._finish(out, case, always=True)
        return codes

    def _expect(self, holds: bool, what: str) -> None:
        if not holds:
            self.wrong.append(what)

    def _copy(self, name: str) -> Path:
        if self._what == "finish":
            for stage in self._beside:
                shutil.copytree(stage, self._folder / name / stage.name)
        return Path(shutil.copytree(self._built, self._folder / name / "out", copy_function=os.link))

    def _finish(self, out: Path, case: str, *, always: bool = False) -> None:
        state = _state(out.parent)
        if always or state not in self._finished:
            self._finished.add(state)
            published = self._what == "finish" and out.exists() and _tree(out) == self.due
            try:
                if self._what in ("rank", "other"):
                    self._finish_ranks(out, case)
                try:
                    _command(self._what, self._plan, out)
                except MissingPartsError:  # after it was published: nothing is left to finish
                    self._expect(published, f"{case}: parts are lost")
                due = self._plain if self._what in ("rank", "other") else self.due
                self._expect(_tree(out) == due, f"{case}: another output when it is repeated")
                left = sorted(path.name for path in out.parent.iterdir())
                if self._what == "part":
                    part = self._beside[0].name
                    same = _tree(out.parent / part / "out") == _tree(self._beside[0] / "out")
                    self._expect(left.pop(0) == part and same, f"{case}: another part when it is repeated")
                self._expect(left == ["out"], f"{case}: leaves {left}")
            except MixprecError as error:
                self._expect(False, f"{case}: when it is repeated: {error}")
        shutil.rmtree(out.parent)

    def _finish_ranks(self, out: Path, case: str) -> None:
        """Cuts the other rank beside what is left of this one, which a finish takes only where it is complete."""
        mine = f"rank-{_RANK if self._what == 'rank' else _OTHER}-of-2"
        before = [path for path in _paths(out) if mine in path]
        _command("other" if self._what == "rank" else "rank", self._plan, out)
        self._expect([path for path in _paths(out) if mine in path] == before, f"{case}: another rank's were changed")
        self._expect(verify(out).differences == (), f"{case}: something is listed that is not complete")
        try:
            split(out, Degree(2), finish=True, jobs=1)
        except MissingRanksError as error:
            self._expect(error.ranks == (int(mine[5]),), f"{case}: ranks {error.ranks} are missing")
            _command(self._what, self._plan, out)
            split(out, Degree(2), finish=True, jobs=1)

    def _failing(self, out: Path, nth: int, error: str) -> int:
        try:
            with _Calls(nth, error):
                _command(self._what, self._plan, out)
        except MixprecError as refusal:
            return refusal.exit_code
        except OSError as unnamed:
            self.wrong.append(f"{self._what}, {error} at call {nth}: a traceback: {unnamed}")
            return 1
        return 0

    def _start(self, out: Path, nth: int, error: str, what: str | None = None) -> int:
        """Starts a process that runs the command, or ``what``; returns its number."""
        child = os.fork()
        if child:
            return child
        code = 99  # a traceback
        try:
            with _Calls(nth, error):
                _command(what or self._what, self._plan, out)
            code = 0
        except MixprecError as refusal:
            code = refusal.exit_code
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)


def _ended_within(process: int, seconds: float) -> int | None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    return None


def _open_files() -> int:
    return len([*Path("/proc/self/fd").iterdir()])


def _ended(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


class _Calls:
    """Counts the file-system calls of this process while the context lasts; the ``nth`` fails, kills or stops it."""

    def __init__(self, nth: int = 0, error: str = "none"):
        self._nth, self._error = nth, error
        self._lock = threading.Lock()
        self.made = 0
        self.changes: list[int] = []
        self._real: list[tuple[Any, str, Any]] = []

    def __enter__(self) -> _Calls:
        for name in _CALLS:
            self._replace(os, name, self._counted(name, getattr(os, name)))
        fdopen = os.fdopen
        self._replace(os, "fdopen", lambda *args, **options: _File(fdopen(*args, **options), self))
        self._replace(builtins, "open", self._counted("open", io.open))
        self._replace(io, "open", builtins.open)
        return self

    def __exit__(self, *_: object) -> None:
        for place, name, real in reversed(self._real):
            setattr(place, name, real)

    def _replace(self, place: Any, name: str, value: Any) -> None:
        self._real.append((place, name, getattr(place, name)))
        setattr(place, name, value)

    def _counted(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if name == "open" and isinstance(arguments[0], int):  # a file object of what is open
                return real(*arguments, **options)
            flags = arguments[1] if name == "open" and len(arguments) > 1 else 0
            makes = "w" in flags if isinstance(flags, str) else bool(flags & (os.O_CREAT | os.O_TRUNC))
            self.count(name in _CHANGES or (name == "open" and makes))
            return real(*arguments, **options)

        return call

    def count(self, changes: bool) -> None:
        with self._lock:
            self.made += 1
            if changes:
                self.changes.append(self.made)
            due = self.made == self._nth
        if not due:
            return
        if self._error == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif self._error == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        else:
            number = getattr(errno, self._error)
            raise OSError(number, os.strerror(number))


class _File:
    """A file object whose reads and writes are counted."""

    def __init__(self, file: Any, calls: _Calls):
        self._file, self._calls = file, calls

    def __getattr__(self, name: str) -> Any:
        if name in _OF_FILES:
            self._calls.count(name in _CHANGES)
        return getattr(self._file, name)

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __iter__(self) -> Any:
        return iter(self._file)


def _command(what: str, plan: Plan, out: Path) -> None:
    if what == "build":
        run_plan(plan, out, force=True, jobs=1)
    elif what == "part":
        run_plan(plan, out, part=_PARTS[0], force=True, jobs=1)
    elif what == "finish":  # of stages that were copied
        run_plan(plan, out, finish=True, take_over=True, force=True, jobs=1)
    elif what == "split":
        split(out, Degree(2), layout="presplit", jobs=1)
    elif what in ("rank", "other"):
        split(out, Degree(2), ranks=[_RANK if what == "rank" else _OTHER], jobs=1)
    elif what == "ranks":
        split(out, Degree(2), layout="presplit", finish=True, jobs=1)
    else:
        differences = verify(out).differences
        if differences:
            raise VerifyError("; ".join(differences))


def _tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def _paths(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in sorted(folder.rglob("*"))]


def _state(folder: Path) -> str:
    """A checksum of a folder's contents, without those of files like :data:`_SIGNED`."""
    digest = xxhash.xxh3_128()
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        data = path.read_bytes() if path.is_file() and not name.endswith(_SIGNED) else b""
        digest.update(f"{name}\0{path.lstat().st_mode}\0{len(data)}\0".encode())
        digest.update(data)
    return str(digest.hexdigest())


def _unsupported(*_: object) -> None:
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


def main() -> None:
    os.fsync = lambda fd: None  # a process that is killed loses nothing of what it wrote
    recipe, built, folder, what, errors, step = sys.argv[1:7]
    if sys.argv[7:] == ["unlocked"]:
        fcntl.flock = _unsupported
    campaign = Campaign(Path(recipe), Path(built), Path(folder), what)
    print(campaign.calls, len(campaign.changes))
    for error in errors.split(","):
        if error in COMMANDS:
            print(json.dumps([error, campaign.pairs(error, int(step))]))
        else:
            print(json.dumps([error, campaign.sweep(error, int(step))]))
    sys.exit("\n".join(campaign.wrong) or 0)


if __name__ == "__main__":
    main()
