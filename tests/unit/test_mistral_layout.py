"""Checkpoints in Mistral's own layout: refused by name, whatever lies beside them, and never taken for another."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load_file, save_file
from support.run import Run
from support.write import LLAMA, write_tiny

from mixprec_build.checkpoint.opening import open_checkpoint
from mixprec_build.errors import OutputError, SourceError
from mixprec_build.output.build import plan_recipe, run_plan

Tensors = Mapping[str, npt.NDArray[Any]]

# Hugging Face's words -> Mistral's, as mistral-inference's release of Mistral-7B-v0.3 has them
WORDS = {
    "model.embed_tokens": "tok_embeddings", "lm_head": "output", "model.norm": "norm", "model.layers": "layers",
    "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3", "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
PARAMS = {"dim": 128, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "head_dim": 64, "hidden_dim": 256}
INSTEAD = "Name the release in Hugging Face's layout (config.json, model*.safetensors)"


def own(tensors: Tensors) -> dict[str, npt.NDArray[Any]]:
    found = {}
    for name, values in tensors.items():
        for theirs, ours in WORDS.items():
            name = name.replace(theirs, ours)
        found[name] = values
    return found


def write(folder: Path, tensors: Tensors, stem: str, *, files: int = 2, index: bool = True) -> None:
    """Writes tensors as shards of this name, as releases count them; one file has the bare name."""
    names = sorted(tensors)
    shards = [f"{stem}-{number:05}-of-{files:05}.safetensors" for number in range(1, files + 1)]
    shards = shards if files > 1 else [f"{stem}.safetensors"]
    weight_map = {name: shards[at * files // len(names)] for at, name in enumerate(names)}
    for shard in shards:
        save_file({name: tensors[name] for name in names if weight_map[name] == shard}, folder / shard)
    if index and files > 1:
        text = json.dumps({"metadata": {}, "weight_map": weight_map})
        (folder / f"{stem}.safetensors.index.json").write_text(text)


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "hf", LLAMA, "bf16")


def release(hf: Path, *, config: bool = True, hf_files: int = 0, files: int = 2, index: bool = True) -> Path:
    """The checkpoint ``hf`` as a release in Mistral's own layout, with ``hf_files`` of the other beside it."""
    tensors = {name: values for file in hf.glob("*.safetensors") for name, values in load_file(file).items()}
    folder = hf.parent / "own"
    folder.mkdir()
    (folder / "params.json").write_text(json.dumps(PARAMS))
    if config:
        (folder / "config.json").write_bytes((hf / "config.json").read_bytes())
    write(folder, own(tensors), "consolidated", files=files, index=index)
    if hf_files:
        write(folder, tensors, "model", files=hf_files, index=index)
    return folder


def refusal(folder: Path) -> str:
    with pytest.raises(SourceError) as caught:
        open_checkpoint(str(folder))
    return str(caught.value)


@pytest.mark.parametrize("files", [1, 2])
def test_without_a_config(hf: Path, files: int) -> None:
    folder = release(hf, config=False, files=files)
    there = "consolidated.safetensors" if files == 1 else (
        "consolidated-00001-of-00002.safetensors, consolidated-00002-of-00002.safetensors"
    )  # fmt: skip
    said = refusal(folder)
    assert said.startswith(
        f"{folder}: no config.json, but params.json, {there}: Mistral's own layout, which mixprec does not read. "
        f"{INSTEAD}"
    )
    assert "rows of q and k are in another order" in said


def test_metas_pickles_without_a_config(tmp_path: Path) -> None:
    (tmp_path / "params.json").write_text("{}")
    (tmp_path / "consolidated.00.pth").write_bytes(b"")
    assert "no config.json, but params.json, consolidated.00.pth: Mistral's own layout" in refusal(tmp_path)


def test_a_folder_of_anything_else_is_not_called_mistrals(tmp_path: Path) -> None:
    assert refusal(tmp_path) == f"{tmp_path}: no config.json: this is no Hugging Face checkpoint"


def test_both_layouts_without_a_config(hf: Path) -> None:
    said = refusal(release(hf, config=False, hf_files=2))
    assert said.endswith("The model*.safetensors beside them are in Hugging Face's: fetch their config.json, too")


@pytest.mark.parametrize("files", [1, 2])
@pytest.mark.parametrize("index", [True, False])
def test_a_config_does_not_make_it_hugging_faces(hf: Path, files: int, index: bool) -> None:
    folder = release(hf, files=files, index=index)
    said = refusal(folder)
    assert said.startswith(f"{folder}/consolidated")
    assert "tensor 'layers.0.attention.wk.weight' has its name in Mistral's own layout" in said
    assert INSTEAD in said


