"""Recipes beside their sources."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.llama import write_recipe, write_sources, write_tiny


@pytest.fixture(scope="module")
def mix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe of a mix, beside its sources: never written to by these tests."""
    folder = tmp_path_factory.mktemp("mix")
    write_sources(folder)
    return write_recipe(folder / "mix.yaml")


@pytest.fixture
def own_mix(tmp_path: Path) -> Path:
    """As ``mix``, for tests that change the sources."""
    (tmp_path / "own").mkdir()
    write_sources(tmp_path / "own")
    return write_recipe(tmp_path / "own" / "mix.yaml")


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """The recipe of a build that takes over both files of its one source."""
    write_tiny(tmp_path / "bf16")
    return write_recipe(tmp_path / "one.yaml", {}, sources=["bf16"])
