"""Reads expert activity: how many tokens were routed to each expert of each layer, and how evenly they are spread.

The files are those that the runtime exports (JSON) and dumps of SGLang's own recorder.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as brief
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import StatsError
from ..storage.disk import read_regular
from ..storage.limits import load_json, readable_json

__all__ = ["Activity", "Balance", "activity_facts", "balance_of", "gini", "read_activity"]


_MAX_BYTES = 1 << 30
_MAX_VALUES = 8_000_000
_MAX_LAYERS, _MAX_EXPERTS = 4096, 65536  # an id beyond is damage, and would take memory
_MAX_CELLS = 1 << 20  # layers times experts; DeepSeek-V3 has 58 x 256
_MAX_COUNT = 1 << 42  # so that no sum of a file's counts overflows
_NO_TORCH = 4

_Counts = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Activity:
    """``counts[layer]`` ``[E]``: tokens that were routed to each expert. A token counts once for each of its experts.

    ``tokens[layer]`` is the number of tokens that the layer's router saw; layers where it is unknown are missing.
    """

    counts: Mapping[int, _Counts]
    tokens: Mapping[int, int]

    def merged(self, other: Activity) -> Activity:
        """The sum of both. The tokens of a layer are known if all that count it know them."""
        counts = dict(self.counts)
        for layer, more in other.counts.items():
            mine = counts.get(layer, np.zeros(0, np.int64))
            total = np.zeros(max(len(mine), len(more)), np.int64)
            total[: len(mine)] += mine
            total[: len(more)] += more
            counts[layer] = total
        layers = self.counts.keys() | other.counts.keys()
        known = {
            layer: self.tokens.get(layer, 0) + other.tokens.get(layer, 0)
            for layer in layers
            if all(layer in one.tokens or layer not in one.counts for one in (self, other))
        }
        return Activity(dict(sorted(counts.items())), dict(sorted(known.items())))

    def frequency(self, layer: int, expert: int, top_k: int) -> float:
        """The share of a layer's tokens routed to an expert, plus half a token: an unused one may yet get some.

        Sums over ranks, as SGLang's recorder dumps them, have the same shares.
        """
        counts = self.counts[layer]
        total = float(counts.sum())
        count = float(counts[expert]) if expert < len(counts) else 0.0
        return (count + 0.5) / (total / top_k + 1.0)


def read_activity(paths: Iterable[Path]) -> Activity:
    """Reads files of either kind and adds them up.

    Raises:
        StatsError: naming the file, for one that is damaged, of another kind, or without any counts.
    """
    merged = Activity({}, {})
    for path in paths:
        merged = merged.merged(_read_dump(path) if path.suffix in (".pt", ".pth") else _read_json(path))
        if any((counts >= _MAX_COUNT).any() for counts in merged.counts.values()):
            raise StatsError(f"{path}: with the files before it an expert has {_MAX_COUNT} activations and more")
    return merged


_ENTRIES = "objects with layer_id, expert_id, and total_tokens_processed or activation_count"


def _read_json(path: Path) -> Activity:
    data = read_regular(path, _MAX_BYTES)
    try:
        found = readable_json(data, _MAX_VALUES)
        return _of_json(found, path)
    except ValueError as error:
        raise StatsError(f"{path}: no expert activity of mixprec or SGLang: {error!s:.300}") from error


def _of_json(data: object, path: Path) -> Activity:
    """Raises :class:`ValueError` with a message for the user."""
    if not isinstance(data, dict) or "expert_stats" not in data:
        raise ValueError(f"`expert_stats` is missing, which maps names to {_ENTRIES}")
    found: dict[int, dict[int, int]] = {}
    for name, entry in _objects(data, "expert_stats", f"names to {_ENTRIES}"):
        try:
            layer, expert = _number(entry, "layer_id", _MAX_LAYERS), _number(entry, "expert_id", _MAX_EXPERTS)
            present = [key for key in ("total_tokens_processed", "activation_count") if key in entry]
            if not present:
                raise ValueError("`total_tokens_processed` is missing, and `activation_count` as well")
            # `activation_count` may count batches; `total_tokens_processed` counts tokens.
            count = next(filter(None, (_number(entry, key, _MAX_COUNT) for key in present)), 0)
        except ValueError as error:
            raise ValueError(f"{brief(name)} in `expert_stats`: {error}") from error
        found.setdefault(layer, {})[expert] = count
    _check_size(sum(max(numbers) + 1 for numbers in found.values()))
    tokens = {}
    for name, entry in _objects(data, "layer_stats", "layers to objects"):
        if not re.fullmatch("[0-9]{1,9}", name):
            raise ValueError(f"`layer_stats` has {brief(name)}, the number of a layer was expected")
        if "routed_tokens" in entry:
            tokens[int(name)] = _number(entry, "routed_tokens", _MAX_COUNT)
    counts = {}
    for layer, numbers in sorted(found.items()):
        counts[layer] = np.zeros(max(numbers) + 1, np.int64)
        counts[layer][list(numbers)] = list(numbers.values())
    return _checked(Activity(counts, {layer: n for layer, n in tokens.items() if layer in counts}), path)


def _objects(data: Mapping[str, Any], key: str, what: str) -> Iterable[tuple[str, Mapping[str, Any]]]:
    """The objects of ``data[key]`` by name; none where there is no such key."""
    section = data.get(key, {})
    if not isinstance(section, dict) or not all(isinstance(entry, dict) for entry in section.values()):
        raise ValueError(f"`{key}` must map {what}")
    return section.items()


def _number(entry: Mapping[str, Any], key: str, below: int) -> int:
    if key not in entry:
        raise ValueError(f"`{key}` is missing")
    value = entry[key]
    if type(value) is not int or not 0 <= value < below:
        raise ValueError(f"`{key}` is {brief(value)}, a number from 0 up to {below - 1} was expected")
    return value


def _check_size(cells: int) -> None:
    if cells > _MAX_CELLS:
        raise ValueError(
            f"{cells:,} experts in all layers, counted up to the highest id; at most {_MAX_CELLS:,} are read"
        )


def _read_dump(path: Path) -> Activity:
    """Reads a dump with torch in another process, ``mixprec_runtime/recorder.py``, which defines the exit codes."""
    if not path.is_file():
        raise StatsError(f"{path}: no such file")
    command = [sys.executable, "-m", "mixprec_runtime.recorder", str(path.absolute()), str(_MAX_CELLS)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode == _NO_TORCH:
        raise StatsError(f"{path}: a dump of SGLang's recorder is read with torch; pip install torch")
    try:
        if ended.returncode:
            raise ValueError(ended.stderr.strip() or f"torch ended with code {ended.returncode}")
        counts = np.asarray(load_json(ended.stdout.encode(), _MAX_VALUES))
        if counts.ndim != 2 or len(counts) > _MAX_LAYERS or counts.shape[1] > _MAX_EXPERTS:
            raise ValueError(f"counts of shape {list(counts.shape)}")
        if (counts < 0).any() or (counts >= _MAX_COUNT).any():
            raise ValueError(f"counts that are negative, or {_MAX_COUNT} and more")
    except ValueError as error:
        raise StatsError(f"{path}: no dump of SGLang's expert distribution recorder: {error!s:.300}") from error
    # Dense layers have rows of zeros.
    return _checked(Activity({layer: row.astype(np.int64) for layer, row in enumerate(counts) if row.any()}, {}), path)


def _checked(activity: Activity, path: Path) -> Activity:
    if not any(counts.any() for counts in activity.counts.values()):
        raise StatsError(f"{path}: counts no expert at all; record while the server answers requests")
    return activity


@dataclass(frozen=True, slots=True)
class Balance:
    """Measures of how evenly tokens are spread over experts."""

    variation: float
    """Coefficient of variation: standard deviation over mean; 0 is even."""
    gini: float
    """Gini coefficient: 0 is even, near 1 is all on one."""
    top_coverage: float
    """Share of the busiest tenth of the experts (rounded up)."""
    unused: int
    """Number of experts without a token."""


def balance_of(counts: _Counts) -> Balance:
    """The balance of counts ``[E]``."""
    total = int(counts.sum())
    if not total:
        return Balance(0.0, 0.0, 0.0, len(counts))
    busiest = np.sort(counts)[::-1][: -(-len(counts) // 10)]
    return Balance(
        float(counts.std() / counts.mean()), gini(counts), float(busiest.sum() / total), int((counts == 0).sum())
    )


def gini(counts: _Counts) -> float:
    """Half the mean absolute difference of two experts' counts, relative to the mean."""
    ordered = np.sort(counts).astype(np.float64)
    n, total = len(ordered), float(ordered.sum())
    return float(2 * (np.arange(1, n + 1) @ ordered) / (n * total) - (n + 1) / n) if total else 0.0


