"""Ranks that many machines cut at once: with their finish they are what one split makes, or are refused by name."""

from __future__ import annotations

import fcntl
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.files import tree
from support.run import Run, environment
from support.serving import LLAMA, write_sources

import mixprec_build as mp
from mixprec_build.checkpoint.degree import Degree
from mixprec_build.checkpoint.manifest import MANIFEST, read_manifest
from mixprec_build.errors import InterruptedBuildError, MissingRanksError, OutputError
from mixprec_build.output import lock_file
from mixprec_build.output import split as split_module
from mixprec_build.output.split import split
from mixprec_build.output.verify import verify

SHAPE = LLAMA.of(layers=2, hidden=256, intermediate=512, heads=4, kv_heads=2, head_dim=64, vocab=512)
FOUR = Degree(4)
Patch = pytest.MonkeyPatch


@pytest.fixture(scope="module")
def mix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mix")
    sources = write_sources(folder, SHAPE, ["bf16", "fp8_block"])
    (folder / "mix.yaml").write_text(
        f"model: {sources['bf16']}\nsources: {{fp8: {sources['fp8_block']}}}\nweights:\n  model.layers.0.mlp.*: fp8\n"
    )
    return folder / "mix.yaml"


@pytest.fixture(scope="module")
def built(mix: Path) -> Path:
    mp.build(mix, mix.parent / "built")
    return mix.parent / "built"


@pytest.fixture(scope="module")
def due(built: Path) -> dict[str, dict[str, bytes]]:
    """Every file of a plain split, by its layout."""
    found = {}
    for layout in ("both", "presplit"):
        plain = Path(shutil.copytree(built, built.with_name(layout)))
        split(plain, FOUR, layout=layout)
        found[layout] = tree(plain)
    return found


@pytest.fixture
def out(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "out"))


@pytest.fixture(params=[True, False], ids=["flock", "no flock"])
def locks(request: pytest.FixtureRequest, monkeypatch: Patch) -> bool:
    """Whether the file system can lock files."""
    if not request.param:
        no_locks(monkeypatch)
    return bool(request.param)


def no_locks(monkeypatch: Patch) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)


def lock(out: Path, rank: int) -> Path:
    return out / f"presplit/tp4-ep1/.rank-{rank}-of-4.lock"


