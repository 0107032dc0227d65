"""Safetensors files that the index does not list: which of them belong to a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support import producers as made
from support.producers import Checkpoint

from mixprec_build.checkpoint.beside import is_draft
from mixprec_build.checkpoint.manifest import MANIFEST
from mixprec_build.checkpoint.opening import open_checkpoint
from mixprec_build.errors import SourceError
from mixprec_build.families.facts import ModelFacts
from mixprec_build.output.build import plan_recipe, run_plan

Config = dict[str, Any]

EXTRA = "model_extra_tensors.safetensors"


def qwen(folder: Path, file: str = EXTRA, *, draft: bool = True) -> Path:
    """A Qwen3.5 whose layer for multi-token prediction is in a file that the index does not list."""
    beside = {file: "mtp.*"} if draft else {}
    return Checkpoint(made.qwen3_5(draft=draft, vision=False), beside=beside).write(folder)


def change(folder: Path, **config: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))


def drafts(folder: Path) -> set[str]:
    return {name for name in open_checkpoint(str(folder)).tensors() if name.startswith("mtp.")}


@pytest.mark.parametrize("file", ["model_mtp.safetensors", EXTRA, "extra_weights.safetensors", "mtp.safetensors"])
def test_a_declared_draft_that_the_index_lacks_is_read(tmp_path: Path, file: str) -> None:
    folder = qwen(tmp_path / "q", file)
    assert drafts(folder) == set(load_file(folder / file))
    assert open_checkpoint(str(folder)).left_aside == ()


def test_it_is_planned_and_built(tmp_path: Path) -> None:
    folder = qwen(tmp_path / "q")
    (tmp_path / "recipe.yaml").write_text("model: q\n")
    plan = plan_recipe(tmp_path / "recipe.yaml", allow_unservable=True)
    run_plan(plan, tmp_path / "out", allow_unservable=True)
    built = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(load_file(folder / EXTRA)) <= built.keys()
    listed = json.loads((tmp_path / "out" / MANIFEST).read_text())["modules"]
    assert set(load_file(folder / EXTRA)) <= {name for module in listed.values() for name in module["tensors"]}


def test_a_draft_that_is_not_declared_is_left_aside(tmp_path: Path) -> None:
    folder = qwen(tmp_path / "q")
    text = json.loads((folder / "config.json").read_text())["text_config"] | {"mtp_num_hidden_layers": 0}
    change(folder, text_config=text)
    assert drafts(folder) == set()
    assert open_checkpoint(str(folder)).left_aside == (EXTRA,)


def test_a_file_that_the_config_names_is_read(tmp_path: Path) -> None:
    folder = qwen(tmp_path / "q", draft=False)
    save_file({"adapter.weight": np.zeros((8, 8), np.float32)}, folder / "adapter.safetensors")
    assert open_checkpoint(str(folder)).left_aside == ("adapter.safetensors",)
    change(folder, extra={"files": ["adapter.safetensors"]})
    opened = open_checkpoint(str(folder))
    assert "adapter.weight" in opened.tensors()
    assert opened.left_aside == ()


def test_what_sglang_reads_is_read(tmp_path: Path) -> None:
    folder = Checkpoint(made.qwen3_moe()).write(tmp_path / "q")
    save_file({"model.layers.2.mlp.gate.weight": np.zeros((8, 8), np.float32)}, folder / "mtp.safetensors")
    assert "model.layers.2.mlp.gate.weight" not in open_checkpoint(str(folder)).tensors()
    change(folder, architectures=["Glm4MoeForCausalLM"], num_nextn_predict_layers=1)
    assert "model.layers.2.mlp.gate.weight" in open_checkpoint(str(folder)).tensors()


@pytest.mark.parametrize("name", ["consolidated.safetensors", "adapter_model.safetensors"])
def test_a_copy_of_the_model_under_other_names_is_left_aside(tmp_path: Path, name: str) -> None:
    folder = qwen(tmp_path / "q", draft=True)
    save_file({"layers.0.attention.wq.weight": np.zeros((8, 8), np.float32)}, folder / name)
    opened = open_checkpoint(str(folder))
    assert opened.left_aside == (name,)
    assert drafts(folder)


def test_a_tensor_of_the_index_and_of_a_file_beside_it_is_refused(tmp_path: Path) -> None:
    folder = qwen(tmp_path / "q", draft=False)
    save_file({"lm_head.weight": np.zeros((8, 8), np.float32)}, folder / "extra.safetensors")
    change(folder, extra="extra.safetensors")
    with pytest.raises(SourceError) as error:
        open_checkpoint(str(folder))
    assert "'lm_head.weight' is in model-00001-of-00001.safetensors and in extra.safetensors" in str(error.value)


def test_a_file_beside_a_single_one_is_read_without_an_index_too(tmp_path: Path) -> None:
    folder = qwen(tmp_path / "q", "model_mtp.safetensors")
    (folder / "model.safetensors.index.json").unlink()
    (folder / "model-00001-of-00001.safetensors").rename(folder / "model.safetensors")
    assert drafts(folder)


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        ("mtp.layers.0.mlp.gate.weight", True),
        ("model.mtp.fc.weight", True),
        ("model.mtp_layers.0.eh_proj.weight", True),
        ("model.layers.4.eh_proj.weight", True),
        ("language_model.model.layers.4.enorm.weight", True),
        ("model.layers.3.mlp.up_proj.weight", False),
        ("lm_head.weight", False),
        ("model.mtprojector.weight", False),
        ("vision_tower.layers.9.mlp.weight", False),
    ],
)
def test_what_is_a_draft(tensor: str, expected: bool) -> None:
    assert is_draft(tensor, ModelFacts.of({"num_hidden_layers": 4})) is expected
    assert is_draft(tensor, ModelFacts.of({"text_config": {"num_hidden_layers": 4}})) is expected


def test_drafts_are_declared_by_several_words() -> None:
    assert ModelFacts.of({}).draft_layers == ModelFacts.of({"num_nextn_predict_layers": None}).draft_layers == 0
    assert ModelFacts.of({"text_config": {"mtp_num_hidden_layers": 1}}).draft_layers == 1
    assert ModelFacts.of({"num_mtp_modules": 3, "num_nextn_predict_layers": 1}).draft_layers == 3
