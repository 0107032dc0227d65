"""Weights that were not made from the ones they are mixed with, and scales that no norm shows."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from support.write import LLAMA, QWEN3_MOE, VARIANTS, Config, Tensors, tiny_tensors, write_tiny

from mixprec_build.cli.app import main
from mixprec_build.errors import RefusedError
from mixprec_build.output.build import plan_recipe
from mixprec_build.planning.types import Plan

MODEL = replace(LLAMA, hidden=256, gain=1 / 16, kv_heads=4)
VARIANT_NAMES = ["fp8_block", "fp8_channel", "fp8_tensor", "gptq_int4", "awq_int4", "ct_int4"]


def trained_further(size: float) -> Callable[[Tensors, Config], None]:
    """Adds to each linear a product of rank 8, of ``size`` times its norm: what a LoRA leaves when it is merged."""

    def edit(tensors: Tensors, config: Config) -> None:
        rng = np.random.default_rng(0)
        for name, weight in tensors.items():
            if name.endswith("_proj.weight"):
                w = weight.astype(np.float32)
                delta = rng.standard_normal((len(w), 8)) @ rng.standard_normal((8, w.shape[1]))
                delta *= size * np.linalg.norm(w) / np.linalg.norm(delta)
                tensors[name] = (w + delta).astype(ml_dtypes.bfloat16)

    return edit


def plan_of(folder: Path, lines: dict[str, str], *, allow: bool = False) -> Plan:
    recipe = folder / "recipe.yaml"
    written = "".join(f"  '{pattern}': {source}\n" for pattern, source in lines.items())
    recipe.write_text(f"model: base\nsources: {{base: base, q: q}}\nweights:\n{written}")
    return plan_recipe(recipe, allow_unservable=allow)


@pytest.mark.parametrize("variant", VARIANT_NAMES)
def test_a_fine_tune_beside_its_bases_quantized_weights_is_noted(tmp_path: Path, variant: str) -> None:
    write_tiny(tmp_path / "base", MODEL, "bf16", edit=trained_further(0.6))
    write_tiny(tmp_path / "q", MODEL, variant)
    notes = plan_of(tmp_path, {"model.layers.*.self_attn.*": "q"}).notes
    (note,) = [note for note in notes if "by more than rounding" in note]
    assert note.startswith("model.layers.{0..1}.self_attn.{k_proj,o_proj,q_proj,v_proj}: `q` differs from `base`")


@pytest.mark.parametrize("size", [0.02, 0.1])
@pytest.mark.parametrize("variant", ["fp8_block", "fp8_channel", "fp8_tensor"])
def test_a_change_far_below_a_step_shows_in_many_weights(tmp_path: Path, variant: str, size: float) -> None:
    """Of each weight 2 % or 10 %, where FP8 rounds by up to 6 %."""
    write_tiny(tmp_path / "base", MODEL, "bf16", edit=trained_further(size))
    write_tiny(tmp_path / "q", MODEL, variant)
    notes = plan_of(tmp_path, {"model.layers.*.self_attn.*": "q", "model.layers.*.mlp.*": "q"}).notes
    (note,) = [note for note in notes if "by more than rounding" in note]
    assert all(word in note for word in ("down_proj", "k_proj", "o_proj", "up_proj"))


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("variant", ["fp8_block", "fp8_channel", "fp8_tensor"])
@pytest.mark.parametrize("fold", [0, 0.02, 0.7])
def test_other_roundings_and_scales_are_no_change(tmp_path: Path, variant: str, dtype: str, fold: float) -> None:
    """Of a quantizer that had them in BF16, or that folded scales into rows and columns."""
    write_tiny(tmp_path / "base", MODEL, dtype)
    write_tiny(tmp_path / "q", MODEL, variant, fold=fold)
    notes = plan_of(tmp_path, {"model.layers.*": "q"}).notes
    assert not [note for note in notes if "rounding" in note]


@pytest.mark.parametrize("variant", VARIANT_NAMES)
def test_what_rounding_made_is_not_noted(tmp_path: Path, variant: str) -> None:
    write_tiny(tmp_path / "base", MODEL, "bf16")
    write_tiny(tmp_path / "q", MODEL, variant)
    assert plan_of(tmp_path, {"model.layers.*.self_attn.*": "q", "model.layers.*.mlp.*": "q"}).notes == ()


@pytest.mark.parametrize("variant", ["awq_int4", "ct_int4"])
def test_folded_scales_are_no_other_weights(tmp_path: Path, variant: str) -> None:
    write_tiny(tmp_path / "base", MODEL, "bf16")
    write_tiny(tmp_path / "q", MODEL, variant, fold=0.7)
    notes = plan_of(tmp_path, {"model.layers.*.self_attn.*": "q", "model.layers.*.mlp.*": "q"}).notes
    assert not [note for note in notes if "rounding" in note]


def test_full_measures_every_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Later rows of one module in a layer that no sample looks at were changed."""
    model = replace(MODEL, layers=5)

    def edit(tensors: Tensors, config: Config) -> None:
        weight = tensors["model.layers.3.mlp.up_proj.weight"].copy()
        weight[128:] = -weight[128:]
        tensors["model.layers.3.mlp.up_proj.weight"] = weight

    write_tiny(tmp_path / "base", model, "bf16", edit=edit)
    write_tiny(tmp_path / "q", model, "gptq_int4")
    assert plan_of(tmp_path, {"*.mlp.*": "q"}).notes == ()
    (note,) = plan_recipe(tmp_path / "recipe.yaml", check_all=True).notes
    assert note.startswith("model.layers.3.mlp.up_proj: `q` differs from `base`") and "--check" not in note
    monkeypatch.setattr("sys.argv", ["mixprec", "plan", str(tmp_path / "recipe.yaml"), "--check", "full"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code in (0, None)
    assert "layers.3.mlp.up_proj" in "".join(capsys.readouterr())


# Scales between linears, with norms left as they are


def scaled_pair(folder: Path, before: str, after: str) -> None:
    """A ct_int4 source in which ``before`` was divided and ``after`` multiplied by scales; norms are the base's."""
    write_tiny(folder / "base", MODEL, "bf16")
    full = tiny_tensors(MODEL, "bf16")

    def edit(tensors: Tensors, config: Config) -> None:
        rng = np.random.default_rng(1)
        for layer in range(MODEL.layers):
            names = [f"model.layers.{layer}.{word}" for word in (before, after)]
            first, last = (full[f"{name}.weight"].astype(np.float32) for name in names)
            scales = np.exp(0.5 * rng.standard_normal(len(first))).astype(np.float32)
            for name, weight in zip(names, (first / scales[:, None], last * scales), strict=True):
                for leaf, tensor in VARIANTS["ct_int4"].store(weight).items():
                    tensors[f"{name}.{leaf}"] = tensor

    write_tiny(folder / "q", MODEL, "ct_int4", edit=edit)


@pytest.mark.parametrize(
    ("before", "after"), [("mlp.up_proj", "mlp.down_proj"), ("self_attn.v_proj", "self_attn.o_proj")]
)
@pytest.mark.parametrize("other", ["before", "after"])
def test_a_pair_whose_scales_no_norm_shows_stays_together(tmp_path: Path, before: str, after: str, other: str) -> None:
    scaled_pair(tmp_path, before, after)
    lines = {"model.layers.*.mlp.*": "q", "model.layers.*.self_attn.*": "q"}
    parts = ["mlp.{gate_proj,up_proj}" if "up" in before else "self_attn.{q_proj,k_proj,v_proj}", after]
    assert plan_of(tmp_path, lines).notes == ()
    lines[f"model.layers.*.{parts[other == 'after']}"] = "base"
    first, last = (word.rpartition(".")[2] for word in (before, after))
    with pytest.raises(RefusedError, match=rf"scales of {last}'s inputs are folded into {first} in `q`"):
        plan_of(tmp_path, lines)


def test_a_pair_without_scales_may_part(tmp_path: Path) -> None:
    write_tiny(tmp_path / "base", MODEL, "bf16")
    write_tiny(tmp_path / "q", MODEL, "ct_int4")
    assert plan_of(tmp_path, {"*.mlp.*": "q", "*.down_proj": "base"}).notes == ()


# Scales that mean something else, or nothing


def scaled(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Tensors, Config], None]:
    """Changes every scale of weights, in float32."""

    def edit(tensors: Tensors, config: Config) -> None:
        for name in [name for name in tensors if name.endswith(("scale_inv", "scale", "scales"))]:
            if "input" not in name and "k_proj" not in name:
                with np.errstate(all="ignore"):
                    tensors[name] = change(tensors[name].astype(np.float32)).astype(tensors[name].dtype)

    return edit


@pytest.mark.parametrize("variant", [*VARIANT_NAMES, "ct_nvfp4"])
def test_scales_stored_as_their_reciprocals_are_refused(tmp_path: Path, variant: str) -> None:
    """Of NVFP4, the scale of blocks in E4M3, too; the scale of all is a reciprocal in ct_nvfp4, and not in nvfp4."""
    write_tiny(tmp_path / "base", MODEL, "bf16")
    write_tiny(tmp_path / "q", MODEL, variant, edit=scaled(np.reciprocal))
    with pytest.raises(RefusedError) as refused:
        plan_of(tmp_path, {"*.mlp.*": "q"})
    assert {problem.code for problem in refused.value.problems} == {"different_weights"}
    text = str(refused.value)
    assert "`q` has the weights of `base` times about 1e" in text
    assert all(word in text for word in ("gate_proj", "up_proj", "down_proj", "Fetch `q` again"))
    plan = plan_of(tmp_path, {"*.mlp.*": "q"}, allow=True)
    assert [problem.code for problem in plan.problems] == [problem.code for problem in refused.value.problems]


@pytest.mark.parametrize("variant", ["fp8_block", "fp8_channel", "gptq_int4", "ct_int4"])
@pytest.mark.parametrize("factor", [2, 0.5, 16])
def test_weights_times_one_factor_are_refused(tmp_path: Path, variant: str, factor: float) -> None:
    """Two: bytes of E4M3 as AMD's MI300 reads them, with another bias of exponents."""
    write_tiny(tmp_path / "base", MODEL, "bf16")
    write_tiny(tmp_path / "q", MODEL, variant, edit=scaled(lambda scale: scale * factor))
    with pytest.raises(RefusedError, match=f"`q` has the weights of `base` times about {factor:.2g}"):
        plan_of(tmp_path, {"*.mlp.*": "q"})


@pytest.mark.parametrize(
    ("value", "said"), [(np.nan, r"no numbers \(NaN or infinite\)"), (np.inf, "no numbers"), (0, "scales of zero")]
)
def test_scales_that_are_no_numbers_or_zero_are_refused(tmp_path: Path, value: float, said: str) -> None:
    write_tiny(tmp_path / "base", MODEL, "bf16")
    write_tiny(tmp_path / "q", MODEL, "fp8_block", edit=scaled(lambda scale: np.full_like(scale, value)))
    with pytest.raises(RefusedError, match=rf"mlp\.{{down_proj,gate_proj,up_proj}}: `q` has .*{said}"):
        plan_of(tmp_path, {"*.mlp.*": "q"})


def test_one_scale_of_zero_is_found_where_all_are_looked_at(tmp_path: Path) -> None:
    def edit(tensors: Tensors, config: Config) -> None:
        scale = tensors["model.layers.1.mlp.up_proj.weight_scale_inv"].copy()
        scale[-1, -1] = 0
        tensors["model.layers.1.mlp.up_proj.weight_scale_inv"] = scale

    write_tiny(tmp_path / "base", MODEL, "bf16")
    write_tiny(tmp_path / "q", MODEL, "fp8_block", edit=edit)
    assert plan_of(tmp_path, {"*.mlp.*": "q"}).notes == ()
    with pytest.raises(RefusedError, match=r"- model\.layers\.1\.mlp\.up_proj: `q` has scales of zero"):
        plan_recipe(tmp_path / "recipe.yaml", check_all=True)


def test_inputs_of_which_no_weight_is_left_are_no_damage(tmp_path: Path) -> None:
    """Blocks of zeros have scales of zero in some tools, and of one in others."""

    def emptied(tensors: Tensors, config: Config) -> None:
        for name in [name for name in tensors if name.endswith("up_proj.weight")]:
            weight = tensors[name].copy()
            weight[:, :128] = 0
            tensors[name] = weight
        for name in [name for name in tensors if name.endswith("up_proj.weight_scale_inv")]:
            scale = tensors[name].copy()
            scale[:, 0] = 0
            tensors[name] = scale

    write_tiny(tmp_path / "base", MODEL, "bf16", edit=emptied)
    write_tiny(tmp_path / "q", MODEL, "fp8_block", edit=emptied)
    assert plan_of(tmp_path, {"*.mlp.*": "q"}).notes == ()


# Weights in another order


def turned(tensors: Tensors, config: Config) -> None:
    """Each expert in the place of the next."""
    found = [(re.fullmatch(r"(.+\.experts\.)(\d+)(\..+)", name), name) for name in tensors]
    places = {name: f"{m[1]}{(int(m[2]) + 1) % QWEN3_MOE.experts}{m[3]}" for m, name in found if m is not None}
    moved = {place: tensors.pop(name) for name, place in places.items()}
    tensors.update(moved)


@pytest.mark.parametrize("variant", ["fp8_block", "gptq_int4", "awq_int4", "ct_nvfp4"])
def test_experts_in_another_order_are_a_warning(tmp_path: Path, variant: str) -> None:
    write_tiny(tmp_path / "base", replace(QWEN3_MOE, gain=1 / 16), "bf16")
    write_tiny(tmp_path / "q", replace(QWEN3_MOE, gain=1 / 16), variant, edit=turned)
    plan = plan_of(tmp_path, {"*.experts.*": "q"})
    (warning,) = plan.warnings
    assert warning.code == "different_weights"
    assert "`q` has nothing of the weights that `base` has here: its experts, rows or packed values are in" in str(
        warning
    )
    assert not [note for note in plan.notes if "by more than rounding" in note]


def test_a_fine_tune_has_most_of_its_base(tmp_path: Path) -> None:
    write_tiny(tmp_path / "base", MODEL, "bf16", edit=trained_further(0.6))
    write_tiny(tmp_path / "q", MODEL, "gptq_int4")
    assert not plan_of(tmp_path, {"*.self_attn.*": "q"}).warnings


# Scales of inputs that a calibration left without a value


@pytest.mark.parametrize("value", [0, np.nan, np.inf, -1])
def test_static_scales_that_nothing_can_be_divided_by_are_refused(tmp_path: Path, value: float) -> None:
    def edit(tensors: Tensors, config: Config) -> None:
        tensors["model.layers.1.mlp.down_proj.input_scale"] = np.array(value, np.float32)

    write_tiny(tmp_path / "base", MODEL, "bf16")
    write_tiny(tmp_path / "q", MODEL, "fp8_tensor", activations="static", edit=edit)
    assert not plan_of(tmp_path, {"*.self_attn.*": "q", "*.{gate,up}_proj": "q"}).problems
    with pytest.raises(RefusedError) as refused:
        plan_of(tmp_path, {"*.mlp.*": "q"})
    (problem,) = refused.value.problems
    assert problem.code == "kernel_limit" and problem.modules == ("model.layers.1.mlp.down_proj",)
    assert f"its input_scale is {value:g}, by which activations cannot be divided" in str(problem)


def test_an_expert_that_no_token_of_the_calibration_reached_may_have_a_scale_of_zero(tmp_path: Path) -> None:
    """SGLang takes the largest of all experts."""

    def unreached(value: float) -> Callable[[Tensors, Config], None]:
        def edit(tensors: Tensors, config: Config) -> None:
            for name in [name for name in tensors if ".experts.1." in name and name.endswith("input_scale")]:
                tensors[name] = np.array(value, np.float32)

        return edit

    write_tiny(tmp_path / "base", QWEN3_MOE, "bf16")
    write_tiny(tmp_path / "q", QWEN3_MOE, "fp8_tensor", activations="static", edit=unreached(0))
    assert not plan_of(tmp_path, {"*.experts.*": "q"}).problems
    write_tiny(tmp_path / "none" / "q", QWEN3_MOE, "fp8_tensor", activations="static", edit=unreached(np.nan))
    (tmp_path / "none" / "base").symlink_to(tmp_path / "base")
    with pytest.raises(RefusedError, match=r"experts\.1\..*: .*its input_scale is nan"):
        plan_of(tmp_path / "none", {"*.experts.*": "q"})
