"""Refuses keys of a ``quantization_config`` that are not understood and may change the meaning of bytes.

An unknown key may mean that weights are stored rotated, permuted or scaled: modules that it may apply to are refused.
Each format names the keys that it knows. Sources of the keys: compressed-tensors 0.20
(``quant_config.py``, ``quant_args.py``), GPTQModel 5 (``quantization/config.py``), AutoAWQ 0.2.9, transformers 5
(``utils/quantization_config.py``), ModelOpt 0.47 (``export/unified_export_hf.py``), SGLang 0.5.17
(``layers/quantization``).
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from reprlib import repr as brief

from .base import FormatError

__all__ = ["check", "check_keys", "rotates"]

# Keys of any method: modules left out, the tool that wrote it, settings of the KV cache only.
_COMMON = {
    "quant_method", "modules_to_not_convert", "ignore", "ignored_layers", "exclude_modules", "exclude",
    "packed_modules_mapping", "kv_cache_scheme", "kv_cache_quant_algo", "kv_cache_quant_config", "version", "producer",
    "dequantize", "quantization_status", "lm_head", "base_model", "model_name_or_path", "desc", "comment",
}  # fmt: skip

# Known keys -> values with which bytes have their usual meaning; any other value changes it.
_USUAL: Mapping[str, tuple[object, ...]] = {
    "is_marlin_format": (False,),
    "fmt": ("e4m3", "float8_e4m3fn", "fp8_e4m3"),
    "moe_quant_algo": ("NVFP4",),
    "moe_quant_format": ("nvfp4-pack-quantized",),
    "output_activations": (),
    "quantization_status": ("compressed", "frozen"),
}
_ROTATING = ("transform_config", "rotation", "rotation_config", "rotations", "hadamard", "online_rotation")


def check_keys(quantization: Mapping[str, object], known: Set[str]) -> None:
    """Raises :class:`FormatError` where a configuration has a key or value that may change the meaning of bytes.

    ``known`` are the keys that formats understand.
    """
    check("quantization_config", quantization, known | _COMMON)
    sparsity = quantization.get("sparsity_config")
    if isinstance(sparsity, Mapping) and sparsity.get("format", "dense") != "dense":
        raise FormatError(
            f"quantization_config has sparsity_config of the format {brief(sparsity['format'])}, which is not read, "
            "only dense"
        )


def rotates(quantization: Mapping[str, object]) -> str | None:
    """The key by which a checkpoint's weights, perhaps also unquantized ones, are stored rotated; or None."""
    return next((key for key in _ROTATING if not _is_nothing(quantization.get(key))), None)


def check(at: str, data: Mapping[str, object], known: Set[str]) -> None:
    """Raises :class:`FormatError` where ``data`` has an unknown key, or a value, that may change the meaning of bytes.

    ``at`` is its name in messages.
    """
    for key, value in data.items():
        if _is_nothing(value):
            continue
        name = f"`{key:.60}`" if isinstance(key, str) and key.isprintable() else brief(key)
        if key not in known and not (isinstance(key, str) and key.startswith("_")):
            raise FormatError(
                f"{at} has {name}, a key that mixprec does not know and that may change what the stored values mean; "
                "take these modules from another source"
            )
        if key in _USUAL and value not in _USUAL[key]:
            raise FormatError(f"{at} has {name} {brief(value)}, which is not read")


def _is_nothing(value: object) -> bool:
    """Whether the value of an unknown key turns it off: null, false, empty, or an object of such values."""
    if isinstance(value, Mapping):
        return all(_is_nothing(inner) for inner in value.values())
    return value is None or value is False or value == [] or value == ""
