"""Activation scales that a source has folded into other weights."""

from __future__ import annotations

from support.write import LLAMA, QWEN3_MOE

from .case import Case, llama, sized, spec

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
        fixes=0,
    ),
}
