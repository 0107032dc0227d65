"""No parameter stays uninitialized, but for the rows that pad a vocabulary."""

from __future__ import annotations

import shutil
from pathlib import Path
from unittest.mock import patch

import pytest
from support.serving import LLAMA
from support.sglang.harness import build, change_tensors, serve, sources

pytestmark = pytest.mark.usefixtures("sglang")


@pytest.mark.parametrize("load_format", ["auto", "safetensors"])
@pytest.mark.parametrize("module", ["lm_head", "model.embed_tokens"])
def test_a_vocabulary_that_nothing_fills_stops_the_server(
    folder: Path, tmp_path: Path, module: str, load_format: str
) -> None:
    source = shutil.copytree(sources(folder, LLAMA)["bf16"], tmp_path / "bf16")
    change_tensors(source, lambda tensors: tensors.pop(f"{module}.weight"))
    with patch("mixprec_build.planning.planner.check_complete"):  # the compiler would refuse it
        checkpoint = build({"bf16": source}, {}, tmp_path / "out")
    with pytest.raises(RuntimeError, match=rf"{module}\.weight: parameters that were not filled"):
        serve(checkpoint, load_format=load_format)
