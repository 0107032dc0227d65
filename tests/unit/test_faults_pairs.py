"""Scales between linears of which one is fused on disk or cannot be looked at, and quantized sources alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from support.write import LLAMA, VARIANTS, Config, Tensors, tiny_tensors, write_tiny

from mixprec_build.errors import RefusedError, SourceError
from mixprec_build.output.build import plan_recipe
from mixprec_build.planning.probe import WeightProbe
from mixprec_build.planning.types import Plan

MODEL = replace(LLAMA, hidden=256, gain=1 / 16, kv_heads=4)


def plan_of(folder: Path, lines: dict[str, str], default: str = "base", model: str = "base") -> Plan:
    recipe = folder / "recipe.yaml"
    written = "".join(f"  '{pattern}': {source}\n" for pattern, source in lines.items())
    names = sorted(path.name for path in folder.iterdir() if path.is_dir())
    sources = ", ".join(f"{name}: {name}" for name in names)
    recipe.write_text(f"model: {model}\nsources: {{{sources}}}\ndefault: {default}\nweights:\n{written}")
    return plan_recipe(recipe)


def joined(
    parts: tuple[str, ...], name: str, after: str, variant: str, scaled: bool
) -> Callable[[Tensors, Config], None]:
    """Joins ``parts`` of each layer as ``name``, and folds scales of the inputs of ``after`` into the last of them."""
    full = tiny_tensors(MODEL, "bf16")

    def edit(tensors: Tensors, config: Config) -> None:
        config |= {"model_type": "phi9", "architectures": ["Phi9ForCausalLM"]}
        rng = np.random.default_rng(1)
        for layer in range(MODEL.layers):
            prefix = f"model.layers.{layer}."
            weights = [full[f"{prefix}{part}.weight"].astype(np.float32) for part in parts]
            last = full[f"{prefix}{after}.weight"].astype(np.float32)
            scales = np.exp(0.5 * rng.standard_normal(len(weights[-1]))).astype(np.float32) if scaled else 1.0
            weights[-1], last = (weights[-1].T / scales).T, last * scales
            for key in list(tensors):
                if key.startswith(tuple(f"{prefix}{word}." for word in (*parts, after))):
                    del tensors[key]
            for word, weight in ((name, np.concatenate(weights)), (after, last)):
                stored = {"weight": weight.astype(ml_dtypes.bfloat16)}
                for leaf, tensor in (VARIANTS[variant].store(weight) if variant != "bf16" else stored).items():
                    tensors[f"{prefix}{word}.{leaf}"] = tensor

    return edit


UP = (("mlp.gate_proj", "mlp.up_proj"), "mlp.gate_up_proj", "mlp.down_proj")
VALUES = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn.qkv_proj", "self_attn.o_proj")


@pytest.mark.parametrize(("parts", "name", "after"), [UP, VALUES])
@pytest.mark.parametrize("scaled", [True, False])
def test_linears_that_are_joined_on_disk(
    tmp_path: Path, parts: tuple[str, ...], name: str, after: str, scaled: bool
) -> None:
    write_tiny(tmp_path / "base", MODEL, "bf16", edit=joined(parts, name, after, "bf16", False))
    write_tiny(tmp_path / "q", MODEL, "ct_int4", edit=joined(parts, name, after, "ct_int4", scaled))
    lines = {f"*.{name}": "q"}
    if not scaled:
        assert plan_of(tmp_path, lines).modules
        return
    first, last = (word.rpartition(".")[2] for word in (name, after))
    with pytest.raises(RefusedError, match=rf"scales of {last}'s inputs are folded into {first} in `q`"):
        plan_of(tmp_path, lines)
    assert plan_of(tmp_path, {**lines, f"*.{after}": "q"}).modules


def test_a_pair_whose_values_are_elsewhere_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiny(tmp_path / "base", MODEL, "bf16")
    write_tiny(tmp_path / "q", MODEL, "ct_int4")
    monkeypatch.setattr(WeightProbe, "rows", lambda *_, **__: None)
    (note,) = plan_of(tmp_path, {"*.mlp.*": "q", "*.down_proj": "base"}).notes
    assert note.startswith("model.layers.{0..1}.mlp.down_proj: up_proj is from `q` and down_proj from `base`")
    assert "cannot be seen, since their values are not on this machine" in note


@pytest.mark.parametrize("alike", [True, False])
def test_quantized_sources_are_compared_with_one_another(tmp_path: Path, alike: bool) -> None:
    def trained(tensors: Tensors, config: Config) -> None:
        rng = np.random.default_rng(0)
        for name, weight in tensors.items():
            if name.endswith("_proj.weight") and not alike:
                w = weight.astype(np.float32)
                delta = rng.standard_normal((len(w), 8)) @ rng.standard_normal((8, w.shape[1]))
                delta *= 0.8 * np.linalg.norm(w) / np.linalg.norm(delta)
                tensors[name] = (w + delta).astype(ml_dtypes.bfloat16)

    write_tiny(tmp_path / "base", MODEL, "fp8_block")
    full = dict(tiny_tensors(MODEL, "bf16"))
    trained(full, {})

    def edit(tensors: Tensors, config: Config) -> None:
        for name, weight in full.items():
            if name.endswith("_proj.weight"):
                module = name.removesuffix(".weight")
                for leaf, tensor in VARIANTS["gptq_int4"].store(weight.astype(np.float32)).items():
                    tensors[f"{module}.{leaf}"] = tensor

    write_tiny(tmp_path / "q", MODEL, "gptq_int4", edit=edit)
    notes = [note for note in plan_of(tmp_path, {"*.mlp.*": "q"}).notes if "by more than rounding" in note]
    assert bool(notes) is not alike
    if notes:
        assert any("`q` differs from `base`" in note for note in notes)


def test_an_adapter_is_no_checkpoint(tmp_path: Path) -> None:
    write_tiny(tmp_path / "base", MODEL, "bf16")
    (tmp_path / "q").mkdir()
    (tmp_path / "q" / "adapter_config.json").write_text("{}")
    with pytest.raises(SourceError, match=r"q: an adapter \(adapter_config.json\) and no checkpoint: merge it"):
        plan_of(tmp_path, {"*.mlp.*": "q"})


def test_a_source_under_another_prefix_is_told_so(tmp_path: Path) -> None:
    def inside(tensors: Tensors, config: Config) -> None:
        for name in [name for name in tensors if name.startswith("model.")]:
            tensors[name.replace("model.", "model.language_model.", 1)] = tensors.pop(name)

    write_tiny(tmp_path / "base", MODEL, "bf16")
    write_tiny(tmp_path / "q", MODEL, "fp8_block", edit=inside)
    with pytest.raises(RefusedError) as refused:
        plan_of(tmp_path, {"*.down_proj": "q"})
    assert (
        "its names begin with another prefix, model.layers.0.mlp.down_proj is "
        "model.language_model.layers.0.mlp.down_proj there"
    ) in str(refused.value)
