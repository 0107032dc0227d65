"""Draft layers of compiled checkpoints, loaded by SGLang's classes for them.

Kernels are not tested here: SGLang's workers for speculative decoding need a GPU (``tests/gpu/test_speculative.py``).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.families import TINY, TinyModel
from support.sglang.families import dense_parameters, dequantized, write_family, write_recipe
from support.sglang.harness import Changed, make, prepare_deepseek_v4, rank_of, serve
from support.sglang.mixes import mix

from mixprec_build.checkpoint.degree import Degree
from mixprec_build.checkpoint.manifest import read_manifest
from mixprec_build.families.facts import ModelFacts
from mixprec_build.output.split import split
from mixprec_build.output.verify import verify

pytestmark = pytest.mark.usefixtures("sglang")

NOT_LOADED = ("g_idx_sort_indices", "_g_idx")
"""Parameters of GPTQ that no kernel reads without act-order, or that are made after loading."""

# Globs that match other layers as well do not mean those for drafts.
_EXPERTS = {"mlp.experts.*": "int4", "mlp.experts.{0..2}.*": "fp8", "mlp.experts.4.*": "bf16"}
_GLM = {"self_attn.*": "fp8", **_EXPERTS}
_LATENT = {**_GLM, "self_attn.kv_b_proj": "bf16"}
_QWEN = {**_GLM, "mlp.shared_expert.*": "fp8"}
# name -> the formats of its draft layers, by names within the layer
LINES: Mapping[str, Mapping[str, str]] = {
    **{
        name: {f"model.layers.3.{inner}": source for inner, source in lines.items()}
        for name, lines in {
            "deepseek_v3": _LATENT, "deepseek_v32": _LATENT, "glm_moe_dsa": _LATENT, "glm4_moe": _GLM,
        }.items()
    },
    "deepseek_v4": {
        "mtp.0.{e_proj,h_proj}": "v4_fp8", "mtp.0.attn.*": "v4_fp8", "mtp.0.ffn.shared_experts.*": "v4_fp8",
        "mtp.0.ffn.experts.*": "v4_mxfp4", "mtp.0.ffn.experts.{0..2}.*": "v4_fp8",
    },
    "ernie4_5_moe": {"model.mtp_block.0.self_attn.*": "fp8", "model.mtp_block.0.mlp.*": "int4"},
    **{
        name: {f"mtp.layers.0.{inner}": source for inner, source in lines.items()}
        for name, lines in {
            "qwen3_5": {"mlp.*": "int4", "self_attn.*": "fp8"}, "qwen3_5_moe": _QWEN, "qwen3_next": _QWEN,
        }.items()
    },
}  # fmt: skip
CUT = [(name, ep) for name in LINES for _, ep in TINY[name].degrees]


@pytest.fixture(autouse=True)
def streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces the calls for a GPU that models make in their constructors."""
    monkeypatch.setattr(torch.cuda, "Stream", lambda *_, **__: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_, **__: (9, 0))
    prepare_deepseek_v4(monkeypatch)


def draft_mix(folder: Path, name: str, model: TinyModel | None = None) -> Path:
    """A mix of a tiny model whose draft layers are quantized, built once below ``folder``."""
    from mixprec_build.output.build import plan_recipe, run_plan

    out = folder / "drafts" / name / "mix"
    if not out.exists():
        written = write_family(out.parent, model or TINY[name], drafts=True)
        run_plan(plan_recipe(write_recipe(out.with_suffix(".yaml"), written, {**TINY[name].lines, **LINES[name]})), out)
    return out


def drafted(checkpoint: Path, name: str, **options: Any) -> torch.nn.Module:
    # GLM's class takes it from the arguments, which the model's own class changes before.
    alone = {"disable_shared_experts_fusion": True}
    return serve(checkpoint, draft=True, **{**TINY[name].options, **alone, **options})


