"""Checks SGLang's arguments before anything is loaded.

Each ``check_*`` raises ``RuntimeError`` with the flags to change.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = [
    "argument_problems",
    "check_arguments",
    "check_counted_experts",
    "check_experts_elsewhere",
    "check_mixed_experts",
    "check_padded",
    "check_quantized_head",
    "deterministic",
    "mixed_problems",
    "quantized_head_problems",
]


def check_arguments() -> None:
    """Checks the arguments for any compiled checkpoint."""
    _raise(argument_problems(_server_args()))


def check_mixed_experts() -> None:
    """Checks the arguments for a layer whose experts differ in format."""
    _raise(mixed_problems(_server_args()))


def check_counted_experts() -> None:
    """Checks the arguments for counting expert activity, of any model."""
    args = _server_args()
    if _moves_experts(args) or _places_experts(args):
        raise RuntimeError(
            "expert activity is counted by the positions of experts: leave out --enable-eplb, "
            "--ep-num-redundant-experts and --init-expert-location while MIXPREC_EXPERT_ACTIVITY is set"
        )


def check_experts_elsewhere(kind: str, *, scales_stay: bool = False) -> None:
    """Checks the arguments for experts of ``kind`` on several ranks, whose runner is repaired to skip ids of -1.

    ``scales_stay``: the repair keeps the scales of the experts that the rank began with.
    """
    args, problems = _server_args(), []
    if scales_stay and getattr(args, "enable_eplb", False):
        problems.append(f"--enable-eplb moves the scales of {kind} experts; leave it out")
    if _asks_for_lora(args):  # lora/layers.py:1027 makes other runners, without the repair
        problems.append(f"--enable-lora and --lora-paths do not go with {kind} experts under --ep-size; leave them out")
    _raise(problems)


def check_padded(padded: Mapping[str, Any]) -> None:
    """Checks the arguments where zeros are added to this rank's weights."""
    if padded and _asks_for_lora(_server_args()):
        _raise(["--enable-lora and --lora-paths do not support ranks with added zeros; leave them out"])


def check_quantized_head(kind: str) -> None:
    """Checks the arguments for an ``lm_head`` in a quantized format."""
    _raise(quantized_head_problems(_server_args(), kind))


def quantized_head_problems(args: Any, kind: str) -> list[str]:
    """One sentence for each flag of ``args`` that an ``lm_head`` of the quantized ``kind`` cannot be served with."""
    problems, instead = [], "or build the checkpoint with an unquantized lm_head"
    if getattr(args, "speculative_algorithm", None) not in (None, "NGRAM", "STANDALONE"):
        problems.append(
            f"--speculative-algorithm {args.speculative_algorithm} passes the weight of lm_head to the draft without "
            f"its scales, and it is stored in {kind}; leave it out, {instead}"
        )
    if getattr(args, "enable_fp32_lm_head", False):
        problems.append(
            f"--enable-fp32-lm-head multiplies an lm_head in 16 bits, and it is stored in {kind}; leave it out"
        )
    if _asks_for_lora(args) and not {"lm_head", "all"}.isdisjoint(getattr(args, "lora_target_modules", None) or ()):
        problems.append(f"--lora-target-modules names lm_head, which is stored in {kind}; leave it out, {instead}")
    return problems


def deterministic() -> bool:
    """Whether a request's answer must not depend on the other requests of its batch."""
    return bool(getattr(_server_args(), "enable_deterministic_inference", False))


def _server_args() -> Any:
    from sglang.srt.runtime_context import get_server_args

    return get_server_args()


def _asks_for_lora(args: Any) -> bool:
    return bool(getattr(args, "enable_lora", None) or getattr(args, "lora_paths", None))


def _moves_experts(args: Any) -> bool:
    return bool(getattr(args, "enable_eplb", False) or getattr(args, "ep_num_redundant_experts", 0))


def _places_experts(args: Any) -> bool:
    return bool(getattr(args, "init_expert_location", "trivial") != "trivial")


def _raise(problems: list[str]) -> None:
    if problems:
        raise RuntimeError(f"this checkpoint cannot be served with these arguments: {'; '.join(problems)}")


def argument_problems(args: Any) -> list[str]:
    """One sentence for each flag of ``args`` (``ServerArgs``) that no compiled checkpoint can be served with."""
    problems = []
    if getattr(args, "tokenizer_worker_num", 1) > 1:
        problems.append("--tokenizer-worker-num above 1 starts processes that load no plugins; leave it out")
    if getattr(args, "moe_a2a_backend", None) not in (None, "none"):
        problems.append(
            f"--moe-a2a-backend {args.moe_a2a_backend} needs SGLang's own classes of quantization configs; leave it out"
        )
    if getattr(args, "moe_runner_backend", "auto") not in ("auto", "triton"):
        problems.append(
            f"--moe-runner-backend {args.moe_runner_backend} is one kernel for all formats; leave it out, and each "
            "gets its own"
        )
    if getattr(args, "load_format", "auto") not in ("auto", "safetensors"):
        problems.append(f"--load-format {args.load_format} does not read compiled checkpoints; leave it out")
    if getattr(args, "torchao_config", ""):
        problems.append("--torchao-config would quantize weights once more; leave it out")
    if getattr(args, "ep_size", 1) > 1 and getattr(args, "enable_fused_moe_sum_all_reduce", False):
        problems.append(_SUM_ALL_REDUCE)
    if getattr(args, "enable_memory_saver", False) and not getattr(args, "enable_weights_cpu_backup", False):
        problems.append(
            "--enable-memory-saver releases weights, which cannot be loaded again; add "
            "--enable-weights-cpu-backup, or leave it out"
        )
    return problems


# In 0.5.17 (kernels/ops/moe/fused_moe_triton_kernels.py:444) the kernel writes rows of ids of -1 behind its output; in
# 0.5.23 it does not.
_SUM_ALL_REDUCE = "--enable-fused-moe-sum-all-reduce does not support experts of other ranks or groups; leave it out"


def mixed_problems(args: Any) -> list[str]:
    """One sentence for each flag of ``args`` that experts of several formats in one layer cannot be served with."""
    problems = []
    if getattr(args, "moe_runner_backend", "auto") != "auto":
        problems.append(f"--moe-runner-backend {args.moe_runner_backend} is one kernel for all formats; leave it out")
    if _moves_experts(args):
        problems.append(
            "--enable-eplb and --ep-num-redundant-experts move experts between places of one format; leave them out "
            "while experts of a layer differ"
        )
    if _places_experts(args):
        problems.append("--init-expert-location changes the order of experts; leave it out")
    if _asks_for_lora(args):
        problems.append("--enable-lora and --lora-paths support experts of one format only; leave them out")
    if getattr(args, "enable_fused_moe_sum_all_reduce", False):
        problems.append(_SUM_ALL_REDUCE)
    return problems
