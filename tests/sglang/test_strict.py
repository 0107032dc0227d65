"""A checkpoint is loaded completely, or the server stops and names the tensor."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from support.serving import LLAMA
from support.sglang.classifiers import classifier
from support.sglang.harness import (
    build,
    change_config,
    change_tensors,
    load,
    make,
    rank_of,
    serve,
    sources,
    stage_of,
    tensors_of,
)
from support.sglang.mixes import MIXES, mix

from mixprec_build.checkpoint.degree import Degree
from mixprec_build.output.split import split
from mixprec_runtime import hooks

pytestmark = pytest.mark.usefixtures("sglang")

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """Returns a function that copies a built checkpoint and changes its files."""

    def copy(name: str, edit: Callable[[Tensors], object] | None = None, **config: Any) -> Path:
        out = shutil.copytree(mix(folder, name), tmp_path / name)
        if edit:
            change_tensors(out, edit)
        change_config(out, config)
        return out

    return copy


# Tensors that were changed after the build

GONE = [
    ("llama", "model.layers.1.self_attn.k_proj.weight_scale"),
    ("llama", "model.layers.0.mlp.up_proj.qweight"),
    ("llama", "model.layers.0.self_attn.v_proj.weight_scale_inv"),
    ("llama", "model.norm.weight"),
    ("qwen2", "model.layers.1.self_attn.q_proj.bias"),
    ("qwen3_moe", "model.layers.0.mlp.experts.3.down_proj.scales"),
    ("qwen3_moe", "model.layers.2.mlp.experts.1.gate_proj.weight_scale_inv"),
    ("mixtral", "model.layers.2.block_sparse_moe.experts.7.w3.weight"),
    ("deepseek", "model.layers.2.self_attn.kv_a_proj_with_mqa.weight"),
    ("deepseek", "model.layers.1.mlp.gate.e_score_correction_bias"),
]


@pytest.mark.parametrize("load_format", ["auto", "safetensors"])
@pytest.mark.parametrize(("name", "gone"), GONE)
def test_a_tensor_that_is_not_in_the_files_stops_the_server(copy: Any, name: str, gone: str, load_format: str) -> None:
    checkpoint = copy(name, lambda tensors: tensors.pop(gone))
    # DeepSeek loads q_a_proj and kv_a_proj when it has both, so without one the other is lost, too.
    with pytest.raises(RuntimeError, match=rf"{gone}.*not in its files"):
        serve(checkpoint, load_format=load_format)


@pytest.mark.parametrize("load_format", ["auto", "safetensors"])
def test_a_tensor_that_the_manifest_does_not_have_stops_the_server(copy: Any, load_format: str) -> None:
    checkpoint = copy("llama", lambda tensors: tensors.update({"model.layers.0.mlp.new.weight": torch.zeros(2)}))
    with pytest.raises(RuntimeError, match=r"model\.layers\.0\.mlp\.new\.weight is not in the checkpoint's manifest"):
        serve(checkpoint, load_format=load_format)


@pytest.mark.parametrize("load_format", ["auto", "safetensors"])
@pytest.mark.parametrize(
    ("gone", "change"),
    [
        ("model.norm.weight", lambda t: t.half()),
        ("model.layers.0.mlp.up_proj.scales", lambda t: t.float()),
        ("model.layers.1.self_attn.q_proj.weight_scale", lambda t: t[:, 0]),
        ("model.layers.0.mlp.down_proj.qweight", lambda t: t[:-8]),
    ],
)
def test_a_tensor_of_another_dtype_or_shape_stops_the_server(
    copy: Any, gone: str, change: Any, load_format: str
) -> None:
    checkpoint = copy("llama", lambda tensors: tensors.update({gone: change(tensors[gone]).contiguous()}))
    with pytest.raises(RuntimeError, match=rf"{gone} is .*was built as"):
        serve(checkpoint, load_format=load_format)


def test_a_classifier_gets_no_bias_that_its_checkpoint_lacks(folder: Path, tmp_path: Path) -> None:
    """SGLang makes this class with one, and leaves random numbers in it."""
    out, score = classifier(folder, tmp_path, labels=3)
    model: Any = serve(out)
    assert type(model).__name__ == "Qwen3ForSequenceClassification"
    assert torch.equal(model.score.weight, score) and model.score.bias is None


def swap(shard: Path, first: str, second: str) -> None:
    """Swaps the offsets of two tensors in a file's header."""
    data = shard.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    a, b = header[first], header[second]
    a["data_offsets"], b["data_offsets"] = b["data_offsets"], a["data_offsets"]
    shard.write_bytes(data[:8] + json.dumps(header, separators=(",", ":")).encode().ljust(end - 8) + data[end:])


