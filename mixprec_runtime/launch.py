"""Checks SGLang's arguments before anything is loaded.

Each ``check_*`` raises ``RuntimeError`` with the flags to change.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from mixprec_build.families.registry import FAMILIES
from mixprec_build.patterns.compress import compress
from mixprec_build.text import some
from mixprec_build.versions import between

from .contact.check import installed
from .contact.flags import choose, server_args, value_of

__all__ = [
    "BY_LAYER",
    "argument_problems",
    "check_arguments",
    "check_counted_experts",
    "check_experts_elsewhere",
    "check_mixed_experts",
    "check_moved_experts",
    "check_padded",
    "check_quantized_head",
    "deterministic",
    "draws_on_own_drafts",
    "drop_chosen_runner",
    "lora_on_mlps",
    "mixed_problems",
    "moves_experts",
    "padded_problems",
    "places_experts",
    "quantized_head_problems",
    "refuse",
    "server_args",
    "speculative_algorithm",
    "value_of",
]


def drop_chosen_runner(architectures: Collection[str]) -> None:
    """Has each layer's experts get a runner of their own again, where SGLang chose one for all of gpt-oss.

    It does so where ``--moe-runner-backend`` is left out and ``--quantization`` as well (arg_groups/overrides.py:961 of
    0.5.17).
    """
    from sglang.srt.layers.moe import initialize_moe_config

    args, flags = server_args(), ("moe_runner_backend", "speculative_moe_runner_backend")
    chosen = [flag for flag in flags if value_of(args, flag) == "triton_kernel"]
    if chosen and "GptOssForCausalLM" in architectures:
        choose(**dict.fromkeys(chosen, "auto"))
        # From 0.5.19 on it has no parameter.
        initialize_moe_config(*[args][: len(inspect.signature(initialize_moe_config).parameters)])


def check_arguments() -> None:
    """Checks the arguments for any compiled checkpoint."""
    refuse(argument_problems(server_args()))


def check_mixed_experts(layers: Collection[str]) -> None:
    """Checks the arguments for ``layers`` whose experts differ in format."""
    refuse(mixed_problems(server_args(), layers))


def check_moved_experts(unmoved: Mapping[tuple[str, str], Collection[str]]) -> None:
    """Checks the arguments for experts that cannot move to another rank: (kind, why) -> layers."""
    if moves_experts():
        refuse(
            [
                f"--enable-eplb moves experts between ranks, and the {kind} experts of {some(compress(layers))} {why}; "
                "leave it out, or build these experts in another format"
                for (kind, why), layers in unmoved.items()
            ]
        )


def moves_experts() -> bool:
    """Whether EPLB moves experts of the model while it serves; those of drafts stay."""
    return bool(value_of(server_args(), "enable_eplb"))


def places_experts() -> bool:
    """Whether a file, or a list in its stead, says where experts begin."""
    return _places_experts(server_args())


def check_counted_experts() -> None:
    """Checks the arguments for counting expert activity, of any model."""
    args = server_args()
    if moves_experts() or places_experts() or value_of(args, "ep_num_redundant_experts"):
        raise RuntimeError(
            "expert activity is counted by the positions of experts: leave out --enable-eplb, "
            "--ep-num-redundant-experts and --init-expert-location while MIXPREC_EXPERT_ACTIVITY is set"
        )
    if value_of(args, "moe_a2a_backend") not in (None, "none"):
        raise RuntimeError(
            f"expert activity is counted by a rank that routes all tokens, and with --moe-a2a-backend "
            f"{args.moe_a2a_backend} each routes its own: leave it out while MIXPREC_EXPERT_ACTIVITY is set"
        )


def check_experts_elsewhere(kind: str) -> None:
    """Checks the arguments for experts of ``kind`` on several ranks, whose runner is repaired to skip ids of -1."""
    if lora_on_mlps(server_args()):  # lora/layers.py:1027 makes other runners, without the repair
        refuse(
            [
                f"--enable-lora and --lora-paths run {kind} experts by kernels that read experts of other ranks under "
                f"--ep-size; {_LORA_ON_ATTENTION}"
            ]
        )


def check_padded(padded: Mapping[str, Any]) -> None:
    """Checks the arguments where zeros are added to this rank's weights."""
    refuse(padded_problems(server_args(), padded))


def padded_problems(args: Any, padded: Mapping[str, Any]) -> list[str]:
    """One sentence for each flag of ``args`` that a rank cannot be served with whose MLPs ``padded`` get zeros."""
    if not padded or not lora_on_mlps(args):
        return []
    return [
        "--enable-lora and --lora-paths cut adapters without the zeros that are added to MLPs and experts here; "
        f"{_LORA_ON_ATTENTION}"
    ]


