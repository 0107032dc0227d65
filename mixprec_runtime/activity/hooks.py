"""Which experts the tokens go to: counted on the device, inside CUDA graphs, without a word to the host.

Off unless the server starts with ``MIXPREC_EXPERT_ACTIVITY=1``; then it costs two small kernels a batch in the CUDA
graphs that decode, and one a MoE layer elsewhere. It counts what a router chose of the experts of any MoE model,
compiled by mixprec or not. Rows that a CUDA graph is filled up with do not count, nor do ids of -1. Of the ranks of
tensor or expert parallelism the first one counts, since all see all tokens; replicas of data parallelism count for
themselves.

While it serves, SGLang's own requests control it: ``/start_expert_distribution_record`` forgets and counts from then
on, ``/stop_expert_distribution_record`` pauses, ``/dump_expert_distribution_record`` writes a JSON file for ``mixprec
experts`` and ``mixprec suggest``, named by ``MIXPREC_EXPERT_ACTIVITY_FILE``, and forgets. ``Engine`` has methods of
these names. SGLang's own recorder, where it was asked for, gets the requests as well. What was counted so far is in
``internal_states[i]["mixprec_expert_activity"]`` of ``/server_info``.
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
"""The key in SGLang's internal state."""


def enabled() -> bool:
    """Whether the environment asks for it. Raises ``RuntimeError`` for a value that is neither yes nor no."""
    value = os.environ.get(SWITCH, "0").lower()
    if value in ("1", "true", "yes", "on"):
        return True
    if value in ("", "0", "false", "no", "off"):
        return False
    raise RuntimeError(f"{SWITCH}={value!r}: write 1 or 0")


# In SGLang


def install(model: Module, *, first_rank: bool, gathered: bool) -> ExpertCounter | None:
    """Counts for every MoE layer of a model that was just made. Only ``first_rank`` of those that see all tokens does.

    ``gathered``: see :class:`ExpertCounter`.
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
        if ids is None:  # kernels that choose for themselves
            raise RuntimeError(
                f"{SWITCH}: the experts of layer {number} are chosen inside a kernel and cannot be counted; start "
                "SGLang with --moe-runner-backend triton, or without counting"
            )
        counter.add(number, ids)
        return forward(hidden_states, topk_output, *args, **kwargs)

    return forward_and_count


def _in_graphs_together(forward: Callable[..., Any], counter: ExpertCounter) -> Callable[..., Any]:
    """A model's ``forward``; where a whole run of it is captured in a graph, all layers are counted at its end."""

    @wraps(forward)
    def forward_and_count(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or not counter.counts.is_cuda or not torch.cuda.is_current_stream_capturing():
            return forward(*args, **kwargs)
        with counter.together():
            return forward(*args, **kwargs)

    return forward_and_count


def begin(runner: Any) -> None:
    """The model of SGLang's ``ModelRunner`` is about to serve: what was counted while graphs were captured is no
    activity, and from now on each batch says how many rows it has."""
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
    """For ``/server_info``; None in a process that does not count."""
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
    """``Scheduler.expert_distribution_handle``. Ranks that do not count themselves get the requests as well."""
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
    # Without its own recorder SGLang raises, which would end the server.
    if "Noop" in type(get_global_expert_distribution_recorder()).__name__:
        return ExpertDistributionReqOutput()
    return original(scheduler, request)


def _replica(scheduler: Any) -> str:
    """What tells the file of this process from those of others that count: ``-dp1`` and the like."""
    from sglang.srt.runtime_context import get_parallel

    ranks = getattr(scheduler, "ps", None) or get_parallel()  # 0.5.23 has them in its context only
    return "".join(f"-{kind}{rank}" for kind in ("dp", "pp") if (rank := getattr(ranks, f"{kind}_rank", None)))


def _dump(replica: str) -> None:
    path = Path(os.environ.get(FILE) or f"expert_activity_{time.time():.0f}.json")
    path = path.with_name(f"{path.stem}{replica}{path.suffix}")
    try:
        tracker.export_stats(path)
    except OSError as error:
        # The server goes on, and so does counting: nothing is lost.
        logger.error("mixprec: cannot write expert activity to %s: %s; set %s", path, error.strerror, FILE)
        return
    logger.info("mixprec: expert activity written to %s", path.absolute())
    tracker.reset_stats()
