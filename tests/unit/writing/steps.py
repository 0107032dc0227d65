"""Builds, what they leave in a folder, and system calls that fail."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mixprec_build.errors import OutputError
from mixprec_build.output.build import plan_recipe, run_plan

INDEX = "model.safetensors.index.json"
MANIFEST = "mixprec_manifest.json"
MIB = 1 << 20

STAGE = r"\.out\.mixprec"

Patch = pytest.MonkeyPatch


def build(recipe: Path, out: Path, *, link: bool = False, **options: Any) -> Path:
    assert run_plan(plan_recipe(recipe, link=link), out, link=link, **options) == out / MANIFEST
    return out


def one_source(folder: Path, tensors: dict[str, torch.Tensor], shard_size: str = "1MiB") -> Path:
    """The recipe of a checkpoint of one source, ``source``, with these tensors: of an encoder, which may have any."""
    (folder / "source").mkdir(parents=True)
    (folder / "source" / "config.json").write_text(json.dumps({"model_type": "bert"}))
    save_file(tensors, folder / "source" / "model.safetensors", metadata={"format": "pt"})
    recipe = folder / "one.yaml"
    recipe.write_text(f"model: ./source\noutput: {{shard_size: {shard_size}}}\n")
    return recipe


def refused(recipe: Path, out: Path, *, force: bool = False) -> str:
    before = listing(out.parent)
    with pytest.raises(OutputError) as caught:
        build(recipe, out, force=force)
    assert listing(out.parent) == before
    assert caught.value.exit_code == 2
    return str(caught.value)


def listing(folder: Path) -> dict[str, object]:
    """All there is below a folder, links not followed."""
    return {
        str(path.relative_to(folder)): (path.lstat().st_mode, path.lstat().st_ino, path.lstat().st_size)
        for path in sorted(folder.rglob("*"))
    }


class Fault:
    """Makes the ``nth`` call of a function of ``os`` fail (0: none); ``calls`` counts them."""

    def __init__(self, monkeypatch: Patch, function: str, number: int = 0, nth: int = 0):
        self.calls = 0
        self._lock = threading.Lock()
        real = getattr(os, function)

        def call(*arguments: Any, **options: Any) -> Any:
            with self._lock:
                self.calls += 1
                fails = self.calls == nth
            if fails:
                paths = [str(a) for a in arguments if isinstance(a, (str, Path))]
                raise OSError(number, os.strerror(number), *([paths[0], None, *paths[1:]] if paths else []))
            return real(*arguments, **options)

        monkeypatch.setattr(os, function, call)
