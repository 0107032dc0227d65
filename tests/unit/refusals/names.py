"""Modules that SGLang never has quantized, and names that no source has."""

from __future__ import annotations

from support.write import DEEPSEEK, Tiny

from .case import ATTENTION, Case, Spec, deepseek, llama, llama_of, moe, moe_of, sized, spec


def deepseek_with_drafts(variant: str) -> dict[str, Spec]:
    model = sized(DEEPSEEK, mtp=1)
    return {
        "bf16": spec(model, "bf16"),
        "quant": spec(model, variant, also=("*.shared_head.head",), skip=("*.kv_b_proj",)),
    }


OTHER = Tiny("olmo2")
"""Of a family that was not compared with SGLang's code."""

NEVER_QUANTIZED = {
    "an embedding": Case(
        llama_of("fp8_channel", also=("model.embed_tokens",)),
        ("model.*: quant",),
        (
            "model.embed_tokens: fp8_channel (activations dynamic) from `quant`",
            "mixprec serves no quantized embedding. Add below line 6: `model.embed_tokens: bf16`",
        ),
    ),
    "lm_head of a family that was not checked": Case(
        {"bf16": spec(OTHER, "bf16"), "quant": spec(OTHER, "gptq_int4", also=("lm_head",))},
        ("lm_head: quant",),
        ("mixprec serves no quantized lm_head of this family of models. Change line 6 to `lm_head: bf16`",),
    ),
    "lm_head of the default": Case(
        {"int4": spec(OTHER, "gptq_int4", also=("lm_head",)), "bf16": spec(OTHER, "bf16")},
        ("model.layers.0.*: int4",),
        ("from `int4` (the default): mixprec serves no quantized lm_head", "Add below line 6: `lm_head: bf16`"),
        clash=(),
    ),
    "lm_head that another source has, but not under that name": Case(
        # `lm_head: fp8` would be refused: what `fp8` stores there is not quantized.
        {"int4": spec(OTHER, "gptq_int4", also=("lm_head",)), "fp8": spec(OTHER, "fp8_block")},
        (),
        ("no quantized lm_head of this family of models. No source of this recipe can take their place",),
        clash=(),
        fixes=0,
    ),
    "lm_head in a shape that its kernel does not take": Case(
        llama_of("awq_int4", sizes={"vocab": 392}, also=("lm_head",)),
        ("lm_head: quant",),
        ("its 392 outputs are no multiple of 64, which Marlin needs", "`lm_head: bf16`"),
    ),
    "the head of a layer for drafts": Case(
        deepseek_with_drafts("fp8_channel"),
        ("model.layers.2.shared_head.head: quant",),
        ("mixprec serves no quantized head of layers for drafts", "`model.layers.2.shared_head.head: bf16`"),
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
