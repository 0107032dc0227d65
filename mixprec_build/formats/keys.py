"""Which keys of a ``quantization_config`` are understood, and which may change what bytes mean.

A key that nobody here knows may say that weights are stored rotated, permuted or scaled: a module that it may be about
is not read. Sources of the keys: compressed-tensors 0.20 (``quant_config.py``, ``quant_args.py``), GPTQModel 5
(``quantization/config.py``), AutoAWQ 0.2.9, transformers 5 (``utils/quantization_config.py``), ModelOpt 0.47
(``export/unified_export_hf.py``), SGLang 0.5.17 (``layers/quantization``).
"""

from __future__ import annotations

from collections.abc import Mapping
from reprlib import repr as brief

from .base import FormatError

__all__ = ["check_group_keys", "check_keys", "check_override_keys", "rotates"]


# Keys of any method: what was left out, which tool wrote it, what concerns only the cache of keys and values.
_COMMON = {
    "quant_method", "modules_to_not_convert", "ignore", "ignored_layers", "exclude_modules", "exclude",
    "packed_modules_mapping", "kv_cache_scheme", "kv_cache_quant_algo", "kv_cache_quant_config", "version", "producer",
    "dequantize", "quantization_status", "lm_head", "base_model", "model_name_or_path", "desc", "comment",
}  # fmt: skip

_GPTQ = {
    "bits", "group_size", "sym", "desc_act", "checkpoint_format", "format", "dynamic", "pack_dtype", "static_groups",
    "true_sequential", "damp_percent", "damp_auto_increment", "meta", "dataset", "tokenizer", "quantizer", "method",
    "model_file_base_name", "block_name_to_quantize", "modules_in_block_to_quantize",
    "module_name_preceding_first_block",
    "use_cuda_fp16", "model_seqlen", "max_input_length", "cache_block_outputs", "batch_size", "pad_token_id",
    "use_exllama", "disable_exllama", "exllama_config", "cache_examples_on_gpu", "hyb_act", "act_group_aware", "mse",
    "backend", "is_marlin_format", "groupsize", "quantization_bits", "actorder", "offload_to_disk", "parallel_packing",
    "iters", "nsamples", "seqlen", "lr", "minmax_lr", "autoround_version", "damping", "gptaq", "fail_safe", "failsafe",
    "compute_device_filter", "mock_quantization", "device", "vram_strategy", "wait_for_submodule_finalizers",
    "auto_forward_data_parallel", "moe", "fallback",
}  # fmt: skip
_AWQ = {
    "bits", "w_bit", "group_size", "q_group_size", "zero_point", "format", "do_fuse", "modules_to_fuse",
    "fuse_max_seq_len", "exllama_config", "backend", "meta", "duo_scaling", "dataset", "sym", "desc_act",
    "pack_dtype", "dynamic", "checkpoint_format", "n_parallel_calib_samples", "max_calib_samples", "max_calib_seq_len",
}  # fmt: skip
_FP8 = {
    "activation_scheme", "weight_block_size", "fmt", "scale_fmt", "modules_to_convert", "is_checkpoint_fp8_serialized",
    "use_per_token_if_dynamic", "activation_scale_ub", "moe_quant_algo", "moe_quant_format", "format",
}  # fmt: skip
_COMPRESSED = {"config_groups", "format", "global_compression_ratio", "sparsity_config"}
_MODELOPT = {"quant_algo", "config_groups", "group_size", "quantized_layers", "quantization", "quant_mode"}
_KNOWN: Mapping[object, set[str]] = {
    "gptq": _GPTQ,
    "awq": _AWQ,
    "fp8": _FP8,
    "compressed-tensors": _COMPRESSED,
    "modelopt": _MODELOPT,
}
_ANY = set().union(*_KNOWN.values())

_GROUP = {"targets", "weights", "input_activations", "output_activations", "format"}
_WEIGHTS = {
    "num_bits", "type", "symmetric", "strategy", "group_size", "block_structure", "dynamic", "actorder", "observer",
    "observer_kwargs", "scale_dtype", "zp_dtype",
}  # fmt: skip
_OVERRIDE = {"bits", "group_size", "sym", "desc_act", "checkpoint_format", "format", "static_groups", "mse",
             "damp_percent", "damp_auto_increment", "true_sequential", "lm_head", "pack_dtype", "act_group_aware",
             "hyb_act"}  # fmt: skip

# Known keys -> the values under which bytes mean what they usually do; any other value changes it.
_USUAL: Mapping[str, tuple[object, ...]] = {
    "is_marlin_format": (False,),
    "fmt": ("e4m3", "float8_e4m3fn", "fp8_e4m3"),
    "moe_quant_algo": (),
    "moe_quant_format": (),
    "output_activations": (),
    "quantization_status": ("compressed", "frozen"),
}
_ROTATING = ("transform_config", "rotation", "rotation_config", "rotations", "hadamard", "online_rotation")


def check_keys(quantization: Mapping[str, object]) -> None:
    """Raises :class:`FormatError` where a configuration has a key, or a value, that may change what bytes mean."""
    known = _KNOWN.get(quantization.get("quant_method"), _ANY) | _COMMON
    _check("quantization_config", quantization, known)
    sparsity = quantization.get("sparsity_config")
    if isinstance(sparsity, Mapping) and sparsity.get("format", "dense") != "dense":
        raise FormatError(f"quantization_config has sparsity_config of the format {brief(sparsity['format'])}, "
                          "which is not read, only dense")  # fmt: skip


def check_group_keys(at: str, group: Mapping[str, object]) -> None:
    """:func:`check_keys` of one of compressed-tensors' config groups, which messages call ``at``."""
    _check(at, group, _GROUP)
    for part in ("weights", "input_activations"):
        data = group.get(part)
        if isinstance(data, Mapping):
            _check(f"{part} of {at}", data, _WEIGHTS)


def check_override_keys(override: Mapping[str, object]) -> None:
    """:func:`check_keys` of what GPTQModel's ``dynamic`` says of some modules."""
    _check("`dynamic`", override, _OVERRIDE)


def rotates(quantization: Mapping[str, object]) -> str | None:
    """The key that says that a checkpoint's weights, unquantized ones perhaps too, are stored rotated; or None."""
    return next((key for key in _ROTATING if not _is_nothing(quantization.get(key))), None)


def _check(at: str, data: Mapping[str, object], known: set[str]) -> None:
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
    """Whether the value of a key that is not known says that there is nothing of the kind: null, false, {} or such
    objects of nothing."""
    if isinstance(value, Mapping):
        return all(_is_nothing(inner) for inner in value.values())
    return value is None or value is False or value == [] or value == ""
