"""What configurations of released checkpoints mean, each over tensors that its producer writes.

Every file of ``tests/data/configs`` has a row here: the checkpoint in small, stored as that release is. A module's
storage says how it is to be read, or by what name it is to be refused. A release that holds refused modules is
planned with these taken from its BF16 sibling.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import producers as made
from support.producers import Checkpoint, Storage, real_config, weight_of

from mixprec_build.checkpoint.typed import Source, open_source
from mixprec_build.errors import MixprecError, RefusedError
from mixprec_build.formats.base import FormatError
from mixprec_build.output.build import plan_recipe, run_plan
from mixprec_build.report.doctor import examine

Config = dict[str, Any]


def _block(config: Config) -> Config:
    """The declaration of a release, wherever it stands."""
    found: Config = config.get("quantization_config") or config["text_config"]["quantization_config"]
    return found


def _set(*path: str | int, to: object) -> Callable[[Config], None]:
    """Sets one value of the declaration: what the source of a configuration left open."""

    def edit(files: Config) -> None:
        node: Any = _block(files["config"])
        for key in path[:-1]:
            node = node[key]
        node[path[-1]] = to

    return edit


ROUTER_BIAS = "*e_score_correction_bias"

MLA_BF16 = {f"*.{name}": made.BF16 for name in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")}
LINEAR_ATTENTION = "*.linear_attn.in_proj_qkv", "*.linear_attn.in_proj_z", "*.linear_attn.out_proj"
GDN_BF16 = {"*.in_proj_[ab]": made.BF16, "*.conv1d": made.BF16, "*.visual.*": made.BF16}
MTP_BF16 = {"mtp.*": made.BF16}
MODELOPT_KV = ("k_proj.k_scale", "v_proj.v_scale")
MLA_KV = ("k_proj.k_scale", "v_proj.v_scale")
EXPERTS = "*.experts.?.*"
VISION = {"vision_tower.*": made.BF16, "mm_projector.*": made.BF16}


def _each(patterns: tuple[str, ...], storage: Storage) -> dict[str, Storage]:
    return dict.fromkeys(patterns, storage)


def _indexer(storage: Storage) -> dict[str, Storage]:
    return {"*.indexer.wq_b": storage, "*.indexer.wk": storage}


_NEMOTRON = made.nemotron("ME*E")

CHECKPOINTS: Mapping[str, Checkpoint] = {
    # FP8 of vendors
    "minimax-m2.5-fp8": Checkpoint(
        made.minimax(), {ROUTER_BIAS: made.F32, "*_proj": made.FP8_BLOCK, EXPERTS: made.FP8_BLOCK}
    ),
    "minimax-m3-bf16": Checkpoint(made.minimax(family="minimax_m3", dense=1), {ROUTER_BIAS: made.F32}),
    "zai-glm-5-fp8": Checkpoint(
        made.deepseek(family="glm_moe_dsa", indexers=(0, 1, 2), draft=78),
        {ROUTER_BIAS: made.F32, "*.eh_proj": made.BF16, **_indexer(made.FP8_BLOCK)}
        | {"*.indexer.weights_proj": made.BF16, "*_proj": made.FP8_BLOCK, "*_proj_with_mqa": made.FP8_BLOCK},
    ),
    "zai-glm-5.2-fp8": Checkpoint(
        made.deepseek(layers=4, family="glm_moe_dsa", indexers=(0, 1, 2, 4), draft=78),
        {ROUTER_BIAS: made.F32, "*.eh_proj": made.BF16, **_indexer(made.FP8_BLOCK)}
        | {"*.indexer.weights_proj": made.BF16, "*_proj": made.FP8_BLOCK, "*_proj_with_mqa": made.FP8_BLOCK},
    ),
    "step-3.7-flash-fp8": Checkpoint(
        made.step3(),
        {"*.router_bias": made.F32, "*.g_proj": made.BF16, "*.eh_proj": made.BF16, "*_proj": made.FP8_BLOCK},
    ),
    "intern-s2-mobius-fp8": Checkpoint(
        made.qwen3_5(layers=3, experts="fused", draft=False, full=(2,)),
        {"*.linear_attn.*": made.BF16, "*.visual.*": made.BF16, "*.experts.*": made.FP8_FUSED}
        | {"*_proj": made.FP8_BLOCK},
    ),
    "qwen3.6-35b-a3b-fp8": Checkpoint(
        made.qwen3_5(experts="each"), {**GDN_BF16, **_each(LINEAR_ATTENTION, made.FP8_BLOCK), "*_proj": made.FP8_BLOCK}
    ),
    "deepseek-v4-flash": Checkpoint(
        made.deepseek_v4(),
        {EXPERTS: made.DSV4_MXFP4, "*.shared_experts.*": made.DSV4_FP8, "*.attn.w*": made.DSV4_FP8}
        | {"mtp.0.[eh]_proj": made.DSV4_FP8},
    ),
    "llama4-maverick-bf16": Checkpoint(made.llama4(), stack=made.llama4_stacked),
    "minimax-m3-mxfp8": Checkpoint(
        made.minimax(layers=4, family="minimax_m3", prefix="language_model.", dense=3),
        {ROUTER_BIAS: made.F32, "*_proj": made.MXFP8, EXPERTS: made.MXFP8},
    ),
    "minimax-m3.1-hybrid": Checkpoint(
        made.minimax(family="minimax_m3", prefix="language_model.", dense=1),
        {ROUTER_BIAS: made.F32, "*_proj": made.MXFP8, EXPERTS: made.CT_NVFP4},
    ),
    "gpt-oss-120b-mxfp4": Checkpoint(made.gpt_oss(), {EXPERTS: made.QUARK_MXFP4}, stack=made.gpt_oss_stacked),
    # ModelOpt
    "qwen3-32b-fp8-static-pertensor": Checkpoint(
        made.llama(family="qwen3", qk_norm=True), {"*_proj": made.MODELOPT_FP8}, MODELOPT_KV
    ),
    "nvidia-llama-3.1-70b-fp8": Checkpoint(made.llama(), {"*_proj": made.MODELOPT_FP8}, MODELOPT_KV),
    "nvidia-deepseek-v3.1-nvfp4": Checkpoint(
        made.deepseek(layers=3, draft=61),
        {ROUTER_BIAS: made.F32, "model.layers.3.*": made.BF16, **MLA_BF16, "*_proj": made.NVFP4},
        MLA_KV,
    ),
    "nvidia-deepseek-v3.2-nvfp4": Checkpoint(
        made.deepseek(layers=3, family="deepseek_v32", indexers=(0, 1, 2, 3), draft=61),
        {ROUTER_BIAS: made.F32, "model.layers.3.*": made.BF16, **MLA_BF16, **_indexer(made.BF16)}
        | {"*.weights_proj": made.BF16, "*_proj": made.NVFP4},
        MLA_KV,
    ),
    "nvidia-glm-5-nvfp4": Checkpoint(
        made.deepseek(layers=3, family="glm_moe_dsa", indexers=(0, 1, 2)),
        {ROUTER_BIAS: made.F32, "*.self_attn.*": made.BF16, "*_proj": made.NVFP4},
        MLA_KV,
    ),
    "nvidia-kimi-k2.5-nvfp4": Checkpoint(
        made.deepseek(layers=3, prefix="language_model.", vision=True),
        {ROUTER_BIAS: made.F32, **VISION, "*.self_attn.*": made.BF16, "*_proj": made.NVFP4},
        MLA_KV,
    ),
    "nvidia-minimax-m2.7-nvfp4": Checkpoint(
        made.minimax(), {ROUTER_BIAS: made.F32, "*.self_attn.*": made.BF16, EXPERTS: made.NVFP4}, MODELOPT_KV
    ),
    "nvidia-nemotron-3-nano-nvfp4": Checkpoint(
        _NEMOTRON,
        {ROUTER_BIAS: made.F32, "*.[qkvo]_proj": made.BF16, "*.mixer.*_proj": made.NVFP4},
        MODELOPT_KV,
    ),
    "nvidia-nemotron-3-super-nvfp4": Checkpoint(
        _NEMOTRON,
        {ROUTER_BIAS: made.F32, "*.[qkvo]_proj": made.BF16, EXPERTS: made.NVFP4, "*.mixer.*_proj": made.MODELOPT_FP8},
        MODELOPT_KV,
    ),
    "nvidia-qwen3-235b-nvfp4": Checkpoint(made.qwen3_moe(), {"*_proj": made.NVFP4}, MODELOPT_KV),
    "nvidia-qwen3.5-397b-nvfp4": Checkpoint(
        made.qwen3_5(layers=4, experts="each", full=(3,)), {**MTP_BF16, EXPERTS: made.NVFP4}, MODELOPT_KV
    ),
    "nvidia-qwen3.6-27b-nvfp4": Checkpoint(
        made.qwen3_5(layers=4, full=(3,)),
        {**MTP_BF16, **GDN_BF16, **_each(LINEAR_ATTENTION, made.MODELOPT_FP8), "*.self_attn.*_proj": made.MODELOPT_FP8}
        | {"*.mlp.*_proj": made.NVFP4_A16, "lm_head": made.NVFP4_A16},
        MODELOPT_KV,
    ),
    "modelopt-mixed-precision-means-w4afp8": Checkpoint(
        made.deepseek(layers=4),
        {ROUTER_BIAS: made.F32, EXPERTS: made.W4AFP8, "*.kv_b_proj": made.FP8_BLOCK, "*_proj": made.FP8_BLOCK}
        | {"*_proj_with_mqa": made.FP8_BLOCK},
    ),
    "w4afp8-ignored-layers": Checkpoint(
        made.deepseek(),
        {ROUTER_BIAS: made.F32, EXPERTS: made.W4AFP8, "*_proj": made.FP8_BLOCK, "*_proj_with_mqa": made.FP8_BLOCK},
    ),
    # compressed-tensors
    "kimi-k2.5-int4": Checkpoint(
        made.deepseek(family="kimi_k2", prefix="language_model.", vision=True),
        {ROUTER_BIAS: made.F32, **VISION, EXPERTS: made.CT_INT4_G32},
    ),
    "kimi-k3-mxfp4": Checkpoint(made.kimi_k3(), {"*.A_log": made.F32, EXPERTS: made.CT_MXFP4}),
    "unsloth-qwen3.8-27b-nvfp4": Checkpoint(
        made.qwen3_5(layers=58, full=(3, 56)),
        {**MTP_BF16, **GDN_BF16, **_each(LINEAR_ATTENTION, made.CT_FP8_CHANNEL)}
        | {"*.self_attn.*_proj": made.CT_FP8_CHANNEL, "lm_head": made.CT_FP8_CHANNEL}
        | {"*.layers.5[67].mlp.*_proj": made.CT_FP8_CHANNEL, "*.mlp.*_proj": made.CT_NVFP4},
        ("k_scale", "v_scale"),
    ),
    "redhat-glm-5.3-flash-nvfp4": Checkpoint(
        made.deepseek(family="glm5_next", draft=99),
        {ROUTER_BIAS: made.F32, "model.layers.2.eh_proj": made.BF16, "model.layers.2.*_proj": made.CT_FP8_TENSOR_W8A16}
        | {"model.layers.2.*_with_mqa": made.CT_FP8_TENSOR_W8A16, EXPERTS: made.CT_NVFP4},
        edit=_set("config_groups", "group_1", "targets", to=["re:.*layers\\.2\\..*"]),
    ),
    "gpustack-glm-5.3-w4a8": Checkpoint(
        made.deepseek(family="glm_moe_dsa"),
        {ROUTER_BIAS: made.F32, EXPERTS: made.CT_W4A8, "*_proj": made.CT_FP8_BLOCK}
        | {"*_proj_with_mqa": made.CT_FP8_BLOCK},
    ),
    "minimax-m2.1-fp8-int4-recombined": Checkpoint(
        made.minimax(),
        {ROUTER_BIAS: made.F32, EXPERTS: made.CT_INT4_G32, "*_proj": made.CT_FP8_BLOCK},
        edit=_set("ignore", to=["lm_head", "re:.*block_sparse_moe\\.gate$"]),
    ),
    "ct-mxfp8-quantized": Checkpoint(made.llama(family="qwen3", qk_norm=True), {"*_proj": made.CT_MXFP8}),
    "ct-w4a16-nvfp4-lm-head": Checkpoint(made.qwen3_moe(), {"*_proj": made.CT_NVFP4_A16, "lm_head": made.CT_NVFP4_A16}),
    "ct-moe-target-fusedmoe": Checkpoint(
        made.qwen3_5(experts="each", draft=False, vision=False),
        {**GDN_BF16, "*.layers.1.self_attn.[qkv]_proj": made.BF16, EXPERTS: made.CT_NVFP4_A16}
        | {**_each(LINEAR_ATTENTION, made.CT_INT4_G128), "*_proj": made.CT_INT4_G128},
    ),
    "ct-mi250x-f32-scale": Checkpoint(made.qwen3_moe(), {"*_proj": made.CT_INT4_F32}),
    "qwen3.5-ct-mtp-ignore-individually": Checkpoint(
        made.qwen3_5(vision=False),
        {**MTP_BF16, **GDN_BF16, **_each(LINEAR_ATTENTION, made.CT_INT4_G128), "*_proj": made.CT_INT4_G128},
    ),
    # GPTQ and AutoRound
    "gptqmodel-meta-dynamic-null": Checkpoint(made.llama(), {"*_proj": made.GPTQ_G32_ACT_ORDER}),
    "gptqmodel-dynamic-empty-object": Checkpoint(made.llama(), {"*_proj": made.GPTQ_G128}),
    "gptq-double-spelling-jointq": Checkpoint(made.llama(), {"*.down_proj": made.GPTQ_3BIT, "*_proj": made.GPTQ_G128}),
    "autoround-qwen3.5-model-free": Checkpoint(
        made.qwen3_5(),
        {"*.visual.*": made.BF16, "*.linear_attn.in_proj_*": made.AUTO_ROUND_GPTQ, "*_proj": made.AUTO_ROUND_GPTQ},
    ),
    "intel-autoround-qwen3.5-122b-hybrid": Checkpoint(
        made.qwen3_5(experts="each"),
        {**MTP_BF16, **GDN_BF16, EXPERTS: made.AUTO_ROUND_GPTQ, **_each(LINEAR_ATTENTION, made.FP8_BLOCK)}
        | {"*_proj": made.FP8_BLOCK},
        beside={"model_extra_tensors.safetensors": "mtp.*"},
    ),
    # AWQ and Quark
    "minicpm-o-awq-null": Checkpoint(made.llama(), {"*_proj": made.AWQ}),
    "awq-old-spelling": Checkpoint(made.llama(), {"*_proj": made.AWQ}),
    "quark-awq-signed": Checkpoint(made.llama(), {"*_proj": made.QUARK_AWQ}),
    "quark-amd-kimi-k2.5-mxfp4": Checkpoint(
        made.deepseek(prefix="language_model.", vision=True),
        {ROUTER_BIAS: made.F32, **VISION, "*.self_attn.*": made.BF16, "*_proj": made.QUARK_MXFP4},
    ),
    "quark-deepseek-v4-pro-mxfp4": Checkpoint(
        made.deepseek_v4(),
        {EXPERTS: made.QUARK_MXFP4, "*.shared_experts.*": made.QUARK_FP8_E8M0, "*.attn.w*": made.QUARK_FP8_E8M0},
    ),
    "quark-qwen3.8-awq-mxfp4": Checkpoint(
        made.qwen3_5(),
        {**MTP_BF16, **GDN_BF16, **_each(LINEAR_ATTENTION, made.QUARK_MXFP4), "*_proj": made.QUARK_MXFP4},
    ),
    "quark-qwen3.5-mtp-partial": Checkpoint(
        made.qwen3_5(experts="each"),
        {"mtp.*.experts.*": made.QUARK_MXFP4, **MTP_BF16, **GDN_BF16, **_each(LINEAR_ATTENTION, made.QUARK_MXFP4)}
        | {"*_proj": made.QUARK_MXFP4},
    ),
}

REFUSED = {
    # MXFP8
    "minimax-m3-mxfp8", "minimax-m3.1-hybrid", "ct-mxfp8-quantized",
    # 4-bit weights that are to meet 8-bit activations, and others without a kernel
    "gpustack-glm-5.3-w4a8",
    "gptq-double-spelling-jointq", "quark-awq-signed", "intern-s2-mobius-fp8",
}  # fmt: skip
"""Files of which some modules are in a format that is not read."""

ROWS = sorted(CHECKPOINTS)


@pytest.fixture
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Source:
    name: str = request.param
    return open_source(str(CHECKPOINTS[name].write(tmp_path / "q", real_config(name))))


def _scale_of_cache(name: str) -> bool:
    return name.endswith((".k_scale", ".v_scale", ".output_scale"))


def test_every_configuration_has_a_row() -> None:
    assert {path.stem for path in made.CONFIGS.glob("*.json")} == CHECKPOINTS.keys()


def test_rows_say_what_they_hold() -> None:
    for name, checkpoint in CHECKPOINTS.items():
        unread = {s.named for s in map(checkpoint.storage, (p.name for p in checkpoint.skeleton.parts)) if s.named}
        assert bool(unread) == (name in REFUSED), name


@pytest.mark.parametrize(("name", "source"), [(name, name) for name in ROWS], ids=ROWS, indirect=["source"])
def test_each_module_is_read_as_it_is_stored(name: str, source: Source) -> None:
    checkpoint = CHECKPOINTS[name]
    stored = checkpoint.tensors()
    wrong = []
    for part in checkpoint.skeleton.parts:
        expected = checkpoint.storage(part.name)
        # Tensors without a leaf that a reader knows are modules of their own.
        names = source.formats.keys() & {part.name, *stored[part.name]}
        if not names:
            wrong.append(f"{part.name} is not there")
        for found in sorted(names):
            fmt = source.formats[found]
            if isinstance(fmt, FormatError):
                if not expected.named or expected.named.lower() not in str(fmt).lower():
                    wrong.append(f"{found} is {expected.kind or expected.named}: {fmt}")
            elif fmt.kind != expected.kind:
                wrong.append(f"{found} is {expected.kind or expected.named}, read as {fmt.kind}")
    assert not wrong, "\n".join(wrong[:12])


@pytest.mark.parametrize(
    ("name", "source"),
    [(name, name) for name in ROWS if any(s.error for s in CHECKPOINTS[name].stored.values())],
    indirect=["source"],
)
def test_what_is_read_has_the_values_that_were_stored(name: str, source: Source) -> None:
    checked = 0
    for part in CHECKPOINTS[name].skeleton.parts:
        expected = CHECKPOINTS[name].storage(part.name)
        if not expected.error or expected is made.BF16 or source.known_format(part.name) is None:
            continue
        weight = weight_of(part.name, part.shape)
        error = np.linalg.norm(source.dequantize(part.name) - weight) / np.linalg.norm(weight)
        assert error < expected.error, part.name
        checked += 1
    assert checked or not any(s.kind and s is not made.BF16 and s is not made.F32 for s in _used(name))


def _used(name: str) -> list[Storage]:
    return [CHECKPOINTS[name].storage(part.name) for part in CHECKPOINTS[name].skeleton.parts]


@pytest.mark.parametrize("name", ROWS)
def test_a_release_is_planned_or_refused_by_name(name: str, tmp_path: Path) -> None:
    """It is planned alone where all of it is read; else the refusal names the format."""
    checkpoint = CHECKPOINTS[name]
    checkpoint.write(tmp_path / "q", real_config(name))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: q\n")
    if name in REFUSED:
        words = {storage.named.lower() for storage in _used(name) if storage.named}
        with pytest.raises(MixprecError) as refused:
            plan_recipe(recipe, allow_unservable=True)
        assert any(word in str(refused.value).lower() for word in words), refused.value
        assert "\n" not in str(refused.value).strip()
        return
    plan = plan_recipe(recipe, allow_unservable=True)
    planned = {module for module in plan.modules if not _scale_of_cache(module)}
    assert planned == {part.name for part in checkpoint.skeleton.parts}


@pytest.mark.parametrize("name", ["kimi-k3-mxfp4", "deepseek-v4-flash"])
def test_a_release_with_experts_in_mxfp4_alone_is_planned_for_a_server(name: str, tmp_path: Path) -> None:
    """Of Kimi-K3 there is none in another format to mix it with; DeepSeek-V4 declares FP8 only."""
    CHECKPOINTS[name].write(tmp_path / "q", real_config(name))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: q\n")
    plan = plan_recipe(recipe)
    assert {planned.format.kind for name, planned in plan.modules.items() if ".experts." in name} == {"mxfp4"}


@pytest.mark.parametrize(
    ("name", "code", "text"),
    [
        ("quark-deepseek-v4-pro-mxfp4", "role_limit", "wo_a.*whose scales are called `scale`, as DeepSeek's"),
    ],
)
def test_what_no_server_takes_is_refused_before_a_build(name: str, code: str, text: str, tmp_path: Path) -> None:
    CHECKPOINTS[name].write(tmp_path / "q", real_config(name))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: q\n")
    with pytest.raises(RefusedError, match=text) as refused:
        plan_recipe(recipe)
    assert {problem.code for problem in refused.value.problems} == {code}
    run_plan(plan_recipe(recipe, allow_unservable=True), tmp_path / "out")
    told = [finding.text for finding in examine(tmp_path / "out") if finding.status == "fail"]
    assert any(re.search(text, one) for one in told)


def test_experts_of_kimi_k3_in_nvfp4_are_refused_before_a_build(tmp_path: Path) -> None:
    """There are releases: SGLang's method for NVFP4 has their activation on Blackwell alone."""

    def in_nvfp4(files: Config) -> None:
        group = _block(files["config"])["config_groups"]["group_0"]
        group["weights"] = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
        group |= {"format": "nvfp4-pack-quantized", "input_activations": {**group["weights"], "dynamic": "local"}}

    name, parts = "kimi-k3-mxfp4", {"*.A_log": made.F32, EXPERTS: made.CT_NVFP4}
    CHECKPOINTS[name].write(tmp_path / "mx", real_config(name))
    Checkpoint(made.kimi_k3(), parts, edit=in_nvfp4).write(tmp_path / "nv", real_config(name))
    recipe, why = tmp_path / "recipe.yaml", r"SGLang's method for NVFP4 experts refuses their activation \(situ\)\."
    recipe.write_text("model: nv\n")
    with pytest.raises(RefusedError, match=rf"`model` \(the default\): {why} No source .*: add one that can"):
        plan_recipe(recipe)
    recipe.write_text("model: mx\nsources: {mx: mx, nv: nv}\ndefault: mx\nweights:\n  '*.experts.1.*': nv\n")
    with pytest.raises(
        RefusedError, match=rf"line 5 `\*\.experts\.1\.\*: nv`\): {why} Add below line 5: .*: mx`"
    ) as refused:
        plan_recipe(recipe)
    assert [problem.code for problem in refused.value.problems] == ["kernel_limit"]
    run_plan(plan_recipe(recipe, allow_unservable=True), tmp_path / "out")
    told = [finding.text for finding in examine(tmp_path / "out") if finding.status == "fail"]
    assert any(re.search(why.removesuffix(r"\."), one) for one in told)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_a_refused_release_has_that_is_read_is_planned(name: str, tmp_path: Path) -> None:
    """With the refused modules taken from the model's BF16 release, as the refusal advises."""
    checkpoint, real = CHECKPOINTS[name], real_config(name)
    checkpoint.write(tmp_path / "q", real)
    config: Config = real.get("config") or {}
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    checkpoint.unquantized().write(tmp_path / "bf16", {"config": plain})
    read = [part.name for part in checkpoint.skeleton.parts if checkpoint.storage(part.name).kind]
    lines = "".join(f"  '{module}': q\n" for module in read)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: bf16\nsources: {{q: q, bf16: bf16}}\ndefault: bf16\nweights:\n{lines}")
    plan = plan_recipe(recipe, allow_unservable=True)
    for module in read:
        assert plan.modules[module].format.kind == checkpoint.storage(module).kind, module