def activity_facts(activity: Activity, top: int) -> dict[str, Any]:
    """The data that ``mixprec experts --json`` prints, with the ``top`` busiest experts."""
    flat = np.concatenate(list(activity.counts.values()))
    total = int(flat.sum())
    of = np.repeat(list(activity.counts), list(map(len, activity.counts.values())))
    numbers = np.concatenate([np.arange(len(row)) for row in activity.counts.values()])
    busiest = np.argsort(-flat, kind="stable")[:top]  # stable: of equal ones the first
    layers = []
    for layer, counts in activity.counts.items():
        balance = balance_of(counts)
        layers.append(
            {
                "layer": layer,
                "experts": len(counts),
                "activations": int(counts.sum()),
                "tokens": activity.tokens.get(layer),
                "busiest": int(counts.argmax()),
                **_facts_of(balance),
            }
        )
    return {
        "activations": total,
        "tokens": max(activity.tokens.values(), default=None),
        "layers": layers,
        "experts": len(flat),
        **_facts_of(balance_of(flat)),
        "top_experts": [
            {
                "layer": int(of[i]),
                "expert": int(numbers[i]),
                "activations": int(flat[i]),
                "share": int(flat[i]) / total,
            }
            for i in busiest
        ],
    }


def _facts_of(balance: Balance) -> dict[str, Any]:
    return {
        "coefficient_of_variation": round(balance.variation, 4),
        "gini": round(balance.gini, 4),
        "top_10_percent_coverage": round(balance.top_coverage, 4),
        "unused": balance.unused,
    }
