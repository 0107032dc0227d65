"""Verifying what others have touched, while others are at work, and from disks that fail."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from support.llama import write_recipe, write_sources
from support.plans import planned

from mixprec_build.checkpoint.degree import Degree
from mixprec_build.errors import MixprecError, OutputError
from mixprec_build.output import verify as verifying
from mixprec_build.output.build import plan_recipe, run_plan
from mixprec_build.output.locked import locked
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


@pytest.fixture(scope="module")
def cut(mix: Path) -> Path:
    """A checkpoint with merged files and those of two ranks."""
    run_plan(plan_recipe(mix), mix.parent / "cut")
    split(mix.parent / "cut", Degree(2))
    return mix.parent / "cut"


@pytest.fixture
def out(cut: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(cut, tmp_path / "out"))


# What else lies in the folder


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


ENTRIES: dict[str, tuple[Callable[[Path], object], str]] = {
    "pipe": (os.mkfifo, "a FIFO, not in the manifest"),
    "server": (_socket, "a socket, not in the manifest"),
    "x.py": (lambda path: path.symlink_to("nowhere"), "a dangling link to nowhere, not in the manifest"),
    "y.py": (lambda path: path.symlink_to("config.json"), "a link to config.json, not in the manifest"),
    "home": (lambda path: path.symlink_to("/"), "a link to /, not in the manifest"),
    "folder": (Path.mkdir, "not in the manifest"),
    ".hidden": (Path.mkdir, "not in the manifest"),
    ".env": (Path.touch, "not in the manifest"),
    ".git": (lambda path: path.symlink_to("/"), "a link to /, not in the manifest"),
    ".gitattributes": (os.mkfifo, "a FIFO, not in the manifest"),
}


@pytest.mark.parametrize("name", ENTRIES)
def test_what_does_not_belong_to_the_checkpoint_is_named(out: Path, name: str) -> None:
    make, what = ENTRIES[name]
    make(out / name)
    assert verify(out).differences == (f"{name}: {what}",)


def test_folders_of_tools_are_named_and_are_no_difference(out: Path) -> None:
    for name in (".git", ".cache"):
        (out / name / "x").mkdir(parents=True)
    (out / ".gitattributes").touch()
    result = verify(out)
    assert result.differences == () and result.beside == (".cache", ".git", ".gitattributes")


LISTED: dict[str, tuple[Callable[[Path], object], str]] = {
    "FIFO": (os.mkfifo, "is a FIFO, a file was written"),
    "folder": (Path.mkdir, "is a folder, a file was written"),
    "dangling": (lambda path: path.symlink_to("nowhere"), "is a dangling link to nowhere, a file was written"),
    "link": (lambda path: path.symlink_to("tokenizer.model"), "is a link to tokenizer.model, a file was written"),
    "away": (lambda path: path.symlink_to("/etc/hostname"), "outside of the checkpoint; put the file itself there"),
}


@pytest.mark.parametrize("kind", LISTED)
def test_something_else_in_the_place_of_a_file(out: Path, kind: str) -> None:
    make, what = LISTED[kind]
    (out / "tokenizer.json").unlink()
    make(out / "tokenizer.json")
    (difference,) = verify(out).differences
    assert "tokenizer.json" in difference and difference.endswith(what)


@pytest.mark.parametrize("layout", ["both", "presplit"])
def test_links_as_the_cache_of_the_hub_makes_them_are_no_difference(out: Path, tmp_path: Path, layout: str) -> None:
    split(out, Degree(2), layout=layout)
    snapshot = tmp_path / "models--org--name/snapshots" / ("a" * 40)
    blobs = tmp_path / "models--org--name/blobs"
    blobs.mkdir(parents=True)
    for number, path in enumerate(path for path in sorted(out.rglob("*")) if path.is_file()):
        path.rename(blobs / str(number))
        link = snapshot / path.relative_to(out)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blobs / str(number), link.parent))
    assert verify(snapshot).differences == ()


# Disks that fail


@pytest.mark.parametrize("where", ["presplit/tp2-ep1/rank-0-of-2/model-", "out/model-", "out/tokenizer.json"])
def test_a_file_that_cannot_be_read_is_named_and_the_others_are_compared(
    out: Path, monkeypatch: Patch, where: str
) -> None:
    """Of the file, what comes after its header."""
    (out / "generation_config.json").write_text("{ }")
    (rank,) = out.glob("presplit/tp2-ep1/rank-1-of-2/*.safetensors")
    data = bytearray(rank.read_bytes())
    data[-1] ^= 1
    rank.write_bytes(data)

    def failing(name: str) -> None:
        real = getattr(os, name)

        def read(fd: int, window: object, offset: int) -> object:
            path = Path(f"/proc/self/fd/{fd}").readlink().as_posix()
            if where in path and (offset > 0 or "tokenizer" in where):
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return real(fd, window, offset)

        monkeypatch.setattr(os, name, read)

    failing("pread")
    failing("preadv")
    differences = verify(out).differences
    unread = [line for line in differences if "Input/output error" in line]
    assert unread and all(where in line for line in unread)
    assert any(line.startswith("generation_config.json: ") for line in differences)
    assert any("rank-1-of-2" in line and line.endswith(": its bytes were changed") for line in differences)


# Other commands


def test_a_split_and_a_verify_do_not_work_at_the_same_time(out: Path) -> None:
    with locked(out), pytest.raises(OutputError, match="another `mixprec split` or build is writing there"):
        verify(out)
    with locked(out, shared=True):
        assert verify(out).differences == ()  # others may compare as well
        with pytest.raises(OutputError, match="`mixprec verify` is reading it; wait for it"):
            split(out, Degree(1))
    split(out, Degree(1))


def test_a_build_waits_for_those_that_compare_what_it_replaces(out: Path, mix: Path) -> None:
    plan = plan_recipe(mix)
    before = out.stat().st_ino
    ended = threading.Event()

    def build() -> None:
        run_plan(plan, out, force=True)
        ended.set()

    builder = threading.Thread(target=build)
    with locked(out, shared=True):
        builder.start()
        assert not ended.wait(3) and out.stat().st_ino == before
    builder.join(60)
    assert ended.is_set() and out.stat().st_ino != before and verify(out).differences == ()


def _cut_again(out: Path, _: Path) -> None:
    split(out, Degree(2), layout="presplit")


def _build_again(out: Path, mix: Path) -> None:
    run_plan(plan_recipe(mix), out, force=True)


@pytest.mark.parametrize("other", [_cut_again, _build_again])
@pytest.mark.parametrize("moment", ["_open_sources", "rank_differences", "_compare"])
def test_where_nothing_can_be_locked_a_change_meanwhile_is_no_difference(
    out: Path, mix: Path, monkeypatch: Patch, other: Callable[[Path, Path], None], moment: str
) -> None:
    """As on network file systems. Another command is at work while a comparison was stopped at one of its steps."""

    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    real = getattr(verifying, moment)
    once = threading.Lock()

    def step(*arguments: object) -> object:
        if once.acquire(blocking=False):
            other(out, mix)
        return real(*arguments)

    monkeypatch.setattr(verifying, moment, step)
    try:
        assert verify(out).differences == ()
    except MixprecError as error:
        assert isinstance(error, OutputError) and "another mixprec command changed it" in str(error)
    monkeypatch.undo()
    assert verify(out).differences == ()


# Headers that cannot be read


DAMAGED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no JSON": (lambda path: path.write_bytes(path.read_bytes()[:8] + b"!" + path.read_bytes()[9:]), "not valid JSON"),
    "endless": (lambda path: path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:]), "header"),
    "empty": (lambda path: path.write_bytes(b""), "0 bytes"),
    "cut short": (lambda path: path.write_bytes(path.read_bytes()[:-1]), "bytes"),
    "missing": (Path.unlink, "missing"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "is a folder, a file was written"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_shard_whose_header_is_damaged_is_named_and_the_others_are_compared(
    mix: Path, tmp_path: Path, kind: str
) -> None:
    damage, what = DAMAGED[kind]
    out = tmp_path / "out"
    write(planned(mix), out)
    shards = sorted(path.name for path in out.glob("*.safetensors"))
    sound = verify(out)
    assert len(shards) > 3 and sound.differences == ()
    with (out / shards[-1]).open("r+b") as file:  # of another one: its last byte
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    damage(out / shards[0])
    result = verify(out)
    about = {shard: [text for text in result.differences if shard in text] for shard in shards}
    assert any(what in text for text in about[shards[0]]), result.differences
    assert all(shard in (shards[0], shards[-1]) or not texts for shard, texts in about.items()), result.differences
    assert len(about[shards[0]]) <= 2 and sum("byte" in text for text in about[shards[-1]]) >= 1
    assert 0 < result.bit_for_bit < sound.bit_for_bit


def test_files_of_ranks_are_compared_beside_a_damaged_header(out: Path) -> None:
    shard = next(out.glob("*.safetensors"))
    shard.write_bytes(b"\xff" * 8 + shard.read_bytes()[8:])
    part = next((out / "presplit").rglob("*.safetensors"))
    data = bytearray(part.read_bytes())
    data[-1] ^= 1
    part.write_bytes(data)
    differences = verify(out).differences
    assert any(shard.name in text for text in differences)
    assert any(str(part) in text and "its bytes were changed" in text for text in differences)
