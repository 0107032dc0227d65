"""The folder a build is written in: whose it is, who holds it, and what is removed with it."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.files import tree
from support.llama import write_recipe, write_sources
from support.plans import planned

from mixprec_build.errors import InterruptedBuildError, OutputError, WriteError
from mixprec_build.output import lock_file
from mixprec_build.output.build import plan_recipe, run_plan
from mixprec_build.output.publish import write
from mixprec_build.output.stage import Stage
from mixprec_build.output.verify import verify

MIX = {"model.layers.0.mlp.*": "fp8", "model.layers.1.mlp.*": "int4"}


@pytest.fixture(scope="module")
def mix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mix")
    write_sources(folder)
    return write_recipe(folder / "mix.yaml", MIX)


@pytest.fixture(scope="module")
def due(mix: Path) -> dict[str, bytes]:
    write(planned(mix), mix.parent / "due")
    return tree(mix.parent / "due")


def interrupted(mix: Path, out: Path, shards: int) -> Path:
    """The stage that a build leaves which is interrupted after some shards."""

    def stop(_: int) -> None:
        if len(list((out.parent / f".{out.name}.mixprec/out").glob("*.safetensors"))) > shards:
            raise KeyboardInterrupt

    with pytest.raises(InterruptedBuildError, match="finished and kept"):
        write(planned(mix), out, jobs=1, progress=stop)
    return out.parent / f".{out.name}.mixprec"


# Links, and a stage that came with a download


@pytest.fixture
def home(tmp_path: Path) -> Path:
    for name in ("letter.txt", ".bashrc", "docs/deep/d"):
        (tmp_path / "home" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "home" / name).write_text(name)
    (tmp_path / "home/empty").write_text("")
    return tmp_path / "home"


PLACES = {
    "out": "home",
    "journal": "home/letter.txt",
    "lock": "home/empty",
    "made": "home/empty",
    "names": "home/letter.txt",
    "replaced": "home",
    "out/presplit": "home",
    "out/presplit/tp2-ep1": "home/docs",
    "out/config.json": "home/letter.txt",
}


@pytest.mark.parametrize("known", [False, True], ids=["of a download", "of an own build"])
@pytest.mark.parametrize("place", PLACES)
def test_nothing_is_reached_through_a_link_in_a_stage(
    mix: Path, tmp_path: Path, home: Path, place: str, known: bool
) -> None:
    """In one that came along, and even in one that this user's build left; `out` is right or not there."""
    if known:
        stage = interrupted(mix, tmp_path / "out", 2)
        here = stage / place
        shutil.rmtree(here) if here.is_dir() else here.unlink(missing_ok=True)
    else:
        here = tmp_path / ".out.mixprec" / place
    here.parent.mkdir(parents=True, exist_ok=True)
    here.symlink_to(tmp_path / PLACES[place])
    before = tree(home)
    try:
        write(planned(mix), tmp_path / "out")
    except (OutputError, WriteError) as error:
        assert ".out.mixprec" in str(error)
        assert not (tmp_path / "out").exists()
    else:
        assert known and place in ("made", "names")
        assert not (tmp_path / "out").is_symlink() and not verify(tmp_path / "out").differences
    assert tree(home) == before


@pytest.mark.parametrize("brought", ["notes.txt", "out/model-00001-of-00002.safetensors", "journal"])
def test_a_stage_that_came_with_a_download_is_not_used(mix: Path, tmp_path: Path, brought: str) -> None:
    path = tmp_path / ".out.mixprec" / brought
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    before = tree(tmp_path)
    with pytest.raises(OutputError, match=rf"{tmp_path}/\.out\.mixprec: was not made here by mixprec"):
        write(planned(mix), tmp_path / "out")
    assert tree(tmp_path) == before


def test_a_finished_shard_of_a_copied_stage_is_not_believed(mix: Path, tmp_path: Path, due: dict[str, bytes]) -> None:
    """Its journal may say anything; who copied it says so with ``take_over``, and even then no file is lost."""
    stage = interrupted(mix, tmp_path / "one" / "out", 3)
    (tmp_path / "two").mkdir()
    shutil.copytree(stage, tmp_path / "two/.out.mixprec")
    before = tree(tmp_path / "two")
    with pytest.raises(OutputError, match=r"was not made here by mixprec.*--take-over if it is your own"):
        write(planned(mix), tmp_path / "two/out")
    assert tree(tmp_path / "two") == before
    write(planned(mix), tmp_path / "two/out", take_over=True)
    assert tree(tmp_path / "two") == {f"out/{name}": data for name, data in due.items()}


