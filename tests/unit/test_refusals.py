"""Every mix that is refused: what the message says, that its advice works, and that nothing is left on disk.

One case a refusal. Each runs through the command line, `plan` and `build`. Where the message gives a recipe line,
that line is taken from it, put into the recipe as a user would, and `plan` must then pass.
"""

from __future__ import annotations

import dataclasses
import json
import random
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import pytest
from support.write import DEEPSEEK, LLAMA, QWEN3_MOE, Config, Tensors, Tiny, write_tiny

from mixprec_build.checkpoint.declaration import Declaration
from mixprec_build.checkpoint.manifest import MANIFEST
from mixprec_build.cli import app as cli

Edit = Callable[[Tensors, Config], None]


@dataclass(frozen=True)
class Spec:
    """A source: what ``write_tiny`` is called with. ``options`` are pairs, so that equal ones are written once."""

    model: Tiny
    variant: str
    edit: Edit | None = None
    options: tuple[tuple[str, Any], ...] = ()


def spec(model: Tiny, variant: str, edit: Edit | None = None, **options: Any) -> Spec:
    return Spec(model, variant, edit, tuple(options.items()))


def sized(model: Tiny, **sizes: int) -> Tiny:
    return dataclasses.replace(model, **sizes)


# What is broken in a source


def drop(*suffixes: str) -> Edit:
    def edit(tensors: Tensors, _: Config) -> None:
        for name in [name for name in tensors if any(suffix in name for suffix in suffixes)]:
            del tensors[name]

    return edit


def configure(**values: object) -> Edit:
    return lambda _, config: config.update(values)


def other_zeros(tensors: Tensors, _: Config) -> None:
    tensors["model.layers.1.mlp.up_proj.qzeros"][0, 0] = 0x66666666


def as_v2(tensors: Tensors, config: Config) -> None:
    """Zero points as they are: not for exllama, which would add one."""
    for name in tensors:
        if name.endswith(".qzeros"):
            tensors[name][:] = 0x88888888 - (1 << 32)
    config["quantization_config"]["checkpoint_format"] = "gptq_v2"


def backwards(*names: str) -> Edit:
    """Another order of inputs, as from a quantizer that ordered each linear for itself."""

    def edit(tensors: Tensors, _: Config) -> None:
        for name in names:
            tensors[f"{name}.g_idx"] = tensors[f"{name}.g_idx"][::-1].copy()

    return edit


def nonzero_bias(tensors: Tensors, _: Config) -> None:
    tensors["model.layers.0.mlp.down_proj.bias"][0] = 0.5


# Cases


@dataclass(frozen=True)
class Case:
    """A recipe that is refused. The first of ``sources`` is the model and the default."""

    sources: Mapping[str, Spec]
    weights: tuple[str, ...]
    says: tuple[str, ...]
    """Parts of the message."""
    clash: tuple[int, ...] = (0,)
    """The lines of ``weights`` that the message must quote."""
    about: tuple[str, ...] = ()
    """Sources whose line in the recipe the message must give."""
    hard: bool = False
    """Whether it stays refused under ``--allow unservable``."""
    mends: int = 1
    """How often advice must be followed until the plan passes; 0 where the message gives no line."""
    options: Mapping[str, object] = field(default_factory=dict)

    def recipe(self, folders: Mapping[str, Path]) -> str:
        names = list(self.sources)
        lines = [f"model: {folders[names[0]]}", "sources:", *(f"  {name}: {folders[name]}" for name in names)]
        lines += ["weights:" if self.weights else "weights: {}", *(f"  {_quoted(line)}" for line in self.weights)]
        return "\n".join(lines) + "\n"

    def line_of(self, weight: int) -> int:
        return len(self.sources) + 4 + weight


def _quoted(line: str) -> str:
    pattern, _, source = line.rpartition(": ")
    return f'"{pattern}": {source}' if pattern[0] in "*{" else line


def llama(*variants: str) -> dict[str, Spec]:
    return _common(LLAMA, variants)


def moe(*variants: str) -> dict[str, Spec]:
    return _common(QWEN3_MOE, variants)


def deepseek(*variants: str) -> dict[str, Spec]:
    return _common(DEEPSEEK, variants)


def _common(model: Tiny, variants: tuple[str, ...]) -> dict[str, Spec]:
    by_name = {
        "bf16": spec(model, "bf16"),
        "fp8": spec(model, "fp8_block", skip=("*.kv_b_proj",)),
        "int4": spec(model, "gptq_int4"),
    }
    return {name: by_name[name] for name in variants}


ATTENTION = "model.layers.0.self_attn"

