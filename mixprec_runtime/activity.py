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

import json
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch.nn import Module

__all__ = [
    "ExpertActivationTracker",
    "ExpertCounter",
    "enabled",
    "export_expert_activation_stats",
    "get_expert_activation_stats",
    "reset_expert_activation_stats",
]

logger = logging.getLogger(__name__)

SWITCH, FILE = "MIXPREC_EXPERT_ACTIVITY", "MIXPREC_EXPERT_ACTIVITY_FILE"
STATE = "mixprec_expert_activity"
"""The key in SGLang's internal state."""

_ALL_ROWS = 2**31 - 1
_TOP = 20
_Key = tuple[int, int]


def enabled() -> bool:
    """Whether the environment asks for it. Raises ``RuntimeError`` for a value that is neither yes nor no."""
    value = os.environ.get(SWITCH, "0").lower()
    if value in ("1", "true", "yes", "on"):
        return True
    if value in ("", "0", "false", "no", "off"):
        return False
    raise RuntimeError(f"{SWITCH}={value!r}: write 1 or 0")


# On the device


class ExpertCounter:
    """Counts ``[layers, experts + 1]``, int64: tokens routed to each expert, and in the last column tokens routed.

    ``rows`` is one int32: how many rows of a batch are tokens. Kernels read it when they run, so it may change between
    two replays of a graph; 0 pauses.
    """

    def __init__(self, layers: dict[int, int], device: torch.device, *, gathered: bool = False):
        """``layers``: number of each MoE layer -> its routed experts.

        ``gathered``: batches are those of several ranks (data-parallel attention), and what fills them up lies between
        their tokens. Such rows count as well.
        """
        self.layers = dict(sorted(layers.items()))
        self._row_of = {layer: row for row, layer in enumerate(self.layers)}
        self._columns = max(layers.values()) + 1
        self.counts = torch.zeros(len(layers), self._columns, dtype=torch.int64, device=device)
        self.experts = torch.tensor(list(self.layers.values()), dtype=torch.int32, device=device)
        self.rows = torch.full((1,), _ALL_ROWS, dtype=torch.int32, device=device)
        self._rows = _ALL_ROWS
        self._held: list[tuple[int, torch.Tensor]] | None = None
        self.recording, self._gathered = True, gathered

    def add(self, layer: int, ids: torch.Tensor) -> None:
        """Counts the experts ``ids`` ``[rows, k]`` of a layer; ids outside its routed experts are none."""
        if self._held is not None:
            self._held.append((self._row_of[layer], ids))
        else:
            self._add(self._row_of[layer], ids[None])

    @contextmanager
    def together(self) -> Iterator[None]:
        """Holds what is added until the end, and counts it in one launch where all layers came, each once."""
        self._held = []
        try:
            yield
            alike = len({ids.shape for _, ids in self._held}) == 1
            if alike and [row for row, _ in self._held] == list(range(len(self.layers))):
                self._add(0, torch.stack([ids for _, ids in self._held]))
            else:
                for row, ids in self._held:
                    self._add(row, ids[None])
        finally:
            self._held = None

    def _add(self, first: int, ids: torch.Tensor) -> None:
        """``ids`` ``[layers, rows, k]`` of the layers from the ``first`` row of the counts on."""
        if ids.is_cuda:
            self._launch(first, ids)
            return
        there = torch.arange(ids.shape[1], device=ids.device)[:, None] < self.rows
        for row, chosen in enumerate(ids.long(), start=first):
            valid = there & (chosen >= 0) & (chosen < self.experts[row])
            self.counts[row].index_add_(0, chosen.clamp(0, self._columns - 1).flatten(), valid.flatten().long())
            # A token once, by its first choice.
            self.counts[row, -1] += valid[:, 0].sum()

    def _launch(self, first: int, ids: torch.Tensor) -> None:
        layers, rows, k = ids.shape
        if rows:
            _count[(triton.cdiv(rows * k, 256), layers)](
                ids, self.counts, self.experts, self.rows, first, self._columns, rows * k, k, *ids.stride(), BLOCK=256
            )

    def begin(self, rows: int) -> None:
        """Before a batch of so many tokens is run: an order to the device, which the host does not wait for."""
        wanted = (_ALL_ROWS if self._gathered else rows) if self.recording else 0
        if wanted != self._rows:
            self.rows.fill_(wanted)
            self._rows = wanted

    def read(self) -> dict[int, tuple[list[int], int]]:
        """Layer -> counts of its experts, and tokens."""
        self._wait()
        found = self.counts.cpu().tolist()
        return {layer: (found[row][: self.layers[layer]], found[row][-1]) for layer, row in self._row_of.items()}

    def reset(self) -> None:
        self._wait()
        self.counts.zero_()

    def _wait(self) -> None:
        if self.counts.is_cuda:
            torch.cuda.synchronize()  # a batch may be under way on another stream


