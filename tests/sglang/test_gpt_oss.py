"""gpt-oss through mixprec's loader: Marlin gets, to the bit, what it gets from SGLang's own loader and class."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.formats import fp8_block, fp8_config
from support.gpt_oss import tensors, unquantized, write
from support.sglang.families import heads_asked_for
from support.sglang.harness import experts_at, load, make, parameters_of, publish, rank_of, serve, server_args
from support.sglang.hopper import hopper

from mixprec_build.errors import RefusedError
from mixprec_build.output.build import plan_recipe
from mixprec_runtime.loading.ledger import default_dtype

pytestmark = pytest.mark.usefixtures("sglang")


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("gpt-oss") / "release", tensors())


@pytest.fixture(scope="module")
def compiled(release: Path) -> Path:
    from mixprec_build.output.build import plan_recipe, run_plan

    out = release.with_name("out")
    recipe = out.with_suffix(".yaml")
    recipe.write_text(f"model: {release}\n")
    run_plan(plan_recipe(recipe), out)
    return out


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Has SGLang find Hopper, and leave weights in their order where it repacks them."""
    from sglang.srt.layers.quantization import marlin_utils_fp4, mxfp4, mxfp4_marlin_moe

    def repack(b_q_weight: torch.Tensor, **_: Any) -> torch.Tensor:
        return b_q_weight.clone()

    monkeypatch.setattr(marlin_utils_fp4, "gptq_marlin_repack", repack, raising=False)
    monkeypatch.setattr(marlin_utils_fp4, "marlin_make_workspace", lambda *_: None)
    with hopper(mxfp4, mxfp4_marlin_moe):
        yield


@pytest.fixture(scope="module")
def plain(release: Path) -> Path:
    return write(release.with_name("unquantized"), unquantized(), quantization_config=None)


@pytest.fixture(scope="module")
def mixed(release: Path, plain: Path) -> Path:
    """All experts of layer 0 in BF16; of layer 1 experts 1 and 2, the others in MXFP4."""
    from mixprec_build.output.build import plan_recipe, run_plan

    recipe = release.with_name("mix.yaml")
    recipe.write_text(
        f"model: {release}\nsources: {{mx: {release}, bf16: {plain}}}\ndefault: mx\n"
        "weights: {'model.layers.0.mlp.experts.*': bf16, 'model.layers.1.mlp.experts.{1,2}.*': bf16}\n"
    )
    run_plan(plan_recipe(recipe), recipe.with_suffix(""))
    return recipe.with_suffix("")


def natively(release: Path, made: dict[str, Any] | None = None, **options: Any) -> Any:
    """SGLang's model with its own config and loader, on Marlin; in this process it has no method mxfp4 by name."""
    from sglang.srt.layers.quantization.mxfp4 import Mxfp4Config

    plain = release.with_name("plain")
    if not plain.exists():
        write(plain, made or tensors(), quantization_config=None)
    return with_own_loader(plain, "marlin", Mxfp4Config(is_checkpoint_mxfp4_serialized=True), **options)


def with_own_loader(plain: Path, runner: str, quantization: Any = None, **options: Any) -> Any:
    """SGLang's model, filled by its own loader."""
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.models.gpt_oss import GptOssForCausalLM

    args = server_args(plain, dtype="bfloat16", moe_runner_backend=runner, **options)
    publish(args)
    config = ModelConfig.from_server_args(args)
    with default_dtype(config.dtype):
        model = GptOssForCausalLM(config.hf_config, quantization)
    load(model, config)
    return model


def experts_of(model: Any) -> list[Any]:
    return [layer.mlp.experts for layer in model.model.layers]


def assert_as_natively(mine: Any, theirs: Any) -> None:
    """Every parameter of two layers of experts, to the bit."""
    due = dict(theirs.named_parameters())
    assert dict(mine.named_parameters()).keys() == due.keys()
    for name, parameter in mine.named_parameters():
        a, b = (t.data.contiguous().view(torch.uint8) for t in (parameter, due[name]))
        if name.endswith("scale"):  # 0.5.15 and 0.5.16 fill them up with 0, where values are 0
            b = torch.where(b == 0, 127, b)
        assert parameter.shape == due[name].shape and torch.equal(a, b), name


