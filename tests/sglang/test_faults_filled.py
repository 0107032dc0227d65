"""No parameter stays uninitialized, but for the rows that pad a vocabulary."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from unittest.mock import patch

import pytest
from safetensors.torch import save_file
from support.serving import LLAMA
from support.sglang.harness import build, serve, sources, tensors_of

pytestmark = pytest.mark.usefixtures("sglang")


@pytest.mark.parametrize("load_format", ["auto", "safetensors"])
@pytest.mark.parametrize("module", ["lm_head", "model.embed_tokens"])
def test_a_vocabulary_that_nothing_fills_stops_the_server(
    folder: Path, tmp_path: Path, module: str, load_format: str
) -> None:
    source = shutil.copytree(sources(folder, LLAMA)["bf16"], tmp_path / "bf16")
    tensors = tensors_of(source)
    del tensors[f"{module}.weight"]
    first, *rest = sorted(source.glob("*.safetensors"))
    for path in rest:
        path.unlink()
    save_file(tensors, first, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, first.name)}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    with patch("mixprec_build.planning.planner.check_complete"):  # the compiler would refuse it
        checkpoint = build({"bf16": source}, {}, tmp_path / "out")
    with pytest.raises(RuntimeError, match=rf"{module}\.weight: parameters that were not filled"):
        serve(checkpoint, load_format=load_format)