@pytest.mark.parametrize("name", ["out/notes.txt", "out/presplit/.git"])
def test_a_stopped_build_does_not_publish_or_remove_the_files_of_others(mix: Path, tmp_path: Path, name: str) -> None:
    path = interrupted(mix, tmp_path / "out", 2) / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")
    with pytest.raises(OutputError, match=rf"{path}: a file that mixprec did not write; move it away"):
        write(planned(mix), tmp_path / "out")
    assert path.read_text() == "mine" and not (tmp_path / "out").exists()
    path.unlink()
    write(planned(mix), tmp_path / "out")
    assert not verify(tmp_path / "out").differences


def test_a_note_beside_what_is_kept_stays(mix: Path, tmp_path: Path) -> None:
    note = interrupted(mix, tmp_path / "out", 2) / "note.txt"
    note.write_text("mine")
    write(planned(mix), tmp_path / "out")
    assert note.read_text() == "mine" and [path.name for path in note.parent.iterdir() if path != note] != []


# Who holds it


def signed(stage: Path, text: str, age: float) -> None:
    (stage / "lock").write_text(text)
    then = time.time() - age
    os.utime(stage / "lock", (then, then))


def test_a_build_killed_in_a_container_goes_on_in_the_next(mix: Path, tmp_path: Path, due: dict[str, bytes]) -> None:
    """Another host name, the same machine: the lock is free, and its kernel says that it can be trusted."""
    stage = interrupted(mix, tmp_path / "out", 3)
    signed(stage, f"pod-a pid 7\n{lock_file._boot()}\nabc\n", age=0)
    kept = {path.name: path.stat().st_ino for path in (stage / "out").glob("*.safetensors")}
    write(planned(mix), tmp_path / "out")
    assert tree(tmp_path / "out") == due
    assert kept and all((tmp_path / "out" / name).stat().st_ino == inode for name, inode in kept.items())


