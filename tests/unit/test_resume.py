"""Builds that are stopped, by anything and at any moment: what they leave, and that the next one goes on."""

from __future__ import annotations

import fcntl
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from support.files import tree
from support.llama import write_recipe, write_sources
from support.plans import cut, planned
from support.run import environment

from mixprec_build.errors import InterruptedBuildError, OutputError, SourceError, WriteError
from mixprec_build.output.publish import write
from mixprec_build.output.stage import Stage
from mixprec_build.output.verify import verify
from mixprec_build.planning.companions import companion_files
from mixprec_build.planning.planner import make_plan
from mixprec_build.recipe.recipe import load_recipe
from mixprec_build.recipe.sources import open_sources
from mixprec_build.storage import reader

# Runs builds (or splits of a build that is there) in which the nth system call that changes the disk is the last: the
# process is killed before it, and with "power" what was never synced is lost, too: data, and new names in folders.
DRIVER = """
import io, json, os, random, shutil, signal, sys, threading
from pathlib import Path
from support.plans import cut, planned
from mixprec_build.output import split
from mixprec_build.output.stage import Stage
from mixprec_build.output.publish import write

what, how = sys.argv[2:4]
calls, names, synced = 0, [], {}  # names in folders that were not synced; file -> bytes that were
lock = threading.RLock()  # the end comes to all threads at once

def path_of(fd):
    return os.readlink(f"/proc/self/fd/{fd}")

def absolute(path, folder):
    return str(path) if folder is None else os.path.join(path_of(folder), path)

def end():
    if how == "power":
        for path, kept in synced.items():
            if os.path.isfile(path):
                size = os.path.getsize(path)  # which may survive where data does not
                truncate(path, min(kept, size))
                truncate(path, size)
        for path in names:
            if os.path.isdir(path):
                shutil.rmtree(path)
            elif os.path.exists(path):
                unlink(path)
    os.kill(os.getpid(), signal.SIGKILL)

def counted(name):
    real = getattr(os, name)
    def call(*arguments, **options):
        global calls
        with lock:
            creates = name == "mkdir" or (name == "open" and arguments[1] & os.O_CREAT)
            if name != "open" or creates:
                calls += 1
                if calls == nth:
                    end()
            first = absolute(arguments[0], options.get("dir_fd"))
            new = creates and not os.path.exists(first)
            result = real(*arguments, **options)
            if new:
                names.append(first)
            if creates and name == "open":
                synced.setdefault(path_of(result), 0)
            if name == "rename":
                old, new = (absolute(at, options.get(f"{end}_dir_fd")) for at, end in zip(arguments, ("src", "dst")))
                names[:] = [path for path in names if path != old]
                for path in [path for path in synced if (path + "/").startswith(old + "/")]:
                    synced[new + path.removeprefix(old)] = synced.pop(path)
            if name == "fsync":
                path = path_of(arguments[0])
                if path in synced:
                    synced[path] = os.fstat(arguments[0]).st_size
                names[:] = [other for other in names if os.path.dirname(other) != path]
            return result
    setattr(os, name, call)

def opened(file, mode="r", *arguments, **options):
    if isinstance(file, Path) and ("w" in mode or "x" in mode):
        os.close(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL * ("x" in mode)))
        mode = mode.replace("x", "w")
    return real_open(file, mode, *arguments, **options)

def noting(function, file_of):
    # What is finished, as it was on the disk then.
    def call(*arguments):
        result = function(*arguments)
        inode = os.stat(file_of(*arguments)).st_ino
        with real_open(log, "a") as file:
            print(file_of(*arguments).name, inode, file=file)
        return result
    return call

truncate, unlink, real_open = os.truncate, os.unlink, io.open
plan = planned(Path(sys.argv[1]))
for nth, out in json.loads(sys.argv[4]):
    child = os.fork()
    if child:
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        continue
    log = out + ".finished"
    Stage.record = noting(Stage.record, lambda stage, shard, *_: stage.payload / shard)
    split.write_rank = noting(split.write_rank, lambda root, name, *_: root.path / name / "index.json")
    changes = "open", "pwrite", "posix_fallocate", "fsync", "rename", "mkdir", "unlink", "rmdir", "ftruncate"
    for name in changes:
        counted(name)
    io.open = opened
    jobs = 1 + nth % 2
    if what == "split":
        cut(Path(out), jobs)
    else:
        write(plan, Path(out), force=True, jobs=jobs)
    if not nth:
        print(calls)
    sys.stdout.flush()
    os._exit(0)
"""


