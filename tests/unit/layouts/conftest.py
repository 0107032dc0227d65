"""A compiled checkpoint to cut, and a way to stop whoever does."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.serving import write_sources

from mixprec_build.output.build import plan_recipe, run_plan

from .compiled import SMALL, Killed


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("layout")


@pytest.fixture(scope="session")
def small(folder: Path) -> Path:
    home = folder / "small"
    home.mkdir()
    (source,) = write_sources(home / "sources", SMALL, ["bf16"]).values()
    (home / "recipe.yaml").write_text(f"model: {source}\noutput: {{shard_size: 1MiB}}\n")
    run_plan(plan_recipe(home / "recipe.yaml"), home / "out")
    assert len(list((home / "out").glob("*.safetensors"))) == 3
    return home / "out"


@pytest.fixture
def out(small: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small, tmp_path / "out"))


@pytest.fixture
def stop(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """``stop(n)``: whatever renames or removes is stopped at the n-th time; ``stop(0)``: no more."""
    real = {name: getattr(os, name) for name in ("rename", "unlink", "rmdir")}
    left = 0

    def set_to(n: int) -> None:
        nonlocal left
        left = n

    def wrap(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                raise Killed
            return real[name](*args, **kwargs)

        return call

    for name in real:
        monkeypatch.setattr(os, name, wrap(name))
    yield set_to
