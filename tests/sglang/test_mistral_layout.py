"""What SGLang does with Mistral's own layout: why mixprec refuses it, and that it serves what is read of it alike."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from support import mistral_large as large
from support.mistral_large import MIX, STATIC, write_releases
from support.serving import LLAMA
from support.sglang.families import dense_parameters, dequantized, skip_unless_made, write_recipe
from support.sglang.harness import rank_of, serve, sources, tensors_of

from mixprec_build.checkpoint.degree import Degree
from mixprec_build.checkpoint.mistral_layout import refuse_own_names, taken_for_own, usual_name
from mixprec_build.errors import SourceError
from mixprec_build.families.mistral_config import config_of, processor_of
from mixprec_build.output.build import plan_recipe, run_plan
from mixprec_build.output.split import split
from mixprec_build.output.verify import verify
from mixprec_build.report.doctor import examine
from mixprec_build.storage.header import TensorInfo

pytestmark = pytest.mark.usefixtures("sglang")

PARAMS = {
    "dim": 64, "n_layers": 1, "n_heads": 4, "n_kv_heads": 2, "head_dim": 16, "hidden_dim": 128, "norm_eps": 1e-5,
    "vocab_size": 256, "rope_theta": 1e4,
}  # fmt: skip
LEAVES = ("weight", "qscale_weight", "qscale_act", "weight_scale", "weight_packed", "input_global_scale")
SIZES = ("head_dim", "kv_lora_rank", "context_len", "vocab_size")


def test_names_that_its_classes_rename_are_refused() -> None:
    """In a folder that is not read as a release in Mistral's own layout."""
    from sglang.srt.models.mistral import MistralForCausalLMMistralFormat
    from sglang.srt.models.mistral_eagle import MistralForCausalLMEagle
    from sglang.srt.models.mistral_large_3 import MistralLarge3ForCausalLM

    for its in (MistralForCausalLMMistralFormat, MistralForCausalLMEagle, MistralLarge3ForCausalLM):
        linears = [name for name in names_that(its) if ".attention.w" in name]
        assert len(linears) >= 4
        for name in linears:
            for leaf in ("weight", "qscale_weight", "qscale_act"):
                tensor = TensorInfo(name.replace(r"(\w+)", leaf), "BF16", (1,), "a.safetensors", 0, 2)
                with pytest.raises(SourceError, match="Mistral's own layout"):
                    refuse_own_names([tensor], "there")


def names_that(its: Any) -> list[str]:
    """The names of tensors that a class renames, ``(\\w+)`` for any last word."""
    return [pattern.replace(r"(\d+)", "3").replace("\\.", ".") for pattern in its.remapping]


def test_its_names_are_those_that_the_class_makes_of_them() -> None:
    from sglang.srt.models.mistral_large_3 import MistralLarge3ForCausalLM

    own = [name.replace(r"(\w+)", leaf) for name in names_that(MistralLarge3ForCausalLM) for leaf in LEAVES]
    names = SimpleNamespace(remapping=MistralLarge3ForCausalLM.remapping)
    renamed = MistralLarge3ForCausalLM._iterable_remap_mistral_to_ds(names, ((name, name) for name in own))
    served = {stored: name for name, stored in renamed}
    assert len(served) > 100 and served.keys() == {*own}
    del served["layers.3.router_biases"]  # its config makes no parameter for them
    assert {name: usual_name(name) for name in served} == served


def settings(config: dict[str, Any]) -> dict[str, Any]:
    """Without what SGLang has read and leaves there, and a second spelling of a key that is there."""
    left = ("moe", "yarn", "quantization", "vision_encoder", "_name_or_path")
    found = {key: value for key, value in config.items() if key not in left}
    rope = found.pop("rope_parameters", {})
    return {**found, "rope_parameters": {key: value for key, value in rope.items() if key != "type"}}