@pytest.mark.parametrize("name", [name for name in ROWS if CHECKPOINTS[name].kv_scales and name not in REFUSED])
def test_scales_of_the_kv_cache_are_planned_with_attention(name: str, tmp_path: Path) -> None:
    checkpoint = CHECKPOINTS[name]
    real = real_config(name)
    checkpoint.write(tmp_path / "q", real)
    plain = {key: value for key, value in real["config"].items() if key != "quantization_config"}
    checkpoint.unquantized().write(tmp_path / "bf16", {"config": plain})
    recipe = tmp_path / "recipe.yaml"
    attention = checkpoint.attentions()[0]
    recipe.write_text(f"model: bf16\nsources: {{q: q, bf16: bf16}}\nweights:\n  '{attention}.*': q\n")
    plan = plan_recipe(recipe, allow_unservable=True)
    planned = {tensor.info.name for shard in plan.shards for tensor in shard.tensors}
    scales = {f"{attention}.{scale}" for scale in checkpoint.kv_scales}
    assert {name for name in planned if _scale_of_cache(name)} == scales


@pytest.mark.parametrize("name", [name for name in ROWS if name not in REFUSED])
def test_one_declaration_is_left_after_a_build(name: str, tmp_path: Path) -> None:
    """No ``quantization_config`` but mixprec's stands anywhere in the ``config.json`` that is written."""
    from mixprec_build.output.build import run_plan

    CHECKPOINTS[name].write(tmp_path / "q", real_config(name))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: q\n")
    run_plan(plan_recipe(recipe, allow_unservable=True), tmp_path / "out", allow_unservable=True)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.pop("quantization_config")["quant_method"] == "mixprec"
    text = json.dumps(config)
    assert "quantization_config" not in text
    assert "compression_config" not in text
    assert not (tmp_path / "out" / "hf_quant_config.json").exists()
