"""Counts the tokens of each expert of a served MoE model, compiled by mixprec or not.

On with ``MIXPREC_EXPERT_ACTIVITY=1``. Counting is done on the device, inside CUDA graphs, without synchronization: two
small kernels a batch in graphs that decode, one a MoE layer elsewhere. Rows that pad a graph and ids of -1 are not
counted. Ranks of tensor and expert parallelism all see all tokens, so only the first counts; replicas of data
parallelism count separately.

SGLang's own requests (and the methods of ``Engine`` with their names) control it: ``/start_expert_distribution_record``
resets and counts, ``/stop_expert_distribution_record`` pauses, ``/dump_expert_distribution_record`` writes a JSON file
for ``mixprec experts`` and ``mixprec suggest``, named by ``MIXPREC_EXPERT_ACTIVITY_FILE``, and resets. SGLang's
recorder, where it is on, gets them too. ``internal_states[i]["mixprec_expert_activity"]`` of ``/server_info`` has the
counts so far.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch.nn import Module

from .counter import ExpertCounter
from .tracker import tracker

__all__ = ["enabled"]


logger = logging.getLogger(__name__)

SWITCH, FILE = "MIXPREC_EXPERT_ACTIVITY", "MIXPREC_EXPERT_ACTIVITY_FILE"
STATE = "mixprec_expert_activity"
"""Key of the counts in SGLang's internal state."""


def enabled() -> bool:
    """Whether ``MIXPREC_EXPERT_ACTIVITY`` is on. Raises ``RuntimeError`` for a value that is neither on nor off."""
    value = os.environ.get(SWITCH, "0").lower()
    if value in ("1", "true", "yes", "on"):
        return True
    if value in ("", "0", "false", "no", "off"):
        return False
    raise RuntimeError(f"{SWITCH}={value!r}: write 1 or 0")


def install(model: Module, *, first_rank: bool, gathered: bool) -> ExpertCounter | None:
    """Adds a counter to all MoE layers of a new model; None without such layers, or where not ``first_rank``.

    Args:
        model: the model, before it is compiled or captured.
        first_rank: whether this rank counts, of those that see the same tokens.
        gathered: see :class:`ExpertCounter`.
    """
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE

    from ..experts.group import ExpertGroup

    layers = [m for m in model.modules() if isinstance(m, FusedMoE) and not isinstance(m, ExpertGroup)]
    if not layers or not first_rank:
        return None
    experts = {int(layer.layer_id): layer.num_experts - layer.num_fused_shared_experts for layer in layers}
    counter = ExpertCounter(experts, next(model.parameters()).device, gathered=gathered)
    for layer in layers:
        layer.forward_impl = _counted(layer, layer.forward_impl, counter)
    model.forward = _in_graphs_together(model.forward, counter)
    tracker.attach(counter)
    logger.info("mixprec: counts the activity of %d experts in %d layers", sum(experts.values()), len(layers))
    return counter


def _counted(layer: Any, forward: Callable[..., Any], counter: ExpertCounter) -> Callable[..., Any]:
    number = int(layer.layer_id)

    def forward_and_count(hidden_states: torch.Tensor, topk_output: Any, *args: Any, **kwargs: Any) -> Any:
        ids = getattr(topk_output, "topk_ids", None)
        if ids is None:  # the kernel does the routing
            raise RuntimeError(
                f"{SWITCH}: the experts of layer {number} are chosen inside a kernel and cannot be counted; start "
                "SGLang with --moe-runner-backend triton, or without counting"
            )
        counter.add(number, ids)
        return forward(hidden_states, topk_output, *args, **kwargs)

    return forward_and_count


def _in_graphs_together(forward: Callable[..., Any], counter: ExpertCounter) -> Callable[..., Any]:
    """Wraps a model's ``forward``: while it is captured in a graph, all layers are counted at its end."""

    @wraps(forward)
    def forward_and_count(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or not counter.counts.is_cuda or not torch.cuda.is_current_stream_capturing():
            return forward(*args, **kwargs)
        with counter.together():
            return forward(*args, **kwargs)

    return forward_and_count


def begin(runner: Any) -> None:
    """Begins to count the batches of SGLang's ``ModelRunner``; resets what the capture of graphs counted."""
    counter = tracker.counter
    if counter is None:
        return
    forward = runner.forward

    def forward_with_rows(forward_batch: Any, *args: Any, **kwargs: Any) -> Any:
        ids = forward_batch.input_ids if forward_batch.input_ids is not None else forward_batch.positions
        counter.begin(len(ids))
        return forward(forward_batch, *args, **kwargs)

    runner.forward = forward_with_rows
    tracker.reset_stats()


def state() -> dict[str, Any] | None:
    """The entry in ``/server_info``; None in a process that does not count."""
    counter = tracker.counter
    if counter is None:
        return None
    counts = counter.read()
    return {
        "recording": counter.recording,
        "counts": {str(layer): found for layer, (found, _) in counts.items()},
        "routed_tokens": {str(layer): tokens for layer, (_, tokens) in counts.items()},
        "top_experts": tracker.get_top_experts(),
    }


def handle_request(original: Callable[..., Any], scheduler: Any, request: Any) -> Any:
    """Around ``Scheduler.expert_distribution_handle``. Called on all ranks, also those that do not count."""
    if not enabled():
        return original(scheduler, request)
    from sglang.srt.eplb.expert_distribution import get_global_expert_distribution_recorder
    from sglang.srt.managers.io_struct import ExpertDistributionReqOutput, ExpertDistributionReqType

    counter = tracker.counter
    if counter is not None:
        if request.action == ExpertDistributionReqType.START_RECORD:
            tracker.reset_stats()
            counter.recording = True
        elif request.action == ExpertDistributionReqType.STOP_RECORD:
            counter.recording = False
        elif request.action == ExpertDistributionReqType.DUMP_RECORD:
            _dump(_replica(scheduler))
    # SGLang raises where its recorder is off, which would end the server.
    if "Noop" in type(get_global_expert_distribution_recorder()).__name__:
        return ExpertDistributionReqOutput()
    return original(scheduler, request)


def _replica(scheduler: Any) -> str:
    """A suffix that keeps the files of counting processes apart, such as ``-dp1``; empty for the first."""
    from sglang.srt.runtime_context import get_parallel

    ranks = getattr(scheduler, "ps", None) or get_parallel()  # 0.5.23 has ranks in its context only
    return "".join(f"-{kind}{rank}" for kind in ("dp", "pp") if (rank := getattr(ranks, f"{kind}_rank", None)))


def _dump(replica: str) -> None:
    path = Path(os.environ.get(FILE) or f"expert_activity_{time.time():.0f}.json")
    path = path.with_name(f"{path.stem}{replica}{path.suffix}")
    try:
        tracker.export_stats(path)
    except OSError as error:
        # Counts are kept, so that nothing is lost.
        logger.error("mixprec: cannot write expert activity to %s: %s; set %s", path, error.strerror, FILE)
        return
    logger.info("mixprec: expert activity written to %s", path.absolute())
    tracker.reset_stats()