def check_quantized_head(kind: str) -> None:
    """Checks the arguments for an ``lm_head`` in a quantized format."""
    refuse(quantized_head_problems(server_args(), kind))


def quantized_head_problems(args: Any, kind: str) -> list[str]:
    """One sentence for each flag of ``args`` that an ``lm_head`` of the quantized ``kind`` cannot be served with."""
    problems, instead = [], "or build the checkpoint with an unquantized lm_head"
    if value_of(args, "speculative_algorithm") not in (None, "NGRAM", "STANDALONE"):
        problems.append(
            f"--speculative-algorithm {args.speculative_algorithm} passes the weight of lm_head to the draft without "
            f"its scales, and it is stored in {kind}; leave it out, {instead}"
        )
    if value_of(args, "enable_fp32_lm_head"):
        problems.append(
            f"--enable-fp32-lm-head multiplies an lm_head in 16 bits, and it is stored in {kind}; leave it out"
        )
    if _asks_for_lora(args) and not {"lm_head", "all"}.isdisjoint(value_of(args, "lora_target_modules") or ()):
        problems.append(f"--lora-target-modules names lm_head, which is stored in {kind}; leave it out, {instead}")
    return problems


def speculative_algorithm() -> str | None:
    """``--speculative-algorithm``, as SGLang resolved it; None without it."""
    found: str | None = value_of(server_args(), "speculative_algorithm")
    return found


def draws_on_own_drafts() -> str | None:
    """The algorithm, if it wants drafts from layers of the checkpoint itself; None if not."""
    args, algorithm = server_args(), speculative_algorithm()
    elsewhere = value_of(args, "speculative_draft_model_path") not in (None, value_of(args, "model_path"))
    return None if elsewhere or algorithm in ("NGRAM", "STANDALONE") else algorithm


def deterministic() -> bool:
    """Whether a request's answer must not depend on the other requests of its batch."""
    return bool(value_of(server_args(), "enable_deterministic_inference"))


def _asks_for_lora(args: Any) -> bool:
    return bool(value_of(args, "enable_lora") or value_of(args, "lora_paths"))


_LORA_ON_ATTENTION = (
    "leave them out, or limit adapters to attention by --lora-target-modules, such as q_proj k_proj v_proj o_proj"
)
_PROJECTIONS = {word for family in FAMILIES for projections in family.projections for word in projections.words}
_JOINED = {group.name for family in FAMILIES for group in family.fused if _PROJECTIONS.issuperset(group.members)}
_MLPS = frozenset({"all"} | _PROJECTIONS | _JOINED)
"""Names for ``--lora-target-modules`` that reach MLPs and experts."""


def lora_on_mlps(args: Any) -> bool:
    """Whether adapters of LoRA may change MLPs or experts.

    SGLang takes the modules of the adapters where ``--lora-target-modules`` is left out, and refuses adapters with
    others where it is given.
    """
    named = value_of(args, "lora_target_modules")
    return _asks_for_lora(args) and (not named or not _MLPS.isdisjoint(named))


def _places_experts(args: Any) -> bool:
    return bool(value_of(args, "init_expert_location") != "trivial")


def _chooses_copies_by_rank(args: Any) -> bool:
    """Whether ranks that see the same tokens may choose different copies of an expert.

    Before 0.5.17, each has a table of its own where places change (eplb/expert_location_dispatch.py); without DeepEP,
    the answers of all are added up.
    """
    moved = value_of(args, "enable_eplb") or _places_experts(args)
    together = value_of(args, "moe_a2a_backend") in (None, "none")
    return bool(moved and together and value_of(args, "ep_num_redundant_experts")) and between(
        "", "0.5.17", installed()
    )


def refuse(problems: Sequence[str]) -> None:
    """Raises ``RuntimeError`` if there are problems."""
    if problems:
        raise RuntimeError(f"this checkpoint cannot be served with these arguments: {'; '.join(problems)}")


