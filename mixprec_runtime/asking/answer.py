"""Makes a model of SGLang's on the meta device, and has it load tensors with names and shapes but no values.

This reads no weights and takes no memory. The class's own ``__init__`` shows which layers can be quantized, and its own
``load_weights`` which parameters each tensor is copied into.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from sglang.srt.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
from torch.overrides import TorchFunctionMode

from mixprec_build.families.facts import ModelFacts

from ..loading import output_groups
from ..loading.ledger import DTYPES, default_dtype, ends_alike
from ..loading.names import keep_names

__all__ = ["Answer", "ask"]

_MOVING = frozenset({"transpose", "permute", "t", "flip", "roll", "index_select", "gather", "movedim"})
"""Operations that move values within a tensor."""


@dataclass(frozen=True, slots=True)
class Answer:
    """How a class of SGLang's loads the unquantized tensors of a checkpoint."""

    model: str
    """The name of the class."""
    parameters: frozenset[str]
    offered: frozenset[str]
    """Layers that get their method from the quantization config."""
    reached: Mapping[str, frozenset[str]]
    """Tensor of the checkpoint -> the parameters that it is copied into; without tensors that are not copied."""
    partial: frozenset[str]
    """Tensors of which only a part is copied."""
    moved: frozenset[str]
    """Tensors whose values are moved while they are loaded."""
    stopped: str | None
    """The exception that ended loading, as a line; None if there was none."""


class _Recorder(QuantizationConfig):
    """A quantization config of unquantized layers, which records the layers that ask it for a method."""

    def __init__(self) -> None:
        super().__init__()
        self.packed_modules_mapping: dict[str, list[str]] = {}
        self.layers: set[int] = set()
        self._kept: list[torch.nn.Module] = []
        """Keeps layers alive, since ``id()`` of a deleted one may be used again."""

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        from sglang.srt.layers.linear import LinearBase

        self.layers.add(id(layer))
        self._kept.append(layer)
        return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None

    def get_name(self) -> str:
        return "asking"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.half, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> _Recorder:
        return cls()

    def get_scaled_act_names(self) -> list[str]:
        return []


class _Copies:
    """Records the storage that each tensor was copied into."""

    def __init__(self) -> None:
        self.into: dict[str, set[int]] = {}
        self.elements: Counter[str] = Counter()
        self.moved: set[str] = set()
        self.asked: set[str] = set()
        """One-element tensors whose value was read; SGLang then fills a parameter with it."""

    def note(self, tensor: _Named, into: torch.Tensor) -> None:
        storage = into.untyped_storage()._cdata
        for name in tensor._names:
            self.into.setdefault(name, set()).add(storage)
            self.elements[name] += into.numel()
        if tensor._moved:
            self.moved.update(tensor._names)


class _Named(torch.Tensor):
    """A tensor without values, with the names of the checkpoint's tensors that it was made from."""

    _copies: _Copies
    _names: tuple[str, ...]
    _moved: bool

    @classmethod
    def of(cls, tensor: torch.Tensor, copies: _Copies, names: tuple[str, ...], moved: bool) -> _Named:
        named = tensor.as_subclass(cls)
        named._copies, named._names, named._moved = copies, names, moved
        return named

    def _copy_to(self, into: torch.Tensor) -> torch.Tensor:
        """Records a copy instead of making it, since ``into`` may have memory. Raises for shapes that do not fit."""
        torch.broadcast_to(self, into.shape)
        self._copies.note(self, into)
        return into

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func is torch.Tensor.copy_ and type(args[0]) is not cls and type(args[1]) is cls:
                return args[1]._copy_to(args[0])
            if func is torch.Tensor.__setitem__ and type(args[0]) is not cls and type(args[2]) is cls:
                args[2]._copy_to(args[0][args[1]])
                return None
            if func is torch.Tensor.item:
                args[0]._copies.asked.update(args[0]._names)
                return 1.0
            result = func(*args, **(kwargs or {}))
            if not isinstance(result, torch.Tensor | tuple | list) or isinstance(result, torch.Size):
                return result
            sources = list(_named((*args, *(kwargs or {}).values())))
            if not sources:
                return result
            names = tuple(dict.fromkeys(name for source in sources for name in source._names))
            moved = func.__name__ in _MOVING or any(source._moved for source in sources)
            return _wrapped(result, sources[0]._copies, names, moved)


