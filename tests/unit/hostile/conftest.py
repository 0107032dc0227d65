"""A recipe, its sources and what it builds, to spoil; and a limit of time for each test."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.run import Run, at_most
from support.write import LLAMA, write_tiny

from mixprec_build.output.build import plan_recipe, run_plan

from .spoil import Patch, link


@pytest.fixture(autouse=True)
def in_time() -> Iterator[None]:
    """CPU seconds of this process, with a wide margin for a loaded machine; a minute for what only waits."""
    start = time.process_time()
    with at_most(60):
        yield
    assert time.process_time() - start < 20


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three sources, a recipe, and what it builds: copied, never changed."""
    folder = tmp_path_factory.mktemp("built")
    companions = {"tokenizer.json": "{}", "modeling_x.py": "raise SystemExit('was run')\n", "LICENSE": "as you like"}
    for name, variant in (("bf16", "bf16"), ("fp8", "fp8_block"), ("int4", "gptq_int4")):
        write_tiny(
            folder / name, LLAMA, variant, edit=lambda _, config: config.update(auto_map={"AutoModel": "modeling_x.X"})
        )
        for file, text in companions.items():
            (folder / name / file).write_text(text)
    (folder / "mix.yaml").write_text(
        "model: ./bf16\n"
        "sources: {bf16: ./bf16, fp8: ./fp8, int4: ./int4}\n"
        "weights: {'model.layers.*.self_attn.*': fp8, 'model.layers.*.mlp.*': int4}\n"
    )
    run_plan(plan_recipe(folder / "mix.yaml"), folder / "out")
    return folder


@pytest.fixture
def mix(built: Path, tmp_path: Path) -> Path:
    """A copy of them, to spoil."""
    return Path(shutil.copytree(built, tmp_path / "mix"))


@pytest.fixture
def mixprec(mixprec: Run) -> Run:
    """Runs the command; ``verify`` without its progress bar."""
    return lambda *arguments: mixprec(*arguments, *(["--quiet"] if arguments[0] == "verify" else []))


@pytest.fixture
def snapshot(mix: Path, tmp_path: Path, monkeypatch: Patch) -> Path:
    """``bf16`` as the hub's cache holds ``org/name``."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    repository, commit = tmp_path / "hf" / "hub" / "models--org--name", "0123456789" * 4
    folder = repository / "snapshots" / commit
    for path in (folder, repository / "blobs", repository / "refs"):
        path.mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    for i, path in enumerate(sorted((mix / "bf16").iterdir())):
        path.rename(repository / "blobs" / f"{i:040x}")
        link(folder / path.name, f"../../blobs/{i:040x}")
    return folder
