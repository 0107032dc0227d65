"""The mistake that each repair is for stands in the code of the releases that need the repair, and of no other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

_ZERO_POINTS = r"group_blocks >= thread_k_blocks\) \{\s*if \(k % b_sh_wr_iters == 0\) \{\s*int4\* sh_zp_stage"

MARKS: dict[str, list[tuple[str, str]]] = {
    "scales of blocks by another name (linear)": [
        ("llama.py", r'name\.replace\("\.weight_scale_inv", "\.weight_scale"\)')
    ],
    "scales of blocks by another name (experts)": [
        ("llama.py", r'name\.replace\("\.weight_scale_inv", "\.weight_scale"\)')
    ],
    "blocks cut under data-parallel attention": [
        ("srt/layers/quantization/fp8.py", r"(?s)\A(?!.*tp_group = layer\.tp_group)"),
        ("blockwise_int8.py", r"tp_size = get_parallel\(\)\.tp_size"),
    ],
    "blocks of other sizes than 128 x 128": [
        (
            "fp8_utils.py",
            r"def dispatch_w8a8_block_fp8_linear\(\) ->|is not None and weight_block_size\[1\] != 128",
        )
    ],
    "one scale for activations of experts": [
        (
            "fused_moe_triton_kernels.py",
            r"A, A_scale = scaled_fp8_quant\(\s*A, A_scale, use_per_token_if_dynamic=per_channel_quant",
        )
    ],
    "linears that Marlin does not take": [("gptq_kernels.py", r"\n        check_marlin_supports_shape\(")],
    "scales of experts": [
        ("gptq_moe.py", r"w13_scales = torch\.nn\.Parameter\(\s*torch\.empty\([^)]*dtype=torch\.half"),
        ("gptq_moe.py", r"w2_scales_size = intermediate_size_per_partition \* layer\.moe_tp_size"),
    ],
    "scales of gate and up permuted by the wrong inputs": [
        ("gptq_kernels.py", r"s=layer\.w13_scales,\s*size_k=layer\.intermediate_size_per_partition"),
        ("awq_kernels.py", r"s=layer\.w13_scales,\s*size_k=layer\.intermediate_size_per_partition"),
        (
            "compressed_tensors_wNa16_moe.py",
            r"layer\.w13_weight_scale,\s*(size_k=)?layer\.w13_weight_packed\.shape\[2\]",
        ),
    ],
    "experts in act-order under tensor parallelism": [("gptq_moe.py", r'"load_full_w2": self\.quant_config\.desc_act')],
    # 0.5.23's kernel also leaves ids of -1 out where they come first, as it is given them without a map.
    "ids of experts on other ranks": [
        ("fused_marlin_moe.py", r"is_ep=expert_map is not None"),
        ("gptq_kernels.py", r"(?s)\A(?!.*expert_map)"),
        ("awq_kernels.py", r"(?s)\A(?!.*expert_map)"),
    ],
    # The kernel of all releases; the router that has others is Phi-3.5-MoE's.
    "router weights that are not float32": [
        ("marlin_moe/moe_wna16_marlin.cuh", r"const float\* topk_weights_ptr = \(const float\*\)topk_weights"),
        ("models/phimoe.py", r"masked_gates = torch\.softmax\(masked_gates, dim=-1\)"),
    ],
    "shapes that Marlin does not take": [
        ("awq/awq.py", r"if not check_marlin_supports_layer\(layer, self\.group_size\)")
    ],
    "outputs that end inside a word": [
        ("layers/parameter.py", r"shard_size // (self\.)?packed_factor"),
    ],
    "zero points of linear read while the next arrive": [("marlin/marlin_template.h", _ZERO_POINTS)],
    "zero points of experts read while the next arrive": [("marlin_moe/marlin_template.h", _ZERO_POINTS)],
    "packed weights kept beside repacked ones": [
        ("deepseek_v2.py", r"self\.gate_up_proj\.weight = self\.gate_up_proj\.weight_packed")
    ],
    "shapes and orders of experts": [
        ("compressed_tensors_wNa16_moe.py", r"torch\.empty\(num_experts, 2\), requires_grad=False")
    ],
    "shapes of experts that nobody reads": [
        ("compressed_tensors_wNa16_moe.py", r'register_parameter\("w13_weight_shape"')
    ],
    "ids of experts in other groups": [
        ("compressed_tensors_wNa16_moe.py", r"expert_map = layer\.dispatcher\.local_expert_mapping")
    ],
    "activations with an alpha": [
        ("compressed_tensors_wNa16_moe.py", r"clamp_limit=self\.moe_runner_config\.swiglu_limit,\s*workspace=")
    ],
    "scales that Marlin does not use": [("modelopt_quant.py", r'"w13_blockscale_swizzled"')],
    # mixprec's own choice; from 0.5.22 on, SGLang has methods for compressed-tensors on Marlin, too.
    "NVFP4 of compressed-tensors (linear)": [("compressed_tensors_w4a4_nvfp4.py", r"return 100")],
    "NVFP4 of compressed-tensors (experts)": [("compressed_tensors_w4a4_nvfp4_moe.py", r"return 100")],
    "ids of experts elsewhere, of NVFP4": [
        ("modelopt_quant.py", r"expert_map = layer\.dispatcher\.local_expert_mapping")
    ],
    "MXFP4 by other names, and without padding": [
        ("mxfp4_marlin_moe.py", r"w13_weight_scale_inv"),
        ("mxfp4_marlin_moe.py", r"round_up\("),
    ],
    # In the class of Kimi-K3, too, which came with 0.5.17.
    "packed values by another name": [("deepseek_v4.py", r'name\.replace\("weight_packed", "weight"\)')],
    "rows of gate and up that do not alternate": [
        ("mxfp4_marlin_moe.py", r"gemm1_alpha is not None:\s+deinterleave_moe_mxfp4_w13_for_marlin\(layer\)")
    ],
    "ids of experts elsewhere, of MXFP4": [
        # 0.5.15 and 0.5.16 pass no map at all.
        (
            "mxfp4_marlin_moe.py",
            r'getattr\(layer\.dispatcher, "local_expert_mapping", None\)|"w2_weight_bias", None\),\s*\)',
        )
    ],
    "the scaling factor of routed experts": [
        (
            "fused_marlin_moe.py",
            r"if is_mxfp4_marlin:(?:(?!else:\s+if routed)[\s\S])*?"
            r"(torch\.sum\(|moe_sum_reduce\(intermediate_cache3, output, 1\.0\))",
        )
    ],
    "scales of inputs that are rounded before they are compared": [
        ("fused_moe_triton/layer.py", r'or "w4afp8" in self\.quant_config\.get_name\(\)'),
        ("w4afp8.py", r"w13_input_scale = torch\.nn\.Parameter\(\s*torch\.ones\([^)]*\), dtype=torch\.bfloat16"),
    ],
    "ids of experts elsewhere, of W4AFP8": [
        ("cutlass_w4a8_moe.py", r"moe_ep_size > 1:\s*topk_ids = torch\.where\(topk_ids == -1, num_local_experts")
    ],
    "experts without a gate": [
        ("w8a8_fp8.py", r"2 \* intermediate_size_per_partition"),
        ("w8a8_int8.py", r"2 \* intermediate_size_per_partition"),
        ("gptq_moe.py", r"2 \* intermediate_size_per_partition"),
        ("awq_moe.py", r"2 \* intermediate_size_per_partition"),
        ("compressed_tensors_wNa16_moe.py", r"2 \* intermediate_size_per_partition"),
    ],
    "one scale of experts without a gate": [
        (
            "layers/quantization/fp8.py",
            r"w13_weight_scale = torch\.nn\.Parameter\(\s*torch\.ones\(num_experts, 2, dtype",
        )
    ],
}
"""Name of a repair -> files, and what stands in them as long as it is needed; a regular expression each."""


def stands(home: Path, file: str, mark: str) -> bool:
    """Whether ``mark`` is in a file of SGLang's, wherever a release has it."""
    places = [path for path in home.rglob(Path(file).name) if path.as_posix().endswith(f"/{file}")]
    assert places, file
    return any(re.search(mark, path.read_text(encoding="utf-8")) for path in places)