FUSED = {
    "one of q, k, v by an exact line": Case(
        llama("bf16", "int4"),
        (f"{ATTENTION}.k_proj: int4",),
        (
            "model.layers.0.self_attn.{k_proj,q_proj,v_proj}: parts of qkv_proj, one GEMM in SGLang, must share a ",
            "k_proj is gptq_int4 (group_size 128, sym true, desc_act false, layout gptq) from `int4`",
            "q_proj is bf16 from `bf16` (the default); v_proj is bf16",
            f"Change line 6 to `{ATTENTION}.k_proj: bf16`",
        ),
    ),
    "q, k, v by globs": Case(
        llama("bf16", "fp8", "int4"),
        ("*.q_proj: fp8", "*.k_proj: int4", "*.v_proj: fp8"),
        (
            "model.layers.{0..1}.self_attn.{k_proj,q_proj,v_proj}: ",
            "Add below line 9: `model.layers.{0..1}.self_attn.k_proj: fp8`",
        ),
        clash=(0, 1, 2),
    ),
    "q, k, v by two exact lines": Case(
        llama("bf16", "fp8", "int4"),
        (f"{ATTENTION}.q_proj: fp8", f"{ATTENTION}.k_proj.weight: int4"),
        (f"Change line 7 to `{ATTENTION}.q_proj: bf16`, change line 8 to `{ATTENTION}.k_proj: bf16`",),
        clash=(0,),
    ),
    "q, k, v by exact lines and globs": Case(
        llama("bf16", "fp8", "int4"),
        ("*.v_proj: fp8", f"{ATTENTION}.k_proj: int4", "model.layers.1.*: fp8"),
        (f"Change line 8 to `{ATTENTION}.k_proj: bf16`, add below line 9: `{ATTENTION}.v_proj: bf16`",),
        clash=(0, 1),
    ),
    "gate and up": Case(
        llama("bf16", "int4"),
        ("model.layers.*.mlp.*: int4", "*.mlp.up_proj: bf16"),
        (
            "model.layers.{0..1}.mlp.{gate_proj,up_proj}: parts of gate_up_proj",
            "Add below line 7: `model.layers.{0..1}.mlp.gate_proj: bf16`",
        ),
        clash=(0, 1),
    ),
    "gate and up of shared experts": Case(
        deepseek("bf16", "fp8"),
        ("*.shared_experts.gate_proj: fp8",),
        ("model.layers.1.mlp.shared_experts.{gate_proj,up_proj}: parts of gate_up_proj",),
    ),
    "group sizes": Case(
        llama("bf16") | {"coarse": spec(LLAMA, "gptq_int4"), "fine": spec(LLAMA, "gptq_int4", group_size=32)},
        ("*.self_attn.*: coarse", "*.k_proj: fine"),
        ("k_proj is gptq_int4 (group_size 32, ", "q_proj is gptq_int4 (group_size 128, "),
        clash=(0, 1),
    ),
    "orders of inputs": Case(
        llama("bf16") | {"plain": spec(LLAMA, "gptq_int4"), "ordered": spec(LLAMA, "gptq_int4", desc_act=True)},
        ("*.mlp.*: plain", "*.gate_proj: ordered"),
        ("gate_proj is gptq_int4 (group_size 128, sym true, desc_act true, ", "desc_act false"),
        clash=(0, 1),
    ),
    "granularities of FP8": Case(
        llama("bf16", "fp8") | {"channel": spec(LLAMA, "fp8_channel")},
        ("*.self_attn.*: fp8", "*.v_proj: channel"),
        ("q_proj is fp8_block (block [128, 128], activations dynamic)", "v_proj is fp8_channel (activations dynamic)"),
        clash=(0, 1),
    ),
    "blocks of FP8": Case(
        llama("bf16", "fp8") | {"small": spec(LLAMA, "fp8_block", block=(64, 64))},
        ("*.self_attn.*: fp8", "*.v_proj: small"),
        ("q_proj is fp8_block (block [128, 128], ", "v_proj is fp8_block (block [64, 64], "),
        clash=(0, 1),
    ),
    "activations of FP8": Case(
        llama("bf16") | {"one": spec(LLAMA, "fp8_tensor"), "two": spec(LLAMA, "fp8_tensor", activations="static")},
        ("*.self_attn.*: one", "*.v_proj: two"),
        ("q_proj is fp8_tensor (activations dynamic)", "v_proj is fp8_tensor (activations static)"),
        clash=(0, 1),
    ),
    "gate and up of one expert": Case(
        moe("bf16", "fp8", "int4"),
        ("*.experts.*: int4", "model.layers.*.mlp.experts.2.{down,gate}_proj: fp8"),
        (
            "model.layers.{0..1}.mlp.experts.2.{gate_proj,up_proj}: gate and up of one expert, one GEMM in SGLang, "
            "must share a format, but gate_proj is fp8_block (block [128, 128], activations dynamic) from `fp8`",
            "Add below line 8: `model.layers.{0..1}.mlp.experts.2.up_proj: fp8`",
        ),
        clash=(0, 1),
    ),
    "one projection of one expert": Case(
        moe("bf16", "fp8", "int4"),
        ("*.experts.*: int4", "model.layers.1.mlp.experts.3.up_proj: fp8"),
        ("gate and up of one expert", "Change line 8 to `model.layers.1.mlp.experts.3.up_proj: int4`"),
        clash=(0, 1),
    ),
    "DeepSeek's q_a and kv_a": Case(
        deepseek("bf16", "fp8"),
        ("*.q_a_proj: fp8",),
        ("parts of fused_qkv_a_proj_with_mqa, one GEMM in SGLang, must share a format",),
    ),
}

