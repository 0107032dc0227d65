"""The arguments of SGLang's server that mixprec reads.

A release that lacks one that is not known to be missing has renamed it, and a refusal that depends on it would be lost:
that stops the server.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mixprec_build.versions import between

from .check import ContactError, differs, installed

__all__ = ["FLAGS", "Flag", "choose", "missing_flags", "server_args", "value_of"]


@dataclass(frozen=True, slots=True)
class Flag:
    """An attribute of ``ServerArgs``; ``absent`` is the value that releases without it act as if they had."""

    name: str
    absent: Any = None
    since: str = ""
    until: str = ""


FLAGS = {
    flag.name: flag
    for flag in (
        Flag("tokenizer_worker_num", 1),
        Flag("moe_a2a_backend"),
        Flag("moe_runner_backend"),
        Flag("load_format"),
        Flag("torchao_config", "", until="0.5.18"),
        Flag("cpu_offload_gb"),
        Flag("offload_group_size"),
        Flag("kt_weight_path"),
        Flag("ep_size"),
        Flag("enable_fused_moe_sum_all_reduce"),
        Flag("enable_memory_saver"),
        Flag("enable_weights_cpu_backup"),
        Flag("enable_eplb"),
        Flag("ep_num_redundant_experts"),
        Flag("init_expert_location"),
        Flag("enable_lora"),
        Flag("lora_paths"),
        Flag("lora_target_modules"),
        Flag("model_path"),
        Flag("speculative_algorithm"),
        Flag("speculative_draft_model_path"),
        Flag("speculative_moe_runner_backend"),
        Flag("speculative_moe_a2a_backend"),
        Flag("enable_fp32_lm_head"),
        Flag("enable_deterministic_inference"),
        Flag("moe_dense_tp_size"),
        Flag("enable_dp_lm_head"),
    )
}


class _Resolved:
    """The arguments with SGLang's own choices, from 0.5.18 on: its ``ServerArgs`` is only what the user asked for."""

    def __init__(self, context: Any):
        self._context = context

    def __getattr__(self, name: str) -> Any:
        try:
            return self._context.config_leaf(name)
        except ValueError:  # it is no choice of SGLang's, or none was made yet
            return getattr(self._context.server_args, name)


def server_args() -> Any:
    """The arguments of this process, as SGLang acts on them; an object with the attributes of its ``ServerArgs``."""
    from sglang.srt.runtime_context import get_context, get_server_args

    context = get_context()
    return _Resolved(context) if hasattr(context, "config_leaf") else get_server_args()


def choose(**values: Any) -> None:
    """Sets arguments of this process in SGLang's stead."""
    from sglang.srt.runtime_context import get_context, get_server_args

    args = get_server_args()
    if hasattr(args, "override"):  # 0.5.16 and 0.5.17
        args.override("mixprec", **values)
    elif between("0.5.18", "", installed()):
        get_context().override("mixprec", **values)
    else:
        for name, value in values.items():
            setattr(args, name, value)


def value_of(args: Any, name: str) -> Any:
    """The value of a flag in ``args`` (``ServerArgs``), as every release from ``OLDEST`` on has it.

    Raises:
        ContactError: this SGLang lacks a flag that it should have.
    """
    flag = FLAGS[name]
    if hasattr(args, name):
        return getattr(args, name)
    if between(flag.since, flag.until, installed()):
        raise ContactError(differs([_text(flag)]))
    return flag.absent


def missing_flags(args: Any) -> list[str]:
    """The flags that ``args`` should have and lacks, each as one line."""
    version = installed()
    return [
        _text(flag)
        for flag in FLAGS.values()
        if not hasattr(args, flag.name) and between(flag.since, flag.until, version)
    ]


def _text(flag: Flag) -> str:
    return f"the argument {flag.name} (--{flag.name.replace('_', '-')}) of the server is missing"
