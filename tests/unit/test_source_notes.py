"""What a plan notes of sources whose files say more, or say it twice."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from support.write import LLAMA, write_tiny

from mixprec_build.output.build import plan_recipe


def notes(folder: Path) -> list[str]:
    recipe = folder / "recipe.yaml"
    recipe.write_text("model: bf16\nsources: {bf16: bf16, int4: int4}\nweights: {'model.layers.*.mlp.*': int4}\n")
    return [note for note in plan_recipe(recipe).notes if note.startswith("`int4`")]


def sources(folder: Path) -> Path:
    write_tiny(folder / "bf16", LLAMA, "bf16")
    write_tiny(folder / "int4", LLAMA, "gptq_int4")
    return folder / "int4"


def test_an_ordinary_source_needs_no_note(tmp_path: Path) -> None:
    sources(tmp_path)
    assert notes(tmp_path) == []


def test_files_beside_the_index_that_are_not_read(tmp_path: Path) -> None:
    int4 = sources(tmp_path)
    for name in ("consolidated", "adapter_model"):
        save_file({"layers.0.wq.weight": np.zeros((8, 8), np.float32)}, int4 / f"{name}.safetensors")
    copy, other = notes(tmp_path)
    assert copy == "`int4`: consolidated.safetensors: not read, by name a copy of the weights in Mistral's own layout"
    assert other.startswith("`int4`: adapter_model.safetensors beside the files that the index lists: not read")


def test_two_declarations_that_differ(tmp_path: Path) -> None:
    int4 = sources(tmp_path)
    ours = json.loads((int4 / "config.json").read_text())["quantization_config"]
    (int4 / "quantize_config.json").write_text(json.dumps({**ours, "group_size": 64}))
    (note,) = notes(tmp_path)
    assert note == (
        "`int4`: `quantization_config` of config.json and quantize_config.json declare its quantization differently "
        "(group_size 128 and 64); each module is read by the one that its tensors agree with"
    )


def test_one_that_says_more_is_no_contradiction(tmp_path: Path) -> None:
    int4 = sources(tmp_path)
    ours = json.loads((int4 / "config.json").read_text())["quantization_config"]
    (int4 / "quantize_config.json").write_text(json.dumps({**ours, "damp_percent": 0.01}))
    assert notes(tmp_path) == []
