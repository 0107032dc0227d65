"""The grouped output projection of DeepSeek-V4, ``wo_a``.

SGLang's class multiplies by it outside of quantization methods: in BF16, to which it dequantizes FP8 as it loads it, or
on Blackwell in FP8, by a kernel that mixprec was not tried with. The choice is a constant of the class's module, from
``SGLANG_OPT_FP8_WO_A_GEMM`` (``models/deepseek_v4.py:202`` in 0.5.17); from 0.5.23 on, BF16 is the only one for a
quantization config that is not SGLang's own.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from mixprec_build.families.base import Family
from mixprec_build.families.facts import ModelFacts
from mixprec_build.families.parts import CutBy

__all__ = ["are_in", "check", "dequantize", "load_apart"]

logger = logging.getLogger(__name__)

_MODULE, _CONSTANT, _VARIABLE = "sglang.srt.models.deepseek_v4", "_FP8_WO_A_GEMM", "SGLANG_OPT_FP8_WO_A_GEMM"
_UNFILLED = "Some weights are not initialized from checkpoints"


def are_in(family: Family) -> bool:
    """Whether models of ``family`` have such a projection."""
    return CutBy.OUTPUT_GROUPS in family.cuts.values()


def dequantize(family: Family) -> None:
    """Before a model of ``family`` is made: has SGLang's class, if it is DeepSeek-V4's, take ``wo_a`` in BF16."""
    if not are_in(family):
        return
    module = importlib.import_module(_MODULE)
    if getattr(module, _CONSTANT):
        logger.info("mixprec: wo_a is dequantized to BF16 as it is loaded, as with %s=0", _VARIABLE)
        setattr(module, _CONSTANT, False)
    os.environ[_VARIABLE] = "0"


def check(facts: ModelFacts) -> None:
    """Checks that the ranks of this run can share the groups; SGLang's class would round down, and stop at a request.

    Raises:
        RuntimeError: they cannot.
    """
    from sglang.srt.runtime_context import get_parallel

    ranks, groups = get_parallel().attn_tp_size, facts.output_groups
    if are_in(facts.family) and groups is not None and groups % ranks:
        raise RuntimeError(
            f"the output of attention is projected in {groups} groups (o_groups of config.json), which {ranks} ranks "
            f"cannot share: start SGLang with a --tp that divides {groups}"
        )


def load_apart(family: Family, load_weights: Callable[..., Any]) -> Callable[..., Any]:
    """``load_weights`` of a model, called once more for ``wo_a`` that is stored unquantized, if it is DeepSeek-V4's.

    Where one ``wo_a`` has scales, SGLang's class misses those of the others (``_dequant_fp8_wo_a_streaming``). It warns
    of all parameters that were not filled by one call; mixprec checks that by itself, and fills most of them.
    """
    if not are_in(family):
        return load_weights

    def load(weights: Iterable[tuple[str, torch.Tensor]], *args: Any, **kwargs: Any) -> Any:
        apart: list[tuple[str, torch.Tensor]] = []

        def others() -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in weights:
                if name.endswith(".wo_a.weight") and tensor.dtype != torch.float8_e4m3fn:
                    apart.append((name, tensor))
                else:
                    yield name, tensor

        of_class = logging.getLogger(_MODULE)
        of_class.addFilter(_says_more)
        try:
            result = load_weights(others(), *args, **kwargs)
            if apart:
                load_weights(iter(apart), *args, **kwargs)
        finally:
            of_class.removeFilter(_says_more)
        return result

    return load


def _says_more(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_UNFILLED)
