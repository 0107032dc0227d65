"""Each layer of SGLang's own models gets SGLang's own method for the format that the checkpoint declares."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from harness import build, make, rank_of
from mixes import MIXES, SHAPES

pytestmark = pytest.mark.usefixtures("sglang")

LINEAR = {
    "bf16": "UnquantizedLinearMethod",
    "fp8_block": "Fp8LinearMethod",
    "fp8_channel": "W8A8Fp8LinearMethod",
    "fp8_tensor": "Fp8LinearMethod",
    "gptq_int4": "GPTQMarlinLinearMethod",
    "gptq_int4_act": "GPTQMarlinLinearMethod",
    "gptq_int4_g64": "GPTQMarlinLinearMethod",
    "gptq_int8": "GPTQMarlinLinearMethod",
}
EXPERTS = {
    "bf16": "UnquantizedFusedMoEMethod",
    "fp8_block": "Fp8MoEMethod",
    "fp8_channel": "W8A8FP8MoEMethod",
    "fp8_tensor": "Fp8MoEMethod",
    "gptq_int4": "GPTQMarlinMoEMethod",
    "gptq_int4_g64": "GPTQMarlinMoEMethod",
    "gptq_int8": "GPTQMarlinMoEMethod",
}