def argument_problems(args: Any) -> list[str]:
    """One sentence for each flag of ``args`` (``ServerArgs``) that no compiled checkpoint can be served with."""
    problems = []
    if _chooses_copies_by_rank(args):
        problems.append(f"--ep-num-redundant-experts {args.ep_num_redundant_experts} {_COPIES}")
    if value_of(args, "tokenizer_worker_num") > 1:
        problems.append("--tokenizer-worker-num above 1 starts processes that load no plugins; leave it out")
    if value_of(args, "moe_a2a_backend") not in (None, "none", "deepep"):
        problems.append(f"--moe-a2a-backend {args.moe_a2a_backend} {_ALL_TO_ALL}")
    target, draft = value_of(args, "moe_runner_backend"), value_of(args, "speculative_moe_runner_backend")
    if target not in ("auto", *BY_LAYER):
        problems.append(f"--moe-runner-backend {target} {_ONE_RUNNER}")
    if draft not in (None, target, "auto", *BY_LAYER):
        problems.append(f"--speculative-moe-runner-backend {draft} {_ONE_RUNNER}")
    if value_of(args, "speculative_moe_a2a_backend") not in (None, "none", "deepep"):
        problems.append(f"--speculative-moe-a2a-backend {args.speculative_moe_a2a_backend} {_ALL_TO_ALL}")
    if value_of(args, "load_format") not in ("auto", "safetensors"):
        problems.append(f"--load-format {args.load_format} does not read compiled checkpoints; leave it out")
    if value_of(args, "torchao_config"):
        problems.append("--torchao-config would quantize weights once more; leave it out")
    if value_of(args, "cpu_offload_gb") > 0:
        problems.append(f"--cpu-offload-gb {args.cpu_offload_gb} {_OFFLOADED}")
    if value_of(args, "offload_group_size") > 0:
        problems.append(f"--offload-group-size {args.offload_group_size} {_OFFLOADED}")
    if value_of(args, "kt_weight_path"):
        problems.append(
            f"--kt-weight-path {args.kt_weight_path} runs experts from weights of its own instead of the checkpoint's; "
            "leave it out"
        )
    if value_of(args, "ep_size") > 1 and value_of(args, "enable_fused_moe_sum_all_reduce"):
        problems.append(_SUM_ALL_REDUCE)
    if value_of(args, "enable_memory_saver") and not value_of(args, "enable_weights_cpu_backup"):
        problems.append(
            "--enable-memory-saver releases weights, which cannot be loaded again; add "
            "--enable-weights-cpu-backup, or leave it out"
        )
    return problems


BY_LAYER = {
    "deep_gemm": "all in FP8 with blocks of 128 x 128",
    "marlin": "in GPTQ, AWQ, packed compressed-tensors, NVFP4 or MXFP4",
    "triton": "unquantized, in FP8 or Int8",
}
"""The values of ``--moe-runner-backend`` that layers are given one by one, and the experts that take them."""

_ONE_RUNNER = (
    "changes routing, layers or the order of weights of all formats at once; give one of "
    f"{', '.join(BY_LAYER)}, for layers that take it only, or leave it out, and each layer gets its own"
)

_COPIES = (
    "makes copies of experts, of which each rank chooses another one where experts move, with SGLang before 0.5.17; "
    "leave it out, or serve it with a newer release"
)

_ALL_TO_ALL = (
    "exchanges rows for kernels that were not looked at with compiled checkpoints; leave it out, or give deepep, for "
    "layers of experts in block FP8 or BF16"
)

_OFFLOADED = (
    "moves weights away from the GPU on which their kernels and repairs expect them; leave it out, and use more ranks "
    "or formats with fewer bits"
)

# In 0.5.17 (kernels/ops/moe/fused_moe_triton_kernels.py:444) the kernel writes rows of ids of -1 behind its output; in
# 0.5.23 it does not.
_SUM_ALL_REDUCE = "--enable-fused-moe-sum-all-reduce does not support experts of other ranks or groups; leave it out"


def mixed_problems(args: Any, layers: Collection[str]) -> list[str]:
    """One sentence for each flag of ``args`` that ``layers`` with experts of several formats cannot be served with."""
    if not layers:
        return []
    problems = []
    differ = (
        f"and experts of {some(compress(layers))} differ in format; leave it out, or build all experts of each of "
        "these layers in one format"
    )
    if value_of(args, "enable_eplb"):
        problems.append(f"--enable-eplb moves experts to each other's places, {differ}")
    if value_of(args, "ep_num_redundant_experts"):
        problems.append(
            f"--ep-num-redundant-experts {args.ep_num_redundant_experts} needs places that any expert fits, {differ}"
        )
    if _places_experts(args):
        problems.append(
            f"--init-expert-location {args.init_expert_location} puts experts into each other's places, {differ}"
        )
    if lora_on_mlps(args):
        problems.append(
            f"--enable-lora and --lora-paths support experts of one format only in a layer; {_LORA_ON_ATTENTION}"
        )
    if value_of(args, "enable_fused_moe_sum_all_reduce"):
        problems.append(_SUM_ALL_REDUCE)
    return problems
