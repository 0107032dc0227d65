"""Sources that hold several formats themselves, each taken for what its modules are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
from support.files import folder_tensors
from support.write import LLAMA, QWEN3_MOE, Config, Tensors, Tiny, tiny_tensors, write_tiny

from mixprec_build.checkpoint.typed import open_source
from mixprec_build.formats.awq import Awq
from mixprec_build.formats.base import Format
from mixprec_build.formats.dense import Dense
from mixprec_build.formats.fp8 import Fp8
from mixprec_build.formats.gptq import Gptq
from mixprec_build.formats.packed import Packed
from mixprec_build.output.build import plan_recipe, run_plan
from mixprec_build.output.verify import verify
from mixprec_build.report.facts import inspect_facts

INT4 = Gptq(4, 128, True, False, "gptq")


def swap(tensors: Tensors, other: Tensors, names: Iterable[str]) -> None:
    """Stores the modules ``names`` as ``other`` does."""
    for name in names:
        for tensor in [tensor for tensor in tensors if tensor.startswith(f"{name}.")]:
            del tensors[tensor]
        tensors |= {tensor: value for tensor, value in other.items() if tensor.startswith(f"{name}.")}


def formats_of(folder: Path) -> dict[str, Any]:
    return dict(open_source(str(folder)).formats)


def build(folder: Path, lines: Mapping[str, str], out: str = "out") -> dict[str, Format]:
    """Compiles, verifies, and says what came out."""
    names = [path.name for path in sorted(folder.glob("*/")) if (path / "config.json").exists()]
    text = ["model: base", "default: base", "sources:", *(f"  {name}: {name}" for name in names), "weights:"]
    recipe = folder / f"{out}.yaml"
    recipe.write_text("\n".join([*text, *(f"  '{pattern}': {source}" for pattern, source in lines.items())]))
    plan = plan_recipe(recipe)
    run_plan(plan, folder / out)
    assert not verify(folder / out).differences
    assert formats_of(folder / out) == {name: module.format for name, module in plan.modules.items()}
    stored = folder_tensors(folder / out)
    for module in plan.modules.values():
        source = folder_tensors(folder / module.source)
        assert all(stored[t.info.name] == source[t.info.name] for t in module.tensors.values())
    return {name: module.format for name, module in plan.modules.items()}


def test_gptq_with_layers_of_8_bits(tmp_path: Path) -> None:
    """GPTQModel's `dynamic`: other group sizes and modules left alone."""
    down = [f"model.layers.{layer}.mlp.down_proj" for layer in range(2)]

    def edit(tensors: Tensors, config: Config) -> None:
        swap(tensors, tiny_tensors(LLAMA, "gptq_int4", group_size=64), down)
        swap(tensors, tiny_tensors(LLAMA, "fp16"), ["model.layers.0.self_attn.o_proj"])
        config["quantization_config"]["dynamic"] = {
            r"+:.*\.down_proj": {"group_size": 64}, r"-:model\.layers\.0\.self_attn\.o_proj": {},
        }  # fmt: skip

    write_tiny(tmp_path / "base", LLAMA, "bf16")
    write_tiny(tmp_path / "gptq", LLAMA, "gptq_int4", edit=edit)
    built = build(tmp_path, {"*.self_attn.*": "gptq", "*.mlp.*": "gptq"})
    assert {built[name] for name in down} == {Gptq(4, 64, True, False, "gptq")}
    assert built["model.layers.0.mlp.up_proj"] == INT4
    assert built["model.layers.0.self_attn.o_proj"] == Dense("F16")


