"""Degrees of parallelism that SGLang's class for a model refuses, beside those that its decoder's sizes rule out.

The classes assert them while they make layers, before a weight is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

__all__ = ["DegreeLimits"]

_STEP = 64
"""Entries of an embedding that ranks share are filled up to a multiple of this (``VocabParallelEmbedding``)."""


class DegreeLimits(NamedTuple):
    """What a class of SGLang's compares with the number of ranks."""

    ranks_up_to_experts: bool = False
    """Whether there may be no more ranks than experts of a layer."""
    encoder: tuple[str, ...] = ()
    """Keys of ``vision_config`` for the heads and columns of the encoder of images, which ranks that share attention
    share as well."""
    positions: str = ""
    """The key there for the number of its positions, if ranks share their embedding; ``"image_size"`` where they are
    the patches of an image."""
    whole_encoder: bool = False
    """Whether every rank has all of the encoder with ``--mm-enable-dp-encoder``."""

    def uneven(self, sizes: Mapping[str, int], ranks: int) -> Iterator[str]:
        """Yields those of an encoder's ``sizes`` that ``ranks`` cannot share, such as ``"16 num_heads"``."""
        for key in self.encoder:
            size = sizes.get(key, 0)
            copied = "key_value" in key and 0 < size < ranks and not ranks % size
            if size % ranks and not copied:
                yield f"{size} {key}"
        rows = sizes.get(self.positions)
        if rows is not None and self.positions == "image_size":
            rows = (rows // sizes.get("patch_size", rows)) ** 2
        if rows is not None and -(-rows // _STEP) * _STEP % ranks:
            yield f"{rows} positions"