MIX = {"model.layers.0.mlp.*": "fp8", "model.layers.1.mlp.*": "int4"}


@pytest.fixture(scope="module")
def mix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mix")
    write_sources(folder)
    return write_recipe(folder / "mix.yaml", MIX)


@pytest.fixture(scope="module")
def undisturbed(mix: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    write(planned(mix), out)
    assert len(list(out.glob("*.safetensors"))) >= 5
    return tree(out)


def drive(recipe: Path, what: str, how: str, runs: Sequence[tuple[int, Path]]) -> list[int]:
    """The exit codes of builds or splits that are killed before their nth change; of the 0th, the number of changes."""
    arguments = [str(recipe), what, how, json.dumps(runs, default=str)]
    command = [sys.executable, "-c", DRIVER, *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment())
    assert ended.returncode == 0, ended.stderr
    return [int(line) for line in ended.stdout.split()]


KILLS = 50


@pytest.mark.parametrize("how", ["kill", "power"])
@pytest.mark.parametrize("before", ["nothing", "an output"])
def test_a_build_killed_at_any_moment(
    mix: Path, undisturbed: dict[str, bytes], tmp_path: Path, how: str, before: str
) -> None:
    """Before or after, never between; and the next build makes what an undisturbed one makes, of what was finished."""

    def prepared(name: str) -> Path:
        out = tmp_path / name / "out"
        out.parent.mkdir()
        if before == "an output":
            shutil.copytree(built, out)
        return out

    built = tmp_path / "built"
    write(planned(mix), built)
    calls, _ = drive(mix, "build", how, [(0, prepared("whole"))])
    runs = [(nth, prepared(str(nth))) for nth in sorted(random.Random(how + before).sample(range(1, calls + 1), KILLS))]
    assert drive(mix, "build", how, runs) == [-signal.SIGKILL] * KILLS
    resumed = 0
    for nth, out in runs:
        stage, finished = out.parent / ".out.mixprec", finished_in(out)
        published = before == "nothing" and out.exists()
        if out.exists():
            assert tree(out) == undisturbed, nth
            published |= not (stage / "out").exists()
        else:
            # Only between the two renames that replace an output is there none: it waits in the stage.
            assert before == "nothing" or tree(stage / "replaced") == undisturbed
        write(planned(mix), out, force=True)
        assert tree(out) == undisturbed, nth
        assert [entry.name for entry in out.parent.iterdir() if entry.name != "out.finished"] == ["out"], nth
        if not published:
            resumed += bool(finished)
            assert finished <= inodes(out), nth
    assert resumed > KILLS / 2


@pytest.mark.parametrize("how", ["kill", "power"])
def test_a_split_killed_at_any_moment(mix: Path, tmp_path: Path, how: str) -> None:
    """What the manifest lists is whole; the next split makes what an undisturbed one makes, of what was finished."""
    built = tmp_path / "built"
    write(planned(mix), built)
    before = tree(built)
    calls, _ = drive(mix, "split", how, [(0, Path(shutil.copytree(built, tmp_path / "whole")))])
    after = tree(tmp_path / "whole")
    runs = [(nth, Path(shutil.copytree(built, tmp_path / str(nth)))) for nth in range(1, calls + 1)]
    assert drive(mix, "split", how, runs) == [-signal.SIGKILL] * calls
    for nth, out in runs:
        finished = finished_in(out)
        there = tree(out)
        listed = json.loads(there["mixprec_manifest.json"])["presplit"]
        whole = after if "presplit/tp1-ep1/rank-0-of-1" in listed else before
        assert there.items() >= whole.items(), nth
        cut(out)
        assert tree(out) == after, nth
        assert finished <= inodes(out), nth


def finished_in(out: Path) -> set[tuple[str, int]]:
    """The name and inode of each file that the driver saw finished."""
    log = out.with_name(f"{out.name}.finished")
    lines = log.read_text().splitlines() if log.exists() else []
    return {(name, int(inode)) for name, inode in map(str.split, lines)}


def inodes(out: Path) -> set[tuple[str, int]]:
    return {(path.name, path.stat().st_ino) for path in out.rglob("*")}


def stop_after(shards: int) -> Any:
    """A progress callback that presses Ctrl-C when so many files are finished."""

    def progress(_: int) -> None:
        journals = list(Path(progress.folder).glob(".*.mixprec/journal"))  # type: ignore[attr-defined]
        if journals and len(journals[0].read_bytes().splitlines()) >= shards:
            raise KeyboardInterrupt

    return progress


def interrupted(recipe: Path, out: Path, shards: int) -> str:
    progress = stop_after(shards)
    progress.folder = out.parent
    with pytest.raises(InterruptedBuildError) as caught:
        write(planned(recipe), out, jobs=1, progress=progress)
    assert caught.value.exit_code == 130
    return str(caught.value)


def test_an_interrupted_build_goes_on(mix: Path, undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    """Finished shards are not copied again, and the message says how to go on."""
    out = tmp_path / "out"
    message = interrupted(mix, out, 3)
    plan = planned(mix)
    count = len(plan.shards)
    assert message == (
        f"{out}: interrupted; 3 of {count} files are finished and kept in {tmp_path}/.out.mixprec: "
        "the same command goes on from there"
    )
    stage = tmp_path / ".out.mixprec"
    kept = {p.name: p.stat() for p in (stage / "out").iterdir()}
    assert sorted(kept) == [shard.file for shard in plan.shards[:3]]
    done: list[int] = []
    write(plan, out, progress=done.append)
    assert sum(done) == plan.written_bytes
    for name, state in kept.items():
        after = (out / name).stat()
        assert (after.st_ino, after.st_mtime_ns) == (state.st_ino, state.st_mtime_ns)
    assert tree(out) == undisturbed
    assert not stage.exists()


def test_another_recipe_takes_over_only_what_is_the_same(mix: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    interrupted(mix, out, 3)
    other = write_recipe(mix.with_name("other.yaml"), {"model.layers.1.mlp.*": "fp8"})
    write(planned(other), out)
    assert not verify(out).differences
    write(planned(other), tmp_path / "fresh")
    assert tree(out) == tree(tmp_path / "fresh")


def test_a_source_that_changed_is_copied_again(tmp_path: Path) -> None:
    """Also where its header stayed the same."""
    write_sources(tmp_path)
    recipe, out = write_recipe(tmp_path / "mix.yaml", MIX), tmp_path / "out"
    interrupted(recipe, out, 3)
    path = next((tmp_path / "fp8").glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    write(planned(recipe), out)
    assert not verify(out).differences


@pytest.mark.parametrize("damage", ["cut", "flipped", "garbage", "file gone", "file short"])
def test_a_journal_that_cannot_be_trusted(
    mix: Path, undisturbed: dict[str, bytes], tmp_path: Path, damage: str
) -> None:
    out, stage = tmp_path / "out", tmp_path / ".out.mixprec"
    interrupted(mix, out, 3)
    journal, first = stage / "journal", next((stage / "out").iterdir())
    data = journal.read_bytes()
    if damage == "cut":
        journal.write_bytes(data[:-5])
    elif damage == "flipped":
        journal.write_bytes(data[:60] + bytes([data[60] ^ 1]) + data[61:])
    elif damage == "garbage":
        journal.write_bytes(data + b"\x00" * 100)
    elif damage == "file gone":
        first.unlink()
    else:
        os.truncate(first, first.stat().st_size - 1)
    write(planned(mix), out)
    assert tree(out) == undisturbed


def test_a_journal_that_cannot_be_read_now_is_kept(
    mix: Path, undisturbed: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor are the shards that it lists, which the same command takes over when the disk is back."""
    out, stage = tmp_path / "out", tmp_path / ".out.mixprec"
    interrupted(mix, out, 3)
    before = tree(stage / "out")

    def failing(self: Stage) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch, pytest.raises(WriteError, match="Input/output error"):
        patch.setattr(Stage, "_read_journal", failing)
        write(planned(mix), out)
    assert len(before) == 3 and tree(stage / "out") == before
    done: list[int] = []
    plan = planned(mix)
    write(plan, out, progress=done.append)
    assert plan.shards[0].data_bytes in done and tree(out) == undisturbed


def test_two_builds_into_one_folder(mix: Path, tmp_path: Path) -> None:
    out, refused = tmp_path / "out", []

    def second(_: int) -> None:
        if not refused:
            with pytest.raises(OutputError) as caught:
                write(planned(mix), out)
            refused.append(str(caught.value))

    write(planned(mix), out, jobs=1, progress=second)
    host = os.uname().nodename
    assert refused == [
        f"{out}: another mixprec build is writing there ({host} pid {os.getpid()}); wait for it or name another folder"
    ]
    assert not verify(out).differences


def test_a_lock_of_another_host_is_respected(mix: Path, tmp_path: Path) -> None:
    """On network file systems locks of other hosts are not always seen; the name in the file is."""
    stage = tmp_path / ".out.mixprec"
    stage.mkdir()
    (stage / "lock").write_text("elsewhere pid 7")
    with pytest.raises(OutputError, match=r"another host \(elsewhere pid 7\) was writing .*pass --take-over"):
        write(planned(mix), tmp_path / "out")
    (stage / "lock").write_text(f"{os.uname().nodename} pid 7")
    write(planned(mix), tmp_path / "out")


def test_a_killed_builds_lock_is_free(mix: Path, tmp_path: Path) -> None:
    stage = tmp_path / ".out.mixprec"
    stage.mkdir()
    with (stage / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(OutputError, match=r"another mixprec build is writing there \(unknown\)"):
            write(planned(mix), tmp_path / "out")
    write(planned(mix), tmp_path / "out")
    assert not stage.exists()


def test_a_failing_disk_keeps_what_is_finished(
    mix: Path, undisturbed: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, real = tmp_path / "out", os.posix_fallocate
    calls: list[int] = []

    def full(fd: int, offset: int, length: int) -> None:
        calls.append(length)
        if len(calls) == 4:
            raise OSError(28, "No space left on device")
        real(fd, offset, length)

    with monkeypatch.context() as patch, pytest.raises(WriteError) as caught:
        patch.setattr(os, "posix_fallocate", full)
        write(planned(mix), out, jobs=1)
    assert "No space left on device; free some space; 3 of" in str(caught.value)
    assert "the same command goes on from there" in str(caught.value)
    write(planned(mix), out)
    assert tree(out) == undisturbed


def test_a_read_error_keeps_what_is_finished(mix: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.preadv
    calls: list[int] = []

    def failing(fd: int, buffers: list[memoryview], at: int) -> int:
        calls.append(at)
        if len(calls) == 20:
            raise OSError(5, "Input/output error")
        return real(fd, buffers, at)

    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(SourceError, match=r"Input/output error; \d of \d+ files are finished and kept"):
        write(planned(mix), tmp_path / "out", jobs=1)


def test_out_of_memory_keeps_what_is_finished(
    mix: Path, undisturbed: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = reader.pread_into, 0

    def failing(fd: int, window: memoryview, at: int) -> int:
        nonlocal calls
        calls += 1
        if calls == 20:
            raise MemoryError
        return real(fd, window, at)

    with monkeypatch.context() as patch, pytest.raises(WriteError) as caught:
        patch.setattr(reader, "pread_into", failing)
        write(planned(mix), tmp_path / "out", jobs=1)
    assert re.search(r"out: out of memory; \d of 12 files are finished and kept in ", str(caught.value))
    with monkeypatch.context() as patch, pytest.raises(WriteError, match="can't start new thread; try --jobs 1; "):
        plan = planned(mix)
        patch.setattr(threading.Thread, "start", no_thread)
        write(plan, tmp_path / "out")
    write(planned(mix), tmp_path / "out")
    assert tree(tmp_path / "out") == undisturbed


def no_thread(_: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


@pytest.mark.parametrize(
    "link", [".out.mixprec", "out/presplit", "out/presplit/tp1-ep1", "out/.mixprec_manifest.json.new"]
)
def test_nothing_is_written_through_a_link(mix: Path, tmp_path: Path, link: str) -> None:
    """That somebody else put where a build or split writes."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    if link.startswith("out/"):
        small = load_recipe(mix)
        write(make_plan(small, open_sources(small)), tmp_path / "out")
    if link.endswith(".new"):
        elsewhere = elsewhere / "file"
        elsewhere.write_text("mine")
    (tmp_path / link).parent.mkdir(exist_ok=True)
    (tmp_path / link).symlink_to(elsewhere)
    before = tree(tmp_path / "elsewhere")
    if link.endswith(".new"):
        cut(tmp_path / "out")
    else:
        with pytest.raises(OutputError, match=f"{tmp_path / link}: is a link; remove it"):
            cut(tmp_path / "out") if link.startswith("out/") else write(planned(mix), tmp_path / "out")
    assert tree(tmp_path / "elsewhere") == before


def test_room_for_ranks_is_asked_for_before_a_byte_is_written(
    mix: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(mix)
    merged, real = sum(shard.file_bytes(plan.sources) for shard in plan.shards), os.statvfs
    needed = merged + plan.presplit["tp2-ep1"] + sum(companion_files(plan.sources.model).values())

    def almost_full(path: Path) -> os.statvfs_result:
        found = list(real(path))
        found[1], found[4] = 1, merged  # f_frsize, f_bavail
        return os.statvfs_result(found)

    monkeypatch.setattr(os, "statvfs", almost_full)
    with pytest.raises(WriteError, match=f"{needed} bytes are needed, {merged} are free"):
        write(plan, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_clock_does_not_matter(mix: Path, undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    """Kept files from the future or the distant past are taken over by their key, not by their age."""
    out, stage = tmp_path / "out", tmp_path / ".out.mixprec"
    interrupted(mix, out, 3)
    for at, path in zip((0, 2**33, 1), (stage / "out").iterdir(), strict=True):
        os.utime(path, (at, at))
    write(planned(mix), out)
    assert tree(out) == undisturbed


def test_journal_lines_name_shards(mix: Path, tmp_path: Path) -> None:
    interrupted(mix, tmp_path / "out", 2)
    lines = (tmp_path / ".out.mixprec" / "journal").read_bytes().splitlines()
    assert [json.loads(line.partition(b" ")[2])["shard"] for line in lines] == [
        shard.file for shard in planned(mix).shards[:2]
    ]


def test_what_one_build_forgets_no_later_one_believes(tmp_path: Path) -> None:
    """A finished shard that another recipe's build began to overwrite, at the same size, before it was killed."""
    with Stage.open(tmp_path / "out") as stage:
        for shard in ("a", "b"):
            (stage.payload / shard).write_bytes(b"1234")
            stage.record(shard, f"key of {shard}", {})
    with Stage.open(tmp_path / "out") as stage:
        stage.keep({"a": "another key", "b": "key of b"})
        (stage.payload / "a").write_bytes(b"....")
    with Stage.open(tmp_path / "out") as stage:
        stage.keep({"a": "key of a", "b": "key of b"})
        assert list(stage.finished) == ["b"]
        assert [path.name for path in stage.payload.iterdir()] == ["b"]
