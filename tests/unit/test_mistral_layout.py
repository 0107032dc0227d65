"""Checkpoints in Mistral's own layout: those of latent attention are sources, others are refused by name.

Whatever lies beside them, they are never taken for another.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file as save_torch
from support import mistral_large as large
from support.mistral_large import LARGE_TINY, MIX, own_name, write_own, write_releases
from support.run import Run
from support.write import LLAMA, write_tiny

from mixprec_build.checkpoint.manifest import read_manifest
from mixprec_build.checkpoint.opening import open_checkpoint
from mixprec_build.errors import OutputError, RefusedError, SourceError
from mixprec_build.families.identity import config_differences
from mixprec_build.families.mistral_large import MISTRAL_LARGE3, MISTRAL_LARGE3_IMAGES, hugging_face_name
from mixprec_build.output.build import plan_recipe, run_plan
from mixprec_build.output.verify import verify
from mixprec_build.report.doctor import examine

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
        f"{folder}: no config.json, but params.json, {there}: Mistral's own layout, which mixprec reads only of models "
        f"with latent attention. {INSTEAD}"
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


def test_doctor_sees_that_a_folder_was_moved_to_such_a_path(hf: Path) -> None:
    recipe = hf.parent / "recipe.yaml"
    recipe.write_text("model: hf\nsources: {a: hf}\n")
    run_plan(plan_recipe(recipe), hf.parent / "out")
    assert "path" not in {finding.subject for finding in examine(hf.parent / "out")}
    moved = (hf.parent / "out").rename(hf.parent / "Mistral-Large-3-mix")
    (found,) = [finding for finding in examine(moved) if finding.subject == "path"]
    assert found.status == "fail" and "'mistral-large-3' in it" in found.text and "params.json" in found.text
    assert not [finding for finding in examine(moved) if "serve: python" in finding.text]


# Latent attention


@pytest.fixture(scope="module")
def releases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("releases")
    write_releases(folder)
    return folder


@pytest.fixture(scope="module")
def weights() -> large.Weights:
    return large.weights()


def recipe_of(folder: Path, lines: Mapping[str, str], *, default: str = "bf16", **sources: Path) -> Path:
    named = {**{name: folder / name for name in ("bf16", "static", "ct_nvfp4", "int4")}, **sources}
    text = [f"model: {named[default]}", f"default: {default}", "sources:"]
    text += [f"  {name}: {path}" for name, path in named.items()]
    text += ["weights:", *(f"  '{pattern}': {source}" for pattern, source in lines.items())]
    recipe = folder / "recipe.yaml"
    recipe.write_text("\n".join(text))
    return recipe


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def torch_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_torch(file).items()}


@pytest.mark.parametrize("files", [1, 2, 3])
@pytest.mark.parametrize("config", [None, {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}])
def test_latent_attention_is_read(tmp_path: Path, weights: large.Weights, files: int, config: object) -> None:
    """By the names of DeepSeek-V3, and by the facts in params.json, whatever a config.json beside it says."""
    folder = write_own(tmp_path / "own", weights, files=files)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    if files == 3:
        (folder / "consolidated.safetensors.index.json").unlink()
    opened = open_checkpoint(str(folder))
    assert sorted(opened.tensors()) == sorted(weights)
    assert opened.facts.family is MISTRAL_LARGE3_IMAGES and opened.facts.names_family
    assert opened.facts.config == LARGE_TINY["mistral_large_3_images"].config
    assert (opened.facts.layers, opened.facts.experts, opened.facts.hidden_size) == (3, 8, 256)
    for tensor in opened.tensors().values():
        assert torch.equal(bits(torch.from_numpy(opened.read(tensor).view(np.uint8))), bits(weights[tensor.name]))


def test_a_decoder_alone(tmp_path: Path, weights: large.Weights) -> None:
    decoder = {name: value for name, value in weights.items() if name.startswith(("model.", "lm_head"))}
    opened = open_checkpoint(str(write_own(tmp_path / "own", decoder, vision_encoder=None)))
    assert opened.facts.family is MISTRAL_LARGE3
    assert opened.facts.architectures == ("MistralLarge3ForCausalLM",)


def test_a_mix_has_the_bytes_of_releases_and_their_files(releases: Path, tmp_path: Path, mixprec: Run) -> None:
    """Static FP8 and NVFP4 in Mistral's layout beside Int4 in Hugging Face's: an ordinary folder with a config.json."""
    (releases / "bf16" / "tekken.json").write_text("{}")
    plan = plan_recipe(recipe_of(releases, MIX))
    assert sum("Mistral's own layout: tensors have the names of DeepSeek-V3" in note for note in plan.notes) == 3
    out = tmp_path / "out"
    run_plan(plan, out)
    assert not verify(out).differences
    manifest, built = read_manifest(out), torch_tensors(out)
    kinds = {module.format for module in manifest.modules.values()}
    assert {manifest.formats[name].kind for name in kinds} == {"bf16", "fp8_tensor", "ct_nvfp4", "gptq_int4"}
    stored = {name: torch_tensors(releases / name) for name in ("bf16", "static", "ct_nvfp4", "int4")}
    for name, entry in manifest.tensors().items():
        theirs = name if entry.source == "int4" else own_name(name, scales=entry.source == "static")
        assert torch.equal(bits(built[name]), bits(stored[entry.source][theirs])), name
    config = json.loads((out / "config.json").read_text())
    assert config.pop("quantization_config")["quant_method"] == "mixprec"
    assert config == LARGE_TINY["mistral_large_3_images"].config
    written = {path.name for path in out.iterdir()}
    assert "tekken.json" in written and not {name for name in written if name.startswith(("params", "consolidated"))}
    assert json.loads((out / "processor_config.json").read_text())["patch_size"] == 14
    for command in (["inspect", out], ["split", out, "--tp", 2], ["split", out, "--tp", 2, "--ep", 2], ["verify", out]):
        assert mixprec(*command).code == 0
    assert not verify(out).differences


def test_of_both_layouts_its_own_is_read(tmp_path: Path, weights: large.Weights) -> None:
    """SGLang has no class for Mistral-Small-4 as transformers has it, and reads the other by the name of the folder."""
    folder = write_own(tmp_path / "own", weights)
    save_torch(
        {"model.language_model.embed_tokens.weight": torch.ones(8, 8)}, folder / "model-00001-of-00001.safetensors"
    )
    config = {"architectures": ["Mistral3ForConditionalGeneration"], "text_config": {"model_type": "mistral4"}}
    (folder / "config.json").write_text(json.dumps(config))
    opened = open_checkpoint(str(folder))
    assert sorted(opened.tensors()) == sorted(weights)
    (note,) = [
        note for note in opened.notes_on_files() if note.startswith("model-00001-of-00001.safetensors: not read")
    ]
    assert note.endswith("a copy of the weights in Hugging Face's layout, for which SGLang has no class of this model")


@pytest.mark.parametrize(("kind", "stored"), [("ct_fp8_block", "fp8_block"), ("ct_int4", "ct_int4")])
def test_declarations_of_llm_compressor_are_read(
    tmp_path: Path, weights: large.Weights, kind: str, stored: str
) -> None:
    """As in Mistral-Large-3's release in FP8: a declaration by names of DeepSeek-V3, in params.json."""
    experts = large.stored_as(kind, r"model.*\.experts\.\d+\.\w+_proj", weights)
    folder = write_own(tmp_path / "own", experts, quantization_config=large.declared(kind))
    (tmp_path / "recipe.yaml").write_text("model: own\nsources: {a: own}\n")
    formats = {name: module.format.kind for name, module in plan_recipe(tmp_path / "recipe.yaml").modules.items()}
    assert {formats[name] for name in formats if ".experts." in name} == {stored}
    assert {formats[name] for name in formats if ".experts." not in name} == {"bf16"}
    assert folder.is_dir()


