"""What SGLang runs as one GEMM, in several formats."""

from __future__ import annotations

from support.write import LLAMA

from .case import ATTENTION, Case, deepseek, llama, moe, spec

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
