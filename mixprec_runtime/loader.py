"""Each rank reads its own files, where the checkpoint has them (``mixprec split``).

They hold SGLang's parameters as its weight loaders would fill them, so loading is reading: a few large tensors, each
into the parameter of its name, from the file through pinned memory to the GPU. The files of the whole checkpoint
are not opened.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from threading import local
from typing import Any

import torch
from torch.nn import Module

from mixprec_build.errors import MixprecError
from mixprec_build.header import TensorInfo, open_regular, pread_into
from mixprec_build.manifest import layout_of, merged_files
from mixprec_build.presplit import Degree
from mixprec_build.rankfiles import RankIndex, open_rank, read_rank

from .strict import CASTS, DTYPES, LoadError, may_be_empty

__all__ = ["files_of_this_rank", "load", "mismatch", "pad", "require_merged", "this_run"]

logger = logging.getLogger(__name__)

_THREADS = 4
_BUFFER = 16 << 20


def files_of_this_rank(folder: Path, manifest: Mapping[str, Any]) -> RankIndex | None:
    """What this process is to read; None where the checkpoint has no files for this run.

    Raises:
        RuntimeError: it has, and they are damaged.
    """
    from sglang.srt.runtime_context import get_parallel

    parallel = get_parallel()
    if parallel.pp_size > 1 or parallel.attn_tp_size != parallel.tp_size:
        return None  # attention is cut for all ranks of one replica
    try:
        return read_rank(folder, manifest, Degree(parallel.tp_size, parallel.moe_ep_size), parallel.tp_rank)
    except MixprecError as error:
        raise RuntimeError(str(error)) from error


def require_merged(folder: Path, manifest: Mapping[str, Any], because: str) -> None:
    """Raises ``RuntimeError`` where this run needs the merged files, and they are not there."""
    dropped = layout_of(manifest) == "presplit"
    missing = [name for name in merged_files(manifest) if dropped or not (folder / name).exists()]
    if not missing:
        return
    degrees = sorted({name.split("/")[1] for name in manifest.get("presplit", {})})
    have = f"it has files cut for {', '.join(degrees)}" if degrees else "it has no files cut for ranks"
    remedy = "bring the merged files, and `mixprec split` them for this run"
    if dropped:
        remedy = f"restore the merged files with `mixprec split {folder} --layout both`"
    raise RuntimeError(
        f"{folder}: {missing[0]} is not there, and {because}; {have}. Start SGLang with the --tp and --ep-size of "
        f"one of these, or {remedy}"
    )


def this_run() -> str:
    """``"tp4-ep1"``."""
    from sglang.srt.runtime_context import get_parallel

    return str(Degree(get_parallel().tp_size, get_parallel().moe_ep_size))


def pad(method: Any, prefix: str, padded: Mapping[str, tuple[int, int]]) -> None:
    """Has SGLang's method make a layer as wide as this rank's files have it, where zeros were added.

    ``padded``: MLP or ``...experts`` -> columns of a rank as SGLang counts them, and as they are stored.
    """
    for name in (prefix, f"model.{prefix}"):
        if name in padded:
            _pad_experts(method, padded[name][1])
        elif name.rpartition(".")[0] in padded:
            _pad_linear(method, *padded[name.rpartition(".")[0]], inputs=name.endswith("down_proj"))


def _pad_linear(method: Any, native: int, held: int, *, inputs: bool) -> None:
    create = method.create_weights

    def create_weights(
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        if inputs:
            input_size = input_size // native * held
            layer.input_size_per_partition = input_size_per_partition = held
        else:
            output_size = output_size // native * held
            output_partition_sizes = [held] * len(output_partition_sizes)
            layer.output_partition_sizes = output_partition_sizes
            layer.output_size_per_partition = sum(output_partition_sizes)
        create(layer, input_size_per_partition, output_partition_sizes, input_size, output_size, *args, **kwargs)

    method.create_weights = create_weights


def _pad_experts(method: Any, held: int) -> None:
    create = method.create_weights

    def create_weights(layer: Any, *, intermediate_size_per_partition: int, **kwargs: Any) -> None:
        layer.intermediate_size_per_partition = held
        if getattr(layer.moe_runner_config, "intermediate_size_per_partition", None) is not None:
            layer.moe_runner_config.intermediate_size_per_partition = held
        create(layer=layer, intermediate_size_per_partition=held, **kwargs)

    method.create_weights = create_weights


def mismatch(model: Module, index: RankIndex) -> str | None:
    """Why a rank's files are not for the parameters of ``model``: SGLang was started in a way they were not cut for."""
    parameters = _parameters(model)
    for name, parameter in parameters.items():
        entry = index.parameters.get(name)
        if entry is None:
            if may_be_empty(name, index.parameters):
                continue
            return f"they have no {name}"
        if tuple(entry["shape"]) != tuple(parameter.shape):
            return f"{name} is {entry['shape']} in them and {list(parameter.shape)} in SGLang"
        stored = DTYPES.get(entry["dtype"])
        if stored != parameter.dtype and not {stored, parameter.dtype} <= CASTS:
            return f"{name} is {entry['dtype']} in them and {parameter.dtype} in SGLang"
    extra = sorted(index.parameters.keys() - parameters.keys())
    return f"SGLang has no {extra[0]}" if extra else None