def test_the_processor_of_a_release_is_kept(tmp_path: Path, weights: large.Weights) -> None:
    write_own(tmp_path / "own", weights)
    (tmp_path / "own" / "preprocessor_config.json").write_text('{"patch_size": 15}')
    (tmp_path / "recipe.yaml").write_text("model: own\nsources: {a: own}\n")
    run_plan(plan_recipe(tmp_path / "recipe.yaml"), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").glob("*processor*")] == ["preprocessor_config.json"]
    assert not verify(tmp_path / "out").differences


def test_scales_that_sglang_leaves_out_are_left_out_with_the_reason(releases: Path) -> None:
    """Of what trained with quantized keys and values: SGLang caches their latent, and drops these without a word."""
    plan = plan_recipe(recipe_of(releases, {"*.mlp.experts.*": "ct_nvfp4"}, default="ct_nvfp4"))
    left = [one for one in plan.left_out if "mla_attn" in str(one.modules) or "fake_quantizer" in str(one.modules)]
    assert left and all("KV cache" in one.reason for one in left), plan.left_out


def test_a_source_is_what_was_built_of_it(releases: Path, tmp_path: Path) -> None:
    """And the other way round: what was built is a source beside a release."""
    run_plan(plan_recipe(recipe_of(releases, MIX)), tmp_path / "out")
    lines = {"*.layers.1.mlp.experts.*": "built", "*.self_attn.o_proj": "built"}
    plan = plan_recipe(recipe_of(releases, lines, built=tmp_path / "out"))
    assert {m.format.kind for m in plan.modules.values()} == {"bf16", "fp8_tensor", "ct_nvfp4", "gptq_int4"}


def test_another_spelling_of_its_rotary_embedding_is_the_same() -> None:
    """DeepSeek's class makes its own of any that scales (models/deepseek_v2.py:1783 of SGLang 0.5.17)."""
    text = LARGE_TINY["mistral_large_3"].config
    usual = {**text, "rope_scaling": {**text["rope_scaling"], "rope_type": "yarn"}}
    assert not config_differences(text, usual)
    for key, changed in (("rope_scaling", {"factor": 8}), ("llama_4_scaling", {"beta": 0.2})):
        (found,) = config_differences(text, {**text, key: {**text[key], **changed}})
        assert found.counts and found.key.startswith(key)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"moe": None}, "params.json: latent attention, but no `moe` with `num_shared_experts`.*EAGLE.* is no source"),
        ({"moe": {**large.PARAMS["moe"], "num_shared_experts": 0}}, "no `moe` with `num_shared_experts`"),
        ({"moe": [1]}, "params.json: `moe` is not an object"),
        ({"llama_4_scaling": None}, "`llama_4_scaling` has no `original_max_position_embeddings`"),
        ({"llama_4_scaling": {"original_max_position_embeddings": 8192}}, "`llama_4_scaling` has no `beta`"),
        ({"yarn": {"factor": 4, "gamma": 1}}, "`yarn` has `gamma`, which neither SGLang nor mixprec knows"),
        ({"multimodal": {"whisper_model_args": {}}}, "`multimodal`: an encoder that SGLang's class does not make"),
        ({"quantization": {"qformat_weight": "int8"}}, "`quantization` is {'qformat_weight': 'int8'}, which mixprec"),
        ({"quantization": {**large.STATIC, "qscheme_act": ["TENSOR"]}}, "which mixprec does not read, only fp8_e4m3"),
        ({"kv_lora_rank": None}, "no config.json, but params.json.*which mixprec reads only of models with latent"),
    ],
)
def test_settings_that_are_refused(tmp_path: Path, weights: large.Weights, params: Any, message: str) -> None:
    folder = write_own(tmp_path / "own", weights, files=1, **params)
    with pytest.raises(SourceError, match=message):
        open_checkpoint(str(folder))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("layers.1.router_biases", "is none of those that SGLang loads of Mistral-Large-3"),
        ("layers.0.attention.wk.weight", "is none of those that SGLang loads of Mistral-Large-3"),
        (
            "layers.1.experts.0.w1.weight_scale",
            "and another one are both 'model.layers.1.mlp.experts.0.gate_proj.weight_",
        ),
        ("eagle_linear.weight", "a draft model .EAGLE. is no source: give it to SGLang by --speculative-draft-model"),
    ],
)
def test_tensors_that_are_refused(tmp_path: Path, weights: large.Weights, name: str, message: str) -> None:
    folder = write_own(tmp_path / "own", weights, files=1)
    there = load_torch(folder / "consolidated.safetensors")
    scale = {"layers.1.experts.0.w1.qscale_weight": torch.ones(())}
    save_torch({**there, **scale, name: torch.ones(8)}, folder / "consolidated.safetensors")
    with pytest.raises(SourceError, match=f"consolidated.safetensors: tensor '{name}' .*{message}"):
        open_checkpoint(str(folder))