@triton.jit  # type: ignore[untyped-decorator]
def _count(  # type: ignore[no-untyped-def]
    ids, counts, experts, rows, first, columns, size, k, layer_stride, row_stride, column_stride, BLOCK: tl.constexpr
):
    """Programs ``(block of a layer's ids, layer)``; the last of the ``columns`` of a layer's counts is its tokens."""
    layer = tl.program_id(1)
    number = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row, column = number // k, number % k
    there = (number < size) & (row < tl.load(rows))
    at = ids + layer.to(tl.int64) * layer_stride + row.to(tl.int64) * row_stride + column * column_stride
    expert = tl.load(at, there, -1).to(tl.int32)
    chosen = there & (expert >= 0) & (expert < tl.load(experts + first + layer))
    mine = counts + (first + layer) * columns
    tl.atomic_add(mine + expert, tl.full((BLOCK,), 1, tl.int64), chosen, sem="relaxed")
    tokens = tl.sum((chosen & (column == 0)).to(tl.int64), 0)
    tl.atomic_add(mine + columns - 1, tokens, sem="relaxed")


# In the host


class ExpertActivationTracker:
    """Statistics of expert activity: what the device counted, and what a program records itself.

    Safe to use from several threads. ``activation_count`` is how often an expert was chosen (once for each token, by
    the counter), ``total_tokens_processed`` how many tokens it got, ``last_activation_time`` (seconds since 1970) when
    it was recorded, or when a reading first showed that it had got more.
    """

    def __init__(self, max_history: int = 1000):
        """``max_history`` bounds the requests that are remembered."""
        self._recorded: dict[_Key, list[int]] = {}
        self._times: dict[_Key, float] = {}
        self._seen: dict[_Key, int] = {}
        self._requests: deque[dict[str, Any]] = deque(maxlen=max_history)
        self._lock = threading.RLock()
        self.counter: ExpertCounter | None = None

    def attach(self, counter: ExpertCounter) -> None:
        """Makes the counter's counts part of the statistics."""
        with self._lock:
            self.counter = counter
            self._seen.clear()

    def record_expert_activation(
        self, layer_id: int, expert_id: int, tokens_processed: int = 1, request_id: str | None = None
    ) -> None:
        """Adds one activation of an expert with so many tokens. ``request_id`` is accepted and not kept."""
        with self._lock:
            entry = self._recorded.setdefault((layer_id, expert_id), [0, 0])
            entry[0] += 1
            entry[1] += tokens_processed
            self._times[layer_id, expert_id] = time.time()

    def record_request(self, request_id: str, input_length: int, output_length: int) -> None:
        """Remembers the lengths of a request, in tokens."""
        with self._lock:
            self._requests.append(
                {
                    "timestamp": time.time(),
                    "request_id": request_id,
                    "input_length": input_length,
                    "output_length": output_length,
                    "total_tokens": input_length + output_length,
                }
            )

    def get_expert_stats(self, layer_id: int | None = None, expert_id: int | None = None) -> dict[str, Any]:
        """One expert's statistics (empty for one that is not known), or with no arguments all, by
        ``layer_0_expert_1``."""
        with self._lock:
            entries, _ = self._read()
            if layer_id is not None and expert_id is not None:
                return entries.get((layer_id, expert_id), {})
            return {f"layer_{layer}_expert_{expert}": entry for (layer, expert), entry in entries.items()}

    def get_top_experts(self, top_k: int = 10) -> list[dict[str, Any]]:
        """The experts with most activations, busiest first."""
        with self._lock:
            return _top(self._read()[0], top_k)

    def get_layer_stats(self) -> dict[int, dict[str, Any]]:
        """Layer -> sums over its experts, each expert's, and ``routed_tokens`` where the counter knows them."""
        with self._lock:
            return _by_layer(*self._read())

    def reset_stats(self) -> None:
        """Forgets all that was counted and recorded."""
        with self._lock:
            self._recorded.clear()
            self._times.clear()
            self._seen.clear()
            self._requests.clear()
            if self.counter is not None:
                self.counter.reset()

    def snapshot(self) -> dict[str, Any]:
        """What :meth:`export_stats` writes, of one reading."""
        with self._lock:
            entries, tokens = self._read()
            return {
                "expert_stats": {f"layer_{layer}_expert_{expert}": e for (layer, expert), e in entries.items()},
                "layer_stats": {str(layer): stats for layer, stats in _by_layer(entries, tokens).items()},
                "top_experts": _top(entries, _TOP),
                "requests": list(self._requests),
                "export_time": time.time(),
            }

    def export_stats(self, path: str | os.PathLike[str]) -> None:
        """Writes the statistics as JSON, which takes its name when it is whole. Raises ``OSError``."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            unfinished.write_text(json.dumps(self.snapshot(), indent=1), encoding="utf-8")
            unfinished.replace(target)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise

    def _read(self) -> tuple[dict[_Key, dict[str, Any]], dict[int, int]]:
        """Entries by layer and expert, and tokens by layer."""
        sums = {key: list(entry) for key, entry in self._recorded.items()}
        tokens = {}
        now = time.time()
        for layer, (counts, routed) in ({} if self.counter is None else self.counter.read()).items():
            tokens[layer] = routed
            for expert, count in enumerate(counts):
                entry = sums.setdefault((layer, expert), [0, 0])
                entry[0] += count
                entry[1] += count
                if count > self._seen.get((layer, expert), 0):
                    self._times[layer, expert] = now
                self._seen[layer, expert] = count
        return {
            (layer, expert): {
                "layer_id": layer,
                "expert_id": expert,
                "activation_count": count,
                "last_activation_time": self._times.get((layer, expert), 0.0),
                "total_tokens_processed": processed,
            }
            for (layer, expert), (count, processed) in sorted(sums.items())
        }, tokens


def _top(entries: dict[_Key, dict[str, Any]], top_k: int) -> list[dict[str, Any]]:
    busiest = sorted(entries.values(), key=lambda entry: -entry["activation_count"])[:top_k]
    return [{key: value for key, value in entry.items() if key != "last_activation_time"} for entry in busiest]


def _by_layer(entries: dict[_Key, dict[str, Any]], tokens: dict[int, int]) -> dict[int, dict[str, Any]]:
    layers: dict[int, dict[str, Any]] = {}
    for (layer, expert), entry in entries.items():
        stats = layers.setdefault(layer, {"total_experts": 0, "total_activations": 0, "total_tokens": 0, "experts": {}})
        stats["total_experts"] += 1
        stats["total_activations"] += entry["activation_count"]
        stats["total_tokens"] += entry["total_tokens_processed"]
        stats["experts"][expert] = {key: entry[key] for key in ("activation_count", "total_tokens_processed")}
    for layer, count in tokens.items():
        layers[layer]["routed_tokens"] = count
    return layers


_tracker = ExpertActivationTracker()


def get_expert_activation_stats() -> dict[str, Any]:
    """The statistics of the model that this process serves, as they are exported; without experts where there is none,
    as in SGLang's main process: there ask ``Engine.get_server_info()``."""
    return _tracker.snapshot()


