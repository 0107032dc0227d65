"""Files that come along with a model, links onto other disks, recipes without an end, and too many threads."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest
from support.llama import write_recipe, write_sources
from support.run import at_most, run_python

from mixprec_build.errors import RecipeError, SourceError, WriteError
from mixprec_build.output import copier
from mixprec_build.output.build import plan_recipe, run_plan
from mixprec_build.output.verify import verify
from mixprec_build.recipe.recipe import load_recipe

Patch = pytest.MonkeyPatch


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mix")
    write_sources(folder)
    return folder


@pytest.fixture
def mix(sources: Path, tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(sources, tmp_path / "own"))
    return write_recipe(folder / "mix.yaml", {"model.layers.0.mlp.*": "fp8"})


# Companions


def _large(path: Path) -> None:
    path.touch()
    os.truncate(path, (256 << 20) + 1)


BAD = {
    "FIFO": (os.mkfifo, "not a regular file"),
    "device": (lambda path: os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 5)), "not a regular file"),
    "large": (_large, "268435457 bytes; at most 268435456 are read"),
    "link": (lambda path: path.symlink_to("/etc/hostname"), "outside of the checkpoint"),
}


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "tokenizer.model", "LICENSE"])
@pytest.mark.parametrize("kind", BAD)
def test_what_a_build_could_not_copy_is_refused_by_the_plan(mix: Path, name: str, kind: str) -> None:
    make, why = BAD[kind]
    path = mix.parent / "bf16" / name
    path.unlink(missing_ok=True)
    try:
        make(path)
    except PermissionError:
        pytest.skip("devices can be made by root only")
    with at_most(30), pytest.raises(SourceError, match=why) as caught:
        plan_recipe(mix)
    assert f"bf16/{name}: " in str(caught.value)


def test_companions_are_copied_and_compared_in_bounded_memory(mix: Path, tmp_path: Path) -> None:
    """Four of 200 MB (holes, which take no disk to read): less than 200 MB in all, the interpreter included."""
    for number in range(4):
        path = mix.parent / "bf16" / f"extra{number}.txt"
        path.touch()
        os.truncate(path, 200_000_000)
    code = """
import sys
from pathlib import Path
from mixprec_build.output.build import plan_recipe, run_plan
from mixprec_build.output.verify import verify
run_plan(plan_recipe(Path(sys.argv[1])), Path(sys.argv[2]))
assert verify(Path(sys.argv[2])).differences == ()
print(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
"""
    peak = int(run_python("-c", code, str(mix), str(tmp_path / "out")).stdout)
    assert peak < 200_000, f"{peak} kB"


def test_companions_are_part_of_the_space_that_is_asked_for(mix: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    path = mix.parent / "bf16" / "extra.txt"
    path.write_bytes(bytes(10_000_000))
    plan = plan_recipe(mix)
    real = os.statvfs

    def little(path: Any) -> Any:
        state = real(path)
        return type("State", (), {"f_bavail": 9_000_000 // state.f_frsize, "f_frsize": state.f_frsize})

    monkeypatch.setattr(os, "statvfs", little)
    with pytest.raises(WriteError, match=r"bytes are needed, .* are free"):
        run_plan(plan, tmp_path / "out")
    path.unlink()
    run_plan(plan_recipe(mix), tmp_path / "out")


# Links


@pytest.mark.parametrize("error", [errno.EXDEV, errno.EPERM, errno.EMLINK])
def test_where_nothing_can_be_linked_the_space_is_asked_for(
    sources: Path, tmp_path: Path, monkeypatch: Patch, error: int
) -> None:
    recipe = tmp_path / "mix.yaml"
    recipe.write_text(f"model: {sources / 'bf16'}\nsources: {{bf16: {sources / 'bf16'}}}\n")
    plan = plan_recipe(recipe, link=True)
    assert all(shard.link for shard in plan.shards)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(error, os.strerror(error))

    asked: list[int] = []
    with Patch.context() as patch:
        patch.setattr(copier, "check_space", lambda folder, need: asked.append(need))
        run_plan(plan, tmp_path / "linked", link=True)
        patch.setattr(os, "link", refuse)
        patch.setattr("fcntl.ioctl", refuse)
        run_plan(plan, tmp_path / "copied", link=True)
    linked, copied = asked
    assert copied - linked == sum(path.stat().st_size for path in (tmp_path / "copied").glob("*.safetensors"))
    assert verify(tmp_path / "copied").differences == () == verify(tmp_path / "linked").differences


# Recipes and threads


@pytest.mark.parametrize("path", ["/dev/zero", "/proc/kmsg", "/dev/full", "/proc/self/pagemap"])
def test_a_recipe_without_an_end(path: str) -> None:
    if not os.access(path, os.R_OK):
        pytest.skip(f"{path} cannot be read here")
    with at_most(20), pytest.raises(RecipeError, match=f"^{path}"):
        load_recipe(Path(path))


def test_threads_are_bounded(mix: Path, tmp_path: Path) -> None:
    for command in (("build", str(mix), "-o", str(tmp_path / "out")), ("split", str(tmp_path / "out"), "--tp", "2")):
        ended = run_python("-m", "mixprec_build", *command, "-j", "200000")
        assert ended.returncode == 2 and "256" in ended.stderr
        assert run_python("-m", "mixprec_build", *command, "-q", "-j", "256").returncode == 0
    run_plan(plan_recipe(mix), tmp_path / "other", jobs=200_000)
    assert verify(tmp_path / "other").differences == ()
