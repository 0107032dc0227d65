"""The files beside the weights."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.files import tree
from support.llama import COMPANIONS, CONFIG, LEFT_BEHIND
from support.run import at_most

from mixprec_build.errors import SourceError

from .steps import INDEX, MANIFEST, build


def test_companions_are_copied_and_nothing_else(mix: Path, tmp_path: Path) -> None:
    written = tree(build(mix, tmp_path / "out"))
    assert {name: written.pop(name) for name in COMPANIONS} == COMPANIONS
    assert not written.keys() & LEFT_BEHIND.keys()
    assert set(written) == {"README.md", "config.json", INDEX, MANIFEST, "model-00001-of-00001.safetensors"}


def test_config_keeps_the_models_keys(own_mix: Path, tmp_path: Path) -> None:
    """Of the source's quantization nothing is left, wherever a tool put it."""
    path = own_mix.parent / "bf16" / "config.json"
    before = {**CONFIG, "compression_config": {"quant_method": "compressed-tensors"}, "text": "\ud800 \udcff é"}
    path.write_text(json.dumps(before))
    written = (build(own_mix, tmp_path / "out") / "config.json").read_bytes()
    after = json.loads(written)
    declared = after.pop("quantization_config")
    del before["compression_config"]
    assert after == before and list(after) == list(before)
    assert declared["quant_method"] == "mixprec" and declared["formats"].keys() == {"bf16", "fp8_block", "gptq_int4"}
    assert "é".encode() in written and b"\\ud800 \\udcff" in written


def test_the_quantization_of_a_quantized_model_is_replaced(own_mix: Path, tmp_path: Path) -> None:
    recipe = own_mix.with_name("fp8.yaml")
    recipe.write_text("model: ./fp8\nsources: {fp8: ./fp8}\n")
    config = json.loads((build(recipe, tmp_path / "out") / "config.json").read_bytes())
    assert config["quantization_config"]["quant_method"] == "mixprec"
    assert "weight_block_size" not in config["quantization_config"]


@pytest.mark.parametrize("kind", ["fifo", "device"])
def test_a_companion_that_would_never_end(own_mix: Path, tmp_path: Path, kind: str) -> None:
    path = own_mix.parent / "bf16" / "tokenizer.json"
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    with at_most(30), pytest.raises(SourceError, match=f"{path}: (not a regular file|a link to /dev/zero)"):
        build(own_mix, tmp_path / "out")


@pytest.fixture
def umask() -> Iterator[Callable[[int], int]]:
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


@pytest.mark.parametrize(("mask", "file", "folder"), [(0o022, 0o644, 0o755), (0o027, 0o640, 0o750), (0, 0o666, 0o777)])
def test_modes_follow_the_umask(
    mix: Path, tmp_path: Path, umask: Callable[[int], int], mask: int, file: int, folder: int
) -> None:
    """A server often runs as another user than the build."""
    umask(mask)
    out = build(mix, tmp_path / "deep" / "out")
    assert {stat.S_IMODE(path.stat().st_mode) for path in out.iterdir()} == {file}
    assert stat.S_IMODE(out.stat().st_mode) == stat.S_IMODE(out.parent.stat().st_mode) == folder