def own(parameters: Iterator[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Without those that SGLang replaces by the model's."""
    shared = ("model.embed_tokens.weight", "lm_head.weight")
    return {key: value for key, value in parameters if key not in shared and not key.endswith(NOT_LOADED)}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8) if tensor.dim() and tensor.numel() else tensor


@pytest.mark.parametrize("name", LINES)
def test_every_parameter_is_that_of_a_native_load(
    folder: Path, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    out = draft_mix(folder, name)
    with caplog.at_level("DEBUG", "mixprec_runtime"):
        model = drafted(out, name)
    cut = bool(TINY[name].degrees)
    assert ("mixprec: read draft layers from the weights in" in caplog.text) == cut
    stock = drafted(out, name, load_format="safetensors")
    theirs = own(dense_parameters(drafted(dequantized(out, tmp_path / "dense"), name)))
    for loaded in (model, stock):
        ours = own(dense_parameters(loaded))
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert ours[key].shape == value.shape, key
            # Scales of GPTQ are rounded to BF16 as SGLang loads them.
            assert (ours[key] - value).abs().max() <= 0.01 * value.abs().max(), key


@pytest.mark.parametrize(("name", "ep"), CUT)
def test_a_rank_reads_its_part_from_merged_files_and_from_its_own(
    folder: Path, tmp_path: Path, name: str, ep: int, caplog: pytest.LogCaptureFixture
) -> None:
    """The second of two ranks; merged files are gone at the end."""
    out = Path(shutil.copytree(draft_mix(folder, name), tmp_path / "out"))
    with rank_of(1, 2, ep):
        theirs = own(drafted(out, name, load_format="safetensors").named_parameters())
        merged = own(drafted(out, name).named_parameters())
    split(out, Degree(2, ep), layout="presplit")
    assert not verify(out).differences
    with rank_of(1, 2, ep), caplog.at_level("DEBUG", "mixprec_runtime"):
        cut = own(drafted(out, name).named_parameters())
        serve(out, **TINY[name].options)
    assert "mixprec: read draft layers from the files in" in caplog.text
    for ours in (merged, cut):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert torch.equal(bits(ours[key].data), bits(value.data)), key


def with_experts_of(columns: int, model: TinyModel) -> TinyModel:
    def changed(config: dict[str, Any]) -> dict[str, Any]:
        keys = ("moe_intermediate_size", "shared_expert_intermediate_size")
        return {
            key: columns if key in keys else changed(value) if isinstance(value, dict) else value
            for key, value in config.items()
        }

    return replace(model, config=changed(dict(model.config)))


@pytest.mark.parametrize("name", ["deepseek_v3", "qwen3_5_moe"])
def test_ranks_of_draft_experts_are_filled_up_with_zeros(tmp_path: Path, name: str) -> None:
    """192 columns of 384 are one and a half blocks; the classes pass names of their own or of the checkpoint on."""
    out = draft_mix(tmp_path, name, with_experts_of(384, TINY[name]))
    whole = own(dense_parameters(drafted(out, name)))
    (key,) = [key for key in whole if key.endswith("experts.w2_weight")]
    ranks = []
    for rank in range(2):
        with rank_of(rank, 2):
            ranks.append(own(dense_parameters(drafted(out, name)))[key])
    assert [rank.shape[2] for rank in ranks] == [256, 256]
    assert torch.equal(torch.cat(ranks, 2)[:, :, :384], whole[key])
    assert not torch.cat(ranks, 2)[:, :, 384:].any()


# Names


def test_a_draft_with_the_names_of_the_models_first_layer(folder: Path) -> None:
    """Qwen3-Next's: each has its own formats, and compiled code finds its own layer."""
    from mixprec_runtime.experts import method

    out, options = draft_mix(folder, "qwen3_next"), TINY["qwen3_next"].options
    model, draft = serve(out, **options), drafted(out, "qwen3_next")
    names = [name for name, module in model.named_modules() if hasattr(module, "up_numbers")]
    assert names == ["model.layers.1.mlp.experts"]
    assert hasattr(draft.model.layers[0].mlp.experts, "up_numbers")
    assert method._layers["draft.model.layers.0.mlp.experts"] is draft.model.layers[0].mlp.experts
    assert method._layers["model.layers.1.mlp.experts"] is model.model.layers[1].mlp.experts
    assert draft.model.layers[0].qkv_proj.quant_method.mixprec_format.kind == "fp8_block"
    assert model.model.layers[0].mlp.experts.quant_method.mixprec_format.kind == "gptq_int4"


# Losses


def test_a_tensor_that_the_draft_loses_is_noticed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.models.glm4_moe_nextn import Glm4MoeForCausalLMNextN

    out = draft_mix(folder, "glm4_moe")
    load_weights = Glm4MoeForCausalLMNextN.load_weights

    def forgetful(self: Any, weights: Any) -> Any:
        return load_weights(self, ((name, tensor) for name, tensor in weights if "enorm" not in name))

    monkeypatch.setattr(Glm4MoeForCausalLMNextN, "load_weights", forgetful)
    with pytest.raises(RuntimeError, match=r"model\.layers\.3\.enorm\.weight: dropped .*; model\.enorm\.weight: param"):
        drafted(out, "glm4_moe", load_format="safetensors")


class Speculating:
    """Changes the server's arguments, after SGLang's own checks, to those of speculative decoding."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        from mixprec_runtime import launch

        published = launch.server_args
        self.arguments: dict[str, Any] = {}
        monkeypatch.setattr(launch, "server_args", lambda: Changed(published(), **self.arguments))


@pytest.fixture
def speculating(monkeypatch: pytest.MonkeyPatch) -> Speculating:
    return Speculating(monkeypatch)


def test_a_checkpoint_without_draft_layers_is_refused_before_it_is_loaded(
    folder: Path, tmp_path: Path, speculating: Speculating
) -> None:
    """SGLang would start, and accept no draft."""
    promising = Path(shutil.copytree(mix(folder, "deepseek"), tmp_path / "out"))
    config = json.loads((promising / "config.json").read_text())
    (promising / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))
    for algorithm in ("EAGLE", "NEXTN"):
        for path in (None, str(promising)):
            speculating.arguments = {"speculative_algorithm": algorithm, "speculative_draft_model_path": path}
            text = (
                rf"^--speculative-algorithm {algorithm}: .* no layers for drafts, of which config.json promises 1; bu"
            )
            with pytest.raises(RuntimeError, match=text):
                make(promising)
    with pytest.raises(RuntimeError, match=r"NextN: .* no layers for drafts, of which config\.json promises 1; build"):
        make(promising, draft=True)
    speculating.arguments = {"speculative_algorithm": "EAGLE"}
    with pytest.raises(RuntimeError, match=r"no layers for drafts; build it .* --speculative-draft-model-path"):
        make(mix(folder, "deepseek"))
    with pytest.raises(RuntimeError, match=r"serves no draft layers of this family .* --speculative-draft-model-path"):
        make(mix(folder, "qwen3"))
    for elsewhere in ({"speculative_draft_model_path": "other"}, {"speculative_algorithm": "NGRAM"}):
        speculating.arguments = {"speculative_algorithm": "EAGLE", **elsewhere}
        make(promising)
    speculating.arguments = {"speculative_algorithm": "EAGLE"}
    make(draft_mix(folder, "deepseek_v3"))


def test_more_draft_layers_than_the_class_has_are_refused(folder: Path) -> None:
    from mixprec_runtime.drafts import check_own

    out = draft_mix(folder, "glm4_moe")
    facts = ModelFacts.of(json.loads((out / "config.json").read_text()))
    modules = [*read_manifest(out).modules, "model.layers.4.enorm", "model.layers.4.mlp.experts.0.up_proj"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mixprec_runtime.launch.draws_on_own_drafts", lambda: "EAGLE")
        check_own(facts, modules[:-2])
        with pytest.raises(RuntimeError, match=r"Glm4MoeForCausalLMNextN has no place for model\.layers\.4\."):
            check_own(facts, modules)


def test_a_complete_model_drafts_as_it_serves(folder: Path, speculating: Speculating) -> None:
    out = mix(folder, "qwen3")
    with pytest.raises(RuntimeError, match="SGLang's Qwen3ForCausalLM: mixprec serves no draft layers"):
        make(out, draft=True)
    speculating.arguments = {"speculative_algorithm": "STANDALONE"}
    draft, model = (dict(serve(out, draft=draft).named_parameters()) for draft in (True, False))
    assert draft.keys() == model.keys()
    assert all(torch.equal(bits(draft[key].data), bits(value.data)) for key, value in model.items())
    with pytest.raises(RuntimeError, match=r"STANDALONE runs complete models, and SGLang makes Deepseek.*NextN"):
        make(draft_mix(folder, "deepseek_v3"), draft=True)


# Memory, and what is shared


def test_memory_counts_model_and_draft(folder: Path) -> None:
    from mixprec_runtime.drafts import check_shared
    from mixprec_runtime.memory import drafts, measure

    out = draft_mix(folder, "deepseek_v3")
    model, draft = serve(out), drafted(out, "deepseek_v3")
    assert any(draft is found for found in drafts())
    with pytest.raises(RuntimeError, match="did not pass the embedding"):
        check_shared(model, draft)
    alone, free = measure(model), sum(value.nbytes for value in own(draft.named_parameters()).values())
    # As SGLang's worker does, which then frees memory of the GPU.
    draft.model.embed_tokens.weight, draft.lm_head.weight = model.get_embed_and_head()
    check_shared(model, draft)
    both = measure(model, draft)
    orders = sum(value.nbytes for key, value in draft.named_parameters() if key.endswith(NOT_LOADED))
    assert both["bytes_by_layer"] == {**alone["bytes_by_layer"], "draft": free + orders}
    assert both["weight_mb"] * 2**20 == alone["weight_mb"] * 2**20 + free + orders
    assert both["bf16_mb"] > alone["bf16_mb"]
