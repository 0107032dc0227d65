"""File systems that cannot do all that Linux's own can: rename between folders, lock files."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.files import tree
from support.llama import write_recipe, write_sources
from support.plans import planned

from mixprec_build.checkpoint.degree import Degree
from mixprec_build.errors import OutputError, WriteError
from mixprec_build.output.build import plan_recipe, run_plan
from mixprec_build.output.publish import write
from mixprec_build.output.split import split
from mixprec_build.output.verify import verify

MIX = {"model.layers.0.mlp.*": "fp8", "model.layers.1.mlp.*": "int4"}
Patch = pytest.MonkeyPatch


@pytest.fixture(scope="module")
def mix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mix")
    write_sources(folder)
    return write_recipe(folder / "mix.yaml", MIX)


def cannot_rename(monkeypatch: Patch, kind: Callable[[int], bool]) -> None:
    """What ``kind`` says of an entry's mode is renamed within one folder only."""
    real = os.rename

    def rename(old: Any, new: Any, *, src_dir_fd: int | None = None, dst_dir_fd: int | None = None) -> None:
        if src_dir_fd is not None and dst_dir_fd is not None:
            there = os.stat(old, dir_fd=src_dir_fd, follow_symlinks=False)
            if kind(there.st_mode) and not os.path.sameopenfile(src_dir_fd, dst_dir_fd):
                raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        real(old, new, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)

    monkeypatch.setattr(os, "rename", rename)


@pytest.mark.parametrize("replaces", [False, True], ids=["new", "replaces one"])
def test_an_output_that_cannot_be_renamed(mix: Path, tmp_path: Path, monkeypatch: Patch, replaces: bool) -> None:
    """As a folder of a container's image, in an overlay: the old output stays, and what is finished is kept."""
    out = tmp_path / "out"
    if replaces:
        run_plan(plan_recipe(mix), out)
    before = tree(out) if replaces else None
    with monkeypatch.context() as patch:
        cannot_rename(patch, stat.S_ISDIR)
        with pytest.raises(WriteError) as caught:
            write(planned(mix), out, force=replaces)
    where = out if replaces else tmp_path / ".out.mixprec/out"
    assert str(caught.value).startswith(f"{where}: its file system cannot rename it to ")
    assert "finished and kept" in str(caught.value) and caught.value.exit_code == 3
    assert (tree(out) if out.exists() else None) == before
    kept = {path.name: path.stat().st_ino for path in (tmp_path / ".out.mixprec/out").glob("*.safetensors")}
    write(planned(mix), out, force=replaces)
    assert kept and all((out / name).stat().st_ino == inode for name, inode in kept.items())
    assert verify(out).differences == () and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_merged_files_are_restored_into_another_file_system(mix: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    """``presplit`` may be a volume of its own."""
    out = tmp_path / "out"
    run_plan(plan_recipe(mix), out)
    split(out, Degree(2))
    due = tree(out)
    split(out, Degree(2), layout="presplit")
    cannot_rename(monkeypatch, stat.S_ISREG)
    split(out, layout="both")
    assert tree(out) == due and verify(out).differences == ()


def test_a_copy_into_another_file_system_that_is_stopped_is_made_again(
    mix: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    out = tmp_path / "out"
    run_plan(plan_recipe(mix), out)
    split(out, Degree(2))
    due = tree(out)
    split(out, Degree(2), layout="presplit")
    cannot_rename(monkeypatch, stat.S_ISREG)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.copyfileobj", failing_half_way)
        with pytest.raises(WriteError, match="No space left"):
            split(out, layout="both")
    split(out, layout="both")
    assert tree(out) == due and verify(out).differences == ()


def failing_half_way(source: Any, target: Any, length: int) -> None:
    target.write(source.read(100))
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_everything_works_without_locks(mix: Path, tmp_path: Path, monkeypatch: Patch, number: int) -> None:
    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    due = tmp_path / "due" / "out"
    run_plan(plan_recipe(mix), due)
    split(due, Degree(2))
    monkeypatch.setattr(fcntl, "flock", flock)
    out = tmp_path / "here" / "out"
    for force in (False, True):
        run_plan(plan_recipe(mix), out, force=force)
        split(out, Degree(2))
        assert tree(out) == tree(due) and verify(out).differences == ()
        assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_a_build_that_was_killed_here_is_told_from_one_that_goes_on(
    mix: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    """Without locks only its silence tells; the message says so, and ``--take-over`` goes on from it at once."""

    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    class Killed(BaseException):
        pass

    def die(_: int) -> None:
        if len(list((tmp_path / ".out.mixprec/out").glob("*.safetensors"))) > 2:
            raise Killed

    monkeypatch.setattr(fcntl, "flock", flock)
    with monkeypatch.context() as patch:
        patch.setattr("mixprec_build.output.stage.Stage._leave", lambda stage: None)
        with pytest.raises(Killed):
            write(planned(mix), tmp_path / "out", jobs=1, progress=die)
    with pytest.raises(OutputError) as caught:
        write(planned(mix), tmp_path / "out")
    message = str(caught.value)
    assert "another mixprec build (" in message and "no locks that tell whether it has ended" in message
    kept = {path.name: path.stat().st_ino for path in (tmp_path / ".out.mixprec/out").glob("*.safetensors")}
    write(planned(mix), tmp_path / "out", take_over=True)
    assert sum((tmp_path / "out" / name).stat().st_ino == inode for name, inode in kept.items()) >= 2
    assert verify(tmp_path / "out").differences == () and [path.name for path in tmp_path.iterdir()] == ["out"]
