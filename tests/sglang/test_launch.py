"""Arguments that a compiled checkpoint cannot be served with, and the memory of weights."""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.sglang.harness import Changed, Lacking, load, make, rank_of, serve, server_args, sources
from support.sglang.mixes import MIXES, Expected, mix

from mixprec_build.checkpoint.manifest import read_manifest

pytestmark = pytest.mark.usefixtures("sglang")

UNFIT = {
    "tokenizer_worker_num": (2, "--tokenizer-worker-num"),
    "moe_a2a_backend": ("mooncake", "--moe-a2a-backend mooncake"),
    "moe_runner_backend": ("flashinfer_cutlass", "--moe-runner-backend flashinfer_cutlass"),
    "load_format": ("sharded_state", "--load-format sharded_state"),
    "speculative_moe_runner_backend": ("flashinfer_trtllm", "--speculative-moe-runner-backend flashinfer_trtllm"),
    "speculative_moe_a2a_backend": ("nixl", "--speculative-moe-a2a-backend nixl"),
    "torchao_config": ("int8wo", "--torchao-config"),
    "enable_memory_saver": (True, "--enable-memory-saver"),
    "cpu_offload_gb": (8, "--cpu-offload-gb 8"),
    "offload_group_size": (2, "--offload-group-size 2"),
    "kt_weight_path": ("experts", "--kt-weight-path experts"),
}
DROPPED = {"torchao_config"}  # by 0.5.18


def test_arguments_that_no_checkpoint_goes_with() -> None:
    from mixprec_runtime.contact.check import ContactError
    from mixprec_runtime.launch import argument_problems

    args = server_args("dummy")
    assert argument_problems(args) == []
    for name, (value, flag) in UNFIT.items():
        assert hasattr(args, name) or name in DROPPED, "SGLang has renamed it"
        (problem,) = argument_problems(Changed(args, **{name: value}))
        assert flag in problem and "leave it out" in problem
    for name in UNFIT.keys() - DROPPED:
        with pytest.raises(ContactError, match=rf"the argument {name} \(--{name.replace('_', '-')}\) .* is missing"):
            argument_problems(Lacking(args, name))
    everything = {name: value for name, (value, _) in UNFIT.items()}
    assert len(argument_problems(Changed(args, **everything))) == len(UNFIT)


def test_arguments_that_experts_elsewhere_do_not_go_with() -> None:
    from mixprec_runtime.launch import argument_problems, mixed_problems

    args = server_args("dummy")
    assert args.enable_fused_moe_sum_all_reduce is False, "SGLang has renamed it"
    args = Changed(args, enable_fused_moe_sum_all_reduce=True)
    assert argument_problems(args) == []
    for problems in (mixed_problems(args, ["model.layers.0.mlp.experts"]), argument_problems(Changed(args, ep_size=2))):
        assert len(problems) == 1 and "--enable-fused-moe-sum-all-reduce" in problems[0]


def test_weights_are_not_updated_while_they_serve(folder: Path) -> None:
    """A model's loader refuses; a request is answered with a refusal, since an exception would end the server."""
    from sglang.srt.managers import io_struct
    from sglang.srt.managers.scheduler_components import weight_updater

    from mixprec_runtime import hooks

    model, config = make(mix(folder, "qwen3_moe"))
    load(model, config)
    with pytest.raises(RuntimeError, match="cannot be updated while they serve"):
        load(model, config)
    answers_of = {
        "update_weights_from_disk": "UpdateWeightFromDiskReqOutput",
        "update_weights_from_distributed": "UpdateWeightsFromDistributedReqOutput",
        "update_weights_from_tensor": "UpdateWeightsFromTensorReqOutput",
        "update_weights_from_ipc": "UpdateWeightsFromIPCReqOutput",
        "begin_weight_update": "BeginWeightUpdateReqOutput",
        "end_weight_update": "EndWeightUpdateReqOutput",
    }
    manager_class = weight_updater.SchedulerWeightUpdaterManager
    ways = {way for way in vars(manager_class) if re.search(r"^(update|begin|end)_.*weight|^load_.*weight", way)}
    hooked = {target.rpartition(".")[2]: hook for target, hook, _ in hooks._hooks() if "UpdaterManager." in target}
    assert hooked.keys() == ways and ways <= answers_of.keys(), "SGLang has a new way, or renamed one"
    for way, update in hooked.items():
        answer = getattr(io_struct, answers_of[way])
        for method, answers in (("mixprec", False), ("fp8", True)):
            runner = SimpleNamespace(model_config=SimpleNamespace(quantization=method))
            manager = SimpleNamespace(tp_worker=SimpleNamespace(model_runner=runner))
            said = update(lambda *_: "SGLang's own", manager, object())
            assert (said == "SGLang's own") == answers
            if not answers:
                assert isinstance(said, answer) and not said.success
                assert "start the server again" in said.message