MISSING = {
    "modules by a glob": Case(
        {"fp8": spec(sized(DEEPSEEK, mtp=1), "fp8_block", skip=("*.kv_b_proj",)), "int4": spec(DEEPSEEK, "gptq_int4")},
        ("model.layers.*.mlp.experts.*: int4",),
        (
            "`int4` has no model.layers.2.mlp.experts.{0..3}.{down_proj,gate_proj,up_proj} (12 modules), which come "
            "from there by line 6 `model.layers.*.mlp.experts.*: int4`",
            "Add below line 6: `model.layers.2.mlp.experts.{0..3}.{down_proj,gate_proj,up_proj}: fp8`",
        ),
        hard=True,
    ),
    "a module by an exact line": Case(
        llama("bf16") | {"int4": spec(LLAMA, "gptq_int4", drop(".1.mlp.down_proj."))},
        ("model.layers.1.mlp.down_proj: int4",),
        (
            "`int4` has no model.layers.1.mlp.down_proj (1 module)",
            "Change line 6 to `model.layers.1.mlp.down_proj: bf16`",
        ),
        hard=True,
    ),
    "a module that two others have": Case(
        # Not from `fp8`: what is not quantized there may not be asked of it by name.
        {
            "int4": spec(DEEPSEEK, "gptq_int4"),
            "fp8": spec(sized(DEEPSEEK, mtp=1), "fp8_block"),
            "bf16": spec(sized(DEEPSEEK, mtp=1), "bf16"),
        },
        (
            "model.layers.2.eh_proj: int4",
            "*.{kv_b_proj,q_a_proj,q_b_proj,kv_a_proj_with_mqa,shared_experts.gate_proj,shared_experts.up_proj}: bf16",
        ),
        ("`int4` has no model.layers.2.eh_proj (1 module)", "Change line 7 to `model.layers.2.eh_proj: bf16`"),
        hard=True,
    ),
    "half of a fused group": Case(
        # Following the advice leaves gate_proj in Int4 alone, which is refused with advice of its own.
        llama("bf16") | {"int4": spec(LLAMA, "gptq_int4", drop(".1.mlp.up_proj."))},
        ("*.mlp.*: int4",),
        ("`int4` has no model.layers.1.mlp.up_proj", "Add below line 6: `model.layers.1.mlp.up_proj: bf16`"),
        hard=True,
        mends=2,
    ),
}

OTHER_MODELS = {
    "config.json": Case(
        llama("bf16") | {"int4": spec(LLAMA, "gptq_int4", configure(rope_theta=1e6, num_attention_heads=8))},
        ("*.mlp.*: int4",),
        (
            "`bf16` and `int4` are different models: num_attention_heads 4 and 8 in their config.json; point `int4` "
            "(line 4) to a checkpoint of the same model",
        ),
        clash=(),
        about=("int4",),
        hard=True,
        mends=0,
    ),
    "shapes": Case(
        llama("bf16") | {"int4": spec(sized(LLAMA, intermediate=512), "gptq_int4", configure(intermediate_size=256))},
        ("*.mlp.*: int4",),
        (
            "model.layers.{0..1}.mlp.down_proj: [128, 256] in `bf16` and [128, 512] in `int4`, these are different "
            "models; point `int4` (line 4) to a checkpoint of the same model",
            "model.layers.{0..1}.mlp.{gate_proj,up_proj}: [256, 128] in `bf16` and [512, 128] in `int4`",
        ),
        clash=(),
        about=("int4",),
        hard=True,
        mends=0,
    ),
    "a bias that is not zero": Case(
        llama("bf16") | {"int4": spec(LLAMA, "gptq_int4", nonzero_bias, zero_bias=True)},
        ("*.mlp.*: int4",),
        ("model.layers.0.mlp.down_proj has a bias in `int4` that is not zero, and none in `bf16`",),
        clash=(),
        about=("int4",),
        hard=True,
        mends=0,
    ),
    "norms": Case(
        llama("bf16") | {"int4": spec(sized(LLAMA, seed=1), "gptq_int4")},
        ("*.mlp.*: int4",),
        (
            "model.layers.{0..1}.{input_layernorm,post_attention_layernorm}, model.norm: `int4` (line 4) and `bf16` "
            "(line 3) hold different values, so they do not hold the same weights",
            "point one of them to a checkpoint of the other's weights",
        ),
        clash=(),
        about=("bf16", "int4"),
        mends=0,
    ),
    "norms of what is not quantized": Case(
        {"int4": spec(sized(LLAMA, seed=1), "gptq_int4"), "bf16": spec(LLAMA, "bf16")},
        ("*.self_attn.*: bf16",),
        ("`bf16` (line 4) and `int4` (line 3) hold different values",),
        clash=(),
        about=("bf16", "int4"),
        mends=0,
    ),
}


MHA = sized(LLAMA, kv_heads=4, hidden=256)  # v_proj and o_proj have one shape
AWQ = {"bf16": spec(QWEN3_MOE, "bf16"), "awq": spec(QWEN3_MOE, "awq_int4", fold=0.5)}
OWNERS = "in `awq`, so both must come from one source, but"

