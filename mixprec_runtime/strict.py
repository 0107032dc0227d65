"""Nothing is lost on the way from the checkpoint to the GPU.

SGLang's models drop a tensor that finds no parameter, some with a warning and some without a word, and serve
whatever lay in a parameter that none was loaded into. Here tensors are followed while a model loads them: they
arrive as a subclass of ``torch.Tensor`` that remembers its names in the checkpoint through every view, cast and
concatenation, and notes each parameter that it is copied into. Afterwards every tensor must have been copied
somewhere, and every element of every parameter must have been written.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from math import prod
from threading import Lock
from typing import Any

import torch
from torch.nn import Module

from mixprec_build.patterns import compress
from mixprec_build.servable import some

from .native import format_of

__all__ = ["CASTS", "DTYPES", "Ledger", "LoadError", "here", "load_strictly", "may_be_empty"]

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
CASTS = {torch.float64, torch.float32, torch.float16, torch.bfloat16}
_DERIVED = re.compile(r".*_g_idx_sort_indices")
_LAYER = re.compile(r"\.layers\.(\d+)\.")
_EXPERT = re.compile(r"(.+)\.(\d+)\.[^.]+\.[^.]+")


class LoadError(RuntimeError):
    """A checkpoint that did not reach the model whole."""


class Ledger:
    """What arrived, and where it went.

    Args:
        declared: tensor name -> its ``dtype`` (as safetensors writes it) and ``shape``, from the manifest.
        parameters: the model's parameters by name.
    """

    def __init__(self, declared: Mapping[str, Mapping[str, Any]], parameters: Iterable[tuple[str, torch.Tensor]]):
        self._declared = declared
        self._parameters = dict(parameters)
        self._by_storage: dict[int, list[str]] = defaultdict(list)
        for name, parameter in self._parameters.items():
            if parameter.numel():
                self._by_storage[parameter.untyped_storage().data_ptr()].append(name)
        self._written: dict[int, dict[object, int]] = defaultdict(dict)
        self._lock = Lock()
        self.arrived: set[str] = set()
        self.used: Counter[str] = Counter()
        """How many elements were copied from each tensor."""

    def follow(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors of a checkpoint, watched.

        Raises:
            LoadError: one is not what the manifest declares.
        """
        for name, tensor in weights:
            self._check(name, tensor)
            self.arrived.add(name)
            yield name, _Arriving.of(tensor, (self, (name,)))

    def _check(self, name: str, tensor: torch.Tensor) -> None:
        declared = self._declared.get(name)
        if declared is None:
            raise LoadError(f"{name} is not in the checkpoint's manifest: a file was added or changed after building")
        dtype, shape = DTYPES[declared["dtype"]], tuple(declared["shape"])
        if tensor.dtype != dtype or tuple(tensor.shape) != shape:
            raise LoadError(
                f"{name} is {tensor.dtype} {list(tensor.shape)}, and was built as {dtype} {list(shape)}: the "
                "checkpoint was changed after building; `mixprec verify` says where"
            )

    def copied(self, names: Iterable[str], into: torch.Tensor) -> None:
        """Notes that ``names`` were written to ``into``, a view of a parameter perhaps.

        Raises:
            LoadError: the copy changes quantized values.
        """
        storage, size = into.untyped_storage().data_ptr(), into.numel()
        owners = self._by_storage.get(storage)
        with self._lock:  # DeepSeek's loaders run in threads
            for name in names:
                self.used[name] += size
            if owners is not None:
                self._written[storage][into.storage_offset(), into.shape, into.stride()] = size
        if owners is None:
            return
        for name in names:
            dtype = DTYPES[self._declared[name]["dtype"]]
            if dtype != into.dtype and not {dtype, into.dtype} <= CASTS:
                raise LoadError(
                    f"{name} is {dtype}, and {owners[0]}, which SGLang loads it into, is "
                    f"{into.dtype}: the layer is not in the format that the checkpoint declares"
                )

    def unused(self, ranks: int) -> list[str]:
        """Tensors of the manifest of which less was copied than one of ``ranks`` takes."""
        return [name for name, t in self._declared.items() if self.used[name] * ranks < prod(t["shape"])]

    def unfilled(self) -> list[str]:
        """Parameters that were not written in full."""
        return [
            name
            for storage, names in self._by_storage.items()
            for name in names
            if sum(self._written[storage].values()) < self._parameters[name].numel()
        ]


