"""Kimi-K3's only release, with experts in MXFP4: compiled, each layer holds what SGLang's own classes make of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.image_families import KIMI_K3_WIDE as MODEL
from support.sglang.families import skip_unless_made, write_family
from support.sglang.harness import load, publish, rank_of, serve, server_args
from support.sglang.hopper import hopper

from mixprec_build.output.build import plan_recipe, run_plan
from mixprec_build.output.verify import verify
from mixprec_runtime.loading.ledger import default_dtype

pytestmark = pytest.mark.usefixtures("sglang", "streams")


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    skip_unless_made("kimi_k3")
    return write_family(tmp_path_factory.mktemp("kimi-k3"), MODEL)["mxfp4"]


@pytest.fixture(scope="module")
def compiled(release: Path) -> Path:
    """The release alone: its declaration of a source is below ``text_config``."""
    recipe, out = release.with_suffix(".yaml"), release.with_name("out")
    recipe.write_text(f"model: {release}\n")
    plan = plan_recipe(recipe)
    experts = {plan.modules[name].format.kind for name in plan.modules if ".experts." in name}
    others = {plan.modules[name].format.kind for name in plan.modules if ".experts." not in name}
    assert (experts, others) == ({"mxfp4"}, {"bf16", "fp32"} & others)
    run_plan(plan, out)
    assert not verify(out).differences
    return out


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Has SGLang find Hopper, and leave weights in their order where it repacks them."""
    from sglang.srt.layers.quantization import marlin_utils_fp4, mxfp4, mxfp4_marlin_moe

    monkeypatch.setattr(
        marlin_utils_fp4, "gptq_marlin_repack", lambda b_q_weight, **_: b_q_weight.clone(), raising=False
    )
    monkeypatch.setattr(marlin_utils_fp4, "marlin_make_workspace", lambda *_: None)
    with hopper(mxfp4, mxfp4_marlin_moe):
        yield


def natively(release: Path, **options: Any) -> Any:
    """SGLang's model with its own loader and config, on Marlin."""
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
    from sglang.srt.models.kimi_k3 import KimiK3ForConditionalGeneration

    args = server_args(release, dtype="bfloat16", moe_runner_backend="marlin", **MODEL.options, **options)
    publish(args)
    config = ModelConfig.from_server_args(args)
    declared = json.loads((release / "config.json").read_text())["text_config"]["quantization_config"]
    quantization = CompressedTensorsConfig.from_config({**declared, "packed_modules_mapping": {}})
    with default_dtype(config.dtype):
        model = KimiK3ForConditionalGeneration(config.hf_config, quantization)
    load(model, config)
    return model


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.data.contiguous().reshape(-1).view(torch.uint8)


@pytest.mark.parametrize(
    ("rank", "tp", "ep", "dp"), [(0, 1, 1, 1), (1, 2, 1, 1), (1, 2, 2, 1), (1, 2, 1, 2), (2, 4, 4, 2), (3, 4, 2, 4)]
)
def test_marlin_gets_what_it_gets_natively(
    release: Path, compiled: Path, kernels: None, rank: int, tp: int, ep: int, dp: int
) -> None:
    """With replicas of attention (``dp``), too, which have all of it, or the ranks of each a part."""
    replicas = {"tp_size": tp, "dp_size": dp, "enable_dp_attention": True} if dp > 1 else {}
    with rank_of(rank, tp, ep, dp):
        ours = serve(compiled, **MODEL.options, **replicas)
        native = natively(release, **replicas)
    rest = {key: value for key, value in native.named_parameters() if ".experts." not in key}
    assert {key for key, _ in ours.named_parameters() if ".experts." not in key} == rest.keys()
    for key, parameter in rest.items():
        held = ours.get_parameter(key)
        assert held.shape == parameter.shape and torch.equal(bits(held), bits(parameter)), key
    layers = [name for name, _ in native.named_modules() if name.endswith(".experts")]
    assert len(layers) == 2
    for name in layers:
        mine, theirs = ours.get_submodule(name), native.get_submodule(name)
        assert type(mine.quant_method).__name__ == "Mxfp4MarlinMoEMethod"
        assert type(theirs.quant_method).__name__ == "Mxfp4MoEMethod"
        for layer in (mine, theirs):
            layer.quant_method.process_weights_after_loading(layer)
        due = {key: value for key, value in theirs.named_parameters() if "bias" not in key}
        assert dict(mine.named_parameters()).keys() == due.keys()
        for key, parameter in mine.named_parameters():
            assert parameter.shape == due[key].shape and torch.equal(bits(parameter), bits(due[key])), key
        config = mine.moe_runner_config
        assert (config.activation, config.gemm1_alpha, config.gemm1_clamp_limit) == ("situ", 4.0, 25.0)
        assert mine.quant_method.runner.runner_backend.is_marlin()
