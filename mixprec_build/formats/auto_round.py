"""Reads AutoRound's configuration, which stores modules in the layouts of GPTQ and AWQ.

``packing_format`` names the layout: ``auto_round:auto_gptq`` is GPTQ's with zero points minus one, ``auto_round`` and
``auto_round:gptqmodel`` the same with zero points as they are, ``auto_round:auto_awq`` AutoAWQ's; most have no
``g_idx``. Versions of AutoRound use the same word for both of the first two, so that for symmetric weights the zero
points decide (:meth:`.gptq.Gptq.as_stored`). ``extra_config`` has other settings for single modules, by their names or
by regular expressions that match complete names; 16 bits mean unquantized. Tensors show which modules are quantized:
``block_name_to_quantize`` is ignored.

As AutoRound 0.16 writes it (``export/export_to_autoround/export.py``) and SGLang 0.5.17 reads it
(``layers/quantization/auto_round.py``).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from reprlib import repr as brief
from typing import TYPE_CHECKING

from ..patterns.budget import MatchBudget
from ..patterns.pattern import PatternError
from ..patterns.regexes import plain_regex
from .base import FormatError, shape_text
from .keys import check
from .names import name_forms

if TYPE_CHECKING:
    from ..storage.module import StoredModule
    from .quantization import Quantization

__all__ = ["KEYS", "METHOD", "entry_of", "settings_for"]


METHOD = "auto-round"
KEYS = {
    "bits", "group_size", "sym", "packing_format", "backend", "vllm_backend", "sglang_backend", "data_type",
    "extra_config", "block_name_to_quantize", "to_quant_block_names", "quant_block_list", "autoround_version", "iters",
    "model_free", "nsamples", "seqlen", "lr", "minmax_lr", "low_gpu_mem_usage", "low_cpu_mem_usage", "batch_size",
    "gradient_accumulate_steps", "enable_quanted_input", "enable_norm_bias_tuning", "enable_minmax_tuning",
    "amp", "not_use_best_mse", "dynamic_max_gap", "scale_dtype", "dataset", "act_bits", "act_group_size", "act_sym",
    "act_dynamic", "act_data_type", "super_bits", "super_group_size", "quant_nontext_module", "enable_quant_lm_head",
    "enable_alg_ext", "static_kv_dtype", "static_attention_dtype", "damp_percent", "desc_act", "true_sequential",
    "to_quant_block_name", "supported_types", "regex_config", "rotation_configs", "in_blocks", "fixed_by_user",
    "modules_in_block_to_quantize", "meta", "ignore_layers", "layer_config", "model_dtype",
}  # fmt: skip
_ENTRY_KEYS = KEYS | {"zp", "symmetric", "clip"}
_REGEX = frozenset("*+?^$()[]{}|\\")
_MAX_ENTRIES = 200_000
_MAX_REGEXES = 4096

# Values of ``packing_format`` (in older files, of ``backend``) that mean GPTQ's layout -> which one.
_GPTQ = {
    "auto_round:auto_gptq": "gptq", "auto_round:gptq": "gptq", "auto_gptq": "gptq", "gptq": "gptq", "auto": "gptq",
    "gptq:marlin": "gptq", "marlin": "gptq",
    "auto_round": "gptq_v2", "auto_round:gptqmodel": "gptq_v2", "gptqmodel": "gptq_v2",
    **{f"auto_round:{kernel}": "gptq_v2" for kernel in ("exllamav2", "triton", "tritonv2", "torch", "marlin")},
}  # fmt: skip
_AWQ = frozenset({"auto_round:auto_awq", "auto_round:awq", "auto_awq", "awq", "awq:marlin"})


class _Extra:
    """``extra_config`` of one configuration."""

    def __init__(self, quantization: Mapping[str, object]):
        extra = quantization.get("extra_config")
        self._entries: dict[str, Mapping[str, object]] = {
            name: entry for name, entry in (extra if isinstance(extra, Mapping) else {}).items()
            if isinstance(entry, Mapping)
        }  # fmt: skip
        self._regexes = [name for name in self._entries if not _REGEX.isdisjoint(name)]
        if len(self._entries) > _MAX_ENTRIES or len(self._regexes) > _MAX_REGEXES:
            raise FormatError(
                f"`extra_config` holds more than {_MAX_ENTRIES} names or {_MAX_REGEXES} regular expressions"
            )
        self._budget = MatchBudget()

    def entry(self, module: str) -> str | None:
        """The name of the entry for a module: its own name, else the first regular expression for it.

        Raises:
            FormatError: a regular expression is not supported, or takes too long.
        """
        if not self._entries:
            return None
        forms = name_forms(module)
        named = next((form for form in forms if form in self._entries), None)
        if named is not None or not self._regexes:
            return named
        try:
            with self._budget:
                for regex in self._regexes:
                    pattern = plain_regex(regex, regex)
                    if any(pattern.fullmatch(form) for form in forms):
                        return regex
        except PatternError as error:
            raise FormatError(f"`extra_config` {error}") from error
        return None

    def settings(self, entry: str) -> Mapping[str, object]:
        return self._entries[entry]


def entry_of(name: str, quantization: Quantization) -> Hashable:
    """The name of a module's entry in ``extra_config``, which tells modules that are stored alike apart; or None."""
    if quantization.get("quant_method") != METHOD:
        return None
    try:
        return quantization.derive(_Extra).entry(name)
    except FormatError as error:
        return str(error)


def settings_for(module: StoredModule, quantization: Quantization, *, awq: bool) -> dict[str, object] | None:
    """``bits``, ``group_size``, ``sym`` and ``checkpoint_format`` of a quantized module; None in the other layout.

    Raises:
        FormatError: it is declared unquantized, or in a type or packing that is not supported.
    """
    packing = next(
        (str(quantization[key]) for key in ("packing_format", "backend") if quantization.get(key) is not None),
        "auto_round:auto_gptq",
    )
    # A kernel may follow the packing: "auto_round:gptq:exllamav2".
    known = packing if packing in _GPTQ or packing in _AWQ or packing.count(":") < 2 else packing.rpartition(":")[0]
    if known not in _GPTQ and known not in _AWQ:
        raise FormatError(
            f"{shape_text('qweight', module)} of AutoRound's packing_format {brief(packing)} is not read, only "
            "auto_round:auto_gptq, auto_round and auto_round:auto_awq; take this module from another source"
        )
    if (known in _AWQ) != awq:
        return None
    extra = quantization.derive(_Extra)
    entry = extra.entry(module.name)
    settings = {key: quantization[key] for key in ("bits", "group_size", "sym", "data_type") if key in quantization}
    if entry is not None:
        own = extra.settings(entry)
        check("`extra_config`", own, _ENTRY_KEYS)
        settings |= {key: own[key] for key in ("bits", "group_size", "sym", "data_type") if own.get(key) is not None}
    bits, data_type = settings.get("bits"), settings.pop("data_type", "int")
    if type(bits) is int and bits >= 16:
        raise FormatError(
            f"{shape_text('qweight', module)} is stored quantized, although `extra_config` says that it has {bits} bits"
        )
    if data_type not in ("int", "int_sym", "int_asym", "int_asym_dq", "int_sym_gptq"):
        raise FormatError(f"{shape_text('qweight', module)} of AutoRound's data_type {brief(data_type)} is not read")
    return {**settings, "desc_act": False, "checkpoint_format": _GPTQ.get(known, "gemm")}
