"""Each mistake of stock SGLang with a format, shown on its own classes, and mixprec's repair."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from support.serving import quantize
from support.sglang.harness import Changed, load, make, publish, rank_of, server_args, sources
from support.sglang.layers import FORMATS, PREFIX, mixed_config
from support.sglang.mixes import MIXES, mix

from mixprec_build.formats.fp8 import Fp8
from mixprec_build.formats.packed import Packed
from mixprec_build.versions import between
from mixprec_runtime.contact.check import installed

pytestmark = pytest.mark.usefixtures("stage")

EXPERTS, HIDDEN, INTERMEDIATE = 2, 256, 512


@pytest.fixture
def stage(sglang: None) -> None:
    publish(server_args("dummy"))


def stock(kind: str) -> Any:
    """SGLang's own config, as for a checkpoint of one format."""
    from mixprec_runtime.native import sglang_config

    return sglang_config(FORMATS[kind])


def ours(kind: str, experts: int = EXPERTS) -> Any:
    from mixprec_runtime.config import MixPrecConfig

    return mixed_config(MixPrecConfig, [kind] * experts)


def experts_of(config: Any, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Any:
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE

    sizes = {"num_experts": EXPERTS, "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "top_k": 2}
    return FusedMoE(layer_id=0, params_dtype=dtype, quant_config=config, prefix=PREFIX, **{**sizes, **options})


def linear(config: Any, prefix: str, inputs: int, outputs: int, dtype: torch.dtype = torch.bfloat16) -> Any:
    from sglang.srt.layers.linear import ReplicatedLinear

    return ReplicatedLinear(inputs, outputs, bias=False, params_dtype=dtype, quant_config=config, prefix=prefix)


def load_expert(layer: Any, tensors: dict[str, torch.Tensor], shard: str, expert: int) -> None:
    for leaf, tensor in tensors.items():
        name = f"{'w2' if shard == 'w2' else 'w13'}_{leaf}"
        parameter = layer._parameters[name]
        parameter.weight_loader(parameter, tensor, f"experts.{name}", shard_id=shard, expert_id=expert)


# All repairs


def test_repairs_are_listed_with_a_place_that_sglang_has() -> None:
    import sglang

    from mixprec_build.formats import registry
    from mixprec_runtime.formats.registry import SERVED, repairs

    assert [one.format for one in SERVED] == [*registry.FORMATS]
    home = Path(sglang.__path__[0])
    listed = repairs()
    assert len(listed) > 15 and len({(name, repair.name) for name, repair in listed}) == len(listed)
    for _, repair in listed:
        assert repair.layer in ("linear", "experts") and len(repair.why) > 20
        assert any((repair.check, repair.create, repair.process, repair.runner, repair.run))
        # Places are those of 0.5.17; other versions may have a file in another folder.
        place = Path(repair.where.partition(":")[0])
        assert any(home.rglob(place.name)), repair.where
        if sglang.__version__ == "0.5.17":
            assert (home / place).is_file(), repair.where


# Block FP8


@pytest.mark.parametrize("block", [(128, 128), (64, 128), (32, 32)])
def test_blocks_run_on_kernels_that_take_them(block: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.layers.quantization import fp8_utils

    from mixprec_runtime.native import NativeFormat, sglang_config

    # As on a GPU from compute capability 9.0 on
    monkeypatch.setattr(fp8_utils.deep_gemm_wrapper, "ENABLE_JIT_DEEPGEMM", True)
    fmt = Fp8("block", "dynamic", block)

    def kernel_of(config: Any) -> Any:
        chosen = linear(config, "model.layers.0.mlp.down_proj", 256, 256).quant_method.w8a8_block_fp8_linear
        return getattr(chosen, "func", chosen)

    deep_gemm, ours = fp8_utils.deepgemm_w8a8_block_fp8_linear_with_fallback, kernel_of(NativeFormat(fmt))
    if block == (128, 128):
        assert ours is deep_gemm
    else:
        assert ours is fp8_utils.triton_w8a8_block_fp8_linear
    if block == (64, 128):
        assert kernel_of(sglang_config(fmt)) is deep_gemm


# NVFP4 and W4AFP8


@pytest.mark.parametrize("kind", ["nvfp4", "ct_nvfp4"])
def test_the_scale_of_all_is_that_of_the_weights(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What Marlin gets: compressed-tensors stores one over it."""
    from sglang.srt.layers.quantization import modelopt_quant

    from mixprec_runtime.native import NativeFormat

    monkeypatch.setattr(modelopt_quant, "prepare_nvfp4_layer_for_marlin", lambda layer: None)
    monkeypatch.setattr(modelopt_quant, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(modelopt_quant, "is_cuda", lambda: True)
    layer = linear(NativeFormat(FORMATS[kind]), "model.layers.0.mlp.down_proj", 128, 64)
    tensors, _ = quantize(torch.randn(64, 128), kind)
    for leaf, tensor in tensors.items():
        parameter = layer._parameters[leaf]
        parameter.weight_loader(parameter, tensor)
    layer.quant_method.process_weights_after_loading(layer)
    torch.testing.assert_close(layer.weight_global_scale.data, torch.tensor(1 / 2688), rtol=1e-6, atol=0)
    assert torch.equal(layer.weight.data, tensors.get("weight", tensors.get("weight_packed")))


@pytest.mark.parametrize(
    ("kind", "capability", "words"),
    [
        ("nvfp4", (10, 0), "on this GPU SGLang runs NVFP4 on kernels that mixprec does not serve yet"),
        ("ct_nvfp4", (12, 0), "serve it on compute capability 8.0 to 9.0"),
        ("w4afp8", (8, 0), "SGLang's kernel for W4AFP8 runs on compute capability 9.0 only"),
        ("w4afp8", (10, 0), "build the checkpoint with another format for these experts"),
    ],
)
def test_gpus_without_a_kernel_are_refused_by_name(
    kind: str, capability: tuple[int, int], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    with pytest.raises(ValueError, match=rf"^{PREFIX}.*{words}"):
        experts_of(ours(kind))


def test_scales_of_inputs_of_gate_and_up_are_compared_as_stored() -> None:
    scale = torch.tensor([0.0123])  # not a number of BF16
    layer = experts_of(ours("w4afp8"))
    for shard in ("w1", "w3", "w2"):
        load_expert(layer, {"input_scale": scale}, shard, 1)
    for name in ("w13_input_scale", "w2_input_scale"):
        assert torch.equal(layer._parameters[name].data, torch.tensor([1, 0.0123]))
    layer = experts_of(stock("w4afp8"))
    load_expert(layer, {"input_scale": scale}, "w1", 1)
    with pytest.raises(ValueError, match="must be equal"):
        load_expert(layer, {"input_scale": scale}, "w3", 1)


@pytest.mark.parametrize("mixed", [True, False])
def test_rows_of_other_groups_have_an_id_that_is_skipped(mixed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.layers.moe.token_dispatcher.standard import StandardDispatchOutput
    from sglang.srt.layers.moe.topk import StandardTopKOutput

    from mixprec_runtime.config import MixPrecConfig

    seen: list[torch.Tensor] = []
    kernel = ModuleType("sglang.srt.layers.moe.cutlass_w4a8_moe")  # needs a GPU's libraries

    def run(x: torch.Tensor, *arguments: Any, **_: Any) -> torch.Tensor:
        seen.append(arguments[5])  # after weights, scales, and the router's weights
        return x

    kernel.__dict__["cutlass_w4a8_moe"] = run
    monkeypatch.setitem(sys.modules, kernel.__name__, kernel)
    config = mixed_config(MixPrecConfig, ["w4afp8", "w4afp8", "bf16" if mixed else "w4afp8"])
    layer = experts_of(config, num_experts=3)
    layer = layer.groups[0] if mixed else layer
    ids = torch.tensor([[0, -1], [1, 0]], dtype=torch.int32)
    x = torch.zeros(2, HIDDEN, dtype=torch.bfloat16)
    topk = StandardTopKOutput(topk_weights=torch.ones(2, 2), topk_ids=ids, router_logits=x)
    layer.quant_method.apply(layer, StandardDispatchOutput(x, None, topk))
    assert seen[0].dtype == torch.int32
    # 0.5.23's kernels skip every id that is no expert's.
    assert seen[0].tolist() == ([[0, 2], [1, 0]] if mixed and between("", "0.5.23", installed()) else ids.tolist())


def test_the_page_lists_every_repair_with_its_reports() -> None:
    from mixprec_runtime.formats.registry import repairs

    page = (Path(__file__).parents[2] / "mixprec_runtime" / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"(?m)^\| [^|]+ \| [^|]+ \| `([^`]+)` \| ([^|]*)\|$", page)
    listed = {place: set(re.findall(r"\((https://[^)]+)\)", reported)) for place, reported in rows}
    due: dict[str, set[str]] = {}
    for _, repair in repairs():
        due.setdefault(repair.where, set()).update(repair.issues)
    assert {place: listed.get(place) for place in due} == due


def test_a_repair_that_sglang_never_calls_is_named() -> None:
    from mixprec_runtime.formats.repair import never_called

    layer = experts_of(ours("gptq_int4"))
    waiting = never_called(layer.modules())
    assert any("'scales of experts' waits for process_weights_after_loading" in line for line in waiting)
    assert all("create_weights" not in line and "create_moe_runner" not in line for line in waiting)
    assert all(PREFIX in line for line in waiting)
    assert never_called(layer.modules(), without=("apply", "process_weights_after_loading")) == []


# GPTQ experts


@pytest.mark.parametrize("rank", [0, 1])
def test_scales_of_down_projections_are_cut_for_tensor_parallelism(rank: int) -> None:
    tensors, _ = quantize(torch.randn(HIDDEN, INTERMEDIATE), "gptq_int4")
    expected = tensors["scales"].chunk(2)[rank]

    def holds(config: Any) -> bool:
        with rank_of(rank, 2):
            layer = experts_of(config, torch.half)
        layer.w2_scales.data.fill_(-7)
        try:
            load_expert(layer, {"scales": tensors["scales"]}, "w2", 1)
        except RuntimeError:
            return False
        return torch.equal(layer.w2_scales[1], expected)

    assert holds(ours("gptq_int4"))
    assert not holds(stock("gptq_int4"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.half])
def test_scales_are_of_the_models_dtype_and_zero_points_whole_numbers(dtype: torch.dtype) -> None:
    layer = experts_of(ours("gptq_int4"), dtype)
    assert {layer.w13_scales.dtype, layer.w2_scales.dtype} == {dtype}
    assert {layer.w13_qzeros.dtype, layer.w2_qzeros.dtype} == {torch.int32}
    # Marlin supports only activations in the dtype of the scales.
    assert experts_of(stock("gptq_int4"), dtype).w13_scales.dtype == torch.half


def test_scales_are_permuted_by_their_layers_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """On four ranks, 512 columns of an expert are 128 on each, one group; its inputs are still two groups."""
    from sglang.srt.hardware_backend.gpu.quantization import gptq_kernels
    from sglang.srt.layers.quantization.marlin_utils import marlin_moe_permute_scales

    monkeypatch.setattr(gptq_kernels, "gptq_marlin_moe_repack", lambda qweight, *_: qweight)

    def permuted(config: Any) -> Any:
        with rank_of(1, 4):
            layer = experts_of(config, torch.half)
        layer.w13_scales.data.copy_(torch.arange(layer.w13_scales.numel()).reshape(layer.w13_scales.shape))
        before = layer.w13_scales.data.clone()
        layer.quant_method.process_weights_after_loading(layer)
        expected = marlin_moe_permute_scales(before, size_k=HIDDEN, size_n=before.shape[2], group_size=128)
        return layer, torch.equal(layer.w13_scales, expected)

    layer, right = permuted(ours("gptq_int4"))
    assert right and layer.intermediate_size_per_partition == INTERMEDIATE // 4
    assert not {"w13_qzeros", "w2_qzeros"} & dict(layer.named_parameters()).keys()
    assert not permuted(stock("gptq_int4"))[1]


def test_experts_with_desc_act_are_not_cut() -> None:
    config = ours("gptq_int4")
    act = replace(FORMATS["gptq_int4"], desc_act=True)
    from mixprec_runtime.native import NativeFormat

    config.native[act] = NativeFormat(act)
    config._experts[PREFIX] = {e: dict.fromkeys(("gate_proj", "up_proj", "down_proj"), act) for e in range(EXPERTS)}
    with rank_of(0, 2), pytest.raises(ValueError, match=rf"{PREFIX} \(gptq_int4\): experts with desc_act.*--ep-size"):
        experts_of(config)
    with rank_of(0, 2, 2):
        experts_of(config)


@pytest.mark.parametrize("kind", ["gptq_int4", "awq_int4"])
def test_experts_that_marlin_has_no_kernel_for_are_refused(kind: str) -> None:
    with pytest.raises(ValueError, match=rf"{PREFIX} \({kind}\): Marlin has no kernel.*96"):
        experts_of(ours(kind), intermediate_size=96)


# FP8


def test_experts_that_triton_has_no_kernel_for_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Ampere, where linears in FP8 run on Marlin."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 6))
    with pytest.raises(ValueError, match=rf"{PREFIX} \(fp8_block\): Triton multiplies.*compute capability 8.9"):
        experts_of(ours("fp8_block"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 9))
    experts_of(ours("fp8_block"))


def test_powers_of_two_as_scales_of_activations_are_asked_for() -> None:
    from sglang.srt.layers.quantization.fp8 import Fp8Config

    from mixprec_runtime.native import sglang_config

    fmt = replace(FORMATS["fp8_block"], scale_fmt="ue8m0")
    made = sglang_config(fmt)
    theirs = Fp8Config.from_config(
        {"quant_method": "fp8", "activation_scheme": "dynamic", "scale_fmt": "ue8m0", "weight_block_size": [128, 128]}
    )
    assert {**vars(theirs), "scale_fmt": "ue8m0"} == {**vars(made)}


WEIGHTS_ONLY = {f"fp8_{size}, weights only": Fp8(size, "none") for size in ("channel", "tensor")}
SHARED = {kind: FORMATS[kind] for kind in ("bf16", "fp8_block", "fp8_channel", "fp8_tensor", "int8_channel", "ct_int4")}


@pytest.mark.parametrize("gate", [*SHARED, *WEIGHTS_ONLY])
def test_shared_experts_are_refused_where_sglang_stops(gate: str) -> None:
    """DeepSeek's layers read these attributes of the two methods (models/deepseek_v2.py:799)."""
    from mixprec_runtime.native import NativeFormat

    formats = {**SHARED, **WEIGHTS_ONLY}

    def made(kind: str) -> Any:
        return linear(NativeFormat(formats[kind]), "shared_experts", 256, 256)

    for down in formats:
        try:
            sound = getattr(made(gate), "weight", torch.empty(0)).dtype != torch.float8_e4m3fn or (
                made(gate).quant_method.quant_config.weight_block_size
                == made(down).quant_method.quant_config.weight_block_size
            )
        except AttributeError:
            sound = False
        assert (formats[gate].shared_experts_limit(formats[down]) is None) == sound, down


# AWQ


def test_awq_scales_are_permuted_by_their_layers_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for GPTQ; the single group of w2's inputs must stay one."""
    from sglang.srt.hardware_backend.gpu.quantization import awq_kernels
    from sglang.srt.layers.quantization.marlin_utils import marlin_moe_permute_scales

    monkeypatch.setattr(awq_kernels, "awq_marlin_moe_repack", lambda qweight, *_, **sizes: qweight)

    def permuted(config: Any) -> list[bool]:
        with rank_of(1, 4):
            layer = experts_of(config)
        right, due = [], {}
        for name, inputs in (("w13_scales", HIDDEN), ("w2_scales", INTERMEDIATE // 4)):
            scales = layer._parameters[name]
            scales.data.copy_(torch.randn(scales.shape))
            due[name] = marlin_moe_permute_scales(scales.data.clone(), inputs, scales.shape[2], 128)
        for name in ("w13_qzeros", "w2_qzeros"):
            layer._parameters[name].data.zero_()
        layer.quant_method.process_weights_after_loading(layer)
        for name, expected in due.items():  # groups may be repeated, which another test is about
            scales = layer._parameters[name]
            right.append(torch.equal(scales[:, :: scales.shape[1] // expected.shape[1]], expected))
        return right

    assert permuted(ours("awq_int4")) == [True, True]
    assert permuted(stock("awq_int4")) == [False, True]
    assert awq_kernels.marlin_moe_permute_scales is marlin_moe_permute_scales


def test_zero_points_of_experts_have_groups_as_long_as_a_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scales and zero points of 128 inputs become those of two groups of 64; a single group stays one."""
    from sglang.srt.hardware_backend.gpu.quantization import awq_kernels

    monkeypatch.setattr(awq_kernels, "awq_marlin_moe_repack", lambda qweight, *_, **sizes: qweight)
    names = ("w13_scales", "w13_qzeros", "w2_scales", "w2_qzeros")

    def processed(config: Any, intermediate: int) -> list[torch.Tensor]:
        layer = experts_of(config, intermediate_size=intermediate)
        generator = torch.Generator().manual_seed(1)
        for name in names:
            parameter = layer._parameters[name]
            parameter.data.copy_(torch.randint(1, 100, parameter.shape, generator=generator))
        layer.quant_method.process_weights_after_loading(layer)
        return [layer._parameters[name].data for name in names]

    for intermediate in (128, 512):
        single = intermediate == FORMATS["awq_int4"].group_size
        here, there = processed(ours("awq_int4"), intermediate), processed(stock("awq_int4"), intermediate)
        for name, ran, due in zip(names, here, there, strict=True):
            due = due if single and name.startswith("w2") else due.repeat_interleave(2, dim=1)
            assert ran.shape == due.shape
            # Where w2 has one group, stock permutes the scales of w13 otherwise, too: another repair's.
            assert torch.equal(ran, due) or (single and name == "w13_scales"), (intermediate, name)


@pytest.mark.parametrize(
    ("fmt", "leaves"),
    [
        (FORMATS["awq_int4"], ("scales", "qzeros")),
        (Packed(4, 128, False, False), ("weight_scale", "weight_zero_point")),
    ],
)
def test_zero_points_of_linears_have_groups_as_long_as_a_tile(fmt: Any, leaves: tuple[str, str]) -> None:
    from mixprec_runtime.formats.registry import served
    from mixprec_runtime.formats.repair import install

    repairs = [one for one in served(fmt).repairs if one.name.startswith("zero points of linear")]
    method: Any = SimpleNamespace(create_weights=None, process_weights_after_loading=lambda layer: None)
    install(method, fmt, repairs, "linear", "model.layers.0.mlp.up_proj")
    layer = torch.nn.Module()
    values = {leaf: torch.arange(3 * size).reshape(3, size) for leaf, size in zip(leaves, (16, 2), strict=True)}
    for leaf, value in values.items():
        layer.register_parameter(leaf, torch.nn.Parameter(value, requires_grad=False))
    method.process_weights_after_loading(layer)
    for leaf, value in values.items():
        assert torch.equal(layer._parameters[leaf], value[[0, 0, 1, 1, 2, 2]])


def test_awq_is_unpacked_as_sglang_unpacks_it() -> None:
    from sglang.srt.layers.quantization.awq import awq_dequantize_decomposition

    tensors, _ = quantize(torch.randn(HIDDEN, INTERMEDIATE), "awq_int4")
    tensors["scales"] = tensors["scales"].float()
    theirs = awq_dequantize_decomposition(tensors["qweight"], tensors["scales"], tensors["qzeros"]).t()
    ours = FORMATS["awq_int4"].dequantize({leaf: tensor.numpy() for leaf, tensor in tensors.items()})
    assert torch.equal(torch.from_numpy(ours.copy()), theirs)


def test_a_rank_that_would_cut_a_word_of_outputs_is_refused_by_name() -> None:
    prefix = "model.layers.7.self_attn.qkv_proj"
    method = config_of("awq_int4", prefix).get_quant_method(linear(stock("awq_int4"), prefix, 256, 256), prefix)
    with pytest.raises(
        ValueError, match=rf"{prefix} \(awq_int4\): a rank would hold 116 outputs.*fewer tensor-parallel"
    ):
        method.create_weights(torch.nn.Module(), 256, [128, 116, 12], 256, 512, torch.bfloat16)


def test_what_is_read_off_the_models_config_in_prefill_graphs() -> None:
    """Only AWQ linears read the model's config, and only what they otherwise read from their own."""
    import sglang.srt

    readers = [
        (path.name, line.strip())
        for path in Path(sglang.srt.__path__[0]).rglob("*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if "context().quant_config" in line or "context.quant_config" in line
    ]
    assert readers == [("marlin_utils.py", "quant_config = get_tc_piecewise_forward_context().quant_config")]
    assert ours("awq_int4").quant_type == stock("awq_int4").quant_type


# compressed-tensors


def test_packed_experts_keep_nothing_that_nobody_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes are integers, and removed after loading; unused input orders are empty."""
    from sglang.srt.layers.quantization.compressed_tensors.schemes import compressed_tensors_wNa16_moe as scheme

    layer, untouched = experts_of(ours("ct_int4")), experts_of(packed_stock())
    assert layer.w13_weight_shape.dtype == torch.int64 and untouched.w13_weight_shape.dtype == torch.float32
    assert layer.w13_weight_g_idx.numel() == 0 < untouched.w13_weight_g_idx.numel()
    monkeypatch.setattr(scheme, "gptq_marlin_moe_repack", lambda words, *_: words)
    monkeypatch.setattr(scheme, "marlin_make_workspace", lambda *_: None)
    layer.quant_method.process_weights_after_loading(layer)
    left = {name for name, parameter in layer.named_parameters() if parameter.numel()}
    assert left == {"w13_weight_packed", "w13_weight_scale", "w2_weight_packed", "w2_weight_scale"}


def packed_stock() -> Any:
    """SGLang's own config of compressed-tensors, on a machine without a GPU."""
    config = stock("ct_int4")
    config.target_scheme_map = {"Linear": config.target_scheme_map["re:.*"]}
    return config


def test_packed_experts_are_of_one_scheme_whatever_their_number() -> None:
    """Stock SGLang finds a layer's scheme by the name of expert 0, whatever the targets name."""
    config = stock("ct_int4")
    config.target_scheme_map = {f"re:{PREFIX}.1": config.target_scheme_map["re:.*"]}
    with pytest.raises(ValueError, match="Unable to find matching target"):
        experts_of(config)
    mixed = experts_of(mixed_config(type(ours("bf16")), ["fp8_block", "ct_int4", "ct_int8"]), num_experts=3)
    assert [group.quant_method.mixprec_format.kind for group in mixed.groups] == ["fp8_block", "ct_int4", "ct_int8"]


def test_what_groups_would_not_get_of_a_runners_config_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a field that a later SGLang adds."""
    from mixprec_runtime.experts import method

    monkeypatch.setattr(method, "_PASSED_ON", method._PASSED_ON - {"gate_up_interleaved"})
    config = mixed_config(type(ours("bf16")), ["fp8_block", "ct_int4"])
    experts_of(config)
    with pytest.raises(ValueError, match=rf"{PREFIX}: experts in several formats .* gate_up_interleaved=False"):
        experts_of(config, gate_up_interleaved=False)


def test_packed_experts_with_orders_are_not_cut() -> None:
    from mixprec_runtime.native import NativeFormat

    config = ours("ct_int4")
    act = replace(FORMATS["ct_int4"], actorder=True)
    config.native[act] = NativeFormat(act)
    config._experts[PREFIX] = {e: dict.fromkeys(("gate_proj", "up_proj", "down_proj"), act) for e in range(EXPERTS)}
    with rank_of(0, 2), pytest.raises(ValueError, match=rf"{PREFIX} \(ct_int4\): experts with weight_g_idx.*--ep-size"):
        experts_of(config)
    with rank_of(0, 2, 2):
        assert experts_of(config).w13_weight_g_idx.shape == (1, HIDDEN)


def test_blocks_of_compressed_tensors_experts_find_their_scales() -> None:
    config = ours("fp8_block")
    theirs = replace(FORMATS["fp8_block"], scale="weight_scale")
    parts = ("gate_proj", "up_proj", "down_proj")
    config._experts[PREFIX] = {
        0: dict.fromkeys(parts, FORMATS["fp8_block"]), 1: dict.fromkeys(parts, theirs),
    }  # fmt: skip
    layer = experts_of(config)
    assert type(layer.quant_method).__name__ == "Fp8MoEMethod"  # one group: one kernel
    scale = torch.rand(HIDDEN // 128, INTERMEDIATE // 128)
    load_expert(layer, {"weight_scale": scale}, "w2", 1)
    load_expert(layer, {"weight_scale_inv": 2 * scale}, "w2", 0)
    assert torch.equal(layer.w2_weight_scale_inv.data, torch.stack([2 * scale, scale]))


# Ids of -1


def test_packed_experts_leave_out_ids_of_other_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = Runner(monkeypatch)
    with rank_of(0, 2, 2):
        shared = experts_of(ours("ct_int4"))
    shared.scheme.is_k_full = True
    assert shared.quant_method.apply(shared, None).expert_map is not None
    assert runner is not None
    # A group of a mixed layer counts as a rank.
    mixed = experts_of(mixed_config(type(ours("bf16")), ["bf16", "ct_int4"]))
    group = mixed.groups[1]
    assert group.quant_method.apply(group, None).expert_map is not None


def test_packed_experts_are_activated_with_an_alpha(monkeypatch: pytest.MonkeyPatch) -> None:
    """By SGLang's runner, which passes the alpha on; its class for them calls Marlin without."""
    Runner(monkeypatch)
    for alpha, ours_runs in ((1.702, True), (None, False)):
        layer = experts_of(ours("ct_int4"), gemm1_alpha=alpha, gemm1_clamp_limit=alpha and 7.0)
        layer.scheme.is_k_full = True
        monkeypatch.setattr(type(layer.scheme), "apply_weights", lambda *_: "without an alpha")
        ran = layer.quant_method.apply(layer, None)
        assert (ran != "without an alpha") == ours_runs
        assert layer.scheme.runner.config.gemm1_alpha == alpha


def routed(dtype: torch.dtype) -> Any:
    """Three tokens, and weights of their experts in ``dtype`` that are exact in BF16."""
    from sglang.srt.layers.moe.token_dispatcher.standard import StandardDispatchOutput
    from sglang.srt.layers.moe.topk import StandardTopKOutput

    x = torch.zeros(3, HIDDEN, dtype=torch.bfloat16)
    weights = torch.tensor([[0.5, 0.25], [0.75, 0.125], [0.5, 0.5]], dtype=dtype)
    return StandardDispatchOutput(x, None, StandardTopKOutput(weights, torch.zeros(3, 2, dtype=torch.int64), x[:, :1]))


ON_MARLIN = [kind for kind in FORMATS if re.search("gptq|awq|ct_int|nvfp4|mxfp4", kind)]


@pytest.mark.parametrize("kind", ON_MARLIN)
def test_marlin_gets_router_weights_in_float32(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Phi-3.5-MoE's router has them in BF16, and the kernel reads float32 whatever they are."""
    from sglang.srt.layers.quantization import modelopt_quant

    from mixprec_runtime.formats.registry import served

    monkeypatch.setattr(modelopt_quant, "is_cuda", lambda: True)
    monkeypatch.setattr(modelopt_quant, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(modelopt_quant, "swizzle_blockscale", lambda scales: scales.data)  # for Blackwell
    assert [kind for kind, fmt in FORMATS.items() if "marlin" in served(fmt).runners(fmt)] == ON_MARLIN
    stock = type(experts_of(ours(kind)).quant_method)
    monkeypatch.setattr(stock, "apply", lambda method, layer, dispatch_output: dispatch_output)
    layer = experts_of(ours(kind))
    if "ct_int" in kind:
        layer.scheme.moe_runner_config = SimpleNamespace(gemm1_alpha=None)
    exact = routed(torch.float32)
    assert layer.quant_method.apply(layer, exact) is exact
    given = layer.quant_method.apply(layer, routed(torch.bfloat16)).topk_output
    assert given.topk_weights.dtype == torch.float32
    assert torch.equal(given.topk_weights, exact.topk_output.topk_weights)


def test_a_mixed_layer_has_router_weights_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    from mixprec_runtime.experts import chains

    layer = experts_of(mixed_config(type(ours("bf16")), ["fp8_block", "gptq_int4"]))
    layer.chains = SimpleNamespace(ups=True)
    monkeypatch.setattr(chains, "run", lambda layer, x, topk: topk.topk_weights)
    given = layer.quant_method.run(layer, routed(torch.bfloat16))
    assert given.dtype == torch.float32
    assert torch.equal(given, routed(torch.float32).topk_output.topk_weights)


class Runner:
    """Records what SGLang's runner gets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        from sglang.srt.layers.moe import MoeRunner

        monkeypatch.setattr(MoeRunner, "run", lambda _, dispatch_output, quant_info, *args, **kwargs: quant_info)

    def given(self, runner: Any, **info: Any) -> Any:
        return runner.run(None, SimpleNamespace(**info))


@pytest.mark.parametrize("kind", ["gptq_int4", "awq_int4"])
def test_marlin_is_told_that_ids_may_be_of_other_ranks(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    runner = Runner(monkeypatch)
    alone = experts_of(ours(kind))
    with rank_of(0, 2, 2):
        shared = experts_of(ours(kind))
    assert runner.given(alone.scheme.kernel.runner, expert_map=None).expert_map is None
    assert runner.given(shared.scheme.kernel.runner, expert_map=None).expert_map is not None
    own = torch.zeros(3)
    assert runner.given(shared.scheme.kernel.runner, expert_map=own).expert_map is own


def test_tensor_scaled_experts_scale_activations_by_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the scale of a weight for each of its outputs, in a parameter, which EPLB moves with the expert."""
    from sglang.srt.layers.quantization import fp8

    monkeypatch.setattr(fp8, "scaled_fp8_quant", lambda values, scale: ((values / scale).to(torch.float8_e4m3fn), None))
    runner = Runner(monkeypatch)
    with rank_of(1, 2, 2):
        shared = experts_of(ours("fp8_tensor"))
    alone = experts_of(ours("fp8_tensor"))
    for layer in (shared, alone):
        for weight in (layer.w13_weight, layer.w2_weight):
            weight.data.zero_()
        numbers = torch.arange(1.0, 1 + layer.num_local_experts)
        layer.w13_weight_scale.data.copy_(torch.stack([numbers / 2, numbers], 1))
        layer.w2_weight_scale.data.copy_(8 * numbers)
        layer.quant_method.process_weights_after_loading(layer)
        assert layer.w13_weight_scale.shape[1:] == (() if layer is alone else (2 * INTERMEDIATE, 1))
        assert layer.w2_weight_scale.shape[1:] == (() if layer is alone else (HIDDEN, 1))
        for number in range(layer.num_local_experts):
            assert layer.w13_weight_scale[number].unique().tolist() == [1 + number]
            assert layer.w2_weight_scale[number].unique().tolist() == [8 * (1 + number)]
    assert runner.given(shared.quant_method.runner, per_channel_quant=False).per_channel_quant
    assert not runner.given(alone.quant_method.runner, per_channel_quant=False).per_channel_quant


@pytest.mark.parametrize(("kind", "option"), [("fp8_tensor", "enable_lora"), ("ct_int4", "enable_lora")])
def test_what_other_ranks_do_not_go_with(monkeypatch: pytest.MonkeyPatch, kind: str, option: str) -> None:
    from mixprec_runtime import launch

    monkeypatch.setattr(launch, "server_args", lambda: Changed(server_args("dummy"), **{option: True}))
    experts_of(ours(kind))
    with rank_of(1, 2, 2), pytest.raises(RuntimeError, match=f"--{option.replace('_', '-')}.*{kind}.*leave"):
        experts_of(ours(kind))


# Linear layers


def test_what_was_packed_is_not_kept_under_another_name() -> None:
    from mixprec_runtime.formats.registry import served
    from mixprec_runtime.formats.repair import install

    def repack(layer: torch.nn.Module) -> None:
        layer.weight_packed = torch.nn.Parameter(torch.zeros(2))

    method: Any = SimpleNamespace(create_weights=None, process_weights_after_loading=repack)
    fmt = FORMATS["ct_int4"]
    repairs = [repair for repair in served(fmt).repairs if repair.name == "packed weights kept beside repacked ones"]
    install(method, fmt, repairs, "linear", "model.layers.0.mlp.up_proj")
    named, plain = torch.nn.Module(), torch.nn.Module()
    for layer in (named, plain):
        layer.weight_packed = torch.nn.Parameter(torch.ones(8))
    named.weight = named.weight_packed
    for layer in (named, plain):
        method.process_weights_after_loading(layer)
    assert named.weight is named.weight_packed and named.weight.numel() == 2
    assert not hasattr(plain, "weight")


def config_of(kind: str, prefix: str) -> Any:
    from mixprec_build.checkpoint.declaration import Declaration
    from mixprec_build.patterns.pattern import Pattern
    from mixprec_runtime.config import MixPrecConfig

    config = MixPrecConfig(Declaration({kind: FORMATS[kind], "bf16": FORMATS["bf16"]}, ((Pattern("*"), kind),), "bf16"))
    config.bind([prefix])
    return config


@pytest.mark.parametrize("kind", ["gptq_int4", "awq_int4"])
@pytest.mark.parametrize(("inputs", "outputs"), [(256, 96), (384, 120)])
def test_a_shape_that_marlin_has_no_kernel_for_is_refused_by_name(kind: str, inputs: int, outputs: int) -> None:
    prefix = "model.layers.7.mlp.down_proj"
    linear(stock(kind), prefix, inputs, outputs)  # accepted, though its kernel would be wrong, crash, or need FP16
    with pytest.raises(ValueError, match=rf"{prefix} \({kind}\):.*fewer tensor-parallel ranks"):
        linear(config_of(kind, prefix), prefix, inputs, outputs)


def has_exllama() -> bool:
    """0.5.23 has it no more."""
    from sglang.srt.layers.quantization.gptq import GPTQConfig

    try:
        GPTQConfig(4, 128, False, False, {}).get_linear_scheme(torch.nn.Module())
    except RuntimeError:
        return False
    return True


def test_gptq_that_marlin_has_no_kernel_for_goes_to_exllama_in_fp16() -> None:
    prefix = "model.layers.7.mlp.down_proj"
    config = config_of("gptq_int4", prefix)
    if not has_exllama():
        with pytest.raises(
            ValueError, match=rf"{prefix} \(gptq_int4\):.*has been removed.*fewer tensor-parallel ranks"
        ):
            linear(config, prefix, 384, 120, torch.half)
        return
    layer = linear(config, prefix, 384, 120, torch.half)
    assert type(layer.scheme).__name__ == "GPTQLinearScheme"
    assert layer.scales.dtype == torch.half and layer.qweight.shape == (48, 120)
    assert type(linear(config, prefix, 384, 128, torch.half).scheme).__name__ == "GPTQMarlinLinearScheme"
    with pytest.raises(ValueError, match=rf"{prefix} \(gptq_int4\):.*in FP16 only: give --dtype half"):
        linear(config, prefix, 384, 120)


@pytest.mark.parametrize(
    ("part", "outputs", "whole"), [(192, [256], (384, 256)), (256, [192, 192], (256, 768)), (256, [64], (256, 128))]
)
def test_a_rank_that_would_cut_an_fp8_block_is_refused_by_name(
    part: int, outputs: list[int], whole: tuple[int, int]
) -> None:
    """SGLang before 0.5.22 misses it where a layer has fewer ranks than the server, as with data-parallel attention."""
    prefix = "model.layers.7.self_attn.o_proj"

    def create(config: Any) -> None:
        layer = torch.nn.Module()
        layer.tp_group = SimpleNamespace(world_size=2)  # which SGLang reads from 0.5.22 on
        method = config.get_quant_method(linear(config, prefix, 256, 256), prefix)
        sizes = {"input_size": whole[0], "output_size": whole[1], "params_dtype": torch.bfloat16}
        method.create_weights(layer, part, outputs, weight_loader=None, **sizes)

    with pytest.raises(ValueError, match=rf"{prefix} \(fp8_block\):.*fewer tensor-parallel ranks"):
        create(config_of("fp8_block", prefix))
    if len(outputs) == 1 and between("", "0.5.22", installed()):
        create(stock("fp8_block"))


def test_llama_finds_its_block_scales(folder: Path) -> None:
    def filled(checkpoint: Path) -> bool:
        model, config = make(checkpoint)
        scale = model.model.layers[0].self_attn.qkv_proj.weight_scale_inv
        scale.data.fill_(-7)
        load(model, config)
        return bool((scale > 0).all())

    assert filled(mix(folder, "llama"))
    assert not filled(sources(folder, MIXES["llama"][0])["fp8_block"])


def test_the_alias_of_block_scales_is_gone_after_loading() -> None:
    prefix = "model.layers.7.self_attn.o_proj"
    layer = linear(config_of("fp8_block", prefix), prefix, 256, 256)
    assert "weight_scale" in dict(layer.named_parameters())
    scale = torch.rand(2, 2)
    layer.weight_scale.weight_loader(layer.weight_scale, scale)
    assert torch.equal(layer.weight_scale_inv.data, scale)
    layer.quant_method.process_weights_after_loading(layer)
    assert "weight_scale" not in dict(layer.named_parameters())
