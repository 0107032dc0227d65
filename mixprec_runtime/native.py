"""SGLang's own quantization config for each storage format of a checkpoint.

Methods are instances of SGLang's classes, since its linear layers choose a weight loader by the name of the method's
class. Where stock SGLang is wrong, the instance is repaired: see :mod:`mixprec_runtime.formats.repair`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from sglang.srt.layers.quantization.base_config import FusedMoEMethodBase, LinearMethodBase, QuantizationConfig
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
from sglang.srt.utils import is_cpu

from mixprec_build.formats.base import Format

from . import launch
from .cpu import reference
from .formats.base import may_have_biases
from .formats.dense import BiasedExperts
from .formats.lm_head import head_method, load_as_vocabulary
from .formats.registry import served
from .formats.repair import install

__all__ = ["NativeFormat", "format_of", "sglang_config"]

_DETECTING = ("fp8", "blockwise_int8", "modelopt_quant", "w4afp8")
"""Modules below SGLang's ``layers.quantization`` whose configs log what they take for the format of all weights."""


def format_of(layer: torch.nn.Module) -> Format | None:
    """The format of a layer whose method a :class:`NativeFormat` made; None for other layers."""
    fmt: Format | None = getattr(getattr(layer, "quant_method", None), "mixprec_format", None)
    return fmt


@contextmanager
def _without_detected() -> Iterator[None]:
    """Leaves out lines such as "Detected int8 checkpoint", of which each format of a checkpoint would log another.

    :func:`.memory.serve` logs one line that names all of them.
    """
    loggers = [logging.getLogger(f"sglang.srt.layers.quantization.{name}") for name in _DETECTING]
    for logger in loggers:
        logger.addFilter(_says_more_than_detected)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(_says_more_than_detected)


def _says_more_than_detected(record: logging.LogRecord) -> bool:
    return re.match(r"Detected \w+ checkpoint", record.getMessage()) is None


def sglang_config(fmt: Format) -> QuantizationConfig | None:
    """SGLang's own config for a format; None for an unquantized one.

    Raises:
        ValueError: SGLang has no config for it.
    """
    return served(fmt).sglang_config(fmt)


class NativeFormat(QuantizationConfig):
    """One format of a checkpoint: makes SGLang's methods for it, repaired where SGLang is wrong.

    As the ``quant_config`` of a group of experts, it has the interface of SGLang's own config.
    """

    def __init__(self, fmt: Format):
        super().__init__()
        self.format = fmt
        self._served = served(fmt)
        with reference.pretend_hopper(), _without_detected():
            self._config = self._served.sglang_config(fmt)

    def get_name(self) -> str:
        return "unquant" if self._config is None else self._config.get_name()

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        if self._config is None or is_cpu():
            return [torch.bfloat16, torch.half, torch.float32]
        return list(self._config.get_supported_act_dtypes())

    def get_min_capability(self) -> int:  # an instance method, as in Fp8Config
        return 75 if self._config is None else self._config.get_min_capability()

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> NativeFormat:
        raise NotImplementedError("made by MixPrecConfig")

    def get_scaled_act_names(self) -> list[str]:
        return []

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> LinearMethodBase | FusedMoEMethodBase | None:
        """SGLang's method for a linear or FusedMoE layer; None for dense experts, whose FusedMoE makes its own, but for
        those with biases.

        Raises:
            ValueError: SGLang has no kernel or method for this layer.
        """
        from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE

        experts = isinstance(layer, FusedMoE)
        if self._config is None:
            if not experts:
                return UnquantizedLinearMethod()
            own = BiasedExperts() if may_have_biases(layer) else None
            return reference.unquantized_experts(own) if is_cpu() else own
        if experts:
            self._served.check_experts(layer, self.format, prefix)
        with reference.pretend_hopper():
            method = self._config.get_quant_method(layer, prefix)
        if method is None:
            raise ValueError(f"{prefix}: SGLang has no {self.format.kind} method for {type(layer).__name__}")
        return self._prepared(method, prefix, experts=experts)

    def get_head_method(self, layer: torch.nn.Module, prefix: str) -> LinearMethodBase | None:
        """SGLang's method for an ``lm_head``; None where the layer makes its own unquantized method.

        Raises:
            RuntimeError: an argument of the server excludes a quantized head.
            ValueError: SGLang has no method for linears in this format.
        """
        if self._config is None:
            return None
        launch.check_quantized_head(self.format.kind)
        with reference.pretend_hopper():
            method = head_method(self._config, layer, prefix)
        if method is None:
            raise ValueError(f"{prefix}: SGLang has no {self.format.kind} method for linears")
        load_as_vocabulary(method, self.format)
        prepared: LinearMethodBase = self._prepared(method, prefix, experts=False)
        return prepared

    def _prepared(self, method: Any, prefix: str, *, experts: bool) -> Any:
        """Repairs SGLang's ``method``, and on a CPU replaces its arithmetic by the reference."""
        method.mixprec_format = self.format
        install(method, self.format, self._served.repairs, "experts" if experts else "linear", prefix)
        if is_cpu():
            reference.stand_in(method, self.format, self._served.as_stored, experts=experts)
        if experts and not self._served.biased_experts:
            _refuse_biases(method, f"{prefix} ({self.format.kind})")
        return method


def _refuse_biases(method: Any, named: str) -> None:
    """Has ``method`` raise ``ValueError`` for experts with biases, which SGLang 0.5.15 tells only who makes weights."""
    create = method.create_weights

    def create_weights(layer: Any, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("with_bias"):
            raise ValueError(
                f"{named}: mixprec serves experts with biases in MXFP4 and unquantized only; build the checkpoint with "
                "one of these for it"
            )
        create(layer, *args, **kwargs)

    method.create_weights = create_weights
