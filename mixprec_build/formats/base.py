"""The interface of a storage format: all that is said of one is said by its class.

numpy is imported where values are looked at: `mixprec inspect` reads headers and starts without it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from ..storage.header import TensorInfo
    from ..storage.module import StoredModule
    from .quantization import Quantization

__all__ = [
    "Axes",
    "Axis",
    "Format",
    "FormatError",
    "Kind",
    "Reader",
    "check_tensor",
    "last_word",
    "only_leaves",
    "shape_text",
]


Reader = Callable[["TensorInfo"], "npt.NDArray[Any] | None"]
"""Gives a tensor's first values, flat (all of them up to 64 KiB), or None where only its header is at hand."""


class FormatError(Exception):
    """A module whose tensors contradict one another or the declared quantization. Callers add where it is."""


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis of a weight in a stored tensor: along dimension ``dim``, ``per`` of the weight's values an index."""

    dim: int
    per: int = 1


@dataclass(frozen=True, slots=True)
class Axes:
    """Where a weight's outputs and inputs lie in one of a module's tensors; None where it has no such axis.

    A cut for tensor parallelism follows from it. A tensor without the axis that is cut is held whole by every rank.
    """

    n: Axis | None = None
    k: Axis | None = None


@dataclass(frozen=True, slots=True)
class Kind:
    """What is known of one kind of a format. Compute capabilities are 90 for a Hopper GPU."""

    bits: int
    """Of a weight."""
    words: tuple[str, ...] | None = ()
    """What a recipe may call it beside its name, as ``int4``; None where a recipe cannot ask for it at all."""
    kernels: str = ""
    """What SGLang runs it with; empty where it has nothing that would."""
    least: int = 0
    """The lowest compute capability of a GPU with these kernels."""
    most: int | None = None
    """The highest one, where there is one."""
    experts_least: int = 0
    """The lowest one that runs experts."""


