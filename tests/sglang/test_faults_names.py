"""SGLang's layers find their modules under all names that it uses; tensors that it skips on purpose are not missed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mixprec_build.checkpoint.declaration import quantization_config
from mixprec_build.families.hunyuan import HUNYUAN
from mixprec_build.families.qwen2 import QWEN2_MOE
from mixprec_build.formats.base import Format
from mixprec_build.formats.dense import Dense
from mixprec_build.formats.fp8 import Fp8

pytestmark = pytest.mark.usefixtures("sglang")

BF16, BLOCK, CHANNEL = Dense("BF16"), Fp8("block", block=(128, 128)), Fp8("channel")


def bound(modules: dict[str, Format], prefixes: dict[str, str] | None = None, **options: Any) -> Any:
    from sglang.srt.models.utils import WeightsMapper

    from mixprec_runtime.config import MixPrecConfig

    config = MixPrecConfig.from_config(quantization_config(modules))
    if prefixes:
        config.apply_weight_name_mapper(WeightsMapper(orig_to_new_prefix=prefixes))
    config.bind(modules, **options)
    return config


def decoder(prefix: str, formats: tuple[Format, ...] = (BLOCK, BF16)) -> dict[str, Format]:
    return {
        f"{prefix}layers.{layer}.self_attn.{part}_proj": fmt for layer, fmt in enumerate(formats) for part in "qkvo"
    }


@pytest.mark.parametrize(
    ("stored", "prefixes", "served"),
    [
        ("language_model.model.", {"language_model.layers.": "language_model.model.layers."}, "model."),  # Kimi-K2.5
        ("language_model.", {"language_model.layers.": "language_model.model.layers."}, "model."),  # its NVFP4
        ("language_model.model.", None, "model."),  # Mistral-3
        ("model.language_model.", None, "model."),
        ("model.language_model.", {"model.language_model.": "language_model.model."}, "model.language_model."),
        ("model.", {"model.": "language_model.model."}, "model.language_model."),  # Qwen3-VL, older names
        ("model.language_model.", {"model.language_model.": "language_model.model."}, "model."),  # Qwen2.5-VL
        ("model.", {"model.": "language_model.model."}, "model."),
        ("model.", None, ""),  # Mixtral
    ],
)
def test_a_decoder_in_a_larger_model(stored: str, prefixes: dict[str, str] | None, served: str) -> None:
    config = bound(decoder(stored), prefixes)
    assert set(config._members(f"{served}layers.0.self_attn.qkv_proj").values()) == {BLOCK}
    assert set(config._members(f"{served}layers.1.self_attn.o_proj").values()) == {BF16}
    assert config._members(f"{served}layers.2.self_attn.o_proj") == {}


def test_a_name_that_may_mean_two_modules_finds_none() -> None:
    config = bound(decoder("language_model.model.", (BLOCK,)) | decoder("model.language_model.", (CHANNEL,)))
    assert config._members("model.layers.0.self_attn.o_proj") == {}
    assert set(config._members("language_model.model.layers.0.self_attn.o_proj").values()) == {BLOCK}


def test_layers_that_are_named_without_their_number_are_those_of_the_checkpoint_in_order() -> None:
    """models/hunyuan.py names the projection ``.self_attn.qkv_proj`` in all layers, and experts not at all."""
    parts = ("gate_proj", "up_proj", "down_proj")
    modules = decoder("model.", (BLOCK, BF16, CHANNEL))
    del modules["model.layers.1.self_attn.k_proj"], modules["model.layers.1.self_attn.v_proj"]  # a cross layer
    modules |= {f"model.layers.0.mlp.{part}": BF16 for part in parts}
    for layer in (1, 2):
        modules |= {f"model.layers.{layer}.mlp.shared_mlp.{part}": CHANNEL for part in parts}
        modules |= {f"model.layers.{layer}.mlp.experts.{i}.{part}": BLOCK for i in range(3) for part in parts}
    layers = bound(modules, family=HUNYUAN)._unnumbered
    made = [
        (".self_attn.qkv_proj", False), (".self_attn.o_proj", False), (".mlp.gate_up_proj", False),
        (".mlp.down_proj", False),
        (".self_attn.q_proj", False), (".self_attn.o_proj", False), ("", True), (".gate_up_proj", False),
        (".down_proj", False),
        (".self_attn.qkv_proj", False), (".self_attn.o_proj", False), ("", True), (".gate_up_proj", False),
        (".down_proj", False),
    ]  # fmt: skip
    assert [layers.next_named(name, experts=experts) for name, experts in made] == [
        *(f"model.layers.0.{name}" for name in ("self_attn.qkv_proj", "self_attn.o_proj")),
        *(f"model.layers.0.mlp.{name}" for name in ("gate_up_proj", "down_proj")),
        *(f"model.layers.1.{name}" for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.experts")),
        *(f"model.layers.1.mlp.shared_mlp.{name}" for name in ("gate_up_proj", "down_proj")),
        *(f"model.layers.2.{name}" for name in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.experts")),
        *(f"model.layers.2.mlp.shared_mlp.{name}" for name in ("gate_up_proj", "down_proj")),
    ]
    assert layers.next_named(".self_attn.qkv_proj", experts=False) is None
    again = bound(modules, family=HUNYUAN)._unnumbered
    assert again.next_named("model.layers.1.self_attn.q_proj", experts=False) is None
    assert again.next_named("mm_projector.linear_1", experts=False) is None


@pytest.mark.parametrize("shared", [BLOCK, BF16])
def test_a_shared_expert_is_fused_in_the_routed_ones_format_alone(shared: Format) -> None:
    parts = ("gate_proj", "up_proj", "down_proj")
    modules: dict[str, Format] = {f"model.layers.0.mlp.experts.{i}.{p}": BLOCK for i in range(2) for p in parts}
    modules |= {f"model.layers.0.mlp.shared_expert.{part}": shared for part in parts}
    config = bound(modules, family=QWEN2_MOE)
    assert config.can_fuse_shared_expert() is (shared == BLOCK)
    modules["model.layers.0.mlp.experts.1.down_proj"] = BF16
    assert not bound(modules, family=QWEN2_MOE).can_fuse_shared_expert()


def test_fp8_that_sglang_dequantizes_is_in_no_wrong_format() -> None:
    """``indexer.wk`` of GLM-5 and DeepSeek-V3.2, which SGLang loads into ``wk_weights_proj`` in BF16."""
    from sglang.srt.layers.quantization.fp8_utils import block_quant_dequant

    from mixprec_build.checkpoint.manifest import TensorEntry
    from mixprec_runtime.loading.ledger import Ledger, LoadError

    stored = {
        "wk.weight": torch.ones(128, 128).to(torch.float8_e4m3fn),
        "wk.weight_scale_inv": torch.full((1, 1), 2.0),
    }
    into = torch.nn.Parameter(torch.zeros(128, 128, dtype=torch.bfloat16))
    entries = {
        name: TensorEntry(
            "F32" if t.dtype is torch.float32 else "F8_E4M3", tuple(t.shape), t.nbytes, "model.safetensors", "fp8", ""
        )
        for name, t in stored.items()
    }
    ledger = Ledger(entries, [("wk_weights_proj.weight", into)])
    weight, scale = (tensor for _, tensor in ledger.follow(stored.items()))
    into.data.copy_(block_quant_dequant(weight, scale, [128, 128], torch.bfloat16))
    assert ledger.unused(1) == [] and ledger.unfilled({}) == [] and into[0, 0].item() == 2
    with pytest.raises(LoadError, match="not in the format that the checkpoint declares"):
        into.data.copy_(weight)


@pytest.mark.parametrize("made", [False, True])
def test_towers_that_sglang_was_told_to_skip(made: bool) -> None:
    from mixprec_runtime.loading.strict import expected_on_this_rank

    model = torch.nn.Module()
    model.language_model = torch.nn.Linear(1, 1)
    model.vision_model = torch.nn.Linear(1, 1) if made else None
    model.multi_modal_projector = None
    belongs = expected_on_this_rank(model)
    assert belongs("vision_model.blocks.0.attn.weight") is made
    assert belongs("multi_modal_projector.linear_1.weight") is made
    assert belongs("language_model.model.norm.weight")