def test_nor_does_the_name_of_the_file(hf: Path) -> None:
    folder = release(hf, files=1)
    (folder / "consolidated.safetensors").rename(folder / "model.safetensors")
    assert refusal(folder).startswith(f"{folder}/model.safetensors: tensor 'layers.0.attention.wk.weight'")


def test_other_names_in_a_file_of_that_name_are_read(hf: Path) -> None:
    expected = sorted(open_checkpoint(str(hf)).tensors())
    tensors = {name: values for file in hf.glob("*.safetensors") for name, values in load_file(file).items()}
    for file in hf.glob("model*"):
        file.unlink()
    write(hf, tensors, "consolidated", files=1)
    assert sorted(open_checkpoint(str(hf)).tensors()) == expected


def test_words_of_internlm2_are_not_mistrals(hf: Path) -> None:
    for file in hf.glob("model*"):
        file.unlink()
    names = ["model.tok_embeddings.weight", "model.layers.0.attention.wo.weight"]
    save_file({name: np.ones((8, 8), np.float32) for name in names}, hf / "model.safetensors")
    assert sorted(open_checkpoint(str(hf)).tensors()) == sorted(names)


@pytest.mark.parametrize("role", ["model", "source"])
def test_either_role_names_the_line(hf: Path, role: str) -> None:
    release(hf)
    recipe = hf.parent / "recipe.yaml"
    model, source = ("own", "hf") if role == "model" else ("hf", "own")
    recipe.write_text(f"model: {model}\nsources:\n  hf: hf\n  other: {source}\nweights: {{'*': hf}}\n")
    with pytest.raises(SourceError, match="in Mistral's own layout") as caught:
        plan_recipe(recipe)
    assert f"recipe.yaml:{1 if role == 'model' else 4}" in str(caught.value)


@pytest.mark.parametrize("config", [True, False])
def test_the_commands_refuse_it(hf: Path, config: bool, mixprec: Run) -> None:
    folder = release(hf, config=config)
    recipe, out = hf.parent / "recipe.yaml", hf.parent / "out"
    recipe.write_text("model: own\nsources: {a: own}\n")
    for command in (["inspect", folder], ["plan", recipe], ["build", recipe, "-o", out]):
        ended = mixprec(*command)
        assert ended.code == 1
        assert "Mistral's own layout" in ended.err
    assert not out.exists()


@pytest.mark.parametrize(("hf_files", "index"), [(1, False), (2, True), (2, False)])
def test_both_layouts_in_one_folder(hf: Path, hf_files: int, index: bool, mixprec: Run) -> None:
    """Hugging Face's is read, the other is not, and the plan and ``inspect`` say so."""
    folder = release(hf, hf_files=hf_files, index=index)
    opened = open_checkpoint(str(folder))
    copies = [f"consolidated-0000{number}-of-00002.safetensors" for number in (1, 2)]
    assert all(file.startswith("model") for file in opened.shards)
    assert sorted(opened.tensors()) == sorted(open_checkpoint(str(hf)).tensors())
    assert list(opened.left_aside) == copies
    note = f"{', '.join(copies)}: not read, by name a copy of the weights in Mistral's own layout"
    recipe = hf.parent / "recipe.yaml"
    recipe.write_text("model: own\nsources: {a: own}\n")
    plan = plan_recipe(recipe)
    assert f"`a`: {note}" in plan.notes
    assert note in json.loads(mixprec("inspect", folder, "--json").out)["notes"]


def test_params_json_is_not_copied(hf: Path) -> None:
    """SGLang would read it instead of ``config.json``, where the folder has the name of some models of Mistral's."""
    folder = release(hf, hf_files=2)
    (folder / "tekken.json").write_text("{}")
    recipe = hf.parent / "recipe.yaml"
    recipe.write_text("model: own\nsources: {a: own}\n")
    run_plan(plan_recipe(recipe), hf.parent / "out")
    written = {path.name for path in (hf.parent / "out").iterdir()}
    assert "tekken.json" in written
    assert not {name for name in written if name.startswith(("params", "consolidated"))}


@pytest.mark.parametrize("name", ["Mistral-Large-3-mix", "mistral-small-4", "a/Leanstral/out", "eagle/Mistral-7B"])
def test_an_output_that_sglang_would_take_for_one(hf: Path, name: str) -> None:
    recipe = hf.parent / "recipe.yaml"
    recipe.write_text("model: hf\nsources: {a: hf}\n")
    with pytest.raises(OutputError, match=r"in its path for one in Mistral's own layout.* name another folder"):
        run_plan(plan_recipe(recipe), hf.parent / name)
    assert not (hf.parent / name).exists()