def signed(path: Path, text: str = "node-1 pid 7\nanother-boot\nabc\n", age: float = 0) -> Path:
    """Leaves a lock as another machine's process does that was killed ``age`` seconds ago."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    os.utime(path, (time.time() - age, time.time() - age))
    return path


def meanwhile(action: Callable[[], object]) -> Any:
    """For ``watch``: runs ``action`` once, when the first bytes are written."""
    ran = []

    def progress(_: int) -> None:
        if not ran:
            ran.append(True)
            action()

    return lambda *_: progress


@pytest.mark.parametrize("layout", ["both", "presplit"])
def test_ranks_cut_one_by_one_are_those_of_a_plain_split(
    out: Path, due: dict[str, dict[str, bytes]], layout: str
) -> None:
    numbers = random.Random(layout).sample(range(4), 4)
    for done, rank in enumerate(numbers, start=1):
        assert split(out, FOUR, ranks=[rank]) == [out / FOUR.folder(rank)]
        assert sorted(read_manifest(out).ranks) == [FOUR.folder(number) for number in sorted(numbers[:done])]
    split(out, FOUR, layout=layout, finish=True)
    assert tree(out) == due[layout]
    inodes = [path.stat().st_ino for path in sorted(out.rglob("*.safetensors"))]
    split(out, FOUR, layout=layout, finish=True)
    split(out, FOUR, layout=layout)
    assert tree(out) == due[layout] and inodes == [path.stat().st_ino for path in sorted(out.rglob("*.safetensors"))]


def test_processes_that_start_at_once(out: Path, due: dict[str, dict[str, bytes]]) -> None:
    command = [sys.executable, "-m", "mixprec_build", "split", str(out), "--tp", "4", "--quiet"]
    started = [subprocess.Popen([*command, "--ranks", str(rank)], env=environment()) for rank in range(4)]
    assert [process.wait(120) for process in started] == [0] * 4
    assert sorted(read_manifest(out).ranks) == [FOUR.folder(rank) for rank in range(4)]
    assert subprocess.run([*command, "--finish"], env=environment(), timeout=120).returncode == 0
    assert tree(out) == due["both"]


def test_others_run_beside_a_rank_that_is_cut_and_what_would_harm_it_is_refused(
    mix: Path, out: Path, due: dict[str, dict[str, bytes]], locks: bool
) -> None:
    refused = {
        "the same rank": lambda: split(out, FOUR, ranks=[1, 2]),
        "all of them": lambda: split(out, FOUR),
        "the finish": lambda: split(out, FOUR, finish=True),
        "another degree and layout": lambda: split(out, Degree(2), layout="presplit"),
        "without ranks": lambda: split(out, layout="merged"),
        "verify": lambda: verify(out),
        "a build": lambda: mp.build(mix, out, force=True),
    }
    seen = []

    def others() -> None:
        split(out, FOUR, ranks=[0, 3])
        for command in refused.values():
            with pytest.raises(OutputError, match=rf"{out}: rank 1 of tp4-ep1: another `mixprec split` .*pid"):
                command()
            seen.append(command)

    split(out, FOUR, ranks=[1], watch=meanwhile(others))
    assert len(seen) == len(refused) and verify(out).differences == ()
    split(out, FOUR, ranks=[2])
    split(out, FOUR, finish=True)
    assert tree(out) == due["both"]


@pytest.mark.parametrize("change", [{"layout": "presplit"}, {"layout": "both"}, {"finish": True}])
def test_no_rank_is_cut_beside_a_split_of_more_than_ranks(
    out: Path, locks: bool, monkeypatch: Patch, change: dict[str, Any]
) -> None:
    """Not of another degree either, and where its folder cannot be locked, its lock file tells."""
    for rank in range(4) if "finish" in change else ():
        split(out, FOUR, ranks=[rank])
    seen, real = [], split_module._Split.run

    def run(self: Any, *arguments: Any) -> Any:
        if not seen:
            with pytest.raises(OutputError, match=rf"{out}: another `mixprec split` .*pid {os.getpid()}\)"):
                seen.append(split(out, Degree(2), ranks=[0]))
            with pytest.raises(OutputError, match=rf"{out}: another `mixprec split` .*pid {os.getpid()}\)"):
                verify(out)
            seen.append([])
        return real(self, *arguments)

    monkeypatch.setattr(split_module._Split, "run", run)
    split(out, FOUR, **change)
    assert seen == [[]] and verify(out).differences == ()
    assert not [*out.rglob(".*.lock"), *out.rglob(".lock")]


def test_a_rank_that_was_stopped_is_cut_again_alone(
    out: Path, due: dict[str, dict[str, bytes]], mixprec: Run, locks: bool
) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    split(out, FOUR, ranks=[0])
    with pytest.raises(InterruptedBuildError, match="the same command goes on"):
        split(out, FOUR, ranks=[2], watch=meanwhile(stop))
    part = out / "presplit/tp4-ep1/.rank-1-of-4.part/model-00001-of-00001.safetensors"
    part.parent.mkdir()
    part.write_bytes(b"half")
    signed(lock(out, 1), age=1000)  # of a process that was killed long ago
    assert {part.parent.relative_to(out).as_posix(), lock(out, 1).relative_to(out).as_posix()} == {
        *verify(out).leftovers
    }
    split(out, FOUR, ranks=[2])
    assert part.exists() and lock(out, 1).exists()
    with pytest.raises(MissingRanksError) as caught:
        split(out, FOUR, finish=True)
    command = f"`mixprec split {out} --tp 4 --ranks"
    assert caught.value.ranks == (1, 3) and str(caught.value) == (
        f"{out}: 2 of the 4 ranks of tp4-ep1 are not complete; cut each, on any machine, before --finish: "
        f"rank 1 is missing: {command} 1`, rank 3 is missing: {command} 3`"
    )
    for error_rank in caught.value.ranks:
        assert mixprec("split", out, "--tp", 4, "--ranks", error_rank).code == 0
    split(out, FOUR, finish=True)
    assert tree(out) == due["both"]


def test_a_rank_that_was_killed_before_it_was_listed_is_listed_by_the_finish(
    out: Path, built: Path, due: dict[str, dict[str, bytes]]
) -> None:
    split(out, FOUR)
    files = {path: path.stat().st_ino for path in out.rglob("*.safetensors")}
    shutil.copy(built / MANIFEST, out)
    signed(out / ".mixprec_manifest.json.tp4-ep1-rank-0-of-4.new", "half of")
    assert ".mixprec_manifest.json.tp4-ep1-rank-0-of-4.new" in verify(out).leftovers
    split(out, FOUR, finish=True)
    assert tree(out) == due["both"] and files == {path: path.stat().st_ino for path in out.rglob("*.safetensors")}


def test_a_finish_says_what_is_wrong_with_a_rank(
    out: Path, due: dict[str, dict[str, bytes]], monkeypatch: Patch
) -> None:
    split(out, FOUR, ranks=[0, 1])
    path = next((out / FOUR.folder(1)).glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1])
    with monkeypatch.context() as patch:
        patch.setattr(split_module, "__version__", "0.0.9")
        split(out, FOUR, ranks=[2])
    split(out, FOUR, ranks=[3])
    lines = read_manifest(out)
    kept = {name: line for name, line in lines.ranks.items() if not name.endswith("2-of-4")}
    (out / MANIFEST).write_bytes(b"".join(lines.listing(kept, None).dump()))
    with pytest.raises(MissingRanksError, match=r"rank 1 is damaged: .* rank 2 is not of this checkpoint and this mix"):
        split(out, FOUR, finish=True)
    split(out, FOUR, ranks=[1])
    with pytest.raises(MissingRanksError, match=r"1 of the 4 ranks of tp4-ep1 is not complete; cut it,") as caught:
        split(out, FOUR, finish=True)
    split(out, FOUR, ranks=caught.value.ranks)
    split(out, FOUR, finish=True)
    assert tree(out) == due["both"]


def test_ranks_of_another_degree_without_merged_files(built: Path, out: Path, locks: bool) -> None:
    """Side by side as well, with the layout that is there; the command of a missing rank keeps it, too."""
    split(out, Degree(2), layout="presplit")
    plain = Path(shutil.copytree(out, out.with_name("plain")))
    split(plain, FOUR, layout="presplit")

    def others() -> None:
        split(out, FOUR, ranks=[0, 1], layout="presplit")
        with pytest.raises(OutputError, match=r"rank 3 of tp4-ep1: another `mixprec split`"):
            split(out, FOUR, ranks=[2])  # which would restore the merged files

    split(out, FOUR, ranks=[3], layout="presplit", watch=meanwhile(others))
    with pytest.raises(MissingRanksError, match=r"rank 2 is missing: `mixprec split .* --tp 4 --layout presplit --ran"):
        split(out, FOUR, layout="presplit", finish=True)
    split(out, FOUR, ranks=[2], layout="presplit")
    split(out, FOUR, layout="presplit", finish=True)
    assert tree(out) == tree(plain)


# Other machines


def test_a_silent_split_on_another_machine_is_dead(
    out: Path, due: dict[str, dict[str, bytes]], locks: bool, mixprec: Run
) -> None:
    where = r"rank 2 of tp4-ep1: a `mixprec split` on another host \(node-1 pid 7\) was writing there \d+ seconds ago"
    for rank in (0, 1, 3):
        split(out, FOUR, ranks=[rank])
    signed(lock(out, 2), age=20)
    for change in ({"ranks": [2]}, {}, {"finish": True}):
        with pytest.raises(
            OutputError, match=rf"{where}.*silent for 150, or pass --take-over: what is finished is kept"
        ):
            split(out, FOUR, **change)
    with pytest.raises(OutputError, match=rf"{where}.*silent for 150$"):
        verify(out)
    split(out, Degree(2), ranks=[0])
    signed(lock(out, 2), age=lock_file._SILENCE + 10)
    assert verify(out).differences == ()
    split(out, FOUR, ranks=[2])
    signed(lock(out, 0))
    assert mixprec("split", out, "--tp", 4, "--finish").code == 2
    assert mixprec("split", out, "--tp", 4, "--finish", "--take-over").code == 0
    split(out, Degree(2), ranks=[1])
    shutil.rmtree(out / "presplit/tp2-ep1")
    manifest = read_manifest(out)
    ranks = {name: line for name, line in manifest.ranks.items() if "tp4" in name}
    (out / MANIFEST).write_bytes(b"".join(manifest.listing(ranks, None).dump()))
    assert tree(out) == due["both"]


def test_a_rank_that_was_taken_over_is_neither_written_nor_listed_any_more(out: Path) -> None:
    """By another machine, while this one was suspended: what that writes stays, with its lock."""
    part = out / "presplit/tp4-ep1/.rank-1-of-4.part"

    def taken_over() -> None:
        lock(out, 1).write_text("node-2 pid 9\nanother-boot\nxyz\n")
        shutil.rmtree(part)
        part.mkdir()
        (part / "model-00001-of-00001.safetensors").write_bytes(b"half")

    with pytest.raises(
        OutputError, match=r"rank 1 of tp4-ep1: another `mixprec split` has taken it over; nothing more"
    ):
        split(out, FOUR, ranks=[1], watch=meanwhile(taken_over))
    assert [path.name for path in part.iterdir()] == ["model-00001-of-00001.safetensors"]
    assert lock(out, 1).read_text().startswith("node-2") and not read_manifest(out).ranks
    assert not (out / FOUR.folder(1)).exists()


def test_listings_at_the_same_time_lose_no_file(
    out: Path, due: dict[str, dict[str, bytes]], monkeypatch: Patch
) -> None:
    """Where folders cannot be locked, one may list its ranks in a manifest that was replaced meanwhile."""
    no_locks(monkeypatch)
    real, seen = os.rename, []

    def rename(old: Any, new: Any, **options: Any) -> None:
        if new == MANIFEST and not seen:
            seen.append(old)
            split(out, FOUR, ranks=[0, 1, 3])
        real(old, new, **options)

    monkeypatch.setattr(os, "rename", rename)
    split(out, FOUR, ranks=[2])
    assert seen and [*read_manifest(out).ranks] == [FOUR.folder(2)] and verify(out).differences == ()
    split(out, FOUR, finish=True)
    assert tree(out) == due["both"]


def test_who_may_not_write_can_compare(out: Path, monkeypatch: Patch) -> None:
    """The clock of the file system is seen only by those that may change something there."""
    signed(lock(out, 1), age=lock_file._SILENCE + 10)

    def forbidden(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "utime", forbidden)
    assert verify(out).leftovers == ("presplit/tp4-ep1/.rank-1-of-4.lock",)


# Locks that are none


@pytest.mark.parametrize("kind", ["link", "hard link", "FIFO", "folder"])
@pytest.mark.parametrize("name", ["presplit/tp4-ep1/.rank-1-of-4.lock", "presplit/.lock"])
def test_what_is_no_lock_is_left_alone(out: Path, tmp_path: Path, kind: str, name: str) -> None:
    mine, path = tmp_path / "mine", out / name
    mine.write_text("mine")
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "link":
        path.symlink_to(mine)
    elif kind == "hard link":
        path.hardlink_to(mine)
    elif kind == "FIFO":
        os.mkfifo(path)
    else:
        path.mkdir()
    ranks = [1] if "rank" in name else None
    with pytest.raises(
        (OutputError, mp.WriteError), match=rf"{path}: (is a link; remove it|is no file|Is a directory)"
    ):
        split(out, FOUR, ranks=ranks)
    assert mine.read_text() == "mine" and os.path.lexists(path) and not read_manifest(out).ranks


def test_a_folder_for_locks_goes_with_the_last(out: Path, built: Path) -> None:
    split(out, layout="merged")
    with pytest.raises(mp.SplitError):
        split(out, layout="presplit")
    with pytest.raises(MissingRanksError):
        split(out, FOUR, finish=True)
    assert [path.relative_to(out) for path in out.rglob("*")] == [path.relative_to(built) for path in built.rglob("*")]


# The command


def test_the_command(out: Path, due: dict[str, dict[str, bytes]], mixprec: Run) -> None:
    ended = mixprec("split", out, "--tp", 4, "--finish")
    assert ended.code == 2 and "4 of the 4 ranks of tp4-ep1 are not complete" in ended.err
    for ranks in ("0-1", "2,3"):
        ended = mixprec("split", out, "--tp", 4, "--ranks", ranks)
        assert ended.code == 0 and f"when all ranks are cut: mixprec split {out} --tp 4 --finish" in ended.out
    ended = mixprec("split", out, "--tp", 4, "--finish", "--layout", "presplit")
    assert ended.code == 0 and "files of 4 ranks" in ended.out and "when all" not in ended.out
    assert tree(out) == due["presplit"]


def test_what_is_no_finish(out: Path, mixprec: Run) -> None:
    assert mixprec("split", out, "--tp", 4, "--finish", "--ranks", 1).code == 2
    assert mixprec("split", out, "--finish", "--layout", "presplit").code == 2
    for options in ({"tp": 4, "ranks": [1]}, {}, {"tp": 4, "layout": "merged"}):
        with pytest.raises(ValueError, match="all ranks of a degree are finished"):
            mp.split(out, finish=True, **options)  # type: ignore[arg-type]
    assert not (out / "presplit").exists()