FOLDED = {
    "experts of one layer": Case(
        AWQ,
        ("*.experts.{0..1}.*: awq",),
        (
            "model.layers.{0..1}.post_attention_layernorm: a norm and what it feeds must come from one source where "
            "scales are folded into it, as they are in `awq` (mlp.experts.{2..3}.{gate_proj,up_proj}, mlp.gate, "
            "post_attention_layernorm from `bf16` (the default); mlp.experts.{0..1}.{gate_proj,up_proj} from `awq` "
            "(line 6 `*.experts.{0..1}.*: awq`))",
            "Add below line 6: `model.layers.{0..1}.mlp.experts.{0..1}.{down_proj,gate_proj,up_proj}: bf16`",
        ),
    ),
    "most experts of one layer": Case(
        AWQ,
        ("*.experts.{0..2}.*: awq",),
        ("Add below line 6: `model.layers.{0..1}.mlp.experts.3.{down_proj,gate_proj,up_proj}: awq`",),
    ),
    "gate and up without down": Case(
        {"bf16": spec(LLAMA, "bf16"), "awq": spec(LLAMA, "awq_int4", fold=0.5)},
        ("*.mlp.{gate,up}_proj: awq",),
        (
            "model.layers.{0..1}.mlp.{down_proj,up_proj}: scales of down_proj's inputs are folded into up_proj "
            f"{OWNERS} up_proj is from `awq` (line 6 `*.mlp.{{gate,up}}_proj: awq`) and down_proj from `bf16`",
        ),
    ),
    "down without gate and up": Case(
        {"bf16": spec(LLAMA, "bf16"), "awq": spec(LLAMA, "awq_int4", fold=0.5)},
        ("model.layers.1.mlp.down_proj: awq",),
        (f"scales of down_proj's inputs are folded into up_proj {OWNERS}",),
    ),
    "values without the output projection": Case(
        {"bf16": spec(MHA, "bf16"), "awq": spec(MHA, "awq_int4", fold=0.5)},
        ("*.self_attn.{q,k,v}_proj: awq",),
        (
            f"scales of o_proj's inputs are folded into v_proj {OWNERS}",
            "Add below line 6: `model.layers.{0..1}.self_attn.o_proj: awq`",
        ),
    ),
    "two of them": Case(
        {
            "bf16": spec(LLAMA, "bf16"),
            "awq": spec(LLAMA, "awq_int4", fold=0.5),
            "awq2": spec(LLAMA, "awq_int4", fold=0.25),
        },
        ("*.mlp.{gate,up}_proj: awq", "*.mlp.down_proj: awq2"),
        ("are folded into up_proj in `awq` and `awq2`, so both must come from one source",),
        clash=(0, 1),
    ),
    "a norm kept back": Case(
        AWQ,
        ("*.experts.*: awq", "*.post_attention_layernorm: bf16"),
        ("Take out line 7 `*.post_attention_layernorm: bf16`",),
        clash=(0, 1),
    ),
    "a router kept back": Case(
        AWQ,
        ("*.experts.*: awq", "model.layers.1.mlp.gate: bf16"),
        (
            "model.layers.1.post_attention_layernorm: a norm and what it feeds",
            "mlp.gate from `bf16` (line 7 `model.layers.1.mlp.gate: bf16`)",
            "Take out line 7 `model.layers.1.mlp.gate: bf16`",
        ),
        clash=(0, 1),
    ),
    "a router that cannot come along": Case(
        {
            "bf16": spec(sized(QWEN3_MOE, experts=8), "bf16"),
            "awq": spec(sized(QWEN3_MOE, experts=8), "awq_int4", also=("*.mlp.gate",), fold=0.5),
        },
        ("*.experts.*: awq",),
        (
            "(post_attention_layernorm from `awq` (what it feeds); mlp.experts.{0..7}.{gate_proj,up_proj} from `awq` "
            "(line 6 `*.experts.*: awq`); mlp.gate from `bf16` (the default))",
            "Add below line 6: `model.layers.{0..1}.mlp.experts.{0..7}.{down_proj,gate_proj,up_proj}: bf16`",
        ),
    ),
    "a fine-tune": Case(
        llama("bf16") | {"awq": spec(sized(LLAMA, seed=1), "awq_int4", fold=0.5)},
        ("*.mlp.*: awq",),
        ("model.norm: `awq` (line 4) and `bf16` (line 3) hold different values, so they do not hold the same weights",),
        clash=(),
        about=("bf16", "awq"),
        mends=0,
    ),
}


def llama_of(variant: str, edit: Edit | None = None, sizes: Mapping[str, int] | None = None, **options: Any) -> Any:
    """A Llama of other sizes in BF16 and in ``variant``, whose source is called `quant`."""
    model = sized(LLAMA, **(sizes or {}))
    return {"bf16": spec(model, "bf16"), "quant": spec(model, variant, edit, **options)}


def moe_of(variant: str, edit: Edit | None = None, sizes: Mapping[str, int] | None = None, **options: Any) -> Any:
    model = sized(QWEN3_MOE, **(sizes or {}))
    return {"bf16": spec(model, "bf16"), "quant": spec(model, variant, edit, **options)}


SHAPES = {
    "outputs for Marlin": Case(
        llama_of("gptq_int4", as_v2, {"intermediate": 144}, skip=("*.down_proj",)),
        ("*.{gate,up}_proj: quant",),
        (
            "model.layers.{0..1}.mlp.{gate_proj,up_proj}: gptq_int4 (group_size 128, ",
            "its 288 outputs are no multiple of 64, which Marlin needs",
            "Add below line 6: `model.layers.{0..1}.mlp.{gate_proj,up_proj}: bf16`",
        ),
    ),
    "inputs for Marlin": Case(
        llama_of("gptq_int4", as_v2, {"intermediate": 160}, group_size=32),
        ("*.mlp.*: quant",),
        ("model.layers.{0..1}.mlp.down_proj: ", "its 160 inputs are no multiple of 128, which Marlin needs"),
    ),
    "inputs for a group": Case(
        llama_of("gptq_int4", sizes={"intermediate": 160}, group_size=64),
        ("model.layers.1.mlp.down_proj: quant",),
        (
            "its 160 inputs are no multiple of the group size 64",
            "its 160 inputs are no multiple of 128",
            "Change line 6 to `model.layers.1.mlp.down_proj: bf16`",
        ),
    ),
    "the hidden size of Int4 experts": Case(
        moe_of("gptq_int4", sizes={"hidden": 192}, group_size=64),
        ("*.experts.*: quant",),
        (
            "model.layers.{0..1}.mlp.experts.{0..3}.{down_proj,gate_proj,up_proj}: ",
            "its hidden size 192 is no multiple of 128, which Marlin needs",
        ),
    ),
    "the hidden size of Int4 experts and its groups": Case(
        moe_of("gptq_int4", sizes={"hidden": 192}),
        ("*.experts.*: quant",),
        ("its hidden size 192 is no multiple of the group size 128",),
    ),
    "the intermediate size of Int4 experts": Case(
        moe_of("gptq_int4", sizes={"intermediate": 192}),
        ("*.experts.*: quant",),
        ("its intermediate size 192 is no multiple of 128, which Marlin needs",),
    ),
    "inputs for a block": Case(
        llama_of("fp8_block", sizes={"intermediate": 192}),
        ("*.down_proj: quant",),
        ("its 192 inputs are no multiple of 128, the block activations are quantized in",),
    ),
    "outputs for a block": Case(
        llama_of("fp8_block", sizes={"intermediate": 192}),
        ("*.{gate_proj,up_proj}: quant",),
        (
            "gate_proj has 192 outputs, no multiple of its block 128, and is fused",
            "up_proj has 192 outputs, no multiple of its block 128, and is fused",
        ),
    ),
    "the intermediate size of block FP8 experts": Case(
        moe_of("fp8_block", sizes={"intermediate": 192}),
        ("*.experts.*: quant",),
        ("its intermediate size 192 is no multiple of the block [128, 128]",),
    ),
    "the hidden size of block FP8 experts": Case(
        moe_of("fp8_block", sizes={"hidden": 192}),
        ("*.experts.*: quant",),
        ("its hidden size 192 is no multiple of 128",),
    ),
}

