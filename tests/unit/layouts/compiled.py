"""Models that are compiled once for all tests of layouts."""

from __future__ import annotations

from pathlib import Path

from support.cut_models import LINES, MOE, SIZES
from support.serving import DEEPSEEK, LLAMA, MIXTRAL, Shape, write_sources

from mixprec_build.checkpoint.degree import Degree
from mixprec_build.output.build import plan_recipe, run_plan

SMALL = LLAMA.of(layers=3, hidden=128, intermediate=256, heads=2, kv_heads=2, head_dim=64, vocab=4096)


def compile_(folder: Path, shape: Shape, lines: dict[str, str], *, name: str = "out", output: str = "") -> Path:
    home, variants = folder / "sources", sorted({"bf16", *lines.values()})
    write_sources(home, shape, variants, skip=["*.kv_b_proj"])
    text = [f"model: {home / 'bf16'}", "sources:", *(f"  from_{v}: {home / v}" for v in variants)]
    text += ["default: from_bf16"]
    text += ["weights:", *(f"  '{pattern}': from_{variant}" for pattern, variant in lines.items()), output]
    recipe = folder / f"{name}.yaml"
    recipe.write_text("\n".join(text))
    run_plan(plan_recipe(recipe, allow_unservable=True), folder / name)
    return folder / name


DENSE = LLAMA.of(**SIZES, layers=5, vocab=100)
DENSE_LINES = {
    f"model.layers.{layer}.{part}": variant
    for layer, variants in enumerate(
        [
            ("fp8_block", "fp8_channel", "fp8_tensor", "gptq_int8"),
            ("gptq_int4_act", "gptq_int4", "gptq_int4_g64", "awq_int4"),
            ("ct_int4", "ct_int4_act", "ct_int4_asym", "ct_int4_g32"),
            ("ct_fp8_block", "ct_fp8_weight", "ct_int8", "int8_channel"),
            ("int8_block", "gptq_int4_act", "bf16", "fp8_block"),
        ]
    )
    for part, variant in zip(
        ("self_attn.{q,k,v}_proj", "self_attn.o_proj", "mlp.{gate,up}_proj", "mlp.down_proj"), variants, strict=True
    )
}
MOE_LINES = {
    **LINES,
    "model.layers.1.mlp.experts.{0,2}.*": "awq_int4",
    "model.layers.1.mlp.experts.3.*": "ct_int4",
    "model.layers.1.mlp.experts.4.*": "ct_int8",
    "model.layers.1.mlp.experts.5.*": "ct_fp8_block",
    "model.layers.1.mlp.experts.7.*": "int8_channel",
    "model.layers.1.mlp.experts.{4,6}.down_proj": "fp8_block",
}
# 384 columns for two ranks, and two key-value heads for four: zeros are added, heads repeated.
MODELS = {
    "dense": (DENSE, DENSE_LINES, [Degree(2), Degree(4)]),
    "moe": (MOE, MOE_LINES, [Degree(4, 2), Degree(2, 1, 2)]),
    "mixtral": (
        MIXTRAL.of(**{**SIZES, "expert_intermediate": 512}, layers=1, vocab=100),
        {"*.experts.*": "gptq_int4_act", "*.experts.{0,5}.*": "fp8_tensor"},
        [Degree(2, 2), Degree(1)],
    ),
    "deepseek": (
        DEEPSEEK.of(**SIZES, layers=2, vocab=100),
        {"*.q_b_proj": "fp8_channel", "*.o_proj": "fp8_block", "*.experts.*": "gptq_int4"},
        [Degree(2), Degree(4, 4)],
    ),
}


def built(folder: Path, name: str) -> Path:
    home = folder / name
    if not home.exists():
        home.mkdir()
        shape, lines, _ = MODELS[name]
        compile_(home, shape, lines, output="output: {shard_size: 2MiB}")
    return home / "out"


class Killed(BaseException):
    """No handler of errors sees it."""
