"""The interface of a storage format. All facts about a format are in its class.

numpy is imported where values are needed: ``mixprec inspect`` reads headers and starts without it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from .arrays import NUMPY, Arrays

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
"""Returns a tensor's first values, flat (all of them up to 64 KiB), or None if only its header is on this machine."""


class FormatError(Exception):
    """A module whose tensors contradict one another or the declared quantization. Callers add module and file."""


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis of a weight in a stored tensor: along dimension ``dim``, ``per`` of the weight's values an index."""

    dim: int
    per: int = 1


@dataclass(frozen=True, slots=True)
class Axes:
    """The axes of a weight's outputs (``n``) and inputs (``k``) in one of a module's tensors; None where it has none.

    They determine how a tensor is cut for tensor parallelism. Every rank has all of a tensor without the axis that is
    cut.
    """

    n: Axis | None = None
    k: Axis | None = None


@dataclass(frozen=True, slots=True)
class Kind:
    """Properties of one kind of a format. Compute capabilities are times ten: 90 for a Hopper GPU."""

    bits: int
    """Bits of a weight."""
    words: tuple[str, ...] | None = ()
    """Words for it in a recipe beside its name, such as ``int4``; None where a recipe cannot ask for it."""
    kernels: str = ""
    """SGLang's kernels for it; empty where there are none."""
    least: int = 0
    """The lowest compute capability of a GPU with these kernels."""
    most: int | None = None
    """The highest compute capability, if there is one."""
    experts_least: int = 0
    """The lowest compute capability that runs experts."""