ASYMMETRIC = "mixprec does not serve asymmetric GPTQ (sym: false)"

KERNELS = {
    "asymmetric GPTQ": Case(llama_of("gptq_int4", sym=False), ("*.mlp.*: quant",), (ASYMMETRIC,)),
    "asymmetric GPTQ as the default": Case(
        {"int4": spec(LLAMA, "gptq_int4", sym=False), "bf16": spec(LLAMA, "bf16")},
        (),
        (ASYMMETRIC, "(the default)", "Add under `weights:`: `model.layers.{0..1}."),
        clash=(),
    ),
    "asymmetric GPTQ alone": Case(
        {"int4": spec(LLAMA, "gptq_int4", sym=False)},
        (),
        (ASYMMETRIC, "No source of this recipe can take their place: add one that can"),
        clash=(),
        mends=0,
    ),
    "asymmetric GPTQ experts": Case(moe_of("gptq_int4", sym=False), ("*.experts.*: quant",), (ASYMMETRIC,)),
    "groups of 16": Case(
        llama_of("gptq_int4", group_size=16),
        ("*.mlp.*: quant",),
        ("mixprec does not serve group size 16, only -1, 32, 64 and 128",),
    ),
    "groups of 256": Case(
        llama_of("gptq_int4", group_size=256), ("*.down_proj: quant",), ("mixprec does not serve group size 256",)
    ),
    "groups of 16 in experts": Case(
        moe_of("gptq_int4", group_size=16), ("*.experts.*: quant",), ("mixprec does not serve group size 16",)
    ),
    "static activations and channels": Case(
        llama_of("fp8_channel", activations="static"),
        ("*.o_proj: quant",),
        ("channel scales with static activations have no SGLang method",),
    ),
    "scales of gate and up": Case(
        moe_of("fp8_tensor", scale=None),
        ("*.experts.*: quant",),
        ("gate and up have different per-tensor scales, and SGLang would requantize them at load",),
    ),
    "zero points that are not symmetric": Case(
        llama_of("gptq_int4", other_zeros),
        ("*.mlp.*: quant",),
        (
            "model.layers.1.mlp.{gate_proj,up_proj}: ",
            "declared symmetric (gptq), for which every word of qzeros is 0x77777777, but they hold other zero points",
        ),
    ),
    "zero points of another layout": Case(
        llama_of("gptq_int4", lambda _, config: config["quantization_config"].update(checkpoint_format="gptq_v2")),
        ("*.o_proj: quant",),
        ("declared symmetric (gptq_v2), for which every word of qzeros is 0x88888888",),
    ),
    "orders of q, k, v": Case(
        llama_of("gptq_int4", backwards(f"{ATTENTION}.v_proj"), desc_act=True, group_size=32),
        ("*.self_attn.*: quant",),
        (
            "model.layers.0.self_attn.{k_proj,q_proj,v_proj}: gptq_int4 (group_size 32, sym true, desc_act true, ",
            "k_proj and v_proj run with one g_idx, but theirs differ (desc_act)",
            "Add below line 6: `model.layers.0.self_attn.{k_proj,q_proj,v_proj}: bf16`",
        ),
    ),
    "orders of gate and up of one expert": Case(
        moe_of("gptq_int4", backwards("model.layers.1.mlp.experts.2.up_proj"), desc_act=True, group_size=32),
        ("*.experts.*: quant",),
        (
            "model.layers.1.mlp.experts.2.{gate_proj,up_proj}: ",
            "gate_proj and up_proj run with one g_idx, but theirs differ (desc_act)",
        ),
    ),
}