@pytest.mark.parametrize(
    ("rank", "tp", "ep", "dp"), [(0, 1, 1, 1), (1, 2, 2, 1), (1, 2, 2, 2), (3, 4, 4, 2), (2, 4, 4, 4)]
)
def test_marlin_gets_what_it_gets_natively(
    release: Path, compiled: Path, kernels: None, rank: int, tp: int, ep: int, dp: int
) -> None:
    """Also with replicas of attention (``dp``)."""
    options: dict[str, Any] = {"tp_size": tp, "dp_size": dp, "enable_dp_attention": True} if dp > 1 else {}
    with rank_of(rank, tp, ep, dp):
        ours = serve(compiled, **options)
        native = natively(release, **options)
    rest = {name: p for name, p in native.named_parameters() if ".experts." not in name}
    assert {name for name, _ in ours.named_parameters() if ".experts." not in name} == rest.keys()
    for name, parameter in rest.items():
        assert torch.equal(ours.get_parameter(name), parameter), name
    for mine, theirs in zip(experts_of(ours), experts_of(native), strict=True):
        assert type(theirs.quant_method).__name__ == "Mxfp4MoEMethod"
        for layer in (mine, theirs):
            layer.quant_method.process_weights_after_loading(layer)
        assert_as_natively(mine, theirs)
        config_of = mine.moe_runner_config
        assert (config_of.gemm1_alpha, config_of.gemm1_clamp_limit) == (1.702, 7.0)
        assert mine.quant_method.runner.runner_backend.is_marlin()


@pytest.mark.parametrize("rank", [0, 1])
def test_experts_at_other_places_are_those_of_a_release_in_that_order(
    release: Path, compiled: Path, kernels: None, tmp_path: Path, rank: int
) -> None:
    """SGLang's own class, which loads all experts of a layer at once, ignores places."""
    order = [3, 1, 0, 2]
    turned = {name: array[order] if ".experts." in name else array for name, array in tensors().items()}
    with rank_of(rank, 2, 2):
        with experts_at([order] * 2):
            ours, stock = serve(compiled), natively(release)
        due, unmoved = natively(tmp_path / "turned", turned), natively(release)
    for layers in zip(*map(experts_of, (ours, due, stock, unmoved)), strict=True):
        for layer in layers:
            layer.quant_method.process_weights_after_loading(layer)
        found, wanted, ignoring, first = layers
        assert_as_natively(found, wanted)
        assert torch.equal(ignoring.w13_weight, first.w13_weight)
        assert not torch.equal(wanted.w13_weight, first.w13_weight)


