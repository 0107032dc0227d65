"""Prints the counts in a dump of SGLang's expert recorder: ``python -m mixprec_runtime.recorder FILE CELLS``.

Dumps are pickles that need torch, which the compiler does not import; and a separate process contains whatever torch
does with a damaged file. Reads the recorder's modes ``stat``, ``per_pass`` and ``per_token`` (SGLang 0.5.17,
``eplb/expert_distribution.py``).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["NO_TORCH", "UNREADABLE", "counts_of", "main"]

UNREADABLE, NO_TORCH = 3, 4
"""Exit codes: the file cannot be read (standard error has the reason); torch is not installed."""


def main() -> None:
    """Prints the counts of ``FILE`` as JSON ``[L][E]``; more than ``CELLS`` counts are refused."""
    try:
        import torch
    except ImportError:
        sys.exit(NO_TORCH)
    try:
        # weights_only runs no code from the pickle.
        data = torch.load(sys.argv[1], map_location="cpu", weights_only=True)
        print(json.dumps(counts_of(data, int(sys.argv[2])).tolist()))
    except Exception as error:  # torch raises many types for a damaged file
        print(error, file=sys.stderr)
        sys.exit(UNREADABLE)


def counts_of(data: Mapping[str, Any], cells: int) -> npt.NDArray[np.int64]:
    """Tokens routed to each expert, ``[L, E]``. Raises :class:`ValueError` for more than ``cells`` counts."""

    def check(size: int) -> None:
        if size > cells:
            raise ValueError(
                f"{size:,} experts in all layers, counted up to the highest id; at most {cells:,} are read"
            )

    if "logical_count" in data:
        check(prod(data["logical_count"].shape[1:]))
        logical: npt.NDArray[np.int64] = data["logical_count"].sum(0).numpy()  # [steps, L, E]
        return logical
    # Records of single passes count physical experts, of which one logical expert may have several.
    logical_of = _numpy(data["last_physical_to_logical_map"]).astype(np.int64)  # [L, P]
    layers, physical = logical_of.shape
    check(layers * max(physical, int(logical_of.max()) + 1))
    total = np.zeros((layers, physical), np.int64)
    for record in data["records"]:
        if "topk_ids_of_layer" in record:
            ids = _numpy(record["topk_ids_of_layer"]).reshape(layers, -1)
            for layer in range(layers):
                routed = ids[layer][ids[layer] >= 0]  # -1 is padding
                total[layer] += np.bincount(routed, minlength=physical)
        else:
            total += _numpy(record["global_physical_count"])
    out = np.zeros((layers, int(logical_of.max()) + 1), np.int64)
    for layer in range(layers):
        np.add.at(out[layer], logical_of[layer], total[layer])
    return out


def _numpy(tensor: Any) -> npt.NDArray[Any]:
    return np.asarray(tensor.cpu().numpy())


if __name__ == "__main__":
    main()
