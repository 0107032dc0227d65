"""Calls that fail, a full disk, interrupts and kills: all of it or nothing."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
from support.files import tree
from support.run import run_python

from mixprec_build.errors import InterruptedBuildError, MixprecError, OutputError, SourceError, WriteError
from mixprec_build.output import copier
from mixprec_build.output.build import plan_recipe, run_plan
from mixprec_build.output.verify import verify

from .steps import STAGE, Fault, Patch, build, listing

WRITES = ("pwrite", "fsync", "posix_fallocate", "rename", "statvfs")
READS = ("preadv",)
ERRORS = (errno.ENOSPC, errno.EIO, errno.EDQUOT)


def count(recipe: Path, out: Path, function: str) -> int:
    """How often a build calls a function."""
    with Patch.context() as monkeypatch:
        fault = Fault(monkeypatch, function)
        build(recipe, out, jobs=1, force=True)
    return fault.calls


@pytest.mark.parametrize("force", [False, True], ids=["fresh", "force"])
@pytest.mark.parametrize("function", [*WRITES, *READS])
def test_nothing_is_left_and_nothing_is_lost_when_a_call_fails(
    mix: Path, tmp_path: Path, function: str, force: bool
) -> None:
    out = tmp_path / "out"
    if force:
        build(mix, out)
    calls = count(mix, out if force else tmp_path / "counted" / "out", function)
    before = listing(tmp_path)
    step = max(1, calls // 12)
    for nth in {*range(1, calls + 1, step), calls}:
        number = ERRORS[nth % 3]
        with Patch.context() as monkeypatch:
            Fault(monkeypatch, function, number, nth)
            with pytest.raises(MixprecError) as caught:
                build(mix, out, force=force, jobs=1 + nth % 2)
        message = str(caught.value)
        assert os.strerror(number) in message
        if function in READS:
            assert type(caught.value) is SourceError
            assert re.match(rf"{mix.parent}/(bf16|fp8|int4)/model-0000\d-of-00002\.safetensors: cannot read ", message)
        else:
            assert type(caught.value) is WriteError and caught.value.exit_code == 3
            assert message.startswith(f"{tmp_path}")
            if function == "posix_fallocate":
                assert re.match(rf"{tmp_path}/{STAGE}/[\w./-]+: ", message)
            assert ("quota" in message) == (number == errno.EDQUOT)
        assert ("finished and kept in" in message) == (tmp_path / ".out.mixprec").exists()
        shutil.rmtree(tmp_path / ".out.mixprec", ignore_errors=True)
        assert listing(tmp_path) == before, (function, nth)


def test_a_header_that_cannot_be_read_is_the_sources_fault(mix: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    plan = plan_recipe(mix)
    Fault(monkeypatch, "pread", errno.EIO, 2)  # the first is that of the lock
    with pytest.raises(SourceError, match=f"{mix.parent}/.*safetensors: cannot read it: Input/output error"):
        run_plan(plan, tmp_path / "out")
    assert listing(tmp_path) == {}


@pytest.mark.parametrize("function", ["fstat", "close"])
def test_an_error_beside_reads_and_writes_names_its_file(mix: Path, tmp_path: Path, function: str) -> None:
    calls = count(mix, tmp_path / "counted" / "out", function)
    plan = plan_recipe(mix)
    named = 0
    for nth in range(1, calls + 1, 2):
        out = tmp_path / str(nth) / "out"
        with Patch.context() as monkeypatch:
            Fault(monkeypatch, function, errno.EIO, nth)
            try:
                run_plan(plan, out)
            except MixprecError as error:
                assert re.search(rf"({mix.parent}|{tmp_path})/[^:]+: .*{os.strerror(errno.EIO)}", str(error)), nth
                named += 1
    assert named > 4


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.EACCES, OutputError), (errno.EROFS, OutputError), (errno.ENOSPC, WriteError)]
)
def test_a_folder_that_cannot_be_made(
    mix: Path, tmp_path: Path, monkeypatch: Patch, number: int, kind: type[MixprecError]
) -> None:
    Fault(monkeypatch, "mkdir", number, 2)  # the first is that of the parent, which exists
    with pytest.raises(kind, match=os.strerror(number)):
        build(mix, tmp_path / "out")
    assert listing(tmp_path) == {}


def test_short_reads_and_writes_are_continued(mix: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    expected = tree(build(mix, tmp_path / "whole"))
    pwrite, preadv = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:1009], at))
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: preadv(fd, [buffers[0][:997]], at))
    assert tree(build(mix, tmp_path / "short")) == expected


def test_a_disk_too_small_is_told_before_a_byte_is_written(mix: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    real = os.statvfs

    def almost_full(path: Path) -> os.statvfs_result:
        found = list(real(path))
        found[1], found[4] = 1, 4096  # f_frsize, f_bavail
        return os.statvfs_result(found)

    monkeypatch.setattr(os, "statvfs", almost_full)
    with pytest.raises(WriteError) as caught:
        build(mix, tmp_path / "out")
    assert str(caught.value) == f"{tmp_path}: 229850 bytes are needed, 4096 are free; nothing was left behind"
    assert listing(tmp_path) == {}


def test_folders_that_were_made_for_a_failed_build_go_with_it(mix: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    (tmp_path / "kept").mkdir()
    Fault(monkeypatch, "fsync", errno.EIO, 1)
    with pytest.raises(WriteError):
        build(mix, tmp_path / "kept" / "a" / "b" / "out")
    assert list(listing(tmp_path)) == ["kept"]


def test_an_old_output_that_cannot_be_removed_is_named(mix: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    out = build(mix, tmp_path / "out")
    Fault(monkeypatch, "rmdir", errno.EIO, 1)
    with pytest.raises(WriteError, match=rf"{tmp_path}/{STAGE}/replaced: .*the new checkpoint is in place"):
        build(mix, out, force=True)
    assert verify(out).differences == ()


@pytest.mark.parametrize("force", [False, True], ids=["fresh", "force"])
@pytest.mark.parametrize(("nth", "jobs"), [(1, 1), (2, 4), (5, 2)])
def test_an_interrupt_leaves_nothing(mix: Path, tmp_path: Path, nth: int, jobs: int, force: bool) -> None:
    out = tmp_path / "out"
    if force:
        build(mix, out)
    before, calls = listing(tmp_path), 0

    def interrupt(_: int) -> None:
        nonlocal calls
        calls += 1
        if calls == nth:
            raise KeyboardInterrupt

    plan = plan_recipe(mix)
    with Patch.context() as monkeypatch, pytest.raises(InterruptedBuildError, match="nothing was left behind"):
        monkeypatch.setattr(copier, "_BUFFER", 10_000)  # many small steps
        run_plan(plan, out, force=force, jobs=jobs, progress=interrupt)
    assert listing(tmp_path) == before


@pytest.mark.parametrize("force", [False, True], ids=["fresh", "force"])
def test_a_kill_leaves_no_output_but_the_one_before(mix: Path, tmp_path: Path, force: bool) -> None:
    out = tmp_path / "out"
    if force:
        build(mix, out)
    before = listing(tmp_path)
    script = (
        "import os, signal, sys; from pathlib import Path; from mixprec_build.output import copier\n"
        "from mixprec_build.output.build import plan_recipe, run_plan\n"
        "copier._BUFFER, calls = 10_000, []\n"
        "def kill(done):\n"
        "    calls.append(done)\n"
        "    if len(calls) == 9: os.kill(os.getpid(), signal.SIGKILL)\n"
        "run_plan(plan_recipe(Path(sys.argv[1])), Path(sys.argv[2]), force=True, progress=kill)\n"
    )
    assert run_python("-c", script, str(mix), str(out)).returncode == -signal.SIGKILL
    after = listing(tmp_path)
    assert before.items() <= after.items()
    stage = {name.partition("/")[0] for name in after.keys() - before.keys()}
    assert len(stage) == 1 and re.fullmatch(STAGE, stage.pop())
    assert verify(build(mix, out, force=force)).differences == ()
