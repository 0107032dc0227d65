"""Whole files that are taken over, by a clone, a hard link or a copy."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import save_file
from support.files import folder_tensors, tree

from mixprec_build.output.build import plan_recipe, run_plan
from mixprec_build.output.verify import verify

from .steps import INDEX, Patch, build


def assert_taken_over(recipe: Path, out: Path) -> None:
    sources = sorted((recipe.parent / "bf16").glob("*.safetensors"))
    taken = sorted(out.glob("*.safetensors"))
    assert sorted(p.read_bytes() for p in taken) == sorted(p.read_bytes() for p in sources)
    assert not any(path.is_symlink() for path in out.iterdir())
    assert json.loads((out / INDEX).read_bytes())["weight_map"].keys() == folder_tensors(out).keys()
    result = verify(out)
    assert (result.differences, result.by_checksum) == ((), 0)


def inodes(folder: Path) -> set[int]:
    return {path.stat().st_ino for path in folder.glob("*.safetensors")}


def test_link_takes_whole_files_over(whole: Path, tmp_path: Path) -> None:
    done: list[int] = []
    plan = plan_recipe(whole, link=True)
    assert {shard.link for shard in plan.shards} == {("bf16", f"model-0000{i}-of-00002.safetensors") for i in (1, 2)}
    run_plan(plan, tmp_path / "out", link=True, progress=done.append)
    assert_taken_over(whole, tmp_path / "out")
    assert sum(done) == plan.tensor_bytes


def refuse_ioctl(*_: object) -> int:
    raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))


def test_link_falls_back_to_hard_links(whole: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(fcntl, "ioctl", refuse_ioctl)
    out = build(whole, tmp_path / "out", link=True)
    assert_taken_over(whole, out)
    assert inodes(out) == inodes(tmp_path / "bf16")


def test_link_through_the_links_of_a_hub_cache(whole: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(fcntl, "ioctl", refuse_ioctl)
    repository = tmp_path / "models--org--name"
    snapshot, blobs = repository / "snapshots" / "0123", repository / "blobs"
    snapshot.parent.mkdir(parents=True)
    blobs.mkdir()
    (tmp_path / "bf16").rename(snapshot)
    (tmp_path / "bf16").symlink_to(snapshot)
    for path in snapshot.glob("*.safetensors"):
        path.rename(blobs / path.name)
        path.symlink_to(Path("../../blobs") / path.name)
    out = build(whole, tmp_path / "out", link=True)
    assert_taken_over(whole, out)
    assert inodes(out) == inodes(blobs)


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EPERM, errno.EMLINK])
def test_link_falls_back_to_copies(whole: Path, tmp_path: Path, monkeypatch: Patch, number: int) -> None:
    def refuse_link(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "ioctl", refuse_ioctl)
    monkeypatch.setattr(os, "link", refuse_link)
    out = build(whole, tmp_path / "out", link=True)
    assert_taken_over(whole, out)
    assert not inodes(out) & inodes(tmp_path / "bf16")


def test_link_across_devices(whole: Path, tmp_path: Path) -> None:
    shm = Path("/dev/shm")
    if not shm.is_dir() or shm.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs a second file system")
    out = shm / f"mixprec-test-{os.getpid()}"
    try:
        assert_taken_over(whole, build(whole, out, link=True))
    finally:
        for path in out.glob("*"):
            path.unlink()
        out.rmdir()


def test_link_leaves_files_that_are_not_whole(mix: Path, tmp_path: Path) -> None:
    plan = plan_recipe(mix, link=True)
    assert [shard.link for shard in plan.shards] == [None]
    run_plan(plan, tmp_path / "out", link=True)
    assert tree(tmp_path / "out") == tree(build(mix, tmp_path / "copied"))


@pytest.mark.parametrize("metadata", [None, {"made": "by hand"}, {"format": "np"}])
def test_link_leaves_files_that_do_not_say_pt(whole: Path, tmp_path: Path, metadata: dict[str, str] | None) -> None:
    for path in (tmp_path / "bf16").glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no dict)
        save_file(tensors, path, metadata)
    assert [shard.link for shard in plan_recipe(whole, link=True).shards] == [None]