@pytest.mark.parametrize("own", [False, True])
def test_a_header_that_tells_of_other_tensors_stops_the_server(copy: Any, own: bool) -> None:
    checkpoint, leaf = copy("qwen3"), "q_proj.weight"
    if own:
        split(checkpoint, Degree(1), layout="presplit")
        leaf = "qkv_proj.weight"
    shard = next(checkpoint.glob("presplit/*/*/*.safetensors" if own else "*.safetensors"))
    swap(shard, f"model.layers.0.self_attn.{leaf}", f"model.layers.1.self_attn.{leaf}")
    with pytest.raises(RuntimeError, match=rf"{shard.name}: its header was changed"):
        make(checkpoint)


@pytest.mark.parametrize("damage", ["cut short", "a link", "a pipe"])
def test_a_damaged_file_is_named(copy: Any, tmp_path: Path, damage: str) -> None:
    checkpoint = copy("qwen3")
    shard = next(checkpoint.glob("*.safetensors"))
    if damage == "cut short":
        os.truncate(shard, shard.stat().st_size - 100)
    else:
        shard.rename(tmp_path / "elsewhere")
        shard.symlink_to(tmp_path / "elsewhere") if damage == "a link" else os.mkfifo(shard)
    with pytest.raises(RuntimeError, match=shard.name):
        make(checkpoint)


# Tensors that SGLang loses, or loads wrongly


def test_a_tensor_that_finds_no_parameter_stops_the_server(folder: Path, tmp_path: Path) -> None:
    paths = sources(folder, MIXES["llama"][0])
    lone = shutil.copytree(paths["bf16"], tmp_path / "bf16")
    change_tensors(lone, lambda tensors: tensors.update({"model.layers.1.mlp.unknown.weight": torch.zeros(64, 64)}))
    checkpoint = build({**paths, "bf16": lone}, {"model.layers.0.mlp.*": "fp8_block"}, tmp_path / "out")
    with pytest.raises(RuntimeError, match=r"model\.layers\.1\.mlp\.unknown\.weight: dropped by SGLang's model"):
        serve(checkpoint)


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_a_parameter_that_nothing_is_loaded_into_stops_the_server(folder: Path, name: str) -> None:
    model, config = make(mix(folder, name))
    model.model.norm.register_parameter("stray", torch.nn.Parameter(torch.empty(7)))
    with pytest.raises(RuntimeError, match=r"model\.norm\.stray: parameters that were not filled"):
        load(model, config)


def test_a_parameter_that_is_filled_by_half_stops_the_server(folder: Path) -> None:
    model, config = make(mix(folder, "llama"), load_format="safetensors")
    weight = model.model.layers[1].mlp.down_proj.qweight
    half = len(weight) // 2
    weight._weight_loader = lambda parameter, loaded: parameter.data[:half].copy_(loaded[:half])
    with pytest.raises(RuntimeError, match=r"model\.layers\.1\.mlp\.down_proj\.qweight"):
        load(model, config)