def test_without_its_params_it_is_refused(tmp_path: Path, weights: large.Weights) -> None:
    folder = write_own(tmp_path / "own", weights, files=1)
    (folder / "params.json").rename(folder / "config.json")
    assert "This one has it: put it into files called consolidated" in refusal(folder)
    assert hugging_face_name("layers.0.attention.wk.weight") is None


def test_a_shard_that_is_missing(tmp_path: Path, weights: large.Weights) -> None:
    folder = write_own(tmp_path / "own", weights)
    (folder / "consolidated-00002-of-00002.safetensors").unlink()
    assert "the shard consolidated-00002-of-00002.safetensors is missing; fetch it again" in refusal(folder)


def test_an_index_that_differs_is_named(tmp_path: Path, weights: large.Weights) -> None:
    folder = write_own(tmp_path / "own", weights)
    path = folder / "consolidated.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"]["norm.weight"]
    path.write_text(json.dumps(index))
    (tmp_path / "recipe.yaml").write_text("model: own\nsources: {a: own}\n")
    notes = plan_recipe(tmp_path / "recipe.yaml").notes
    assert [note for note in notes if "own/consolidated.safetensors.index.json does not list norm.weight" in note]


def test_what_deepseeks_class_cannot_serve_is_refused_of_it_too(releases: Path) -> None:
    """A quantized ``kv_b_proj``, by its name in the plan."""
    fp8 = large.stored_as("fp8_tensor", r"model.*\.kv_b_proj", large.weights())
    write_own(releases / "latent", fp8, scales=True, quantization={**large.STATIC, "qscheme_act": "NO_SCALES"})
    recipe = recipe_of(releases, {"*.kv_b_proj": "latent"}, latent=releases / "latent")
    with pytest.raises(RefusedError, match="SGLang reads kv_b_proj outside its quantization methods"):
        plan_recipe(recipe)