def due(home: Path, name: str) -> bool:
    """Whether SGLang's code in ``home`` has the mistake: all of its marks, or none."""
    found = {mark: stands(home, *mark) for mark in MARKS[name]}
    assert len({*found.values()}) == 1, (name, found)
    return all(found.values())


@pytest.mark.usefixtures("sglang")
def test_repairs_are_needed_by_the_releases_that_have_the_mistake() -> None:
    import sglang

    from mixprec_runtime.contact.check import installed
    from mixprec_runtime.formats.registry import repairs

    listed = {repair.name: repair for _, repair in repairs()}
    assert listed.keys() == MARKS.keys()
    home, version = Path(sglang.__path__[0]), installed()
    found = {name: due(home, name) for name in listed}
    assert found == {name: repair.needed_by(version) for name, repair in listed.items()}


RULES_OF = {"gptq_untiled": ("gptq_kernels.py", r"gptq_gemm\(")}
"""Name of a rule of some releases only -> a file, and what stands in it where the rule holds."""

STOCK = [
    ("0.5.22", "compressed_tensors.py", r"CompressedTensorsW4A16Fp4\(has_input_global_scale=True\)"),  # NVFP4 on Hopper
    ("0.5.18", "modelopt_quant.py", r'"FP8_PB_WO"'),  # blocks in MIXED_PRECISION
    ("0.5.19", "compressed_tensors.py", r"isinstance\(layer, ParallelLMHead\)"),
    ("", "logits_processor.py", r"elif should_apply_lm_head_quant_method\("),  # mixprec's own quantized heads
]
"""What SGLang itself learned, and in which release; as the page of the runtime says, mixprec does not depend on it."""


@pytest.mark.usefixtures("sglang")
def test_rules_that_depend_on_a_release_are_as_its_code() -> None:
    import sglang

    from mixprec_build.versions import RULES, between
    from mixprec_runtime.contact.check import installed

    home, version = Path(sglang.__path__[0]), installed()
    assert {name: stands(home, *mark) for name, mark in RULES_OF.items()} == {
        name: rule.holds_in(version) for name, rule in RULES.items()
    }
    assert [stands(home, file, mark) for _, file, mark in STOCK] == [between(since, "", version) for since, *_ in STOCK]