def _named(values: Iterable[Any]) -> Iterator[_Named]:
    for value in values:
        if isinstance(value, tuple | list):
            yield from _named(value)
        elif type(value) is _Named:
            yield value


def _wrapped(result: Any, copies: _Copies, names: tuple[str, ...], moved: bool) -> Any:
    if isinstance(result, torch.Tensor):
        return _Named.of(result, copies, names, moved)
    if type(result) in (tuple, list):
        return type(result)(_wrapped(value, copies, names, moved) for value in result)
    return result


def _storages(model: torch.nn.Module) -> dict[str, torch.UntypedStorage]:
    """The memory of each parameter, of tied ones under each of their names."""
    return {name: parameter.untyped_storage() for name, parameter in model.named_parameters(remove_duplicate=False)}


def ask(model_config: Any, tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> Answer:
    """Has SGLang's class for ``model_config`` load ``tensors``: name, dtype (as in safetensors) and shape of each.

    Needs process groups and server arguments, as in a worker of SGLang's; see :func:`.machine.prepare`.
    """
    from sglang.srt.model_loader.utils import get_model_architecture

    model_class, _ = get_model_architecture(model_config)
    output_groups.dequantize(ModelFacts.of_loaded(model_config.hf_config).family)
    recorder, copies = _Recorder(), _Copies()
    with default_dtype(model_config.dtype), torch.device("meta"), _ReadAsZeros():
        model = model_class(config=model_config.hf_config, quant_config=recorder)
    keep_names(model)
    # Some classes join parameters once they are filled, which leaves them with other memory: Kimi-K3, MiniMax-M3.
    made = _storages(model)
    parameters = frozenset(name for name, _ in model.named_parameters())
    sizes: dict[str, int] = {}

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        for name, dtype, shape in tensors:
            sizes[name] = prod(shape)
            yield name, _Named.of(torch.empty(shape, dtype=DTYPES[dtype], device="meta"), copies, (name,), False)

    stopped = None
    try:
        model.load_weights(weights())
    except Exception as error:  # any type: steps after loading may need values
        stopped = f"{type(error).__name__}: {error}".splitlines()[0][:300]
    owners: dict[int, list[str]] = {}
    for name, storage in (*made.items(), *_storages(model).items()):
        owners.setdefault(storage._cdata, []).append(name)
    reached = {
        name: frozenset(parameter for storage in into for parameter in owners.get(storage, ()))
        for name, into in copies.into.items()
    }
    # A value that was read fills the parameter whose name has the same last words.
    known = [parameter for owned in owners.values() for parameter in owned]
    for name in copies.asked - reached.keys():
        reached[name] = frozenset(parameter for parameter in known if ends_alike(name, parameter, parameters))
    offered = frozenset(path for path, module in model.named_modules() if id(module) in recorder.layers)
    partial = frozenset(name for name, copied in copies.elements.items() if copied < sizes[name])
    return Answer(model_class.__name__, parameters, offered, reached, partial, frozenset(copies.moved), stopped)


class _ReadAsZeros(TorchFunctionMode):
    """Has tensors without values be read as zeros, for classes that read a parameter while they are made: Apertus'
    activation (layers/activation.py, XIELU)."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in (torch.Tensor.cpu, torch.Tensor.item) and args[0].is_meta:
            zeros = torch.zeros(args[0].shape, dtype=args[0].dtype, device="cpu")
            return zeros if func is torch.Tensor.cpu else zeros.item()
        return func(*args, **(kwargs or {}))