@pytest.mark.parametrize("activations", ["dynamic", "static"])
def test_modelopt_fp8_with_modules_left_out(tmp_path: Path, activations: str) -> None:
    def edit(tensors: Tensors, config: Config) -> None:
        config["quantization_config"] = {
            "quant_method": "modelopt", "quant_algo": "FP8", "exclude_modules": ["lm_head", "model.layers.1.mlp*"],
        }  # fmt: skip

    write_tiny(tmp_path / "base", LLAMA, "bf16")
    skip = ["model.layers.1.mlp.*"]
    write_tiny(tmp_path / "opt", LLAMA, "fp8_tensor", edit=edit, skip=skip, activations=activations)
    built = build(tmp_path, {"*.self_attn.*": "opt", "*.mlp.*": "opt"})
    assert built["model.layers.0.mlp.down_proj"] == Fp8("tensor", activations)
    assert built["model.layers.1.mlp.down_proj"] == Dense("BF16")


def test_compressed_tensors_with_a_group_for_each_expert(tmp_path: Path) -> None:
    """SGLang reads a layer's format from its expert 0; here each expert is what its own group says."""
    model = QWEN3_MOE
    hot = [f"model.layers.{layer}.mlp.experts.{expert}" for layer in range(model.layers) for expert in (1, 3)]

    def edit(tensors: Tensors, config: Config) -> None:
        wanted = [f"{name}.{part}_proj" for name in hot for part in ("gate", "up", "down")]
        swap(tensors, tiny_tensors(model, "fp8_channel"), wanted)
        eight = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False}
        token = {"num_bits": 8, "type": "float", "strategy": "token", "symmetric": True, "dynamic": True}
        config["quantization_config"] |= {"format": "mixed-precision"}
        groups = config["quantization_config"]["config_groups"]
        groups["group_0"]["format"] = "pack-quantized"
        groups["group_1"] = {
            "format": "float-quantized", "targets": ["re:.*experts\\.(1|3)\\..*"], "weights": eight,
            "input_activations": token,
        }  # fmt: skip

    write_tiny(tmp_path / "base", model, "bf16")
    write_tiny(tmp_path / "ct", model, "ct_int4", edit=edit)
    built = build(tmp_path, {"*.experts.*": "ct", "*.self_attn.*": "ct"})
    for layer in range(model.layers):
        kinds = [built[f"model.layers.{layer}.mlp.experts.{expert}.up_proj"] for expert in range(4)]
        assert kinds == [Packed(4, 128, True, False), Fp8("channel")] * 2


def test_an_earlier_mix_is_a_source(tmp_path: Path) -> None:
    for name, variant in {"base": "bf16", "fp8": "fp8_block", "awq": "awq_int4", "ct": "ct_int4"}.items():
        write_tiny(tmp_path / name, LLAMA, variant)
    lines = {"*.0.self_attn.*": "fp8", "*.0.mlp.*": "awq", "*.1.mlp.*": "ct"}
    first = build(tmp_path, lines, "first")
    second = build(tmp_path, {"*.0.*": "first", "*.1.mlp.*": "first", "*.1.self_attn.*": "awq"}, "second")
    assert second["model.layers.0.mlp.up_proj"] == first["model.layers.0.mlp.up_proj"] == Awq(128)
    assert second["model.layers.1.mlp.up_proj"] == Packed(4, 128, True, False)
    assert second["model.layers.1.self_attn.o_proj"] == Awq(128)


@pytest.mark.parametrize(
    ("variant", "kind", "bits"), [("awq_int4", "awq_int4", 4.15625), ("ct_int4", "ct_int4", 4.125)]
)
def test_inspect_tells_what_one_alone_holds(tmp_path: Path, variant: str, kind: str, bits: float) -> None:
    """Of 32 bits a group of 128: AWQ has a scale and a zero point, symmetric weights a scale."""
    model = Tiny("llama")
    write_tiny(tmp_path / "one", model, variant)
    facts = inspect_facts(open_source(str(tmp_path / "one")), tmp_path / "one")
    (found,) = [entry for entry in facts["formats"] if entry["kind"] == kind]
    assert found["modules"] == 14
    assert found["bits_per_weight"] == pytest.approx(bits, abs=0.02)
