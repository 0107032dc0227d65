"""Statistics of expert activity in one process."""

from __future__ import annotations

import json
import os
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

from .counter import ExpertCounter, _Key

__all__ = [
    "ExpertActivationTracker",
    "export_expert_activation_stats",
    "get_expert_activation_stats",
    "reset_expert_activation_stats",
    "tracker",
]

_TOP = 20


class ExpertActivationTracker:
    """Statistics of expert activity, of a counter on the device and of calls to ``record_*``. Thread-safe.

    Each expert has ``activation_count`` (the counter adds 1 for each token), ``total_tokens_processed``, and
    ``last_activation_time`` (seconds since 1970): of the last record, or of the reading that first showed more tokens.
    """

    def __init__(self, max_history: int = 1000):
        """``max_history``: how many requests are kept, the latest ones."""
        self._recorded: dict[_Key, list[int]] = {}
        self._times: dict[_Key, float] = {}
        self._seen: dict[_Key, int] = {}
        self._requests: deque[dict[str, Any]] = deque(maxlen=max_history)
        self._lock = threading.RLock()
        self.counter: ExpertCounter | None = None

    def attach(self, counter: ExpertCounter) -> None:
        """Adds the counts of ``counter`` to the statistics."""
        with self._lock:
            self.counter = counter
            self._seen.clear()

    def record_expert_activation(
        self, layer_id: int, expert_id: int, tokens_processed: int = 1, request_id: str | None = None
    ) -> None:
        """Adds one activation of an expert, with ``tokens_processed`` tokens. ``request_id`` is ignored."""
        with self._lock:
            entry = self._recorded.setdefault((layer_id, expert_id), [0, 0])
            entry[0] += 1
            entry[1] += tokens_processed
            self._times[layer_id, expert_id] = time.time()

    def record_request(self, request_id: str, input_length: int, output_length: int) -> None:
        """Adds a request to the history; lengths are in tokens."""
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
        """The statistics of one expert, empty if unknown; without both ids, of all experts by ``layer_0_expert_1``."""
        with self._lock:
            entries, _ = self._read()
            if layer_id is not None and expert_id is not None:
                return entries.get((layer_id, expert_id), {})
            return {f"layer_{layer}_expert_{expert}": entry for (layer, expert), entry in entries.items()}

    def get_top_experts(self, top_k: int = 10) -> list[dict[str, Any]]:
        """The ``top_k`` experts with most activations, busiest first."""
        with self._lock:
            return _top(self._read()[0], top_k)

    def get_layer_stats(self) -> dict[int, dict[str, Any]]:
        """Layer -> sums over its experts, statistics of each expert and, where counted, ``routed_tokens``."""
        with self._lock:
            return _by_layer(*self._read())

    def reset_stats(self) -> None:
        """Deletes all counts and records."""
        with self._lock:
            self._recorded.clear()
            self._times.clear()
            self._seen.clear()
            self._requests.clear()
            if self.counter is not None:
                self.counter.reset()

    def snapshot(self) -> dict[str, Any]:
        """The contents of an exported file, as of now."""
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
        """Writes the statistics to ``path`` as JSON, atomically. Raises ``OSError``."""
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
        """Statistics by layer and expert, and tokens by layer."""
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


tracker = ExpertActivationTracker()


def get_expert_activation_stats() -> dict[str, Any]:
    """The statistics of this process, in the form of :func:`export_expert_activation_stats`.

    Without experts in a process that serves no model, like SGLang's main one: there ask ``Engine.get_server_info()``.
    """
    return tracker.snapshot()


def reset_expert_activation_stats() -> None:
    """Deletes the statistics of this process."""
    tracker.reset_stats()


def export_expert_activation_stats(path: str | os.PathLike[str]) -> None:
    """Writes the statistics of this process to ``path`` as JSON. Raises ``OSError``."""
    tracker.export_stats(path)