@pytest.mark.parametrize("changes", [{}, {"vision_encoder": None, "quantization": STATIC}, {"yarn": None}])
def test_its_config_is_the_one_that_sglang_makes(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Of ``params.json`` in a folder that it takes for a release, and of the ``config.json`` that is written for it."""
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.utils.hf_transformers import get_config

    params = {**large.PARAMS, **changes}
    own, ours = tmp_path / "mistral-large-3", tmp_path / "ours"
    for path, file, values in ((own, "params.json", params), (ours, "config.json", config_of(params, "there"))):
        path.mkdir()
        (path / file).write_text(json.dumps(values))
    theirs, found = (get_config(str(path), trust_remote_code=False) for path in (own, ours))
    assert found.architectures == theirs.architectures
    assert getattr(found, "quantization_config", None) == getattr(theirs, "quantization_config", None)
    for part in ("text_config", "vision_config"):
        of_theirs, of_ours = (settings(getattr(one, part, one).to_dict()) for one in (theirs, found))
        assert of_theirs == of_ours
    models = [ModelConfig(str(path), trust_remote_code=False) for path in (own, ours)]
    for key in (*SIZES, "scaling", "attention_arch", "is_multimodal", "dtype", "hf_eos_token_id"):
        assert getattr(models[0], key) == getattr(models[1], key), key


def test_images_are_prepared_as_of_a_release(tmp_path: Path) -> None:
    """Where a release has no file for it, SGLang makes a processor by its ``params.json``."""
    from sglang.srt.utils.hf_transformers.processor import get_processor
    from tokenizers import Tokenizer, models

    config = config_of(large.PARAMS, "there")
    files = {"config.json": config, "processor_config.json": processor_of(config)}
    own, ours = tmp_path / "own" / "mistral-large-3", tmp_path / "ours"
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = Tokenizer(models.WordLevel({}, "<unk>"))
    tokenizer.add_special_tokens([*special.values(), "[IMG]", "[IMG_BREAK]", "[IMG_END]"])
    for path, written in ((own, {"params.json": large.PARAMS}), (ours, files)):
        path.mkdir(parents=True)
        tokenizer.save(str(path / "tokenizer.json"))
        written = {**written, "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", **special}}
        for file, values in written.items():
            (path / file).write_text(json.dumps(values))
    theirs, found = (get_processor(str(path), model_name=str(path)) for path in (own, ours))
    assert type(found) is type(theirs)
    for key in ("patch_size", "spatial_merge_size", "image_token", "image_break_token", "image_end_token"):
        assert getattr(found, key) == getattr(theirs, key), key
    left = ("_processor_class", "processor_class")
    assert found.image_processor.to_dict() == {
        key: value for key, value in theirs.image_processor.to_dict().items() if key not in left
    }
    asked = {"text": "[IMG]", "images": [Image.new("RGB", (40, 20))], "return_tensors": "pt"}
    prepared, as_theirs = (made(**asked) for made in (found, theirs))
    assert torch.equal(prepared["input_ids"], as_theirs["input_ids"])
    assert torch.equal(prepared["pixel_values"], as_theirs["pixel_values"])


def test_queries_and_keys_are_in_another_order() -> None:
    """Its own config says how they turn, a ``config.json`` does not: tensors with other names alone answer wrongly."""
    from sglang.srt.layers.rotary_embedding import get_rope
    from sglang.srt.utils.hf_transformers.mistral_utils import adapt_config_dict
    from transformers import MistralConfig

    config, _ = adapt_config_dict(dict(PARAMS), "a-model")
    assert config["rope_is_neox_style"] is False
    assert getattr(MistralConfig(), "rope_is_neox_style", True) is True  # models/llama.py asks so

    heads, size, tokens = 2, 16, 5
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, heads * size, 64, generator=generator)
    x, positions = torch.randn(tokens, 64, generator=generator), torch.arange(3, 3 + tokens)

    def scores(q: torch.Tensor, k: torch.Tensor, *, neox: bool) -> torch.Tensor:
        rope = get_rope(size, size, 64, 10000, neox, dtype=torch.float32)
        turned = rope.forward_native(positions, x @ q.T, x @ k.T)
        a, b = (t.view(tokens, heads, size) for t in turned)
        return torch.einsum("thd,shd->hts", a, b)

    def as_hugging_face_has_them(rows: torch.Tensor) -> torch.Tensor:
        """As `permute_for_rope` of transformers' conversion scripts orders rows."""
        return rows.view(heads, size // 2, 2, -1).transpose(1, 2).reshape(heads * size, -1)

    own = scores(q, k, neox=False)
    torch.testing.assert_close(scores(*map(as_hugging_face_has_them, (q, k)), neox=True), own)
    assert (scores(q, k, neox=True) - own).abs().max() > own.abs().mean()


@pytest.mark.parametrize(
    "path",
    [
        "/models/Mistral-Large-3-mix", "out/mistral-small-4", "Leanstral/out", "Mistral-7B-EAGLE", "/eagle/mistral/out",
        "Mistral-7B", "eagle", "mistral-small-3.2", "mistral_large_3", "ministral-3",
    ],
)  # fmt: skip
def test_folders_that_it_takes_for_one_by_their_name(path: str) -> None:
    from sglang.srt.utils.hf_transformers.mistral_utils import is_mistral_model

    assert is_mistral_model(path) is (taken_for_own(path) is not None)


def test_such_a_folder_does_not_open_in_hugging_faces_layout(folder: Path, tmp_path: Path) -> None:
    from sglang.srt.utils.hf_transformers import get_config

    made = sources(folder, LLAMA.of(layers=2), ["bf16"])["bf16"]
    other = tmp_path / "Mistral-Large-3-mix"
    other.symlink_to(made, target_is_directory=True)
    assert get_config(str(made), trust_remote_code=False).architectures == ["LlamaForCausalLM"]
    with pytest.raises(FileNotFoundError, match=re.escape("params.json")):
        get_config(str(other), trust_remote_code=False)


# Releases in it beside sources in Hugging Face's layout


@pytest.fixture
def hopper(streams: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang's classes for NVFP4 ask for the GPU when they are made."""
    skip_unless_made("mistral_large_3_images")
    from sglang.srt.layers.quantization import modelopt_quant

    monkeypatch.setattr(modelopt_quant, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(modelopt_quant, "is_cuda", lambda: True)
    monkeypatch.setattr(modelopt_quant, "swizzle_blockscale", lambda scale: scale.new_empty(0))  # on a GPU


@pytest.fixture(scope="module")
def mix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("releases")
    recipe = write_recipe(folder / "recipe.yaml", write_releases(folder), MIX)
    run_plan(plan_recipe(recipe), folder / "mix")
    return folder / "mix"


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(("rank", "tp", "ep"), [(0, 1, 1), (1, 2, 1), (1, 2, 2)])
def test_a_mix_of_releases_is_loaded_as_natively(mix: Path, tmp_path: Path, rank: int, tp: int, ep: int) -> None:
    """By mixprec's loader and by SGLang's, beside the dequantized weights by the names of the release."""
    plain = dequantized(mix, tmp_path / "dense")
    assert not [name for name in tensors_of(plain) if name.startswith(("model.", "lm_head"))]
    with rank_of(rank, tp, ep):
        native = dict(dense_parameters(serve(plain)))
        for options in ({}, {"load_format": "safetensors"}):
            ours = dict(dense_parameters(serve(mix, **options)))
            assert ours.keys() == native.keys()
            for key, value in native.items():
                assert (ours[key] - value).abs().max() <= 0.01 * value.abs().max(), key


@pytest.mark.usefixtures("hopper")
def test_ranks_read_their_own_files(mix: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(mix, tmp_path / "out"))
    with rank_of(0, 2, 2):
        merged = dict(serve(out).named_parameters())
    split(out, Degree(2, 2), layout="presplit")
    assert not verify(out).differences
    with rank_of(0, 2, 2):
        own = dict(serve(out).named_parameters())
    assert own.keys() == merged.keys()
    made = "g_idx_sort_indices"  # after loading
    assert all(torch.equal(bits(own[key]), bits(merged[key])) for key in own if not key.endswith(made))


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.data.contiguous().reshape(-1).view(torch.uint8)


def test_doctor_asks_the_class_for_it(mix: Path) -> None:
    skip_unless_made("mistral_large_3_images")
    (asked,) = [finding for finding in examine(mix) if finding.subject == "model class"]
    assert asked.status == "ok" and asked.text.startswith("PixtralForConditionalGeneration takes all "), asked.text