NEVER_QUANTIZED = {
    "an embedding": Case(
        llama_of("fp8_channel", also=("model.embed_tokens",)),
        ("model.*: quant",),
        (
            "model.embed_tokens: fp8_channel (activations dynamic) from `quant`",
            "mixprec serves no quantized embedding. Add below line 6: `model.embed_tokens: bf16`",
        ),
    ),
    "lm_head": Case(
        llama_of("gptq_int4", also=("lm_head",)),
        ("lm_head: quant",),
        ("mixprec serves no quantized lm_head. Change line 6 to `lm_head: bf16`",),
    ),
    "lm_head of the default": Case(
        {"int4": spec(LLAMA, "gptq_int4", also=("lm_head",)), "bf16": spec(LLAMA, "bf16")},
        ("model.layers.0.*: int4",),
        ("from `int4` (the default): mixprec serves no quantized lm_head. Add below line 6: `lm_head: bf16`",),
        clash=(),
    ),
    "lm_head that another source has, but not under that name": Case(
        # `lm_head: fp8` would be refused: what `fp8` stores there is not quantized.
        {"int4": spec(LLAMA, "gptq_int4", also=("lm_head",)), "fp8": spec(LLAMA, "fp8_block")},
        (),
        ("mixprec serves no quantized lm_head. No source of this recipe can take their place",),
        clash=(),
        mends=0,
    ),
    "a router": Case(
        moe_of("fp8_block", also=("*.mlp.gate",)),
        ("model.layers.1.mlp.gate: quant",),
        ("mixprec serves no quantized router. Change line 6 to `model.layers.1.mlp.gate: bf16`",),
    ),
    "routers by a glob that means them": Case(
        moe_of("fp8_block", also=("*.mlp.gate",)),
        ("*.mlp.gate: quant",),
        ("mixprec serves no quantized router. Add below line 6: `model.layers.{0..1}.mlp.gate: bf16`",),
    ),
    "kv_b_proj": Case(
        deepseek("bf16") | {"fp8": spec(DEEPSEEK, "fp8_block")},
        ("*.self_attn.*: fp8",),
        (
            "model.layers.{0..1}.self_attn.kv_b_proj: ",
            "SGLang reads kv_b_proj outside its quantization methods and needs it unquantized",
            "Add below line 6: `model.layers.{0..1}.self_attn.kv_b_proj: bf16`",
        ),
    ),
    "Int4 in q_a_proj and kv_a_proj": Case(
        deepseek("fp8", "int4"),
        ("*.self_attn.*: int4", "*.kv_b_proj: fp8"),
        (
            "SGLang joins q_a_proj and kv_a_proj by rows, and packed formats hold outputs in columns",
            "Add below line 7: `model.layers.{0..1}.self_attn.{kv_a_proj_with_mqa,q_a_proj}: fp8`",
        ),
    ),
    "Int4 in kv_a_proj alone": Case(
        # `int4` has as many votes as `fp8` and comes first, but is no place to move q_a_proj to.
        {"int4": spec(DEEPSEEK, "gptq_int4"), "fp8": spec(DEEPSEEK, "fp8_block", skip=("*.kv_b_proj",))}
        | {"bf16": spec(DEEPSEEK, "bf16")},
        ("*.q_a_proj: fp8", "*.kv_b_proj: bf16"),
        ("kv_a_proj_with_mqa is gptq_int4", "packed formats hold outputs in columns"),
    ),
    "Int4 in q_b_proj": Case(
        deepseek("bf16", "int4"),
        ("*.q_b_proj: int4",),
        (
            "SGLang 0.5.17 looks for a weight in q_b_proj",
            "Add below line 6: `model.layers.{0..1}.self_attn.q_b_proj: bf16`",
        ),
    ),
    "GPTQ in shared experts": Case(
        deepseek("fp8", "int4"),
        ("*.mlp.shared_experts.*: int4", "*.kv_b_proj: fp8"),
        (
            "SGLang looks for a weight in shared experts' gate and up, and GPTQ has none of that name",
            "Add below line 7: `model.layers.1.mlp.shared_experts.{down_proj,gate_proj,up_proj}: fp8`",
        ),
    ),
    "FP8 by channels in shared experts": Case(
        deepseek("bf16") | {"channel": spec(DEEPSEEK, "fp8_channel", skip=("*.kv_b_proj",))},
        ("*.mlp.*: channel",),
        ("SGLang asks shared experts for a config that its method for FP8 by channels has not",),
    ),
    "two kinds of FP8 in shared experts": Case(
        deepseek("bf16", "fp8") | {"channel": spec(DEEPSEEK, "fp8_channel", skip=("*.kv_b_proj",))},
        ("*.mlp.*: fp8", "*.shared_experts.down_proj: channel"),
        ("SGLang compares blocks of shared experts' gate and up with those of down, which is fp8_channel",),
    ),
    "per-tensor FP8 in q_a_proj and kv_a_proj": Case(
        deepseek("bf16") | {"fp8": spec(DEEPSEEK, "fp8_tensor", skip=("*.kv_b_proj",))},
        ("*.self_attn.*: fp8",),
        ("SGLang joins q_a_proj and kv_a_proj and would keep one of their two per-tensor scales",),
    ),
}

NAMES = {
    "a name that no source has": Case(
        llama("bf16", "int4"),
        ("model.layers.0.mlp.down_porj: int4",),
        ("no source has a module model.layers.0.mlp.down_porj; did you mean model.layers.0.mlp.down_proj?",),
        clash=(),
        hard=True,
    ),
    "a name of another layer": Case(
        llama("bf16", "int4"),
        ("model.layers.2.mlp.down_proj: int4",),
        ("no source has a module model.layers.2.mlp.down_proj; did you mean model.layers.1.mlp.down_proj?",),
        clash=(),
        hard=True,
    ),
    "a norm": Case(
        llama("bf16", "int4"),
        ("model.norm: int4",),
        (
            "model.norm is not quantized in `int4`: it is stored as fp16 there; remove the line or name another source "
            "(`bf16` has it so)",
        ),
        clash=(),
        hard=True,
    ),
    "a norm's weight": Case(
        llama("bf16", "fp8"),
        ("model.layers.0.input_layernorm.weight: fp8",),
        ("model.layers.0.input_layernorm is not quantized in `fp8`: it is stored as bf16 there; remove the line",),
        clash=(),
        hard=True,
    ),
    "a router": Case(
        moe("bf16", "int4"),
        ("model.layers.1.mlp.gate: int4",),
        ("model.layers.1.mlp.gate is not quantized in `int4`: it is stored as fp16 there; remove the line",),
        clash=(),
        hard=True,
    ),
    "lm_head": Case(
        llama("bf16", "fp8"),
        ("lm_head: fp8",),
        ("lm_head is not quantized in `fp8`: it is stored as bf16 there; remove the line",),
        clash=(),
        hard=True,
    ),
    "a bias": Case(
        llama("bf16", "int4"),
        (f"{ATTENTION}.o_proj.bias: int4",),
        (f"a bias is never quantized and comes with its module; name {ATTENTION}.o_proj",),
        clash=(),
        hard=True,
    ),
}