def test_a_quantized_tensor_that_is_loaded_into_another_dtype_stops_the_server(folder: Path) -> None:
    """Without mixprec, SGLang casts FP8 to BF16, ignores the scales, and serves."""
    model, config = make(mix(folder, "llama"), load_format="safetensors")
    layer = model.model.layers[1].self_attn.o_proj
    layer.weight.data = layer.weight.data.to(torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"layers\.1\.self_attn\.o_proj\.weight is torch\.float8_e4m3fn.*bfloat16"):
        load(model, config)


# Declarations


def declaration(checkpoint: Path) -> dict[str, Any]:
    return dict(json.loads((checkpoint / "config.json").read_text())["quantization_config"])


def test_a_module_that_config_declares_otherwise_than_the_manifest_stops_the_server(folder: Path, copy: Any) -> None:
    declared = declaration(mix(folder, "llama"))
    declared["modules"].append(["model.layers.1.mlp.down_proj", "fp8_block"])
    with pytest.raises(RuntimeError, match=r"config\.json declares model\.layers\.1\.mlp\.down_proj as fp8_block"):
        make(copy("llama", quantization_config=declared))


@pytest.mark.parametrize(
    ("name", "changed"),
    [("gptq_int4", {"group_size": 64}), ("gptq_int4", {"desc_act": True}), ("fp8_tensor", {"activations": "static"})],
)
def test_a_format_whose_parameters_config_changes_stops_the_server(
    folder: Path, copy: Any, name: str, changed: dict[str, Any]
) -> None:
    declared = declaration(mix(folder, "llama"))
    declared["formats"][name] |= changed
    with pytest.raises(RuntimeError, match=rf"config\.json declares model\.layers\.\d\..* as {name}"):
        make(copy("llama", quantization_config=declared))


def test_parts_of_one_layer_in_different_formats_stop_the_server(folder: Path, copy: Any) -> None:
    """`--allow unservable` builds such checkpoints."""
    from mixprec_runtime.config import MixPrecConfig

    declared = declaration(mix(folder, "llama"))
    declared["modules"].append(["model.layers.1.self_attn.k_proj", "fp8_block"])
    config = MixPrecConfig.from_config(declared)
    config.bind([f"model.layers.1.self_attn.{part}_proj" for part in "qkvo"])
    from sglang.srt.layers.linear import ReplicatedLinear

    with pytest.raises(ValueError, match=r"qkv_proj is one layer.*k_proj fp8_block.*"):
        ReplicatedLinear(512, 512, quant_config=config, prefix="model.layers.1.self_attn.qkv_proj")


def test_a_missing_manifest_stops_the_server(copy: Any) -> None:
    checkpoint = copy("llama")
    (checkpoint / "mixprec_manifest.json").unlink()
    with pytest.raises(RuntimeError, match=r"mixprec_manifest\.json: not there.*the whole folder"):
        make(checkpoint)


def test_a_changed_manifest_stops_the_server(copy: Any) -> None:
    checkpoint = copy("llama")
    path = checkpoint / "mixprec_manifest.json"
    path.write_text(path.read_text().replace('"fp8_channel"', '"fp8_tensor"', 1))
    with pytest.raises(RuntimeError, match=r"mixprec_manifest\.json: was changed after it was written"):
        make(checkpoint)


# Tensors that SGLang skips on purpose


def custom(folder: Path, tmp_path: Path, name: str, edit: Callable[[Tensors], object], **config: Any) -> Path:
    """A mix of edited sources."""
    shape, lines = MIXES[name]
    paths = {}
    for variant, path in sources(folder, shape).items():
        paths[variant] = shutil.copytree(path, tmp_path / variant)
        change_tensors(paths[variant], edit)
        change_config(paths[variant], config)
    return build(paths, lines, tmp_path / "out")


def test_a_tied_head_is_not_missed(folder: Path, tmp_path: Path) -> None:
    serve(custom(folder, tmp_path, "qwen3", lambda t: t.pop("lm_head.weight"), tie_word_embeddings=True))