@pytest.mark.parametrize("which", ["compiled", "plain"])
def test_redundant_experts_are_on_each_rank_that_has_a_place(
    compiled: Path, plain: Path, kernels: None, tmp_path: Path, which: str
) -> None:
    from mixprec_build.output.build import plan_recipe, run_plan

    if which == "plain":
        recipe = tmp_path / "plain.yaml"
        recipe.write_text(f"model: {plain}\n")
        run_plan(plan_recipe(recipe), recipe.with_suffix(""))
        compiled = recipe.with_suffix("")
    places = [[3, 1, 0, 2, 3, 1], [0, 1, 2, 3, 0, 1]]  # the second is SGLang's own order
    due = experts_of(serve(compiled))
    for rank in range(2):
        with rank_of(rank, 2, 2), experts_at(places):
            found = experts_of(serve(compiled, ep_num_redundant_experts=2))
        for number, layer in enumerate(found):
            held = parameters_of(layer)
            assert {"w13_weight", "w2_weight", "w13_bias", "w2_bias"} <= held.keys()
            for name, tensor in parameters_of(due[number]).items():
                assert torch.equal(held[name], tensor[places[number][3 * rank :][:3]]), (number, name)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"load_format": "safetensors"}, "--load-format safetensors has SGLang's loader read the merged files"),
        ({"moe_dense_tp_size": 1}, "--moe-dense-tp-size, --moe-dp-size and context parallelism change what ranks have"),
    ],
)
def test_what_only_sglangs_loader_could_load_is_refused_before_layers_are_made(
    compiled: Path, kernels: None, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], why: str
) -> None:
    from sglang.srt.models.gpt_oss import GptOssForCausalLM

    monkeypatch.setattr(GptOssForCausalLM, "__init__", lambda *_, **__: pytest.fail("a layer was made"))
    with rank_of(0, 2), pytest.raises(RuntimeError, match=f"gpt_oss cannot load single experts, .*: {why}; leave"):
        make(compiled, **options)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_ranks_columns_are_filled_up_and_one_rank_adds_the_bias(compiled: Path, kernels: None, rank: int) -> None:
    with rank_of(rank, 2):
        model = serve(compiled)
    made, layer = tensors(), experts_of(model)[0]
    home = "model.layers.0.mlp.experts"
    blocks = torch.from_numpy(made[f"{home}.gate_up_proj_blocks"]).flatten(2)
    columns = layer.w2_weight.shape[2] * 2
    assert columns == 192  # of 320 for two ranks, in multiples of 64
    there = slice(rank * columns, min((rank + 1) * columns, 320))
    size = there.stop - there.start
    gate, up = layer.w13_weight.data.unflatten(1, (2, columns)).unbind(1)
    assert torch.equal(gate[:, :size], blocks[:, ::2][:, there]) and not gate[:, size:].any()
    assert torch.equal(up[:, :size], blocks[:, 1::2][:, there]) and not up[:, size:].any()
    layer.quant_method.process_weights_after_loading(layer)
    bias = layer.w2_weight_bias
    assert bias.any() == (rank == 0)


@pytest.mark.parametrize(("rank", "tp", "ep"), [(0, 1, 1), (1, 2, 1), (1, 2, 2)])
def test_triton_gets_bf16_experts_as_natively(
    plain: Path, mixed: Path, kernels: None, rank: int, tp: int, ep: int
) -> None:
    """But for the order of rows: gate and up are two halves here. SGLang's loader has all experts on every rank."""
    with rank_of(rank, tp, ep):
        ours = experts_of(serve(mixed))[0]
    with rank_of(*((rank, tp) if ep == 1 else (0, 1))):
        native = experts_of(with_own_loader(plain, "triton"))[0]
    for layer in (ours, native):
        layer.quant_method.process_weights_after_loading(layer)
    due = dict(native.named_parameters())
    assert dict(ours.named_parameters()).keys() == due.keys()
    for name, parameter in ours.named_parameters():
        value = due[name].data[-len(parameter) :]
        if name.startswith("w13"):
            value = torch.cat([value[:, ::2], value[:, 1::2]], 1)
        assert parameter.dtype == value.dtype and torch.equal(parameter.data, value), name
    assert ours.w2_weight_bias.any() == (rank == 0 or ep == 2)
    assert ours.quant_method.runner.runner_backend.is_triton()
    assert (native.moe_runner_config.gate_up_interleaved, ours.moe_runner_config.gate_up_interleaved) == (True, False)


@pytest.mark.parametrize("rank", [0, 1])
def test_groups_of_experts_have_their_biases(mixed: Path, kernels: None, rank: int) -> None:
    """Of BF16 and MXFP4 in one layer, cut for two ranks, of which the first adds those of down."""
    from mixprec_runtime.native import format_of

    with rank_of(rank, 2):
        layer = experts_of(serve(mixed))[1]
    biases = torch.from_numpy(tensors()["model.layers.1.mlp.experts.down_proj_bias"].astype("float32"))
    found = [[0, 3] if format_of(group) else [1, 2] for group in layer.groups]
    assert sorted(found) == [[0, 3], [1, 2]]
    for group, experts in zip(layer.groups, found, strict=True):
        assert torch.equal(group.w2_bias.float(), biases[experts])
        group.quant_method.process_weights_after_loading(group)
        assert group.w2_weight_bias.any() == (rank == 0)


