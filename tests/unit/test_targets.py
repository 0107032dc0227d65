"""Which config group of compressed-tensors a module is of, by the rule of compressed-tensors itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from support import producers as made
from support.oracles import stated

from mixprec_build.formats.base import FormatError
from mixprec_build.formats.config_groups import scheme_of
from mixprec_build.formats.quantization import Quantization

Config = dict[str, Any]

MODULES = [
    f"model.layers.{layer}.{name}"
    for layer in (0, 2, 56)
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.experts.0.down_proj", "linear_attn.norm")
] + ["lm_head", "model.visual.blocks.0.attn.qkv"]


def group(*targets: str, bits: int) -> Config:
    return {"targets": list(targets), "weights": {"num_bits": bits, "type": "int", "strategy": "channel"}}


def declaration(*groups: Config, ignore: list[str] | None = None) -> Config:
    """Groups are told apart by their bits."""
    named = {f"group_{number}": one for number, one in enumerate(groups)}
    settings = {"format": "pack-quantized", "config_groups": named, "ignore": ignore or []}
    return {"quant_method": "compressed-tensors", **settings}


def bits_by_producer(quantization: Config) -> dict[str, int | None]:
    """Module -> the bits that compressed-tensors gives it, or None where it leaves it unquantized."""
    model = torch.nn.Module()
    for name in MODULES:
        *parents, last = name.split(".")
        at = model
        for parent in parents:
            if parent not in at._modules:
                at.add_module(parent, torch.nn.Module())
            at = at.get_submodule(parent)
        at.add_module(last, torch.nn.Linear(16, 16, bias=False))
    apply_quantization_config(model, QuantizationConfig.model_validate(quantization))
    schemes = {name: getattr(model.get_submodule(name), "quantization_scheme", None) for name in MODULES}
    return {name: scheme and scheme.weights and scheme.weights.num_bits for name, scheme in schemes.items()}


def bits_here(quantization: Config) -> dict[str, int | None]:
    found: dict[str, int | None] = {}
    settings = Quantization(quantization)
    for name in MODULES:
        module = stated({"weight_packed": ("I32", (16, 2))}, name)
        try:
            scheme = scheme_of(module, settings)
        except FormatError:
            found[name] = None
        else:
            found[name] = scheme.bits if scheme is not None else None
    return found


CASES: Mapping[str, Config] = {
    "a class": declaration(group("Linear", bits=4), ignore=["lm_head"]),
    "a name goes before a regex": declaration(group("re:.*", bits=4), group("lm_head", bits=8)),
    "a regex goes before a class": declaration(group("Linear", bits=4), group("re:.*mlp.*", bits=8)),
    "regexes overlap, the first in the alphabet is the second group's": declaration(
        group("re:.*mlp\\.experts.*", bits=4), group("re:.*layers\\.2\\..*", bits=8)
    ),
    "regexes overlap, the first in the alphabet is the first group's": declaration(
        group("re:.*layers\\.(56|57)\\.mlp\\..*", bits=8), group("re:.*mlp\\..*", bits=4)
    ),
    "one target twice": declaration(group("Linear", bits=8), group("Linear", "re:.*experts.*", bits=4)),
    "a class of an engine": declaration(group("Linear", bits=4), group("FusedMoE", bits=8)),
    "a parent is ignored": declaration(
        group("Linear", bits=4), ignore=["model.layers.0.self_attn", "model.layers.0.linear_attn"]
    ),
    "a regex is ignored, which begins where the name does": declaration(
        group("Linear", bits=4), ignore=["re:mlp.*", "re:.*self_attn.*"]
    ),
    "no class": declaration(group("re:.*mlp\\.experts\\.\\d+\\.(gate|up|down)_proj$", bits=4)),
}


@pytest.mark.parametrize("case", CASES)
def test_a_module_is_of_the_group_that_its_producer_takes(case: str) -> None:
    assert bits_here(CASES[case]) == bits_by_producer(CASES[case])


def test_the_groups_of_released_checkpoints() -> None:
    """Those whose targets are regular expressions or classes, of modules as these are called everywhere."""
    for path in sorted(made.CONFIGS.glob("*.json")):
        config = made.real_config(path.stem).get("config") or {}
        quantization = config.get("quantization_config") or {}
        if quantization.get("quant_method") != "compressed-tensors" or not quantization.get("config_groups"):
            continue
        groups = [
            group(*one["targets"], bits=4 + 4 * (number % 2))
            for number, one in enumerate(quantization["config_groups"].values())
        ]
        plain = declaration(*groups, ignore=quantization.get("ignore"))
        assert bits_here(plain) == bits_by_producer(plain), path.stem