def _parameters(model: Module) -> dict[str, torch.Tensor]:
    return {name: parameter.data for name, parameter in model.named_parameters() if parameter.numel()}


def load(model: Module, index: RankIndex, finish: Callable[[], Any]) -> Any:
    """Fills the parameters of ``model``, and calls ``finish``: what it does itself once weights are loaded.

    Raises:
        LoadError: a file is damaged, or cannot be read.
    """
    parameters = _parameters(model)
    try:
        tensors = open_rank(index)
        names = dict.fromkeys(tensor.file for tensor in tensors.values())
        with _Files(index.folder, names) as files, ThreadPoolExecutor(_THREADS) as pool:
            largest_first = sorted(tensors.values(), key=lambda tensor: -tensor.nbytes)
            list(pool.map(lambda tensor: files.read(tensor, parameters[tensor.name]), largest_first))
    except (MixprecError, OSError) as error:
        raise LoadError(str(error)) from error
    if any(parameter.is_cuda for parameter in parameters.values()):
        torch.cuda.synchronize()
    logger.info("mixprec: read %s (%.2f GB)", index.folder, sum(t.nbytes for t in tensors.values()) / 1e9)
    return finish()


class _Files:
    """A rank's files, open, and buffers of pinned memory for each thread that reads them."""

    def __init__(self, folder: Path, names: Iterable[str]):
        self._mine = local()
        self._open: dict[str, int] = {}
        with ExitStack() as stack:
            for name in names:
                self._open[name] = open_regular(folder / name)
                stack.callback(os.close, self._open[name])
            self._close = stack.pop_all()

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *_: object) -> None:
        self._close.close()

    def read(self, tensor: TensorInfo, into: torch.Tensor) -> None:
        dtype, fd = DTYPES[tensor.dtype], self._open[tensor.file]
        if into.dtype == dtype and into.is_contiguous():
            self._read_bytes(fd, tensor, into.reshape(-1).view(torch.uint8))
        else:
            stored = torch.empty(tensor.shape, dtype=dtype)
            self._read_bytes(fd, tensor, stored.reshape(-1).view(torch.uint8))
            into.copy_(stored.reshape(into.shape))

    def _read_bytes(self, fd: int, tensor: TensorInfo, into: torch.Tensor) -> None:
        if not into.is_cuda:
            _read_into(fd, into, tensor.start, tensor)
            return
        with torch.cuda.device(into.device), torch.cuda.stream(self._stream()):
            for number, at in enumerate(range(0, tensor.nbytes, _BUFFER)):
                buffer, copied = self._buffers()[number % 2]
                copied.synchronize()  # what was read before has left the buffer
                window = buffer[: min(_BUFFER, tensor.nbytes - at)]
                _read_into(fd, window, tensor.start + at, tensor)
                into[at : at + len(window)].copy_(window, non_blocking=True)
                copied.record()

    def _stream(self) -> torch.cuda.Stream:
        if not hasattr(self._mine, "stream"):
            self._mine.stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream: torch.cuda.Stream = self._mine.stream
        return stream

    def _buffers(self) -> list[tuple[torch.Tensor, torch.cuda.Event]]:
        if not hasattr(self._mine, "buffers"):
            self._mine.buffers = [
                (torch.empty(_BUFFER, dtype=torch.uint8, pin_memory=True), torch.cuda.Event())  # type: ignore[no-untyped-call]
                for _ in range(2)
            ]
        buffers: list[tuple[torch.Tensor, torch.cuda.Event]] = self._mine.buffers
        return buffers


def _read_into(fd: int, into: torch.Tensor, at: int, tensor: TensorInfo) -> None:
    window = into.numpy().data.cast("B")
    if pread_into(fd, window, at) < len(window):
        raise LoadError(f"{tensor.file} ends inside {tensor.name}")