@pytest.mark.parametrize("locks", [True, False], ids=["flock", "no flock"])
def test_a_silent_build_on_another_machine_is_dead(
    mix: Path, tmp_path: Path, due: dict[str, bytes], locks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    if not locks:
        monkeypatch.setattr(fcntl, "flock", unsupported)
    stage = interrupted(mix, tmp_path / "out", 3)
    signed(stage, "node-1 pid 7\nanother-boot\nabc\n", age=20)
    before = tree(stage / "out")
    with pytest.raises(OutputError, match=r"on another host \(node-1 pid 7\) was writing there \d+ seconds ago.*kept"):
        write(planned(mix), tmp_path / "out")
    assert tree(stage / "out") == before
    signed(stage, "node-1 pid 7\nanother-boot\nabc\n", age=lock_file._SILENCE + 10)
    write(planned(mix), tmp_path / "out")
    assert tree(tmp_path / "out") == due and not stage.exists()


def test_a_build_is_taken_over_as_it_is_told(mix: Path, tmp_path: Path, due: dict[str, bytes]) -> None:
    stage = interrupted(mix, tmp_path / "out", 3)
    signed(stage, "node-1 pid 7\nanother-boot\nabc\n", age=0)
    write(planned(mix), tmp_path / "out", take_over=True)
    assert tree(tmp_path / "out") == due


def test_take_over_takes_nothing_from_a_build_that_runs_here(mix: Path, tmp_path: Path) -> None:
    with Stage.open(tmp_path / "out"), pytest.raises(OutputError, match="another mixprec build is writing there"):
        write(planned(mix), tmp_path / "out", take_over=True)


def test_a_build_that_was_taken_over_writes_no_more(mix: Path, tmp_path: Path) -> None:
    """It was silent, suspended say, and goes on when another machine's build has the stage."""
    lock = tmp_path / ".out.mixprec/lock"

    def other(_: int) -> None:
        lock.write_text("node-2 pid 9\nanother-boot\nxyz\n")

    with pytest.raises(OutputError, match="another build has taken over"):
        write(planned(mix), tmp_path / "out", jobs=1, progress=other)
    assert not (tmp_path / "out").exists() and lock.read_text().startswith("node-2")


def test_a_lock_is_touched_while_a_build_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock_file, "_BEAT", 0.01)
    with Stage.open(tmp_path / "out"):
        os.utime(tmp_path / ".out.mixprec/lock", (0, 0))
        deadline = time.monotonic() + 20
        while (tmp_path / ".out.mixprec/lock").stat().st_mtime == 0:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_builds_work_on_a_file_system_without_locks(
    mix: Path, tmp_path: Path, due: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    refused: list[str] = []

    def second(_: int) -> None:
        if not refused:
            with pytest.raises(OutputError) as caught:
                write(planned(mix), tmp_path / "out")
            refused.append(str(caught.value))

    write(planned(mix), tmp_path / "out", progress=second)
    assert tree(tmp_path / "out") == due and re.search(r"was writing there \d seconds ago", refused[0])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# Tidying up


def test_a_build_that_tidies_up_removes_nothing_of_the_next(
    mix: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every step of the first build's tidying the second is refused, or right."""
    real = {name: getattr(os, name) for name in ("unlink", "rmdir")}
    plan, outcomes, inside = planned(mix), [], [False]

    def stepping(name: str) -> Callable[..., None]:
        def call(*arguments: object, **options: object) -> None:
            if not inside[0]:
                inside[0] = True
                try:
                    write(plan, tmp_path / "out")
                    outcomes.append("built")
                except OutputError as error:
                    outcomes.append(str(error))
                inside[0] = False
            real[name](*arguments, **options)

        return call

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        for name in real:
            patch.setattr(os, name, stepping(name))
        patch.setattr(os, "posix_fallocate", lambda *_: full() if not inside[0] else None)
        with pytest.raises(WriteError):
            write(plan, tmp_path / "out")
    assert any("another mixprec build is writing there" in outcome for outcome in outcomes)
    if "built" in outcomes:
        assert not verify(tmp_path / "out").differences
    assert not (tmp_path / ".out.mixprec").exists()


# An output that was being replaced

KILLED = """
import os, signal, sys
from pathlib import Path
from mixprec_build.output.build import plan_recipe, run_plan
real, left = os.unlink, [int(sys.argv[3])]
def unlink(path, *, dir_fd=None):
    if dir_fd is not None and "/replaced" in os.readlink(f"/proc/self/fd/{dir_fd}") + "/":
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), getattr(signal, sys.argv[4]))
    real(path, dir_fd=dir_fd)
os.unlink = unlink
run_plan(plan_recipe(Path(sys.argv[1])), Path(sys.argv[2]), force=True)
"""


def stopped_while_removing(mix: Path, out: Path, how: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", KILLED, str(mix), str(out), "3", how]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


def test_an_output_that_is_half_removed_is_never_put_back(mix: Path, tmp_path: Path) -> None:
    out, stage = tmp_path / "out", tmp_path / ".out.mixprec"
    run_plan(plan_recipe(mix), out)
    assert stopped_while_removing(mix, out, "SIGKILL").returncode == -signal.SIGKILL
    assert list((stage / "replaced").iterdir()) and not verify(out).differences
    shutil.rmtree(out)
    run_plan(plan_recipe(mix), out)
    assert not verify(out).differences and not stage.exists()


def test_what_a_killed_build_left_beside_its_output_is_removed_by_the_same_command(mix: Path, tmp_path: Path) -> None:
    out, stage = tmp_path / "out", tmp_path / ".out.mixprec"
    run_plan(plan_recipe(mix), out)
    stopped_while_removing(mix, out, "SIGKILL")
    before = tree(out)
    with pytest.raises(OutputError, match="exists and is not empty"):
        run_plan(plan_recipe(mix), out)
    assert not stage.exists() and tree(out) == before


def test_interrupted_after_publishing_says_so(mix: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, stage = tmp_path / "out", tmp_path / ".out.mixprec"
    run_plan(plan_recipe(mix), out)
    real = os.unlink

    def stop(path: str, *, dir_fd: int) -> None:
        if "/replaced" in Path(f"/proc/self/fd/{dir_fd}").readlink().as_posix():
            raise KeyboardInterrupt
        real(path, dir_fd=dir_fd)

    with monkeypatch.context() as patch, pytest.raises(InterruptedBuildError) as caught:
        patch.setattr(os, "unlink", stop)
        run_plan(plan_recipe(mix), out, force=True)
    assert f"{out}: interrupted; the new checkpoint is complete and in place; the next build" in str(caught.value)
    assert not verify(out).differences and (stage / "replaced").is_dir()
    with pytest.raises(OutputError, match="exists and is not empty"):
        run_plan(plan_recipe(mix), out)
    assert not stage.exists()


def test_what_others_put_into_a_replaced_output_is_kept(mix: Path, tmp_path: Path) -> None:
    """While it was being replaced: it was not there when the build looked."""
    out = tmp_path / "out"
    run_plan(plan_recipe(mix), out)
    real = os.rename

    def noting(old: str, new: str, **options: int) -> None:
        real(old, new, **options)
        if new == "replaced":
            (tmp_path / ".out.mixprec/replaced/note.txt").write_text("mine")

    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(WriteError, match="replaced: holds files that mixprec did"),
    ):
        patch.setattr(os, "rename", noting)
        run_plan(plan_recipe(mix), out, force=True)
    assert not verify(out).differences
    assert (tmp_path / ".out.mixprec/replaced/note.txt").read_text() == "mine"
