"""Which format a module has, what contradicts it, and the declaration that carries it to a runtime."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from support.formats import packed_config
from support.oracles import Stated, awq, fp8, fp8_block, gptq, mxfp4, nvfp4, stated

from mixprec_build.checkpoint.declaration import quantization_config
from mixprec_build.checkpoint.detection import detect
from mixprec_build.checkpoint.opening import open_checkpoint
from mixprec_build.errors import SourceError
from mixprec_build.formats.awq import Awq
from mixprec_build.formats.base import Format, FormatError
from mixprec_build.formats.dense import Dense
from mixprec_build.formats.fp8 import Fp8
from mixprec_build.formats.gptq import Gptq
from mixprec_build.formats.int8 import Int8
from mixprec_build.formats.mxfp4 import Mxfp4
from mixprec_build.formats.nvfp4 import Nvfp4
from mixprec_build.formats.registry import format_from_json, recognise

Tensors = dict[str, Stated]
Config = dict[str, Any]

GPTQ: Config = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}
BLOCK: Config = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
MODELOPT_FP4: Config = {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16}
# Of DeepSeek-V4's releases with experts in NVFP4, whose draft layers keep their experts in MXFP4
NVFP4_BESIDE_FP8: Config = BLOCK | {
    "quant_algo": "MIXED_PRECISION", "moe_quant_algo": "NVFP4", "expert_dtype": "fp4", "group_size": 16,
    "ignore": ["*.attn.*", "*.ffn.shared_experts.*", "head", "mtp.*"], "producer": {"name": "modelopt"},
    "quantized_layers": {"layers.0.ffn.experts": {"group_size": 16, "quant_algo": "NVFP4"}},
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 16}}},
}  # fmt: skip
PACKED_INT4: Config = packed_config()
CHANNEL: Config = {"quant_method": "compressed-tensors", "format": "float-quantized"}
AWQ: Config = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
AUTO_ROUND: Config = {"quant_method": "auto-round", "bits": 4, "group_size": 128, "sym": True, "data_type": "int"}
ONE: Stated = ("F32", (1,))

SOUND: list[tuple[Tensors, Config, Format]] = [
    (gptq(256, 512), GPTQ, Gptq(4, 128, True, False, "gptq")),
    (gptq(256, 512, g_idx=None), GPTQ, Gptq(4, 128, True, False, "gptq")),
    (gptq(256, 512, bits=8, group_size=-1), GPTQ | {"bits": 8, "group_size": -1}, Gptq(8, -1, True, False, "gptq")),
    (gptq(256, 520), GPTQ | {"sym": False, "desc_act": True}, Gptq(4, 128, False, True, "gptq")),
    (gptq(256, 512, scales=("BF16", (4, 256))), GPTQ | {"checkpoint_format": "gptq_v2"},
     Gptq(4, 128, True, False, "gptq_v2")),
    (gptq(256, 512, bias=("F16", (256,))), GPTQ, Gptq(4, 128, True, False, "gptq")),
    (awq(256, 512), AWQ, Awq(128)),
    (awq(256, 512, group_size=-1, bias=("F16", (256,))), AWQ | {"group_size": -1}, Awq(-1)),
    (awq(256, 512), {"quant_method": "awq", "w_bit": 4, "q_group_size": 128, "version": "GEMM"}, Awq(128)),
    # What is quantized is what is stored so: tools differ in what parts of names stand for.
    (awq(256, 512), AWQ | {"modules_to_not_convert": ["proj"]}, Awq(128)),
    (gptq(256, 512, g_idx=None), AUTO_ROUND, Gptq(4, 128, True, False, "gptq")),
    (gptq(256, 512, g_idx=None), AUTO_ROUND | {"packing_format": "auto_round"}, Gptq(4, 128, True, False, "gptq_v2")),
    (gptq(256, 512, g_idx=None), AUTO_ROUND | {"backend": "auto_round:gptq:exllamav2"},
     Gptq(4, 128, True, False, "gptq")),
    (gptq(256, 512, bits=8, group_size=32, g_idx=None),
     AUTO_ROUND | {"extra_config": {".*": {"bits": 4}, "model.layers.0.mlp.down_proj": {"bits": 8, "group_size": 32}}},
     Gptq(8, 32, True, False, "gptq")),
    (gptq(256, 512, group_size=64, g_idx=None),
     AUTO_ROUND | {"extra_config": {"down_proj": {"bits": 16}, ".*mlp.*": {"group_size": 64, "sym": False}, "x": 3}},
     Gptq(4, 64, False, False, "gptq")),
    (awq(256, 512), AUTO_ROUND | {"packing_format": "auto_round:auto_awq"}, Awq(128)),
    (nvfp4(256, 512), MODELOPT_FP4, Nvfp4("modelopt", "static")),
    (nvfp4(256, 512, input_scale=None, weight_scale_2=ONE), MODELOPT_FP4, Nvfp4("modelopt", "none")),
    (nvfp4(256, 512, bias=("BF16", (256,))), {"quant_method": "fp8", "moe_quant_algo": "NVFP4"},
     Nvfp4("modelopt", "static")),
    (nvfp4(256, 512), NVFP4_BESIDE_FP8, Nvfp4("modelopt", "static")),
    (fp8_block(256, 512), NVFP4_BESIDE_FP8, Fp8("block", "dynamic", (128, 128))),
    (mxfp4(256, 512, weight=("I8", (256, 256)), weight_scale=None, scale=("F8_E8M0", (256, 16))), NVFP4_BESIDE_FP8,
     Mxfp4("weight", "I8", "scale", "F8_E8M0")),
    (mxfp4(256, 512), {"quant_method": "quark", "algo_config": [{"name": "awq"}]}, Mxfp4()),
    (mxfp4(256, 512, weight_scale=("F8_E8M0", (256, 16))), {}, Mxfp4(scales_dtype="F8_E8M0")),
    (mxfp4(256, 512, weight=("I8", (256, 256)), weight_scale=None, scale=("F8_E8M0", (256, 16))), BLOCK,
     Mxfp4("weight", "I8", "scale", "F8_E8M0")),
    # What AutoRound left unquantized and another tool stored in FP8
    (fp8_block(256, 512), AUTO_ROUND | {"extra_config": {".*": {"bits": 16}}}, Fp8("block", "dynamic", (128, 128))),
    (fp8_block(200, 300), CHANNEL, Fp8("block", "dynamic", (128, 128))),
    (fp8(256, 512, (2, 4)), BLOCK, Fp8("block", "dynamic", (128, 128), "weight_scale")),
    (fp8(256, 512, (2, 4)), {"quant_method": "modelopt"}, Fp8("block", "dynamic", (128, 128), "weight_scale")),
    ({"weight": ("F8_E4M3", (256, 512)), "scale": ("F32", (2, 4))}, BLOCK,
     Fp8("block", "dynamic", (128, 128), "scale")),
    (fp8_block(256, 512, weight_scale_inv=("BF16", ()), activation_scale=("BF16", ())),
     {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None},
     Fp8("tensor", "static", None, "weight_scale_inv", "", "activation_scale")),
    (fp8_block(100, 100, weight_scale_inv=("F32", (1, 1))), BLOCK, Fp8("block", "dynamic", (128, 128))),
    (fp8_block(200, 300, bias=("BF16", (200,))), BLOCK, Fp8("block", "dynamic", (128, 128))),
    (fp8_block(200, 300, (64, 32)), BLOCK | {"weight_block_size": [64, 32]}, Fp8("block", "dynamic", (64, 32))),
    (fp8_block(256, 512), BLOCK | {"scale_fmt": "ue8m0"}, Fp8("block", "dynamic", (128, 128), scale_fmt="ue8m0")),
    # Powers of two
    (fp8_block(256, 512, weight_scale_inv=("F8_E8M0", (2, 4))), BLOCK | {"scale_fmt": "ue8m0"},
     Fp8("block", "dynamic", (128, 128), scale_fmt="ue8m0")),
    ({"weight": ("F8_E4M3", (256, 512)), "scale": ("U8", (2, 4))}, BLOCK,
     Fp8("block", "dynamic", (128, 128), "scale")),
    (fp8(100, 100, (), weight_scale=("F8_E8M0", (1, 1))), BLOCK, Fp8("block", "dynamic", (128, 128), "weight_scale")),
    (fp8_block(96, 512, (32, 32), weight_scale_inv=("F8_E8M0", (3, 16))), BLOCK | {"weight_block_size": [32, 32]},
     Fp8("block", "dynamic", (32, 32))),
    (fp8_block(1, 512, (32, 32), weight_scale_inv=("U8", (1, 16))), BLOCK | {"weight_block_size": [32, 32]},
     Fp8("block", "dynamic", (32, 32))),
    (fp8(256, 512, (256, 1)), CHANNEL, Fp8("channel")),
    (fp8(256, 512, (256,)), CHANNEL, Fp8("channel")),
    (fp8(256, 512, (), input_scale=("F32", ())), BLOCK | {"activation_scheme": "static"}, Fp8("tensor", "static")),
    (fp8(256, 512, (1,), input_scale=ONE), {"quant_method": "modelopt"}, Fp8("tensor", "static")),
    (fp8(256, 512, (256, 1), weight=("I8", (256, 512))), CHANNEL, Int8("channel")),
    (fp8_block(200, 300, weight=("I8", (200, 300))), BLOCK | {"quant_method": "blockwise_int8"},
     Int8("block", "dynamic", (128, 128))),
    ({"weight": ("BF16", (256, 512)), "bias": ("F32", (256,))}, GPTQ, Dense("BF16")),  # what `dynamic` leaves out
    ({"": ("F32", (7,))}, {}, Dense("F32")),  # A_log
    ({"": ("I64", (1, 512))}, {}, Dense("I64")),  # position_ids
    ({"bias": ("F32", (256,))}, {}, Dense("F32")),
]  # fmt: skip


@pytest.mark.parametrize(("tensors", "config", "expected"), SOUND)
def test_what_is_sound_is_recognised(tensors: Tensors, config: Config, expected: Format) -> None:
    assert recognise(stated(tensors), config) == expected


# Tensors, configuration, and how the message starts.
CONTRADICTIONS: list[tuple[Tensors, Config, str]] = [
    # GPTQ: its tensors against one another
    (gptq(256, 512, scales=None), GPTQ, "gptq_int4 needs scales"),
    (gptq(256, 512, qzeros=None), GPTQ, "gptq_int4 needs qzeros"),
    (gptq(256, 512, scales=("F16", (256,))), GPTQ, "scales F16 [256]: two dimensions were expected"),
    (gptq(256, 512, scales=("I8", (4, 256))), GPTQ, "scales I8 [4, 256]: F16 or BF16 or F32 was expected"),
    (gptq(256, 512, qweight=("I64", (64, 256))), GPTQ, "qweight I64 [64, 256]: I32 was expected"),
    (gptq(256, 512, qweight=("I32", (64, 128))), GPTQ,
     "qweight I32 [64, 128]: [64, 256] was expected beside scales F16 [4, 256]"),
    (gptq(256, 512, qzeros=("I32", (3, 32))), GPTQ,
     "qzeros I32 [3, 32]: [4, 32] was expected beside scales F16 [4, 256]"),
    (gptq(260, 512), GPTQ, "260 outputs do not fill whole words of 8 zero points"),
    (gptq(256, 512, g_idx=("I32", (256,))), GPTQ, "g_idx I32 [256]: [512] was expected for 512 inputs"),
    (gptq(256, 512, bias=("F16", (512,))), GPTQ, "bias F16 [512]: [256] was expected for 256 outputs"),
    (gptq(256, 512, lora_a=("F16", (8, 512))), GPTQ, "lora_a F16 [8, 512] does not belong to gptq_int4"),
    # GPTQ: its tensors against the configuration
    (gptq(256, 512, bits=8), GPTQ, "qzeros I32 [4, 64] beside scales F16 [4, 256] is 8 bit, the configuration says 4"),
    (gptq(256, 512), GPTQ | {"bits": 8},
     "qzeros I32 [4, 32] beside scales F16 [4, 256] is 4 bit, the configuration says 8"),
    (gptq(256, 512, qzeros=("I32", (4, 24))), GPTQ,
     "qzeros I32 [4, 24] beside scales F16 [4, 256] is 3 bit, the configuration says 4"),
    (gptq(256, 512, group_size=64), GPTQ,
     "scales F16 [8, 256]: [4, 256] was expected for 512 inputs in groups of 128"),
    (gptq(256, 512), GPTQ | {"group_size": -1},
     "scales F16 [4, 256]: [1, 256] was expected for 512 inputs in one group"),
    (gptq(256, 512, g_idx=None), GPTQ | {"desc_act": True}, "desc_act, but no g_idx"),
    (gptq(256, 512, group_size=64), GPTQ | {"dynamic": {r"+:.*down_proj": {"group_size": 32}}},
     "scales F16 [8, 256]: [16, 256] was expected for 512 inputs in groups of 32"),
    # GPTQ: what the configuration may say
    (gptq(256, 512), GPTQ | {"bits": 3}, "GPTQ with 3 bits is not read, only with 4 and 8"),
    (gptq(256, 512), GPTQ | {"bits": 2}, "GPTQ with 2 bits is not read"),
    (gptq(256, 512), GPTQ | {"group_size": 0}, "GPTQ group_size 0 is neither -1 nor a positive number"),
    (gptq(256, 512), GPTQ | {"group_size": "128"}, "GPTQ group_size '128' is neither"),
    (gptq(256, 512), GPTQ | {"sym": "yes"}, "GPTQ sym 'yes' and desc_act False must be true or false"),
    (gptq(256, 512), GPTQ | {"checkpoint_format": "marlin"},
     "GPTQ checkpoint_format 'marlin' is not read, only gptq and gptq_v2"),
    (gptq(256, 512), GPTQ | {"dynamic": {"+:(": {"bits": 8}}},
     "`dynamic` holds '+:(', which is no regular expression: "),
    (gptq(256, 512), {}, "GPTQ tensors, but neither config.json nor quantize_config.json says how"),
    (gptq(256, 512), {"quant_method": "auto-rounds", "bits": 4},
     "qweight I32 [64, 256] of quant_method 'auto-rounds' is not read, only of gptq"),
    # AutoRound
    (gptq(256, 512, g_idx=None), AUTO_ROUND | {"packing_format": "auto_round:mx_fp"},
     "qweight I32 [64, 256] of AutoRound's packing_format 'auto_round:mx_fp' is not read"),
    (gptq(256, 512, g_idx=None), AUTO_ROUND | {"bits": 8}, "qzeros I32 [4, 32] beside scales F16 [4, 256] is 4 bit"),
    (gptq(256, 512, g_idx=None), AUTO_ROUND | {"data_type": "fp8"},
     "qweight I32 [64, 256] of AutoRound's data_type 'fp8'"),
    (gptq(256, 512, g_idx=None), AUTO_ROUND | {"extra_config": {".*down_proj": {"bits": 16}}},
     "qweight I32 [64, 256] is stored quantized, although `extra_config` says that it has 16 bits"),
    (gptq(256, 512, g_idx=None), AUTO_ROUND | {"extra_config": {".*(down_proj": {"bits": 8}}},
     "`extra_config` holds '.*(down_proj', which is no regular expression"),
    (gptq(256, 512, g_idx=None), AUTO_ROUND | {"extra_config": {".*down_proj": {"rotated": True}}},
     "`extra_config` has `rotated`, a key that mixprec does not know"),
    (gptq(256, 512, g_idx=None), AUTO_ROUND | {"packing_format": "auto_round:auto_awq"}, "qweight I32 [64, 256]: "),
    # AWQ
    (awq(256, 512, qzeros=None), AWQ, "awq_int4 needs qzeros"),
    (awq(256, 512, scales=("F16", (256,))), AWQ, "scales F16 [256]: two dimensions were expected"),
    (gptq(256, 512, g_idx=None), AWQ,
     "qweight I32 [64, 256]: [64, 32] was expected beside scales F16 [4, 256] (version gemm)"),
    (gptq(256, 512), AWQ, "g_idx I32 [512] does not belong to awq_int4"),
    (awq(256, 512, group_size=64), AWQ, "scales F16 [8, 256]: [4, 256] was expected for 512 inputs in groups of 128"),
    (awq(256, 512, qzeros=("I32", (4, 16))), AWQ,
     "qzeros I32 [4, 16]: [4, 32] was expected beside scales F16 [4, 256]"),
    (awq(260, 512), AWQ, "260 outputs do not fill whole words of 8"),
    (awq(256, 512, scales=("I8", (4, 256))), AWQ, "scales I8 [4, 256]: F16 or BF16 or F32 was expected"),
    (awq(256, 512, bias=("F16", (512,))), AWQ, "bias F16 [512]: [256] was expected for 256 outputs"),
    (awq(256, 512), AWQ | {"bits": 8}, "AWQ with 8 bits is not read, only with 4"),
    (awq(256, 512), AWQ | {"bits": 4.0}, "AWQ with 4.0 bits is not read"),
    (awq(256, 512), {"quant_method": "awq"}, "AWQ with None bits is not read"),
    (awq(256, 512), AWQ | {"zero_point": False}, "AWQ with zero_point False is not read, only with true"),
    (awq(256, 512), AWQ | {"version": "gemv"}, "AWQ version 'gemv' is not read, only gemm"),
    (awq(256, 512), AWQ | {"version": "gemv_fast"}, "AWQ version 'gemv_fast' is not read"),
    (awq(256, 512), AWQ | {"version": "marlin"}, "AWQ version 'marlin' is not read"),
    (awq(256, 512), AWQ | {"version": [[]]}, "AWQ version [[]] is not read"),
    (awq(256, 512), AWQ | {"group_size": 0}, "AWQ group_size 0 is neither -1 nor a positive number"),
    (awq(256, 512), AWQ | {"group_size": None}, "AWQ group_size None is neither"),
    (awq(256, 512), AWQ | {"group_size": 10**400}, "scales F16 [4, 256]: [1, 256] was expected for 512 "),
    # FP8
    (fp8(256, 512, (), weight_scale=None), BLOCK,
     "weight F8_E4M3 [256, 512] needs one of weight_scale, weight_scale_inv and scale"),
    (fp8_block(256, 512, weight_scale=ONE), BLOCK,
     "weight F8_E4M3 [256, 512] needs one of weight_scale, weight_scale_inv and"),
    (fp8(256, 512, (), weight=("F8_E4M3", (8, 256, 512))), BLOCK,
     "weight F8_E4M3 [8, 256, 512]: only two-dimensional FP8 weights are read"),
    (fp8_block(256, 512, weight_scale_inv=("F32", (4, 2))), BLOCK,
     "weight_scale_inv F32 [4, 2]: [2, 4] was expected for weight [256, 512] in blocks of [128, 128]"),
    (fp8_block(256, 512, (64, 64)), BLOCK, "weight_scale_inv F32 [4, 8]: [2, 4] was expected"),
    (fp8_block(256, 512, weight_scale_inv=("F8_E8M0", (256, 1))), BLOCK,
     "weight_scale_inv F8_E8M0 [256, 1]: [2, 4] was expected for weight [256, 512] in blocks of [128, 128]"),
    # A power of two for each 32 inputs
    (fp8_block(256, 512, weight_scale_inv=("U8", (256, 16))), BLOCK,
     "stored as MXFP8 (weight F8_E4M3 [256, 512], weight_scale_inv U8 [256, 16]), which this version of mixprec does "
     "not read: SGLang runs FP8 with a scale for each 32 inputs from compute capability 10.0 on"),
    (fp8_block(256, 512, weight_scale_inv=("F8_E8M0", (256, 16))), BLOCK | {"weight_block_size": [1, 32]},
     "stored as MXFP8 (weight F8_E4M3 [256, 512], weight_scale_inv F8_E8M0 [256, 16])"),
    (fp8(256, 512, (), weight_scale=("U8", (256, 16))), {"quant_method": "mxfp8"}, "stored as MXFP8 ("),
    (fp8_block(200, 300, weight=("I8", (200, 300)), weight_scale_inv=("F8_E8M0", (2, 3))),
     BLOCK | {"quant_method": "blockwise_int8"}, "stored in no format mixprec knows (weight I8 [200, 300]"),
    (fp8_block(256, 512, (64, 64)), CHANNEL,
     "weight_scale_inv F32 [4, 8], but quantization_config has no weight_block_size"),
    (fp8_block(256, 512), BLOCK | {"weight_block_size": [128, 0]},
     "weight_block_size [128, 0] is no pair of positive numbers"),
    (fp8_block(256, 512), BLOCK | {"weight_block_size": 128}, "weight_block_size 128 is no pair"),
    (fp8(256, 512, (512, 1)), CHANNEL, "weight_scale F32 [512, 1]: [256, 1] was expected for weight [256, 512]"),
    (fp8(256, 512, (4, 4)), CHANNEL,
     "weight_scale F32 [4, 4]: scales of blocks, but no config group of quantization_config says how large"),
    (fp8(256, 512, (1,), input_scale=("F32", (512,))), {}, "input_scale F32 [512]: one value was expected"),
    (fp8(256, 512, (1,), bias=("F16", (512,))), {}, "bias F16 [512]: [256] was expected for weight [256, 512]"),
    (fp8(256, 512, (1,), weight_zero_point=ONE), {}, "weight_zero_point F32 [1] does not belong to fp8_tensor"),
    (fp8(256, 512, (1,)), {"activation_scheme": "static"},
     "activation_scheme is 'static', but the module has no input_scale"),
    (fp8(256, 512, (1,), input_scale=ONE), {"activation_scheme": "dynamic"},
     "activation_scheme is 'dynamic', but the module has an input_scale"),
    (fp8(256, 512, (1,)), {"activation_scheme": "none"}, "activation_scheme 'none' is neither static nor dynamic"),
    # Dense
    ({"weight": ("BF16", (256, 512)), "bias": ("BF16", (512,))}, {},
     "bias BF16 [512] does not fit weight BF16 [256, 512]"),
    # Formats that are known by their tensors and not read
    ({"weight": ("I8", (256, 512)), "weight_scale": ("F32", (256, 1)), "weight_zero_point": ("I8", (256, 1))}, CHANNEL,
     "weight_zero_point I8 [256, 1] does not belong to int8_channel"),
    ({"weight": ("U8", (256, 256))}, {"quant_method": "quark"}, "stored as a 4-bit float format (NVFP4, MXFP4) ("),
    (fp8(256, 512, (1,), weight=("F8_E5M2", (256, 512))), BLOCK, "stored as FP8 E5M2 (weight F8_E5M2 [256, 512], "),
    # NVFP4
    (nvfp4(256, 512, weight_scale_2=None), MODELOPT_FP4, "nvfp4 needs weight_scale_2"),
    (nvfp4(256, 512, weight_scale=("F8_E4M3", (256, 16))), MODELOPT_FP4,
     "weight_scale F8_E4M3 [256, 16]: [256, 32] was expected for 256 outputs and 512 inputs"),
    (nvfp4(256, 512, input_scale=("F32", (256,))), MODELOPT_FP4, "input_scale F32 [256]: [1] was expected"),
    (nvfp4(256, 512, pre_quant_scale=("BF16", (512,))), MODELOPT_FP4 | {"quant_algo": "NVFP4_AWQ"},
     "pre_quant_scale BF16 [512]: stored as ModelOpt's NVFP4_AWQ, whose inputs are to be multiplied by this first"),
    (nvfp4(256, 520), MODELOPT_FP4, "520 inputs are no multiple of the block of 16"),
    ({"weight_packed": ("U8", (256, 256)), "weight_scale": ("F8_E4M3", (256, 32)), "weight_global_scale": ONE},
     PACKED_INT4, "stored as ct_nvfp4, but declared by config group 'group_0' (pack-quantized, 4 bit int, group)"),
    ({"": ("F8_E4M3", (256, 512))}, BLOCK, "stored in no format mixprec knows (the tensor F8_E4M3 [256, 512])"),
    ({"weight": ("BF16", (256, 512)), "SCB": ("F32", (256,))}, {},
     "stored in no format mixprec knows (SCB F32 [256], weight "),
]  # fmt: skip


@pytest.mark.parametrize(("tensors", "config", "message"), CONTRADICTIONS, ids=[c[2] for c in CONTRADICTIONS])
def test_what_contradicts_itself_is_told(tensors: Tensors, config: Config, message: str) -> None:
    with pytest.raises(FormatError, match="^" + re.escape(message)):
        recognise(stated(tensors), config)


SIZES = st.integers(1, 1 << 20)
FORMATS = (
    st.sampled_from(("BF16", "F16", "F32", "F64", "I64", "U8", "BOOL")).map(Dense)
    | st.builds(Fp8, st.sampled_from(("channel", "tensor")), st.sampled_from(("static", "dynamic")))
    | st.builds(Fp8, st.just("block"), st.sampled_from(("static", "dynamic")), st.tuples(SIZES, SIZES))
    | st.builds(
        Gptq, st.sampled_from((4, 8)), st.just(-1) | SIZES, st.booleans(), st.booleans(),
        st.sampled_from(("gptq", "gptq_v2")),
    )
    | st.builds(Awq, st.just(-1) | SIZES)
)  # fmt: skip


@given(FORMATS)
def test_a_format_survives_json(fmt: Format) -> None:
    assert format_from_json(json.loads(json.dumps(fmt.to_json()))) == fmt


G = Gptq(4, 128, True, False, "gptq").to_json()
F = Fp8("block", "dynamic", (128, 128)).to_json()


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"kind": None},
        {"kind": "awq_int3"},  # of a later version: not to be taken for something unquantized
        {"kind": "awq_int4"},
        {"kind": "awq_int4", "group_size": 0},
        {"kind": "awq_int4", "group_size": True},
        {"kind": "f8_e4m3"},
        {"kind": "gptq_int4"},
        G | {"kind": "gptq_int2"},
        G | {"group_size": 0},
        G | {"sym": "false"},
        G | {"layout": "gptq_v3"},
        {key: value for key, value in F.items() if key != "block"},
        F | {"block": [128]},
        F | {"block": [128, "128"]},
        F | {"activations": "sometimes"},
    ],
    ids=str,
)
def test_a_damaged_declaration_is_refused(data: Config) -> None:
    with pytest.raises((KeyError, TypeError, ValueError)):
        format_from_json(data)


# Modules of a compiled checkpoint, by format.
MIXED: dict[str, tuple[Tensors, Format]] = {
    "model.embed_tokens": ({"weight": ("BF16", (64, 128))}, Dense("BF16")),
    "model.layers.0.mlp.down_proj": (gptq(64, 128, group_size=64), Gptq(4, 64, True, False, "gptq")),
    "model.layers.1.mlp.down_proj": (gptq(64, 128, group_size=-1), Gptq(4, -1, False, True, "gptq_v2")),
    "model.layers.2.mlp.down_proj": (fp8_block(64, 128, (48, 48)), Fp8("block", "dynamic", (48, 48))),
    "model.layers.3.mlp.down_proj": (fp8(64, 128, (), input_scale=ONE), Fp8("tensor", "static")),
    "model.layers.4.mlp.down_proj": (awq(64, 128, group_size=64), Awq(64)),
    "model.norm": ({"weight": ("BF16", (128,))}, Dense("BF16")),
    "model.position_ids": ({"": ("I64", (1, 8))}, Dense("I64")),
}

TORCH = {
    "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "I32": torch.int32, "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn, "I8": torch.int8, "U8": torch.uint8,
}  # fmt: skip


def write(folder: Path, modules: dict[str, Tensors], config: Config) -> Path:
    tensors = {
        f"{name}.{leaf}" if leaf else name: torch.zeros(shape, dtype=TORCH[dtype])
        for name, leaves in modules.items()
        for leaf, (dtype, shape) in leaves.items()
    }
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": config}))
    return folder


def test_detects_a_checkpoint_and_keeps_what_is_not_read_as_errors(tmp_path: Path) -> None:
    modules: dict[str, Tensors] = {
        "model.layers.0.mlp.up_proj": fp8_block(256, 128),
        "model.layers.0.mlp.down_proj": fp8_block(128, 256, weight_scale_inv=None),
        "model.layers.0.input_layernorm": {"weight": ("BF16", (128,))},
        "model.layers.0.mlp.gate": {"weight": ("U8", (8, 128))},
    }
    found = detect(open_checkpoint(str(write(tmp_path, modules, BLOCK))))
    errors = {name: str(found.pop(name)) for name in modules if isinstance(found[name], FormatError)}
    assert found == {
        "model.layers.0.mlp.up_proj": Fp8("block", "dynamic", (128, 128)),
        "model.layers.0.input_layernorm": Dense("BF16"),
    }
    # Only modules that are used matter, so each keeps its own reason.
    assert errors.keys() == {"model.layers.0.mlp.down_proj", "model.layers.0.mlp.gate"}
    assert "needs one of weight_scale" in errors["model.layers.0.mlp.down_proj"]
    assert "4-bit float" in errors["model.layers.0.mlp.gate"]


def test_a_compiled_checkpoint_has_what_it_declares(tmp_path: Path) -> None:
    modules = {name: tensors for name, (tensors, _) in MIXED.items()}
    formats = {name: fmt for name, (_, fmt) in MIXED.items()}
    config = quantization_config(formats)
    folder = write(tmp_path, modules, config)
    assert detect(open_checkpoint(str(folder))) == formats

    # Nothing is guessed: tensors that are not as declared are an error of their module alone.
    changed: dict[str, Tensors] = {
        "model.layers.0.mlp.down_proj": gptq(64, 128, group_size=32),
        "model.layers.3.mlp.down_proj": fp8(64, 128, ()),
    }
    write(folder, modules | changed, config)
    found = detect(open_checkpoint(str(folder)))
    int4, static = (str(found.pop(name)) for name in changed)
    assert int4.endswith("[2, 64] was expected for 128 inputs in groups of 64")
    assert static == "has no input_scale although its activations are declared static"
    assert found == {name: fmt for name, fmt in formats.items() if name not in changed}

    for damage in ({"version": 2}, {"default": "int3"}, {"formats": {"bf16": {"kind": "awq_int3"}}}):
        write(folder, modules, config | damage)
        with pytest.raises(SourceError, match=r"version 2|damaged"):
            detect(open_checkpoint(str(folder)))


@pytest.mark.parametrize("leaf", ["gate_up_proj_blocks", "down_proj_scales"])
def test_mxfp4_of_gpt_oss_does_not_pass_for_a_buffer(leaf: str) -> None:
    module = stated({"": ("U8", (32, 5760, 90, 16))}, f"model.layers.0.mlp.experts.{leaf}")
    with pytest.raises(
        FormatError, match=r"^stored as gpt-oss's MXFP4 \(the tensor U8 \[32, 5760, 90, 16\]\), which this version"
    ):
        recognise(module, {"quant_method": "mxfp4"})


def test_modules_stored_alike_are_told_apart_where_names_matter(tmp_path: Path) -> None:
    words = torch.zeros(4, dtype=torch.uint8)
    save_file({"mlp.gate_up_proj_blocks": words, "mlp.token_map": words.clone()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "mxfp4"}}))
    found = detect(open_checkpoint(str(tmp_path)))
    assert found["mlp.token_map"] == Dense("U8")
    assert isinstance(found["mlp.gate_up_proj_blocks"], FormatError)


def test_modules_stored_alike_share_one_format(tmp_path: Path) -> None:
    weight = torch.zeros(4, 4)
    tensors = {"a.weight": weight, "b.weight": weight.clone(), "c.weight": weight.clone(), "c.bias": torch.zeros(4)}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    found = detect(open_checkpoint(str(tmp_path)))
    assert found["a"] is found["b"] and found["a"] == found["c"] == Dense("F32")