def test_a_head_that_is_stored_although_tied_is_not_missed(folder: Path, tmp_path: Path) -> None:
    def tie(tensors: Tensors) -> None:
        if "model.embed_tokens.weight" in tensors:
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    serve(custom(folder, tmp_path, "llama", tie, tie_word_embeddings=True))


def serve_every_way(checkpoint: Path) -> None:
    """Loads by SGLang's loader, from merged files, and from a rank's own files."""
    serve(checkpoint, load_format="safetensors")
    with patch.object(hooks, "load_strictly", side_effect=AssertionError("left to SGLang's loader")):
        serve(checkpoint)
        split(checkpoint, Degree(1), layout="presplit")
        serve(checkpoint)


def test_an_old_rotary_buffer_is_not_missed(folder: Path, tmp_path: Path) -> None:
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(64)}
    serve_every_way(custom(folder, tmp_path, "llama", lambda t: t.update(buffer)))


def test_layers_for_speculation_are_not_missed(folder: Path, tmp_path: Path) -> None:
    past = MIXES["deepseek"][0].layers

    def add(tensors: Tensors) -> None:
        more = {n.replace(".2.", f".{past}.", 1): t.clone() for n, t in tensors.items() if ".layers.2." in n}
        tensors |= {**more, f"model.layers.{past}.eh_proj.weight": torch.zeros(512, 1024, dtype=torch.bfloat16)}
        for norm in ("enorm", "hnorm", "shared_head.norm"):
            tensors[f"model.layers.{past}.{norm}.weight"] = torch.ones(512, dtype=torch.bfloat16)

    serve_every_way(custom(folder, tmp_path, "deepseek", add, num_nextn_predict_layers=1))


@pytest.mark.parametrize("load_format", ["auto", "safetensors"])
def test_an_input_order_may_be_left_out_beside_others(folder: Path, tmp_path: Path, load_format: str) -> None:
    """``g_idx`` of inputs in order may be missing, although another layer needs its own."""
    shape = LLAMA.of(hidden=512, intermediate=1024, heads=4, kv_heads=2, head_dim=128, layers=2)
    paths = sources(folder, shape, ["bf16", "gptq_int4", "gptq_int4_act"])
    without = shutil.copytree(paths["gptq_int4"], tmp_path / "without")
    change_tensors(without, lambda tensors: [tensors.pop(name) for name in [*tensors] if name.endswith("g_idx")])
    lines = {"model.layers.0.mlp.*": "gptq_int4", "model.layers.1.mlp.down_proj": "gptq_int4_act"}
    serve(build({**paths, "gptq_int4": without}, lines, tmp_path / "out"), load_format=load_format)


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_what_other_pipeline_stages_hold_is_not_missed(folder: Path, name: str) -> None:
    for rank in range(2):
        with stage_of(rank, 2):
            serve(mix(folder, name), load_format="safetensors")


def test_what_this_pipeline_stage_holds_is_missed(folder: Path, copy: Any) -> None:
    gone = "model.layers.6.mlp.down_proj.weight_packed"
    checkpoint = copy("llama", lambda tensors: tensors.pop(gone))
    with stage_of(0, 2):
        serve(checkpoint, load_format="safetensors")
    with stage_of(1, 2), pytest.raises(RuntimeError, match=gone):
        serve(checkpoint, load_format="safetensors")


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "deepseek"])
def test_an_expert_is_missed_on_its_rank_only(folder: Path, copy: Any, name: str) -> None:
    experts = "block_sparse_moe" if name == "mixtral" else "mlp"
    gone = next(n for n in tensors_of(mix(folder, name)) if f"layers.2.{experts}.experts.5." in n)
    checkpoint = copy(name, lambda tensors: tensors.pop(gone))
    with rank_of(0, 2, 2):
        serve(checkpoint, load_format="safetensors")
    with rank_of(1, 2, 2), pytest.raises(RuntimeError, match=gone):
        serve(checkpoint, load_format="safetensors")