class Format(ABC):
    """A way to store a module. Instances are frozen dataclasses; equal instances are the same format.

    ``N`` is a linear's number of outputs, ``K`` its number of inputs; a weight is ``[N, K]``.
    """

    name: ClassVar[str]
    """Its name in messages: ``FP8``, ``GPTQ``, ..."""
    kinds: ClassVar[Mapping[str, Kind]]
    """Its kinds by name; a name belongs to one format only."""
    leaves: ClassVar[frozenset[str]]
    """The last words of its tensors' names; ``""`` for a module that is one bare parameter."""
    rounded: ClassVar[bool] = False
    """Whether its writers round weights to the nearest value, instead of moving errors between weights."""
    experts_whole: ClassVar[bool] = False
    """Whether SGLang's kernel multiplies by all three projections of an expert, none of which can be in another
    format."""
    experts_run_on: ClassVar[str] = "Triton"
    """SGLang's kernels for experts; others than Triton have fewer activations."""
    gated_experts_only: ClassVar[bool] = False
    """Whether SGLang runs only experts that have a gate."""
    expert_activations_refused: ClassVar[frozenset[str]] = frozenset()
    """Activations of experts, by SGLang's names, that its method for the format refuses, whatever its kernels have."""
    portable: ClassVar[bool] = False
    """Whether :meth:`dequantize` computes with any :class:`~.arrays.Arrays`, as on a GPU; else it takes numpy's
    alone."""
    methods: ClassVar[Mapping[str, Set[str] | None]] = {}
    """``quant_method`` of configurations that may declare it -> keys that are understood; None for those of any
    method."""
    name_keys: ClassVar[tuple[Callable[[str, Quantization], Hashable], ...]] = ()
    """Functions of a module's name and a ``quantization_config`` with settings by name. Modules that are stored alike
    and have equal results are in one format."""

    @property
    @abstractmethod
    def kind(self) -> str:
        """Its kind: ``bf16``, ``fp8_block``, ``gptq_int4``, ..."""

    @property
    def values_leaf(self) -> str:
        """The leaf of the tensor with a weight's values."""
        return "weight"

    @property
    def quantized(self) -> bool:
        return True

    @property
    def fuses_as(self) -> object:
        """A value that must be equal for modules to run as one GEMM."""
        return self

    @property
    def folds_activation_scales(self) -> bool:
        """Whether quantizers that write it fold scales of activations into the modules before."""
        return False

    @classmethod
    @abstractmethod
    def recognise(cls, module: StoredModule, quantization: Quantization) -> Format | None:
        """The format of a module in a source with this ``quantization_config``; None if it is another format's.

        Raises:
            FormatError: it is this format, but its tensors or the configuration contradict it.
        """

    @classmethod
    @abstractmethod
    def from_json(cls, data: Mapping[str, Any]) -> Format:
        """Inverse of :meth:`to_json`. Raises ``KeyError``, ``TypeError`` or ``ValueError`` if ``data`` is malformed."""

    @abstractmethod
    def to_json(self) -> dict[str, object]:
        """``kind`` and parameters: all that the runtime needs."""

    @abstractmethod
    def check(self, module: StoredModule) -> None:
        """Checks dtypes and shapes of a module's tensors against one another. Raises :class:`FormatError`."""

    @abstractmethod
    def shape(self, module: StoredModule) -> tuple[int, ...]:
        """The shape of the module's weight: ``(N, K)`` for a linear."""

    @abstractmethod
    def axes(self, leaf: str) -> Axes:
        """The weight's axes in the tensor ``leaf``."""

    def tile(self, *, experts: bool) -> tuple[int, int]:
        """Numbers that outputs and inputs of a rank's linear, or expert, must be multiples of.

        Then the format can be cut there, and its kernel runs.
        """
        return 1, 1

    def filler(self, leaf: str) -> int:
        """The element of the tensor ``leaf`` with which the weight is zero."""
        return 0

    def dtype_of(self, leaf: str, stored: str) -> str:
        """The dtype of the elements of the tensor ``leaf``, which files may state as that of plain bytes."""
        return stored

    @property
    def act_order(self) -> bool:
        """Whether a group's inputs may be anywhere (act-order), so that experts cannot be cut along them."""
        return False

    def sglang_name(self, leaf: str) -> str:
        """SGLang's name of the tensor ``leaf``."""
        return leaf

    def transposed_in_experts(self, leaf: str) -> bool:
        """Whether SGLang's experts have the tensor ``leaf`` with its two axes exchanged."""
        return False

    @property
    def rows_in_fused(self) -> int:
        """The number that the outputs of each part of a fused linear must be a multiple of.

        A block of scales may not have rows of two parts.
        """
        return 1

    def linear_limits(self, parts: Sequence[StoredModule]) -> list[str]:
        """Reasons why SGLang cannot run a linear fused of ``parts`` (one, if not fused) on one GPU; empty if it can."""
        return []

    def half_only(self, parts: Sequence[StoredModule]) -> str | None:
        """The reason why SGLang runs a linear fused of ``parts`` only with FP16 activations; None where it runs any."""
        return None

    def fits_untiled(self, outputs: Sequence[int], inputs: int) -> bool:
        """Whether SGLang has a kernel without the rules of :meth:`tile` for a linear of parts of these ``outputs``."""
        return False

    def expert_limits(self, parts: Sequence[StoredModule], hidden: int, intermediate: int) -> list[str]:
        """Reasons why SGLang cannot run ``parts`` of an expert on one GPU: gate and up, down, or all three."""
        return []

    def value_limits(self, parts: Sequence[StoredModule], read: Reader, *, experts: bool) -> list[str]:
        """Reasons that only values of small tensors show; of an expert, ``parts`` are gate and up, or down."""
        return []

    def as_stored(self, module: StoredModule, read: Reader) -> Format:
        """The format that values of small tensors show, where a configuration may be wrong; by default this one."""
        return self

    @property
    def has_weight(self) -> bool:
        """Whether SGLang's linears have a parameter ``weight`` for it, which its DeepSeek models look for."""
        return True

    @property
    def row_join_limit(self) -> str | None:
        """The defect where SGLang joins the tensors of two modules along their first axis; None if there is none.

        It joins DeepSeek's q_a_proj and kv_a_proj so.
        """
        return None

    @property
    def fp8_blocks(self) -> tuple[str, int, int] | None:
        """Of FP8 with scales of blocks, the name of the scales, and a block's outputs and inputs; None for others."""
        return None

    @property
    def states_block(self) -> bool:
        """Whether the config of SGLang's method for it has an attribute ``weight_block_size``, even if it is None."""
        return False

    def shared_experts_limit(self, down: Format) -> str | None:
        """The reason why SGLang cannot run shared experts with gate and up in this format and down in another."""
        return None

    @abstractmethod
    def dequantize(self, tensors: Mapping[str, npt.NDArray[Any]], on: Arrays = NUMPY) -> npt.NDArray[np.float32]:
        """The weight in float32 from a module's tensors by leaf: a new array, or a tensor itself if that is the weight.

        Tensors may be those of some outputs: cut along :meth:`axes`, where no word of packed values and no block of
        scales is of others too; or of outputs within one block, with its scales. Those that have the outputs' axis are
        arrays of ``on``, as is the weight; all others are numpy's in any case.
        """


def shape_text(leaf: str, module: StoredModule) -> str:
    """``"scales F16 [16, 768]"``, for messages."""
    tensor = module.tensors[leaf]
    return f"{leaf or 'the tensor'} {tensor.dtype} {list(tensor.shape)}"


def last_word(module: StoredModule) -> str:
    """The last word of a module's name: ``"down_proj"``."""
    return module.name.rpartition(".")[2]


def check_tensor(module: StoredModule, leaf: str, dtypes: Sequence[str], shape: tuple[int, ...], why: str) -> None:
    """Raises :class:`FormatError` unless a tensor has one of ``dtypes`` and ``shape``; ``why`` explains the shape."""
    tensor = module.tensors[leaf]
    if tensor.dtype not in dtypes:
        raise FormatError(f"{shape_text(leaf, module)}: {' or '.join(dtypes)} was expected")
    if tensor.shape != shape:
        raise FormatError(f"{shape_text(leaf, module)}: {list(shape)} was expected {why}")


def only_leaves(module: StoredModule, known: Set[str], kind: str) -> None:
    """Raises :class:`FormatError` where a module has a tensor that its format does not know, which would be lost."""
    for leaf in module.tensors.keys() - known:
        raise FormatError(f"{shape_text(leaf, module)} does not belong to {kind}")
