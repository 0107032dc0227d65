"""``--moe-a2a-backend deepep``: each layer is one of SGLang's ``DeepEPMoE``, with the config of its own format.

``DeepEPMoE`` asks what its config is: an ``Fp8Config``, or None for experts in BF16, have kernels of DeepGEMM's behind
DeepEP. The config of a compiled checkpoint is neither, so each layer is given one that is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from sglang.srt.layers.deep_gemm_wrapper import configurer
from sglang.srt.layers.moe import utils
from sglang.srt.layers.quantization.base_config import QuantizationConfig
from sglang.srt.layers.quantization.fp8 import Fp8Config

from mixprec_build.formats.base import Format
from mixprec_build.formats.dense import Dense

from ..launch import refuse
from .runner import Layers, by_formats, found_as, only_format, require_heeded, takes

__all__ = ["DEEP_GEMM", "BlockFp8Layer", "check", "in_use", "made_by_format", "problems"]


DEEP_GEMM = "deep_gemm"


class BlockFp8Layer(Fp8Config):
    """The config of one layer whose experts are in block FP8; its method is the one that the whole config makes."""

    def __init__(self, whole: QuantizationConfig):
        super().__init__(is_checkpoint_fp8_serialized=True, activation_scheme="dynamic", weight_block_size=[128, 128])
        self._whole = whole

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        return self._whole.get_quant_method(layer, prefix)


def in_use() -> bool:
    """Whether the model that is being made has all-to-all communication between experts."""
    return not utils.get_moe_a2a_backend().is_none()


def check(layers: Layers, runner: str) -> None:
    """Checks that ``layers`` can be served with DeepEP, if it is in use.

    ``runner``: what ``--moe-runner-backend`` asks for.

    Raises:
        RuntimeError: some cannot; the message names them.
    """
    if in_use():
        refuse(problems(layers, runner))


def problems(layers: Layers, runner: str) -> list[str]:
    """Why ``layers`` cannot be served with DeepEP, as sentences."""
    found, unfit = [], {name: formats for name, formats in layers.items() if not _fits(only_format(formats))}
    if unfit:
        found.append(
            "--moe-a2a-backend deepep has kernels for layers whose experts are all in FP8 with blocks of 128 x 128, or "
            f"all in BF16, and {by_formats(unfit)}; build these layers so, or leave it out (for a draft, with "
            "--speculative-moe-a2a-backend none)"
        )
    if runner not in ("auto", DEEP_GEMM):
        found.append(
            f"--moe-runner-backend {runner} takes no rows from --moe-a2a-backend deepep, for which DeepGEMM is the "
            "only runner; leave one of them out"
        )
    if not configurer.ENABLE_JIT_DEEPGEMM:
        found.append(
            "--moe-a2a-backend deepep needs DeepGEMM: a GPU of compute capability 9.0 or 10, the package deep_gemm, "
            "and SGLANG_ENABLE_JIT_DEEPGEMM not to be 0; leave it out"
        )
    return found


def _fits(fmt: Format | None) -> bool:
    return fmt is not None and (fmt.kind == "bf16" or takes([fmt], DEEP_GEMM))


def config_of_layer(fmt: Format | None, whole: QuantizationConfig, prefix: str) -> BlockFp8Layer | None:
    """What ``DeepEPMoE`` takes as the config of a layer whose experts are in ``fmt``.

    Raises:
        ValueError: there is none.
    """
    if not _fits(fmt):
        raise ValueError(
            f"{prefix}: --moe-a2a-backend deepep has no kernels for experts in "
            f"{'several formats, or of a layer of another name' if fmt is None else fmt.kind}; leave it out"
        )
    return None if isinstance(fmt, Dense) else BlockFp8Layer(whole)


@contextmanager
def made_by_format(whole: Any) -> Iterator[None]:
    """Has SGLang make each ``DeepEPMoE`` by the format of the layer, while the context lasts.

    ``whole``: the config of the model, a ``MixPrecConfig``.
    """
    if not in_use():
        yield
        return
    from sglang.srt.layers.moe.ep_moe.layer import DeepEPMoE

    with patch.object(DeepEPMoE, "__init__", _by_format(DeepEPMoE.__init__, whole)):
        yield


def _by_format(make: Callable[..., None], whole: Any) -> Callable[..., None]:
    def __init__(layer: Any, *args: Any, quant_config: Any = None, prefix: str = "", **kwargs: Any) -> None:
        own = quant_config
        if quant_config is whole:  # some of SGLang's classes leave experts unquantized
            own = config_of_layer(only_format(whole.formats_of_experts(prefix)), whole, prefix)
        with found_as(DEEP_GEMM):  # experts in BF16 have no other runner behind DeepEP
            make(layer, *args, quant_config=own, prefix=prefix, **kwargs)
        require_heeded(layer, "--moe-a2a-backend deepep", prefix)
        chosen = layer.quant_method.runner.runner_backend.value
        if not layer.deprecate_flag or chosen != DEEP_GEMM:  # its own code has kernels of W4AFP8 only
            raise ValueError(
                f"{prefix}: SGLang has no kernels for these experts behind --moe-a2a-backend deepep (it chose "
                f"{chosen}); leave it out, or serve in BF16"
            )

    return __init__
