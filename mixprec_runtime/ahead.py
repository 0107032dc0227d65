"""The tensors of merged files are in pinned memory when a model comes to load them.

SGLang maps the files, and a model copies one tensor after the other to the GPU: each copy waits until the pages of its
tensor are there, and passes through the driver's own pinned memory. Threads do both ahead of the model.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

__all__ = ["pinned_bytes", "read_ahead"]

_THREADS = 4
_SMALLEST, _LARGEST = 64 << 10, 32 << 20
"""Tensors outside these bounds are passed on as they come: the driver takes small ones at once, and of large ones
a few would fill memory that can never be swapped out."""
_AHEAD = 64 << 20
_HELD = 512 << 20


def pinned_bytes() -> int:
    """Bytes of pinned memory that tensors of this process hold."""
    return int(torch.cuda.host_memory_stats()["active_bytes.current"])


def read_ahead(
    weights: Iterable[tuple[str, Tensor]], *, pin_memory: bool = True, held: Callable[[], int] = pinned_bytes
) -> Iterator[tuple[str, Tensor]]:
    """The same tensors in the same order, up to 64 MiB of them copied to pinned memory before they are asked for.

    Some models keep what they are given until the end (DeepSeek's loads in threads of its own): while tensors hold
    more than 512 MiB, as ``held`` tells, further ones are passed on as they come.
    """
    queue: deque[tuple[str, int, Tensor | Future[Tensor]]] = deque()
    queued = unchecked = 0
    room = True

    def first() -> tuple[str, Tensor]:
        nonlocal queued
        name, size, tensor = queue.popleft()
        queued -= size
        return name, tensor.result() if isinstance(tensor, Future) else tensor

    with ThreadPoolExecutor(_THREADS, thread_name_prefix="mixprec-ahead") as pool:
        for name, tensor in weights:
            size = tensor.nbytes
            unchecked += size
            if unchecked > _AHEAD:
                room, unchecked = held() < _HELD, 0
            copies = room and _SMALLEST <= size <= _LARGEST and tensor.is_contiguous()
            queue.append((name, size, pool.submit(_copy, tensor, pin_memory) if copies else tensor))
            queued += size
            while queued > _AHEAD:
                yield first()
        while queue:
            yield first()


def _copy(tensor: Tensor, pin_memory: bool) -> Tensor:
    copied = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pin_memory)
    # torch would share the work among threads of its own; numpy copies here, and lets others run meanwhile.
    np.copyto(_bytes(copied), _bytes(tensor))
    return copied


def _bytes(tensor: Tensor) -> np.ndarray:
    return tensor.view(-1).view(torch.uint8).numpy()
