"""Compares weights by torch, on a GPU. The only module of the compiler that imports torch, itself imported when needed.

Each thread reads one module at a time, through page-locked memory, and has a stream of its own: while one module is
computed, others are read and copied. A thread takes GPU memory for its module, of all sources as they are stored, and
for about ten times :attr:`TorchComparer.chunk` values in float32.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..formats.arrays import Arrays
from .comparing import Comparer

if TYPE_CHECKING:
    from ..checkpoint.typed import Source
    from ..storage.header import TensorInfo
    from ..storage.reader import TensorReader

__all__ = ["TorchComparer", "why_unusable"]


_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.uint8,  # formats look at its bytes; torch has it since 2.7
}  # fmt: skip
_CUDA: Any = torch.cuda  # without types, in part
_PIECE = 8 << 20
"""Bytes that are read, and copied to the device, at a time."""
_PIECES = 3
"""Pieces of a thread in page-locked memory: one is read into while others are copied."""


def why_unusable() -> str | None:
    """The reason why torch cannot compute on a GPU of this machine; None where it can."""
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no GPU"
    try:
        torch.zeros(1, device="cuda")
    except RuntimeError as error:  # others have all of its memory, for example
        return f"torch cannot use the GPU ({str(error).splitlines()[0]})"
    return None


class TorchComparer(Comparer):
    """Compares on a device of torch's: a GPU, or ``cpu`` for tests. What a GPU has no room for is left to numpy."""

    chunk = 1 << 23
    jobs = min(16, os.cpu_count() or 1)

    def __init__(self, device: str = "cuda"):
        self._device = torch.device(device)
        self.arrays = _TorchArrays(self._device)
        self._local = threading.local()

    @property
    def _lane(self) -> _Lane:
        """The calling thread's."""
        if not hasattr(self._local, "lane"):
            self._local.lane = _Lane(self._device)
        lane: _Lane = self._local.lane
        return lane

    def squares(
        self, name: str, reference: Source, others: Sequence[Source], readers: Mapping[str, TensorReader]
    ) -> Any:
        with suppress(torch.cuda.OutOfMemoryError), torch.inference_mode(), self._lane.stream():
            return super().squares(name, reference, others, readers)
        return Comparer().squares(name, reference, others, readers)

    def can_hold(self, tensor: TensorInfo) -> bool:
        return tensor.dtype in _DTYPES

    def read(self, tensor: TensorInfo, reader: TensorReader, dim: int) -> Any:
        out = torch.empty(tensor.nbytes, dtype=torch.uint8, device=self._device)
        row = max(1, tensor.nbytes // max(1, tensor.shape[0]))
        size = max(row, _PIECE - _PIECE % row)  # readers begin at rows
        for at in range(0, tensor.nbytes, size):
            self._lane.upload(out[at : at + size], partial(reader.read_into, tensor, at=at))
        return out.view(_DTYPES[tensor.dtype]).reshape(tensor.shape)

    def subtract(self, a: Any, b: Any, out: Any) -> None:
        torch.subtract(a, b, out=out)

    def sums_of_squares(self, values: Any) -> Any:
        return values.double().square_().sum(0)

    def from_numpy(self, values: Any) -> Any:
        return torch.from_numpy(values).to(self._device)

    def to_numpy(self, values: Any) -> Any:
        return values.cpu().numpy()


class _Lane:
    """One thread's way to the device: a stream, and memory from which the device copies while the thread goes on."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._stream = _CUDA.Stream(device) if self._cuda else None
        self._pieces = cycle([_Piece(self._cuda) for _ in range(_PIECES)])

    def stream(self) -> AbstractContextManager[object]:
        """Has all work for the device done in this thread's stream."""
        return nullcontext() if self._stream is None else _CUDA.stream(self._stream)

    def upload(self, out: torch.Tensor, fill: Callable[[memoryview], object]) -> None:
        """Copies bytes that ``fill`` puts into the memory it is given to ``out``, on the device."""
        piece = next(self._pieces)
        source = piece.free(out.numel())
        fill(source.numpy().data)
        out.copy_(source, non_blocking=True)
        piece.busy()


class _Piece:
    def __init__(self, cuda: bool):
        self._copied = _CUDA.Event(blocking=True) if cuda else None  # waits leave the core to other threads
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def free(self, count: int) -> torch.Tensor:
        """``count`` bytes, when the device has copied what they held."""
        if self._copied is not None:
            self._copied.synchronize()
        if self._bytes.numel() < count:
            self._bytes = torch.empty(max(_PIECE, count), dtype=torch.uint8, pin_memory=self._copied is not None)
        return self._bytes[:count]

    def busy(self) -> None:
        """Marks them as to be copied by all that the stream has to do."""
        if self._copied is not None:
            self._copied.record()


class _TorchArrays(Arrays):
    def __init__(self, device: torch.device):
        self._device = device
        self._tables: dict[int, tuple[Any, torch.Tensor]] = {}
        """Tables on the device, by the ``id`` of numpy's, which is kept beside."""

    def float32(self, stored: Any) -> Any:
        return stored.float()

    def empty(self, shape: tuple[int, ...]) -> Any:
        return torch.empty(shape, device=self._device)

    def contiguous(self, values: Any) -> Any:
        return values.contiguous()

    def octets(self, stored: Any) -> Any:
        # Flat, for a matrix of one column may be contiguous with other strides than a view takes.
        return stored.contiguous().flatten().view(torch.uint8).reshape(*stored.shape[:-1], -1)

    def int16(self, octets: Any) -> Any:
        return octets.short()

    def lookup(self, table: Any, codes: Any) -> Any:
        if id(table) not in self._tables:  # a copy waits for all that its stream has to do, so there is one
            self._tables[id(table)] = table, torch.from_numpy(table).to(self._device)
        return self._tables[id(table)][1][codes.view(torch.uint8).long()].flatten(-2)

    def repeat(self, values: Any, count: int, axis: int) -> Any:
        return values.repeat_interleave(count, dim=axis)

    def columns(self, values: Any, at: Any) -> Any:
        # Numbers that are not there raise here, as numpy's; on a GPU they would end all of the process's work.
        (at,) = np.arange(values.shape[1]).reshape(1, -1).take(at, axis=1)
        return values.index_select(1, torch.from_numpy(at).to(self._device))