@pytest.mark.parametrize("which", ["compiled", "mixed 0", "mixed 1"])
def test_experts_are_computed_with_biases_and_limits(
    compiled: Path, mixed: Path, which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the CPU's reference, against transformers' arithmetic (``GptOssExperts``)."""
    from sglang.srt.layers.moe.token_dispatcher.standard import StandardDispatchOutput
    from sglang.srt.layers.moe.topk import StandardTopKOutput

    from mixprec_runtime import native
    from mixprec_runtime.cpu import reference
    from mixprec_runtime.experts import method

    for module in (native, reference, method):
        monkeypatch.setattr(module, "is_cpu", lambda: True)
    number = 0 if which == "mixed 0" else 1
    model = serve(compiled if which == "compiled" else mixed, dtype="float32")
    layer = experts_of(model)[number]
    for part in (*getattr(layer, "groups", ()), layer):
        part.quant_method.process_weights_after_loading(part)
    x = 4 * torch.randn(9, 192)
    ids, weights = torch.stack([torch.randperm(4)[:2] for _ in range(9)]).int(), torch.rand(9, 2)
    topk = StandardTopKOutput(weights, ids, weights)
    out = layer.quant_method.apply(layer, StandardDispatchOutput(x, None, topk)).hidden_states
    made, plain, home = tensors(), unquantized(), f"model.layers.{number}.mlp.experts"
    levels = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6.0])
    levels = torch.cat([levels, -levels])
    in_bf16 = {"compiled": [], "mixed 0": [0, 1, 2, 3], "mixed 1": [1, 2]}[which]

    def dense(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        blocks = torch.from_numpy(made[f"{home}.{name}_blocks"]).long()
        values = levels[torch.stack([blocks & 15, blocks >> 4], -1)].flatten(3)
        powers = (torch.from_numpy(made[f"{home}.{name}_scales"]).float() - 127).exp2()
        weights = (values * powers[..., None]).flatten(2)
        weights[in_bf16] = torch.from_numpy(plain[f"{home}.{name}"].astype("float32")).transpose(1, 2)[in_bf16]
        return weights, torch.from_numpy(made[f"{home}.{name}_bias"].astype("float32"))

    (w13, b13), (w2, b2) = dense("gate_up_proj"), dense("down_proj")
    due = torch.zeros_like(x)
    for token in range(9):
        for expert, weight in zip(ids[token].tolist(), weights[token], strict=True):
            both = w13[expert] @ x[token] + b13[expert]
            gate, up = both[::2].clamp(max=7), both[1::2].clamp(-7, 7)
            due[token] += weight * (w2[expert] @ ((up + 1) * gate * torch.sigmoid(1.702 * gate)) + b2[expert])
    assert (out - due).abs().max() < 1e-4 * due.abs().max()


def test_its_head_is_unquantized(release: Path, plain: Path, compiled: Path, kernels: None) -> None:
    """models/gpt_oss.py makes it without a quantization config; `plan` refuses another format."""
    with heads_asked_for() as asked:
        serve(compiled)
    assert asked == []
    held = load_file(plain / "model.safetensors")
    head = fp8_block(held.pop("lm_head.weight").float())
    quantized = release.with_name("head")
    left = sorted({name.removesuffix(".weight") for name in held})
    write(quantized, {}, quantization_config={**fp8_config(), "modules_to_not_convert": left})
    save_file(held | {f"lm_head.{leaf}": value for leaf, value in head.items()}, quantized / "model.safetensors")
    recipe = release.with_name("head.yaml")
    recipe.write_text(
        f"model: {release}\nsources: {{mx: {release}, fp8: {quantized}}}\ndefault: mx\nweights: {{lm_head: fp8}}\n"
    )
    with pytest.raises(RefusedError, match="no quantized lm_head of this family"):
        plan_recipe(recipe)


def test_the_runner_that_sglang_chose_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.layers.moe import get_moe_runner_backend

    from mixprec_runtime import launch

    publish(server_args("dummy", moe_runner_backend="triton_kernel"))
    launch.drop_chosen_runner(["Qwen3MoeForCausalLM"])
    assert get_moe_runner_backend().is_triton_kernels()
    with pytest.raises(RuntimeError, match="--moe-runner-backend triton_kernel changes routing"):
        launch.check_arguments()
    launch.drop_chosen_runner(["GptOssForCausalLM"])
    assert get_moe_runner_backend().is_auto()
    launch.check_arguments()
