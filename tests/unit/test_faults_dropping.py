"""Files are dropped only when those that replace them were read back from the disk and are right."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support.files import tree
from support.llama import write_recipe, write_sources

from mixprec_build.checkpoint.degree import Degree
from mixprec_build.errors import MixprecError, VerifyError
from mixprec_build.output.build import plan_recipe, run_plan
from mixprec_build.output.split import split

MIX = {"model.layers.0.mlp.*": "fp8", "model.layers.1.mlp.*": "int4"}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mix")
    write_sources(folder)
    run_plan(plan_recipe(write_recipe(folder / "mix.yaml", MIX)), folder / "built")
    return folder / "built"


@pytest.fixture
def out(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "out"))


def flipping(monkeypatch: pytest.MonkeyPatch, name: str, nth: int, touched: Callable[[str], bool]) -> list[int]:
    """Has the nth read or write of a file's data flip one bit on its way, once."""
    calls: list[int] = []
    real = getattr(os, name)

    def call(fd: int, data: object, at: int) -> int:
        if not touched(Path(f"/proc/self/fd/{fd}").readlink().as_posix()):
            return int(real(fd, data, at))
        calls.append(at)
        if len(calls) != nth:
            return int(real(fd, data, at))
        if name == "pwrite":
            changed = bytearray(data)  # type: ignore[call-overload]
            changed[len(changed) // 2] ^= 1
            return int(real(fd, changed, at))
        done = int(real(fd, data, at))
        (window,) = data  # type: ignore[misc]
        window[done // 2] ^= 1
        return done

    monkeypatch.setattr(os, name, call)
    return calls


def merged(path: str) -> bool:
    return "/presplit/" not in path and "/out/model-" in path


def ranks(path: str) -> bool:
    return "/presplit/" in path and path.endswith(".safetensors")


@pytest.mark.parametrize(("name", "touched"), [("preadv", merged), ("pwrite", ranks)])
def test_a_flipped_bit_while_cutting_keeps_the_merged_files(
    built: Path, out: Path, tmp_path: Path, name: str, touched: Callable[[str], bool]
) -> None:
    """The merged files stay, whichever read or write it is, and the next split succeeds."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        calls = flipping(monkeypatch, name, 0, touched)
        split(Path(shutil.copytree(out, tmp_path / "due/out")), Degree(2), layout="presplit", jobs=1)
    due = tree(tmp_path / "due/out")
    wrong = 0
    for nth in range(1, len(calls) + 1, max(1, len(calls) // 25)):
        one = Path(shutil.copytree(out, tmp_path / f"{nth}/out"))
        with pytest.MonkeyPatch.context() as monkeypatch:
            flipping(monkeypatch, name, nth, touched)
            try:
                split(one, Degree(2), layout="presplit", jobs=1)
            except MixprecError as error:
                wrong += 1
                # A rank whose header is wrong is told from others without reading it.
                assert re.search(
                    "the merged files are kept: the same command |ranks [01] are missing or damaged", str(error)
                )
                assert all((one / path.name).read_bytes() == path.read_bytes() for path in built.glob("*.safetensors"))
        split(one, Degree(2), layout="presplit", jobs=1)
        assert tree(one) == due, nth
        shutil.rmtree(one.parent)
    assert wrong > 5


def test_merged_files_that_are_damaged_do_not_make_ranks_droppable(out: Path) -> None:
    """What `--layout merged` would leave is looked at before the ranks, which are sound, go."""
    split(out, Degree(2))
    path = next(out.glob("model-*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    before = tree(out)
    with pytest.raises(VerifyError, match=rf"{path}: is not as it was built.*the files of ranks are kept"):
        split(out, layout="merged")
    assert tree(out) == before


def test_damaged_merged_files_are_not_cut_and_dropped(out: Path) -> None:
    path = next(out.glob("model-*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(VerifyError, match=rf"{path}: is not as it was built.*nothing was dropped"):
        split(out, Degree(2), layout="presplit")
    assert path.read_bytes() == data


def test_a_flipped_bit_while_restoring_keeps_the_ranks(out: Path, tmp_path: Path) -> None:
    split(out, Degree(2), layout="presplit")
    with pytest.MonkeyPatch.context() as monkeypatch:
        calls = flipping(monkeypatch, "pwrite", 0, lambda path: "/presplit/.merged.part/" in path)
        split(Path(shutil.copytree(out, tmp_path / "due/out")), layout="merged", jobs=1)
    wrong = 0
    for nth in range(1, len(calls) + 1, max(1, len(calls) // 15)):
        one = Path(shutil.copytree(out, tmp_path / f"{nth}/out"))
        with pytest.MonkeyPatch.context() as monkeypatch:
            flipping(monkeypatch, "pwrite", nth, lambda path: "/presplit/.merged.part/" in path)
            with pytest.raises(MixprecError, match="was miswritten; repeat the command"):
                split(one, layout="merged", jobs=1)
            wrong += 1
        split(one, layout="merged", jobs=1)
        assert tree(one) == tree(tmp_path / "due/out")
        shutil.rmtree(one.parent)
    assert wrong > 5
