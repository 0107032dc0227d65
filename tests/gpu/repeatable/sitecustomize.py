"""First on PYTHONPATH: servers whose answers repeat themselves, and ranks that share GPUs.

Marlin kernels run without atomic additions, whose order, and so whose sum, is chance; and the rows of an expert stay in
order when they are sorted, by SGLang and by mixprec: it, too, is chance, and decides where Marlin parts the sum of a
row. Both servers of a comparison run under this, so that what differs is not the kernels'.

With ``SHORT_GROUPS=1`` groups with zero points are as short as a tile of the kernels in stock SGLang, too, which
otherwise computes wrong values now and then (``zero_points_by_tiles`` of ``mixprec_runtime/formats/marlin.py``).

Triton's attention lacks two things that FlashAttention 3, which may not be installed, has: outputs with a row for each
token where q has one for each head (Hunyuan 1), and windows whose size the class does not tell (Command-A). Here it
has them, too.

With ``SHARED_GPUS=2`` the ranks of a server take turns on two GPUs, however many there are. NCCL refuses two ranks of
one host on one GPU, so every process says that it is a host of its own: what ranks exchange goes through sockets.
"""

import contextlib
import importlib.machinery
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any


def _repeatable(kernel: Callable[..., Any]) -> Callable[..., Any]:
    parameters = inspect.signature(kernel)
    zero_points = next(name for name in parameters.parameters if name.startswith("b_zeros"))

    def repeatable(*args: Any, **kwargs: Any) -> Any:
        given = parameters.bind(*args, **kwargs).arguments
        zeros, groups = given.get(zero_points), given["b_scales"].shape[-2]
        if "SHORT_GROUPS" in os.environ and zeros is not None and zeros.numel() and groups > 1:
            times = max(1, given["size_k"] // groups // 64)
            for name in ("b_scales", zero_points):
                given[name] = given[name].repeat_interleave(times, dim=-2)
        return kernel(**{**given, "use_atomic_add": False})

    return repeatable


def _in_order(positions: Any, experts: Any, count: Any, block: int) -> Any:
    """``positions`` with each expert's, in the blocks that ``experts`` has the experts of, sorted."""
    import torch

    at = torch.arange(len(positions), device=positions.device)
    expert = torch.cat([experts[:1] * 0, (experts[1:] != experts[:-1]).cumsum(0)]).repeat_interleave(block)
    keys = (expert[: len(positions)] << 32) + positions
    return positions[torch.where(at < count, keys, at + (1 << 62)).argsort()]


def _aligned_in_order(align: Callable[..., Any]) -> Callable[..., Any]:
    def moe_align_block_size(topk_ids: Any, block_size: int, *args: Any, **kwargs: Any) -> Any:
        positions, experts, count = align(topk_ids, block_size, *args, **kwargs)
        return _in_order(positions, experts, count, block_size), experts, count

    return moe_align_block_size


def _sorted_in_order(sort: Callable[..., Any]) -> Callable[..., Any]:
    def repeatable(*args: Any) -> Any:
        return [replace(r, positions=_in_order(r.positions, r.experts, r.count, r.block)) for r in sort(*args)]

    return repeatable


def _shared(_: Callable[..., Any]) -> Callable[..., Any]:
    @contextlib.contextmanager
    def maybe_reindex_device_id(gpu_id: int) -> Iterator[int]:
        yield gpu_id % int(os.environ["SHARED_GPUS"])

    return maybe_reindex_device_id


def _rows_of_tokens(backend: Any) -> Any:
    extend = backend.forward_extend

    def forward_extend(self: Any, q: Any, k: Any, v: Any, layer: Any, *args: Any, **kwargs: Any) -> Any:
        width = layer.tp_q_head_num * layer.qk_head_dim
        if q.dim() == 2 and q.shape[1] != width:
            q = q.reshape(-1, width)
        return extend(self, q, k, v, layer, *args, **kwargs)

    backend.forward_extend = forward_extend
    return backend


def _with_size_of_window(model: Any) -> Any:
    if not hasattr(model, "get_attention_sliding_window_size"):
        model.get_attention_sliding_window_size = lambda self: self.config.sliding_window
    return model


# module -> function -> what takes its place
_REPLACED = {
    "sglang.kernels.ops.moe.moe_wna16_marlin": ("moe_wna16_marlin_gemm", _repeatable),
    "sglang.kernels.ops.quantization.gptq_marlin": ("gptq_marlin_gemm", _repeatable),
    "sglang.srt.layers.moe.moe_runner.triton_utils.moe_align_block_size": ("moe_align_block_size", _aligned_in_order),
    "mixprec_runtime.experts.routing": ("sort", _sorted_in_order),
    "sglang.srt.layers.attention.triton_backend": ("TritonAttnBackend", _rows_of_tokens),
    "sglang.srt.models.commandr": ("Cohere2ForCausalLM", _with_size_of_window),
}
if "SHARED_GPUS" in os.environ:
    _REPLACED["sglang.srt.utils.common"] = ("maybe_reindex_device_id", _shared)
    os.environ["NCCL_HOSTID"] = str(os.getpid())


class _Finder:
    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> Any:
        if name not in _REPLACED:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        assert spec is not None and spec.loader is not None
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            function, other = _REPLACED[name]
            setattr(module, function, other(getattr(module, function)))

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, _Finder())  # type: ignore[arg-type]