SEEDS = 50

CASES = {
    f"{title}: {name}": case
    for title, cases in {
        "fused": FUSED,
        "missing": MISSING,
        "other models": OTHER_MODELS,
        "folded": FOLDED,
        "shapes": SHAPES,
        "kernels": KERNELS,
        "never quantized": NEVER_QUANTIZED,
        "names": NAMES,
    }.items()
    for name, case in cases.items()
}


# Running them


class Shelf(Protocol):
    def __call__(self, case: Case) -> dict[str, Path]: ...


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    """Writes the sources of a case, each once for all cases."""
    root = tmp_path_factory.mktemp("sources")
    written: dict[Spec, Path] = {}

    def folders(case: Case) -> dict[str, Path]:
        for source in case.sources.values():
            if source not in written:
                written[source] = root / str(len(written))
                write_tiny(written[source], source.model, source.variant, edit=source.edit, **dict(source.options))
        return {name: written[source] for name, source in case.sources.items()}

    return folders


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str


class Run(Protocol):
    def __call__(self, *arguments: str | Path) -> Ran: ...


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The console script, in this process."""

    def mixprec(*arguments: str | Path) -> Ran:
        monkeypatch.setattr(sys, "argv", ["mixprec", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        captured = capsys.readouterr()
        return Ran(int(exit_.value.code or 0), captured.out, captured.err)

    return mixprec


def tree(*folders: Path) -> dict[Path, int]:
    """Every file and folder and when it was changed."""
    return {path: path.lstat().st_mtime_ns for folder in folders for path in [folder, *folder.rglob("*")]}


def follow(text: str, message: str) -> str:
    """The recipe after the changes that the message asks for, typed in as they stand there."""
    lines = text.splitlines()
    below: dict[int, list[str]] = {}
    for number, line in re.findall(r"change line (\d+) to `([^`]+)`", message, re.IGNORECASE):
        lines[int(number) - 1] = f"  {line}"
    for number, added in re.findall(r"add below line (\d+): (`[^`]+`(?:, `[^`]+`)*)", message, re.IGNORECASE):
        below.setdefault(int(number), []).extend(re.findall(r"`([^`]+)`", added))
    for added in re.findall(r"add under `weights:`: (`[^`]+`(?:, `[^`]+`)*)", message, re.IGNORECASE):
        at = lines.index("weights: {}")
        below.setdefault(at + 1, []).extend(re.findall(r"`([^`]+)`", added))
    for number in re.findall(r"take out line (\d+) ", message, re.IGNORECASE):
        lines[int(number) - 1] = ""
    if below and "weights: {}" in lines:
        lines[lines.index("weights: {}")] = "weights:"
    if renamed := re.search(r":(\d+): .*(?:did you mean|; name) ([\w.]+\w)", message):
        at = int(renamed[1]) - 1
        lines[at] = f"  {renamed[2]}:{lines[at].rpartition(':')[2]}"
    elif removed := re.search(r":(\d+): .*remove the line", message):
        lines[int(removed[1]) - 1] = ""
    for number in sorted(below, reverse=True):
        # Two problems may ask for the same line; YAML takes it once.
        lines[number:number] = [f"  {line}" for line in dict.fromkeys(below[number])]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("name", CASES)
def test_it_is_refused(name: str, tmp_path: Path, shelf: Shelf, run: Run) -> None:
    case = CASES[name]
    folders = shelf(case)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(case.recipe(folders))
    (tmp_path / "empty").mkdir()
    before = tree(tmp_path, *folders.values())

    planned = run("plan", recipe)
    assert planned.code == 1 and planned.out == ""
    for part in case.says:
        assert part in planned.err
    for weight in case.clash:
        line = case.weights[weight].replace(".weight:", ":")
        assert f"line {case.line_of(weight)} `{line}`" in planned.err
    for source in case.about:
        assert f"(line {list(case.sources).index(source) + 3})" in planned.err
    if name.startswith("names"):
        assert planned.err.startswith(f"mixprec: {recipe}:{case.line_of(0)}: ")
    else:
        problems = planned.err.count("\n  - ")
        assert planned.err.startswith(f"mixprec: refused, {problems} problem{'s' if problems > 1 else ''}:\n")

    for out in (tmp_path / "not" / "yet" / "there", tmp_path / "empty"):
        built = run("build", recipe, "-o", out, *(("--allow", "unservable") if case.hard else ()))
        assert (built.code, built.out, built.err) == (1, "", planned.err)
    assert tree(tmp_path, *folders.values()) == before


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.mends])
def test_its_advice_works(name: str, tmp_path: Path, shelf: Shelf, run: Run) -> None:
    case = CASES[name]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(case.recipe(shelf(case)))
    for _ in range(case.mends):
        refused = run("plan", recipe)
        assert refused.code == 1
        mended = follow(recipe.read_text(), refused.err)
        assert mended != recipe.read_text()
        recipe.write_text(mended)
    passed = run("plan", recipe)
    assert passed.err == "" and passed.code == 0


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.mends])
def test_without_advice_nothing_can_be_followed(name: str, tmp_path: Path, shelf: Shelf, run: Run) -> None:
    """So that a case is not marked so by mistake."""
    case = CASES[name]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(case.recipe(shelf(case)))
    assert follow(recipe.read_text(), run("plan", recipe).err) == recipe.read_text()


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.hard])
def test_what_is_allowed_is_built_and_recorded(name: str, tmp_path: Path, shelf: Shelf, run: Run) -> None:
    case = CASES[name]
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "out"
    recipe.write_text(case.recipe(shelf(case)))
    refused = run("plan", recipe).err
    problems = [line.removeprefix("  - ") for line in refused.splitlines()[1:]]

    planned = run("plan", "--allow", "unservable", "--json", recipe)
    assert planned.code == 0
    assert json.loads(planned.out)["unservable"] == problems

    built = run("build", "--allow", "unservable", recipe, "-o", out)
    assert built.code == 0
    for problem in problems:
        assert f"SGLang cannot serve this: {problem}\n" in built.err
    manifest = json.loads((out / MANIFEST).read_text())
    assert manifest["unservable"] == problems
    # It is whole: what serves it may be another engine, which reads the declaration.
    declaration = Declaration.from_json(json.loads((out / "config.json").read_text())["quantization_config"])
    formats = {module: manifest["formats"][entry["format"]] for module, entry in manifest["modules"].items()}
    assert {module: declaration.format_of(module).to_json() for module in formats} == formats


@pytest.mark.parametrize("hard_too", [False, True])
def test_hard_problems_come_alone(tmp_path: Path, run: Run, hard_too: bool) -> None:
    """A missing module says nothing yet of what SGLang thinks of the rest, and --allow does not hide it."""
    edit = drop(".1.mlp.down_proj.") if hard_too else None
    write_tiny(tmp_path / "bf16", LLAMA, "bf16")
    write_tiny(tmp_path / "int4", LLAMA, "gptq_int4", edit=edit, sym=False)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: bf16\nsources: {bf16: bf16, int4: int4}\nweights:\n  model.layers.*.mlp.*: int4\n")
    refused = run("plan", recipe)
    assert (ASYMMETRIC in refused.err) is not hard_too
    assert ("has no model.layers.1.mlp.down_proj" in refused.err) is hard_too
    assert run("plan", "--allow", "unservable", recipe).code == int(hard_too)


def test_all_problems_are_told_at_once(tmp_path: Path, run: Run) -> None:
    write_tiny(tmp_path / "bf16", QWEN3_MOE, "bf16")
    write_tiny(tmp_path / "int4", QWEN3_MOE, "gptq_int4", also=["lm_head"], group_size=16)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model: bf16\nsources: {bf16: bf16, int4: int4}\nweights:\n"
        "  model.layers.*.self_attn.k_proj: int4\n  model.layers.*.mlp.experts.*: int4\n  lm_head: int4\n"
    )
    refused = run("plan", recipe).err
    assert refused.startswith("mixprec: refused, 4 problems:\n")
    for part in ("parts of qkv_proj", "group size 16", "no quantized lm_head"):
        assert part in refused
    mended = follow(recipe.read_text(), refused)
    recipe.write_text(mended)
    assert run("plan", recipe).code == 0


def test_a_problem_of_every_layer_is_told_once(tmp_path: Path, run: Run) -> None:
    write_tiny(tmp_path / "bf16", sized(QWEN3_MOE, layers=12, experts=8), "bf16")
    write_tiny(tmp_path / "int4", sized(QWEN3_MOE, layers=12, experts=8), "gptq_int4", sym=False)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text('model: bf16\nsources: {bf16: bf16, int4: int4}\nweights: {"*.experts.*": int4}\n')
    refused = run("plan", recipe).err
    assert refused.startswith("mixprec: refused, 1 problem:\n")
    assert "model.layers.{0..11}.mlp.experts.{0..7}.{down_proj,gate_proj,up_proj}: gptq_int4" in refused
    assert len(refused) < 700


@pytest.mark.parametrize("model", ["llama", "deepseek"])
def test_advice_leads_to_a_recipe_that_passes(tmp_path: Path, run: Run, model: str) -> None:
    """Whatever lines there are, one after the other or all at once, and never round in circles."""
    shape = {"llama": LLAMA, "deepseek": DEEPSEEK}[model]
    variants = {"base": ("bf16", {}), "fp8": ("fp8_block", {}), "packed": ("gptq_int4", {})}
    variants["awq"] = ("awq_int4", {"fold": 0.7}) if model == "llama" else ("fp8_channel", {})
    for name, (variant, options) in variants.items():
        write_tiny(tmp_path / name, shape, variant, **options)
    attention = (
        ["q_proj", "{k,v}_proj", "o_proj"] if model == "llama" else ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa"]
    )
    tails = ["*", "self_attn.*", "mlp.*", "mlp.down_proj", "mlp.{gate,up}_proj", "mlp.up_proj"]
    tails += [f"self_attn.{part}" for part in attention]
    heads = ["model.layers.*.", "model.layers.0.", "model.layers.{0..1}.", "*.1."]
    chance = random.Random(0)
    recipe, refusals = tmp_path / "recipe.yaml", 0
    for _ in range(SEEDS):
        lines = {chance.choice(heads) + chance.choice(tails): chance.choice([*variants]) for _ in range(4)}
        names = chance.sample([*variants], 3)
        text = [f"model: {tmp_path / 'base'}", "sources:", *(f"  {name}: {tmp_path / name}" for name in variants)]
        text += [f"default: {chance.choice(names)}", "weights:", *(f"  '{p}': {s}" for p, s in lines.items())]
        recipe.write_text("\n".join(text))
        seen = set()
        while (ran := run("plan", recipe)).code:
            assert "refused" in ran.err and recipe.read_text() not in seen, "\n".join([*text, *seen, ran.err])
            if "No source of this recipe" in ran.err:
                break
            refusals += 1
            seen.add(recipe.read_text())
            recipe.write_text(follow(recipe.read_text(), ran.err))
    assert refusals > SEEDS / 4