class _Arriving(torch.Tensor):
    """A tensor that came from a checkpoint, or was made from such ones.

    Hundreds of thousands of them come by while a model loads, and torch's way to a subclass takes microseconds each
    time: what weight loaders ask every tensor for is answered by the plain tensor.
    """

    _origin: tuple[Ledger, tuple[str, ...]]
    """Who keeps the books, and the tensors of the checkpoint that it was made from."""
    _plain: torch.Tensor

    @classmethod
    def of(cls, tensor: torch.Tensor, origin: tuple[Ledger, tuple[str, ...]]) -> _Arriving:
        arriving = tensor.as_subclass(cls)
        arriving._origin, arriving._plain = origin, tensor
        return arriving

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        return self._plain.shape

    def dim(self) -> int:
        return self._plain.dim()

    def narrow(self, dim: int, start: int, length: int) -> _Arriving:  # type: ignore[override]
        if start == 0 and length == self._plain.shape[dim]:  # one rank takes all of it
            return self
        return _Arriving.of(self._plain.narrow(dim, start, length), self._origin)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        copy = func is torch.Tensor.copy_
        if copy and type(args[1]) is cls and type(args[0]) is not cls:
            into, value = args[:2]
            result = into.copy_(value._plain, *args[2:], **(kwargs or {}))
            value._origin[0].copied(value._origin[1], into)
            return result
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
            if func is torch.Tensor.__setitem__:
                into, key, value = args
                if type(value) is cls and type(into) is not cls:
                    value._origin[0].copied(value._origin[1], into[key])
                return result
            if copy or not isinstance(result, (torch.Tensor, tuple, list)) or isinstance(result, torch.Size):
                return result
            origins = [arg._origin for arg in _flat((*args, *(kwargs or {}).values())) if type(arg) is cls]
            if not origins:  # deeper in an argument than anyone looks
                return result
            names = tuple(dict.fromkeys(name for _, names in origins for name in names))
            return _wrapped(result, (origins[0][0], names))


def _flat(args: Iterable[Any]) -> Iterator[Any]:
    for arg in args:
        if isinstance(arg, tuple | list):
            yield from _flat(arg)
        else:
            yield arg


def _wrapped(result: Any, origin: tuple[Ledger, tuple[str, ...]]) -> Any:
    if isinstance(result, torch.Tensor):
        return _Arriving.of(result, origin)
    return type(result)(_wrapped(item, origin) for item in result) if type(result) in (tuple, list) else result


def load_strictly(
    model: Module,
    load_weights: Callable[..., Any],
    weights: Iterable[tuple[str, torch.Tensor]],
    declared: Mapping[str, Mapping[str, Any]],
) -> Any:
    """``model.load_weights(weights)``, and the check that all of it arrived.

    Raises:
        LoadError: names the tensors that were lost and the parameters that were not filled.
    """
    ledger = Ledger(declared, model.named_parameters())
    try:
        result = load_weights(ledger.follow(weights))
    except KeyError as error:
        raise LoadError(
            f"SGLang's {type(model).__name__} has no parameter {error}: the layer was not made in the format that the "
            "checkpoint declares"
        ) from error
    from sglang.srt.layers.vocab_parallel_embedding import VocabParallelEmbedding
    from sglang.srt.runtime_context import get_parallel

    belongs, ranks = here(model), get_parallel().tp_size
    # Vocabularies are padded: their parameters have rows that no tensor fills, and the last ranks take fewer.
    padded = {f"{path}.weight" for path, m in model.named_modules() if isinstance(m, VocabParallelEmbedding)}
    lost = [name for name in ledger.unused(ranks) if belongs(name) and not (name in padded and ranks > 1)]
    empty = may_be_empty(model)
    unfilled = [name for name in ledger.unfilled() if name not in padded and not empty(name)]
    problems = []
    if lost:
        missing = [name for name in lost if name not in ledger.arrived]
        what = "not in its files" if missing else "dropped by SGLang's model, or not loaded in full"
        problems.append(f"{_listed(missing or lost)}: {what}")
    if unfilled:
        problems.append(f"{_listed(unfilled)}: parameters that were not filled")
    if problems:
        raise LoadError(f"the checkpoint did not reach the model whole: {'; '.join(problems)}")
    return result


def _listed(names: list[str]) -> str:
    return f"{len(names)} tensors ({some(compress(names))})" if len(names) > 1 else names[0]


def may_be_empty(model: Module) -> Callable[[str], bool]:
    """Tells which parameters need no tensor: made after loading, or an input order (``g_idx``) of a layer that has its
    inputs in order, which files may leave out."""
    ordered = set()
    for path, module in model.named_modules():
        fmt = format_of(module)
        if fmt is not None and fmt.scattered:
            ordered.add(path)

    def empty(parameter: str) -> bool:
        path, _, leaf = parameter.rpartition(".")
        return _DERIVED.fullmatch(parameter) is not None or (leaf.endswith("g_idx") and path not in ordered)

    return empty


def here(model: Module) -> Callable[[str], bool]:
    """Tells which tensors of a checkpoint a model on this rank is meant to take."""
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
    from sglang.srt.runtime_context import get_parallel

    config: Any = getattr(model, "config", None)
    config = getattr(config, "text_config", config)
    layers = getattr(config, "num_hidden_layers", None)
    inner: Any = getattr(model, "model", model)
    first, end = getattr(inner, "start_layer", 0), getattr(inner, "end_layer", layers)
    moe = {name: module for name, module in model.named_modules() if isinstance(module, FusedMoE)}
    tied = getattr(config, "tie_word_embeddings", False)

    def belongs(name: str) -> bool:
        if name.endswith((".inv_freq", ".cos_cached", ".sin_cached")) or (tied and name == "lm_head.weight"):
            return False
        layer = _LAYER.search(name)
        if layer is None:
            return bool(get_parallel().pp_size == 1)  # the first and the last stage have what is in no layer
        # Layers past the last are for speculative decoding, those of other stages are loaded there.
        if end is not None and not (first <= int(layer[1]) < end):
            return False
        expert = _EXPERT.fullmatch(name)
        if expert and expert[1] in moe:
            return bool(moe[expert[1]]._map_global_expert_id_to_local_expert_id(int(expert[2])) >= 0)
        return True

    return belongs
