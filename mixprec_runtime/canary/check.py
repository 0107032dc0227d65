"""Runs the canary on a checkpoint: at a server's start, and for ``mixprec doctor``."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch

from mixprec_build.checkpoint.declaration import Declaration
from mixprec_build.ranks.on_disk import open_on_disk
from mixprec_build.storage.reader import FileReader

from .choice import choose
from .product import Result, compare, device_of_run

__all__ = ["SWITCH", "enabled", "require", "results"]


logger = logging.getLogger(__name__)

SWITCH = "MIXPREC_CANARY"
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
_ONE = {
    "tp_size": 1, "tp_rank": 0, "attn_tp_size": 1, "attn_tp_rank": 0, "moe_ep_size": 1, "moe_ep_rank": 0,
    "moe_tp_size": 1, "moe_tp_rank": 0,
}  # fmt: skip


def enabled() -> bool:
    """Whether ``MIXPREC_CANARY`` is on. Raises ``RuntimeError`` for a value that is neither on nor off."""
    value = os.environ.get(SWITCH, "0").lower()
    if value in ("1", "true", "yes", "on"):
        return True
    if value in ("", "0", "false", "no", "off"):
        return False
    raise RuntimeError(f"{SWITCH}={value!r}: write 1 or 0")


def results(out: Path, dtype: torch.dtype | None = None) -> Iterator[Result]:
    """Yields the comparison for each format and combination of formats of the checkpoint ``out``.

    The kernels are those of one rank, whatever the rank that this process is. ``dtype`` is that of activations, by
    default the one that ``config.json`` names.

    Raises:
        MixprecError: the checkpoint is damaged.
    """
    from sglang.srt.runtime_context import get_parallel

    source = open_on_disk(str(out))
    checkpoint, facts = source.checkpoint, source.facts
    declaration = Declaration.from_json(checkpoint.quantization)
    # The smallest modules first: the choice takes the first of each format.
    by_size = sorted(checkpoint.modules.values(), key=lambda module: module.nbytes)
    formats = declaration.formats_of([module.name for module in by_size])

    with FileReader(checkpoint.storage.cached, ahead=checkpoint.values) as reader:

        def stored(name: str) -> Mapping[str, tuple[str, np.ndarray]]:
            tensors = checkpoint.modules[name].tensors
            return {leaf: (info.dtype, reader.array(info)) for leaf, info in tensors.items()}

        for case in choose(formats, facts.family):
            with patch.dict(get_parallel()._overrides, _ONE):
                yield compare(case, stored, dtype or _DTYPES.get(str(facts.dtype), torch.bfloat16), device_of_run())


def require(out: Path, dtype: torch.dtype) -> None:
    """Raises ``RuntimeError`` where a kernel answers wrongly, or otherwise on the same input."""
    found = list(results(out, dtype))
    wrong = [sentence(result) for result in found if not result.right]
    if wrong:
        raise RuntimeError(
            f"{SWITCH}: {'; '.join(wrong)}. SGLang's kernels do not compute what this checkpoint's formats mean on "
            "this machine: serve it with another release of SGLang, or on another GPU"
        )
    worst = max((result.error / result.limit for result in found), default=0.0)
    logger.info("mixprec: %d products of SGLang's kernels are right, the worst at %.2f of its limit", len(found), worst)


def sentence(result: Result) -> str:
    """A result in words."""
    text = f"{result.what}: {result.error:.1e} of the norm off float64, {result.limit:.1e} allowed"
    if result.differing:
        text += f"; {result.differing} of {result.launches} launches on the same input differ"
    return text