class Format(ABC):
    """How a module is stored. Instances are frozen dataclasses; equal instances are the same format.

    ``N`` is a linear's number of outputs, ``K`` its number of inputs; a weight is ``[N, K]``.
    """

    name: ClassVar[str]
    """For messages: ``FP8``, ``GPTQ``, ..."""
    kinds: ClassVar[Mapping[str, Kind]]
    """Each of its kinds by its word, which no other format has."""
    leaves: ClassVar[frozenset[str]]
    """The last words of its tensors' names; ``""`` for a module that is one bare parameter."""
    values_leaf: ClassVar[str] = "weight"
    """The tensor of a weight's values."""
    rounded: ClassVar[bool] = False
    """Whether its writers round weights to the nearest value, where others move errors from weight to weight."""
    methods: ClassVar[Mapping[str, Set[str] | None]] = {}
    """``quant_method`` of configurations that may declare it -> the keys that are understood there; None where those of
    any method are."""
    name_keys: ClassVar[tuple[Callable[[str, Quantization], Hashable], ...]] = ()
    """Functions that say what a ``quantization_config`` tells of a module by its name, where it tells this format's
    modules apart by their names: modules stored alike of which it tells the same are of one format."""

    @property
    @abstractmethod
    def kind(self) -> str:
        """The word for it: ``bf16``, ``fp8_block``, ``gptq_int4``, ..."""

    @property
    def quantized(self) -> bool:
        return True

    @property
    def fuses_as(self) -> object:
        """Modules run as one GEMM only where this is equal."""
        return self

    @property
    def folds_activation_scales(self) -> bool:
        """Whether quantizers that write it fold scales of activations into the modules before."""
        return False

    @classmethod
    @abstractmethod
    def recognise(cls, module: StoredModule, quantization: Quantization) -> Format | None:
        """The format of a module in a source whose ``quantization_config`` is given; None if another's.

        Raises:
            FormatError: it is this format, but its tensors or the configuration contradict it.
        """

    @classmethod
    @abstractmethod
    def from_json(cls, data: Mapping[str, Any]) -> Format:
        """Inverse of :meth:`to_json`. Raises ``KeyError``, ``TypeError`` or ``ValueError`` on nonsense."""

    @abstractmethod
    def to_json(self) -> dict[str, object]:
        """``kind`` and parameters, all that a runtime needs."""

    @abstractmethod
    def check(self, module: StoredModule) -> None:
        """Checks dtypes and shapes of a module's tensors against one another. Raises :class:`FormatError`."""

    @abstractmethod
    def shape(self, module: StoredModule) -> tuple[int, ...]:
        """The shape of the weight the module stands for: ``(N, K)`` for a linear."""

    @abstractmethod
    def axes(self, leaf: str) -> Axes:
        """How the tensor ``leaf`` lies along the weight's axes."""

    def tile(self, *, experts: bool) -> tuple[int, int]:
        """What a rank's outputs and inputs must be multiples of, for the format to be cut there and its kernel to
        run: of a linear, or of an expert's projections."""
        return 1, 1

    def filler(self, leaf: str) -> int:
        """An element of the tensor ``leaf`` where the weight is to be zero."""
        return 0

    @property
    def act_order(self) -> bool:
        """Whether the inputs of a group lie anywhere (act-order), so that experts cannot be cut along them."""
        return False

    def sglang_name(self, leaf: str) -> str:
        """What SGLang calls the tensor ``leaf``."""
        return leaf

    def transposed_in_experts(self, leaf: str) -> bool:
        """Whether SGLang's experts hold the tensor ``leaf`` with its two axes exchanged."""
        return False

    @property
    def rows_in_fused(self) -> int:
        """What the outputs of each part of a fused linear must be a multiple of: blocks of scales may not hold rows of
        two parts."""
        return 1

    def linear_limits(self, parts: Sequence[StoredModule]) -> list[str]:
        """Why SGLang cannot run a linear fused of ``parts`` (one, when not fused), on one GPU."""
        return []

    def half_only(self, parts: Sequence[StoredModule]) -> str | None:
        """Why SGLang runs a linear fused of ``parts`` with FP16 activations only, and by which kernel; None where any
        do."""
        return None

    def fits_untiled(self, outputs: Sequence[int], inputs: int) -> bool:
        """Whether SGLang has a kernel that needs no multiples of :meth:`tile`, for a linear of ``inputs`` and of parts
        with so many ``outputs``."""
        return False

    def expert_limits(self, parts: Sequence[StoredModule], hidden: int, intermediate: int) -> list[str]:
        """Why SGLang cannot run those ``parts`` of an expert that are in this format, on one GPU: gate and up, down, or
        all three."""
        return []

    def value_limits(self, parts: Sequence[StoredModule], read: Reader, *, experts: bool) -> list[str]:
        """As the two above, for what only the values of small tensors tell; of an expert, ``parts`` are gate and up, or
        down."""
        return []

    def as_stored(self, module: StoredModule, read: Reader) -> Format:
        """This format, or what the values of small tensors show it to be where a configuration says otherwise and no
        header tells."""
        return self

    @property
    def has_weight(self) -> bool:
        """Whether SGLang's linears of it have a parameter ``weight``, which its models of DeepSeek look for."""
        return True

    @property
    def row_join_limit(self) -> str | None:
        """What goes wrong where SGLang joins the tensors of two modules along their first axis, as it does with
        DeepSeek's q_a_proj and kv_a_proj; None where nothing does."""
        return None

    @property
    def states_block(self) -> bool:
        """Whether the config of SGLang's method for it states the size of a block (``weight_block_size``), or None."""
        return False

    def shared_experts_limit(self, down: Format) -> str | None:
        """Why SGLang could not run DeepSeek's shared experts with gate and up in this format and down in another."""
        return None

    @abstractmethod
    def dequantize(self, tensors: Mapping[str, npt.NDArray[Any]]) -> npt.NDArray[np.float32]:
        """The weight in float32 from a module's tensors by leaf. Reference code: readable, not fast."""


def shape_text(leaf: str, module: StoredModule) -> str:
    """``"scales F16 [16, 768]"``, for messages."""
    tensor = module.tensors[leaf]
    return f"{leaf or 'the tensor'} {tensor.dtype} {list(tensor.shape)}"


def last_word(module: StoredModule) -> str:
    """``"down_proj"``."""
    return module.name.rpartition(".")[2]


def check_tensor(module: StoredModule, leaf: str, dtypes: Sequence[str], shape: tuple[int, ...], why: str) -> None:
    """One tensor of a module must have one of ``dtypes`` and exactly ``shape``; ``why`` says where that is from."""
    tensor = module.tensors[leaf]
    if tensor.dtype not in dtypes:
        raise FormatError(f"{shape_text(leaf, module)}: {' or '.join(dtypes)} was expected")
    if tensor.shape != shape:
        raise FormatError(f"{shape_text(leaf, module)}: {list(shape)} was expected {why}")


def only_leaves(module: StoredModule, known: Set[str], kind: str) -> None:
    """Raises where a module has a tensor that its format does not know: it would be lost."""
    for leaf in module.tensors.keys() - known:
        raise FormatError(f"{shape_text(leaf, module)} does not belong to {kind}")
