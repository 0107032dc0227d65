"""Shapes and parameters of formats that SGLang's kernels do not take."""

from __future__ import annotations

from support.write import LLAMA

from .case import ATTENTION, Case, as_v2, backwards, llama_of, moe_of, other_zeros, spec

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
        fixes=0,
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
