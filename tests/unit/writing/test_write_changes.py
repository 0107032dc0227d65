"""Sources that change between the plan and the last byte."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support.files import tree

from mixprec_build.errors import SourceError, WriteError
from mixprec_build.output import copier
from mixprec_build.output.build import plan_recipe, run_plan

from .steps import Fault, Patch, build


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def grow(path: Path) -> None:
    os.truncate(path, path.stat().st_size + 1)


def remove(path: Path) -> None:
    path.unlink()


def change_header(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data.replace(b"layers.0", b"layers.9", 1))


def become_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def touch(path: Path) -> None:
    os.utime(path, ns=(0, 0))


def rewrite(path: Path) -> None:
    """A value, in place."""
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")


SHARD = Path("int4") / "model-00001-of-00002.safetensors"


@pytest.mark.parametrize("change", [truncate, grow, remove, change_header, become_fifo, touch, rewrite])
def test_a_source_that_changed_since_the_plan(own_mix: Path, tmp_path: Path, change: Callable[[Path], None]) -> None:
    plan = plan_recipe(own_mix)
    path = own_mix.parent / SHARD
    change(path)
    messages: dict[object, str] = {
        remove: "cannot open it: No such file or directory",
        become_fifo: "not a regular file",
    }
    with pytest.raises(SourceError) as caught:
        run_plan(plan, tmp_path / "out")
    assert str(caught.value) == f"{path}: {messages.get(change, 'changed since it was planned; start again')}"
    assert [path.name for path in tmp_path.iterdir()] == ["own"]


def cut_short(path: Path) -> None:
    os.truncate(path, 5000)


@pytest.mark.parametrize("change", [cut_short, grow, touch, rewrite])
def test_a_source_that_changes_while_it_is_copied(
    own_mix: Path, tmp_path: Path, monkeypatch: Patch, change: Callable[[Path], None]
) -> None:
    path = own_mix.parent / SHARD
    done: list[int] = []

    def progress(nbytes: int) -> None:
        if not done:
            change(path)
        done.append(nbytes)

    plan = plan_recipe(own_mix)
    monkeypatch.setattr(copier, "_BUFFER", 10_000)
    with pytest.raises(SourceError) as caught:
        run_plan(plan, tmp_path / "out", jobs=1, progress=progress)
    expected = "ends inside model.layers." if change is cut_short else "changed while it was copied; start again"
    assert str(caught.value).startswith(f"{path}: {expected}")
    assert not (tmp_path / "out").exists()


def test_a_source_that_is_replaced_while_it_is_copied(own_mix: Path, tmp_path: Path) -> None:
    """By another file of its name: all that is copied is of the files that were planned with."""
    path = own_mix.parent / SHARD
    expected = tree(build(own_mix, tmp_path / "before"))

    def replaced(_: int) -> None:
        other = path.with_name("other")
        other.write_bytes(bytes(path.stat().st_size))
        other.replace(path)

    out = build(own_mix, tmp_path / "out", jobs=1, progress=replaced)
    assert tree(out) == expected


def test_no_file_stays_open(mix: Path, tmp_path: Path) -> None:
    before = set(Path("/proc/self/fd").iterdir())
    build(mix, tmp_path / "out")
    for function, nth in (("fsync", 1), ("fsync", 2), ("pwrite", 2), ("pwrite", 3), ("posix_fallocate", 1)):
        with Patch.context() as patch:
            Fault(patch, function, errno.EIO, nth)
            with pytest.raises(WriteError):
                build(mix, tmp_path / "fails")
        shutil.rmtree(tmp_path / ".fails.mixprec", ignore_errors=True)
    assert set(Path("/proc/self/fd").iterdir()) == before
