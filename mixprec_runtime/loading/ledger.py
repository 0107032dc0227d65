"""Follows tensors while a model loads them, and records which parameters each was copied into."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from threading import Lock
from typing import Any

import torch

from mixprec_build.checkpoint.manifest import TensorEntry

__all__ = ["CASTS", "DTYPES", "Convert", "Ledger", "LoadError", "casts", "default_dtype", "ends_alike"]


DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
CASTS = {torch.float64, torch.float32, torch.float16, torch.bfloat16}


def casts(stored: torch.dtype | None, parameter: torch.dtype) -> bool:
    """Whether a tensor may be copied into a parameter: in its dtype, or its values are floats that are not quantized.

    Scales that are powers of two (E8M0) are exact in float32, and numbers of experts, of which DeepSeek-V4 has a table,
    in int32.
    """
    exact = (stored, parameter) in ((torch.float8_e8m0fnu, torch.float32), (torch.int64, torch.int32))
    return stored == parameter or {stored, parameter} <= CASTS or exact


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Makes ``dtype`` torch's default while the context lasts."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


Convert = Callable[[str, torch.Tensor], torch.Tensor]


class LoadError(RuntimeError):
    """Raised for a checkpoint that was not loaded completely and correctly."""


class Ledger:
    """Records which tensors were read, and which elements of parameters they were copied to.

    Args:
        declared: tensor name -> its ``dtype`` (as safetensors writes it) and ``shape``, from the manifest.
        parameters: the model's parameters by name.
    """

    def __init__(self, declared: Mapping[str, TensorEntry], parameters: Iterable[tuple[str, torch.Tensor]]):
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
        """Tensor -> the number of its elements that were copied."""
        self._dtypes: dict[str, torch.dtype] = {}
        """Tensor -> its dtype, as it is passed on."""
        self._values: dict[str, object] = {}
        """Tensor of one element -> its value, where a loader read it by ``item()``."""

    def follow(
        self, weights: Iterable[tuple[str, torch.Tensor]], convert: Convert = lambda name, tensor: tensor
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields the tensors of a checkpoint as a subclass that reports copies to this ledger.

        ``convert`` returns a tensor with the same values in the dtype that SGLang's loaders take.

        Raises:
            LoadError: a tensor is not in the manifest, or has another dtype or shape there.
        """
        for name, stored in weights:
            self._check(name, stored)
            self.arrived.add(name)
            tensor = convert(name, stored)
            self._dtypes[name] = tensor.dtype
            yield name, _Arriving.of(tensor, (self, (name,)))

    def _check(self, name: str, tensor: torch.Tensor) -> None:
        declared = self._declared.get(name)
        if declared is None:
            raise LoadError(f"{name} is not in the checkpoint's manifest: a file was added or changed after building")
        dtype, shape = DTYPES[declared.dtype], declared.shape
        if tensor.dtype != dtype or tuple(tensor.shape) != shape:
            raise LoadError(
                f"{name} is {tensor.dtype} {list(tensor.shape)}, and was built as {dtype} {list(shape)}: the "
                "checkpoint was changed after building; `mixprec verify` says where"
            )

    def copied(self, names: Iterable[str], into: torch.Tensor) -> None:
        """Records that tensors ``names`` were copied to ``into``, a parameter or a view of one.

        Raises:
            LoadError: the copy casts quantized values.
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
        names = set(names)
        for name in names:
            dtype = self._dtypes[name]
            # What was made of a weight and its scales is dequantized, as SGLang does with DSA's indexer.wk, V4's wo_a.
            dequantized = into.dtype in CASTS and not names.isdisjoint(_dequantized_with(name))
            if not casts(dtype, into.dtype) and not dequantized:
                raise LoadError(
                    f"{name} is {dtype}, and {owners[0]}, which SGLang loads it into, is "
                    f"{into.dtype}: the layer is not in the format that the checkpoint declares"
                )

    def asked(self, names: Iterable[str], value: object) -> None:
        """Records that the value of a one-element tensor was read; SGLang then fills a parameter with it."""
        with self._lock:
            for name in names:
                self.used[name] += 1
                self._values[name] = value

    def _filled(self, name: str) -> bool:
        """Whether a one-element parameter has the value that was read from a tensor whose name ends as its own."""
        parameter = self._parameters[name]
        if parameter.numel() != 1:
            return False
        asked = [value for tensor, value in self._values.items() if ends_alike(tensor, name, self._parameters)]
        return any(parameter.item() == torch.tensor(value, dtype=parameter.dtype).item() for value in asked)

    def unused(self, ranks: int) -> list[str]:
        """Tensors of the manifest of which less was copied than the share of one of ``ranks``."""
        return [name for name, t in self._declared.items() if self.used[name] * ranks < prod(t.shape)]

    def unfilled(self, due: Mapping[str, int]) -> list[str]:
        """Parameters of which too few elements were written: fewer than ``due`` says, by default fewer than all."""
        return [
            name
            for storage, names in self._by_storage.items()
            for name in names
            if sum(self._written[storage].values()) < due.get(name, self._parameters[name].numel())
            and not self._filled(name)
        ]


def ends_alike(tensor: str, parameter: str, parameters: Iterable[str]) -> bool:
    """Whether a tensor's name ends as a parameter's does: by three words, or by one that ends no other's."""
    ours, theirs = tensor.split("."), parameter.split(".")
    if ours[-3:] == theirs[-3:]:
        return True
    last = f".{theirs[-1]}"
    return ours[-1] == theirs[-1] and sum(f".{name}".endswith(last) for name in parameters) == 1


def _dequantized_with(name: str) -> tuple[str, str, str]:
    """The tensors with one of which a weight is dequantized, or scales are."""
    module, _, leaf = name.rpartition(".")
    return f"{name}_scale_inv", f"{name}_scale", f"{module}.{'scale' if leaf == 'weight' else 'weight'}"


class _Arriving(torch.Tensor):
    """A tensor that was read from a checkpoint, or made from such tensors.

    A model has hundreds of thousands of them, and torch's dispatch to subclasses takes microseconds a call: the methods
    that weight loaders call for every tensor bypass it.
    """

    _origin: tuple[Ledger, tuple[str, ...]]
    """The ledger, and the names of the tensors that this one was made from."""
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
        if start == 0 and length == self._plain.shape[dim]:  # uncut
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
            if func is torch.Tensor.item:
                args[0]._origin[0].asked(args[0]._origin[1], result)
                return result
            if copy or not isinstance(result, (torch.Tensor, tuple, list)) or isinstance(result, torch.Size):
                return result
            origins = [arg._origin for arg in _flat((*args, *(kwargs or {}).values())) if type(arg) is cls]
            if not origins:  # nested too deep for _flat
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