def reset_expert_activation_stats() -> None:
    """Forgets what this process has counted."""
    _tracker.reset_stats()


def export_expert_activation_stats(path: str | os.PathLike[str]) -> None:
    """Writes the statistics of this process as JSON. Raises ``OSError``."""
    _tracker.export_stats(path)


# In SGLang


def install(model: Module, *, first_rank: bool, gathered: bool) -> ExpertCounter | None:
    """Counts for every MoE layer of a model that was just made. Only ``first_rank`` of those that see all tokens does.

    ``gathered``: see :class:`ExpertCounter`.
    """
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE

    from .experts import ExpertGroup

    layers = [m for m in model.modules() if isinstance(m, FusedMoE) and not isinstance(m, ExpertGroup)]
    if not layers or not first_rank:
        return None
    experts = {int(layer.layer_id): layer.num_experts - layer.num_fused_shared_experts for layer in layers}
    counter = ExpertCounter(experts, next(model.parameters()).device, gathered=gathered)
    for layer in layers:
        layer.forward_impl = _counted(layer, layer.forward_impl, counter)
    model.forward = _in_graphs_together(model.forward, counter)
    _tracker.attach(counter)
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
    counter = _tracker.counter
    if counter is None:
        return
    forward = runner.forward

    def forward_with_rows(forward_batch: Any, *args: Any, **kwargs: Any) -> Any:
        ids = forward_batch.input_ids if forward_batch.input_ids is not None else forward_batch.positions
        counter.begin(len(ids))
        return forward(forward_batch, *args, **kwargs)

    runner.forward = forward_with_rows
    _tracker.reset_stats()


def state() -> dict[str, Any] | None:
    """For ``/server_info``; None in a process that does not count."""
    counter = _tracker.counter
    if counter is None:
        return None
    counts = counter.read()
    return {
        "recording": counter.recording,
        "counts": {str(layer): found for layer, (found, _) in counts.items()},
        "routed_tokens": {str(layer): tokens for layer, (_, tokens) in counts.items()},
        "top_experts": _tracker.get_top_experts(),
    }


def handle_request(original: Callable[..., Any], scheduler: Any, request: Any) -> Any:
    """``Scheduler.expert_distribution_handle``. Ranks that do not count themselves get the requests as well."""
    if not enabled():
        return original(scheduler, request)
    from sglang.srt.eplb.expert_distribution import get_global_expert_distribution_recorder
    from sglang.srt.managers.io_struct import ExpertDistributionReqOutput, ExpertDistributionReqType

    counter = _tracker.counter
    if counter is not None:
        if request.action == ExpertDistributionReqType.START_RECORD:
            _tracker.reset_stats()
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
        _tracker.export_stats(path)
    except OSError as error:
        # The server goes on, and so does counting: nothing is lost.
        logger.error("mixprec: cannot write expert activity to %s: %s; set %s", path, error.strerror, FILE)
        return
    logger.info("mixprec: expert activity written to %s", path.absolute())
    _tracker.reset_stats()