def test_experts_are_not_counted_where_they_move(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIXPREC_EXPERT_ACTIVITY", "1")
    path = sources(folder, MIXES["qwen3_moe"][0])["bf16"]
    make(path)
    with pytest.raises(RuntimeError, match="leave out --enable-eplb, --ep-num-redundant-experts and"):
        make(path, init_expert_location="file.json")


def test_shared_experts_in_another_format_are_not_fused(folder: Path) -> None:
    from mixprec_runtime.config import MixPrecConfig

    checkpoint = mix(folder, "deepseek")
    config = MixPrecConfig.from_config(json.loads((checkpoint / "config.json").read_text())["quantization_config"])
    formats = config.bind(read_manifest(checkpoint).modules)
    routed, shared = (formats[f"model.layers.1.mlp.{name}.gate_proj"] for name in ("experts.0", "shared_experts"))
    config._check_fused_shared_experts("model.layers.1.mlp", {routed.fuses_as, shared.fuses_as})
    with pytest.raises(ValueError, match=r"shared experts are in another format .* --disable-shared-experts-fusion"):
        config._check_fused_shared_experts("model.layers.1.mlp", {routed.fuses_as})


def test_a_model_that_mixprec_did_not_build_is_told_apart() -> None:
    from mixprec_runtime.config import MixPrecConfig

    with pytest.raises(ValueError, match="names no quantization: leave it out"):
        MixPrecConfig()


@pytest.mark.parametrize(
    ("name", "arguments", "flag"),
    [
        ("llama", {"tokenizer_worker_num": 2}, "--tokenizer-worker-num"),
        ("llama", {"load_format": "dummy"}, "--load-format dummy"),
        ("qwen3_moe", {"moe_runner_backend": "cutlass"}, "--moe-runner-backend cutlass"),
        ("qwen3_moe", {"init_expert_location": "file.json"}, "--init-expert-location"),
    ],
)
def test_a_server_stops_before_it_makes_layers(folder: Path, name: str, arguments: dict[str, Any], flag: str) -> None:
    with pytest.raises(RuntimeError, match=f"this checkpoint cannot be served with these arguments: {flag}"):
        make(mix(folder, name), **arguments)


def test_a_release_that_lacks_what_was_planned_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import sglang.version

    from mixprec_runtime import hooks

    needs = {"gptq_untiled": ["model.layers.{0..3}.mlp.down_proj"], "of a later mixprec": ["lm_head"]}
    manifest: Any = SimpleNamespace(planned_for="0.5.17", needs=needs)
    monkeypatch.setattr(sglang.version, "__version__", "0.5.19")
    hooks._check_release(manifest)
    monkeypatch.setattr(sglang.version, "__version__", "0.5.21")
    with pytest.raises(
        RuntimeError, match=r"planned for SGLang 0\.5\.17, and SGLang 0\.5\.21 has no more .*exllama"
    ) as told:
        hooks._check_release(manifest)
    assert "model.layers.{0..3}.mlp.down_proj" in str(told.value) and "--sglang 0.5.21" in str(told.value)


# Memory


def bytes_of(tensors: dict[str, torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize(("rank", "tp"), [(0, 1), (1, 2)])
def test_memory_is_the_sum_of_what_was_loaded(folder: Path, rank: int, tp: int) -> None:
    from sglang.srt.layers.linear import LinearBase

    from mixprec_runtime.memory import measure

    with rank_of(rank, tp):
        model = serve(mix(folder, "llama"))
    stats = measure(model)
    held = {name: parameter for name, parameter in model.named_parameters() if parameter.numel()}
    assert stats["weight_mb"] * 2**20 == bytes_of(held)
    expected = Expected(folder, MIXES["llama"], rank, tp)
    by_format: Counter[str] = Counter()
    for path, module in model.named_modules():
        if isinstance(module, LinearBase):
            kind = expected.variant(expected.parts(path)[0])
            kind = {"ct_fp8_block": "fp8_block", "ct_fp8_weight": "fp8_channel"}.get(kind, kind)
            # Suffixes of variants (group sizes, orders) are not part of the kind.
            by_format["_".join(kind.split("_")[:2])] += bytes_of(expected.linear(path))
    rest = bytes_of(held) - by_format.total()
    assert stats["bytes_by_format"] == {**by_format, "bf16": by_format["bf16"] + rest}
    by_layer: Counter[str] = Counter()
    for name, parameter in held.items():
        layer = re.search(r"layers\.(\d+)", name)
        by_layer[layer[1] if layer else "other"] += parameter.nbytes
    assert stats["bytes_by_layer"] == by_layer
    with rank_of(rank, tp):
        dense = serve(sources(folder, MIXES["llama"][0])["bf16"])
    assert stats["bf16_mb"] * 2**20 == bytes_of(dict(dense.named_parameters()))
    assert stats["memory_saved_mb"] == pytest.approx(stats["bf16_mb"] - stats["weight_mb"])
    assert stats["compression_ratio"] == pytest.approx(stats["bf16_mb"] / stats["weight_mb"])


def test_one_line_says_what_is_served(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    from mixprec_runtime import memory

    checkpoint = mix(folder, "llama")
    with caplog.at_level("INFO", "mixprec_runtime"):
        for options, files in (
            ({}, f"the weights in {checkpoint} of rank 0"),
            ({"load_format": "safetensors"}, "merged"),
        ):
            caplog.clear()
            memory.serve(serve(checkpoint, **options))
            (line,) = [record.getMessage() for record in caplog.records if record.name.startswith("mixprec")]
            assert "serves LlamaForCausalLM from" in line and files in line
            assert "fp8_block" in line and "MB on this rank" in line


def test_a_line_that_reads_as_trouble_is_left_out(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """SGLang says it of any method that it does not know."""
    for name, said in (("mixprec", False), ("awq", True)):
        caplog.clear()
        model_config = "sglang.srt.configs.model_config"
        logging.getLogger(model_config).warning("%s quantization is not fully optimized yet. The speed can be", name)
        assert bool(caplog.records) == said
    caplog.clear()
    make(mix(folder, "llama"))
    assert "optimized yet" not in caplog.text


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "deepseek"])
def test_experts_weigh_what_they_would_in_16_bits(folder: Path, name: str) -> None:
    from mixprec_runtime.memory import measure

    stats = measure(serve(mix(folder, name)))
    dense = serve(sources(folder, MIXES[name][0])["bf16"])
    assert stats["bf16_mb"] * 2**20 == bytes_of(dict(dense.named_parameters()))


def test_what_is_tied_weighs_once(folder: Path) -> None:
    from mixprec_runtime.memory import measure

    model = serve(mix(folder, "llama"))
    before = measure(model)["weight_mb"]
    model.lm_head.weight = model.model.embed_tokens.weight
    assert (before - measure(model)["weight_mb"]) * 2**20 == model.lm_head.weight.nbytes


def test_weights_that_lora_wraps_keep_their_format(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its layers have the weight of the layer inside as one of their own."""
    from sglang.srt.layers.linear import LinearBase
    from sglang.srt.lora.layers import get_lora_layer

    from mixprec_runtime.memory import measure

    model = serve(mix(folder, "llama"))
    before = measure(model)
    make_tensor = torch.tensor
    monkeypatch.setattr(torch, "tensor", lambda *args, pin_memory=False, **kwargs: make_tensor(*args, **kwargs))
    linears = [(path, module) for path, module in model.named_modules() if isinstance(module, LinearBase)]
    for path, module in linears:
        parent, _, last = path.rpartition(".")
        setattr(model.get_submodule(parent), last, get_lora_layer(module, SimpleNamespace()))
    wrapped = [module for module in model.modules() if hasattr(module, "lora_backend")]
    assert len(wrapped) == len(linears) and any(
        "weight" in dict(module.named_parameters(recurse=False)) for module in wrapped
    )
    assert measure(model) == before


def test_a_tensor_on_another_device_stops_the_server(folder: Path) -> None:
    from mixprec_runtime.memory import check_placement

    model = serve(mix(folder, "llama"))
    check_placement(model, torch.device("cpu"))
    model.model.norm.weight = torch.nn.Parameter(torch.empty(4, device="meta"))
    with pytest.raises(RuntimeError, match=r"1 tensors .* not on cpu: model\.norm\.weight \(meta\).*--cpu-offload-gb"):
        check_placement(model, torch.device("cpu"))
