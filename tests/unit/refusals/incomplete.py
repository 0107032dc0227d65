"""What a source lacks, and sources of different models."""

from __future__ import annotations

from support.write import DEEPSEEK, LLAMA

from .case import Case, configure, drop, llama, nonzero_bias, sized, spec

MISSING = {
    "modules by a glob": Case(
        {"fp8": spec(sized(DEEPSEEK, mtp=1), "fp8_block", skip=("*.kv_b_proj",)), "int4": spec(DEEPSEEK, "gptq_int4")},
        ("model.layers.{0..2}.mlp.experts.*: int4",),
        (
            "`int4` has no model.layers.2.mlp.experts.{0..3}.{down_proj,gate_proj,up_proj} (12 modules), which "
            "line 6 `model.layers.{0..2}.mlp.experts.*: int4` takes from it",
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
        fixes=2,  # the other modules of the draft layer are missing then
    ),
    "half of a fused group": Case(
        # Following the advice leaves gate_proj in Int4 alone, which is refused with advice of its own.
        llama("bf16") | {"int4": spec(LLAMA, "gptq_int4", drop(".1.mlp.up_proj."))},
        ("*.mlp.*: int4",),
        ("`int4` has no model.layers.1.mlp.up_proj", "Add below line 6: `model.layers.1.mlp.up_proj: bf16`"),
        hard=True,
        fixes=2,
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
        fixes=0,
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
        fixes=0,
    ),
    "a bias that is not zero": Case(
        llama("bf16") | {"int4": spec(LLAMA, "gptq_int4", nonzero_bias, zero_bias=True)},
        ("*.mlp.*: int4",),
        ("model.layers.0.mlp.down_proj has a bias in `int4` that is not zero, and none in `bf16`",),
        clash=(),
        about=("int4",),
        hard=True,
        fixes=0,
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
        fixes=0,
    ),
    "norms of what is not quantized": Case(
        {"int4": spec(sized(LLAMA, seed=1), "gptq_int4"), "bf16": spec(LLAMA, "bf16")},
        ("*.self_attn.*: bf16",),
        ("`bf16` (line 4) and `int4` (line 3) hold different values",),
        clash=(),
        about=("bf16", "int4"),
        fixes=0,
    ),
}
