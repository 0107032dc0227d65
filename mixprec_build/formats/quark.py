"""Reads Quark's configuration: the algorithms that a checkpoint was quantized with.

Modules are told apart by their tensors. Source: Quark 0.10, ``torch/export``.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from reprlib import repr as brief

from .base import FormatError
from .quantization import Quantization

__all__ = ["METHODS", "check_algorithms"]


_METHOD = "quark"
METHODS: Mapping[str, Set[str]] = {
    _METHOD: frozenset(
        {"global_quant_config", "layer_quant_config", "layer_type_quant_config", "kv_cache_post_rope", "algo_config"}
        | {"export", "quant_mode"}
    )
}
"""``quant_method`` -> the keys of its configuration that are understood."""
_ALGORITHMS = ("awq", "gptq", "gptaq", "smooth", "smoothquant", "autosmoothquant", "qronos")
"""Those that leave a weight's stored values as they are to be multiplied: scales are folded into the modules before."""


def check_algorithms(quantization: Quantization) -> None:
    """Raises :class:`FormatError` where Quark used an algorithm that may change what stored values mean, as rotation.

    Other methods' configurations pass.
    """
    if quantization.get("quant_method") != _METHOD:
        return
    algorithms = quantization.get("algo_config")
    for algorithm in algorithms if isinstance(algorithms, list) else [algorithms]:
        name = algorithm.get("name") if isinstance(algorithm, Mapping) else algorithm
        if name is not None and not (isinstance(name, str) and name.lower() in _ALGORITHMS):
            raise FormatError(
                f"algo_config of quantization_config has {brief(name)}, which mixprec does not know and which may "
                "change what the stored values mean; take these modules from another source"
            )
