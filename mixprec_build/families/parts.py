"""Parts of the description of a model family."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, NamedTuple, Protocol

from .names import last_word

__all__ = [
    "CUTS",
    "ComparedFormats",
    "CutBy",
    "ExpertActivation",
    "FusedGroup",
    "MovedRows",
    "OtherHeads",
    "Projections",
    "Restriction",
    "Role",
    "StackedExperts",
    "StoredFormat",
    "group_finder",
    "never_quantized",
]


class Role(Enum):
    """The role of a module for a serving engine."""

    LINEAR = "linear"
    EXPERT = "expert"
    EMBEDDING = "embedding"
    HEAD = "lm_head"
    ROUTER = "router"
    NORM = "norm"
    PARAMETER = "parameter"

    def __init__(self, word: str):
        self.never_quantized = word in ("router", "norm", "parameter")
        """Globs that map complete layers to a quantized source do not apply to these."""


class CutBy(Enum):
    """Ways to share a linear, an embedding or a head among ranks. Projections of MLPs are always shared by columns."""

    QUERY_HEADS = "its outputs, by attention heads"
    KEY_VALUE_HEADS = "its outputs, by key-value heads; where these are fewer than ranks, several hold the same"
    HEAD_INPUTS = "its inputs, by attention heads"
    OUTPUT_GROUPS = "its outputs, by groups in which the output of attention is projected"
    GROUP_INPUTS = "its inputs, by these groups"
    INDEX_HEADS = "its outputs, by heads of a sparse index; where these are fewer than ranks, several hold the same"
    QKV_SECTIONS = "its outputs: queries, keys and values, each by heads"
    GATE_AND_UP = "its outputs: gate and up, each by columns of the MLP"
    VOCABULARY = "its rows, by entries of the vocabulary"
    STATE_SECTIONS = "its outputs: queries, keys and values of a delta net, each by heads"
    MAMBA_SECTIONS = "its outputs: inputs of a Mamba block by heads, and its B and C, each by groups"
    MAMBA_PROJECTIONS = "its outputs: the gate, inputs, B, C and steps of a Mamba block, each by heads or groups"
    STATE_KEY_HEADS = "its outputs, by key heads of a delta net"
    STATE_VALUE_HEADS = "its outputs, by value heads of a delta net"
    STATE_INPUTS = "its inputs, by value heads of a delta net"


CUTS = {
    "q_proj": CutBy.QUERY_HEADS, "k_proj": CutBy.KEY_VALUE_HEADS, "v_proj": CutBy.KEY_VALUE_HEADS,
    "o_proj": CutBy.HEAD_INPUTS, "embed_tokens": CutBy.VOCABULARY, "lm_head": CutBy.VOCABULARY,
}  # fmt: skip
"""The cuts of Llama."""


class FusedGroup(NamedTuple):
    """Linears of one parent that SGLang joins into one layer, and so runs as one GEMM."""

    name: str
    """The last word of SGLang's layer: ``qkv_proj``."""
    members: tuple[str, ...]
    """Last words of the checkpoint's linears, in the order of their outputs."""
    ragged_end: bool = False
    """Whether the last one may end inside of a block of scales, since SGLang never cuts the layer."""
    within: str = ""
    """The last word of their parent, where linears of the same names elsewhere are in no group or in another."""


def group_finder(groups: Iterable[FusedGroup]) -> Callable[[str], FusedGroup | None]:
    """Returns a function of a linear's name, which returns the group that it is in, or None.

    Of several groups with one linear, of which SGLang makes one or another, the last counts: the one with most.
    """
    anywhere = {member: group for group in groups if not group.within for member in group.members}
    within = {f"{group.within}.{member}": group for group in groups if group.within for member in group.members}

    def find(name: str) -> FusedGroup | None:
        last = last_word(name)
        if within and (found := within.get(f"{last_word(name[: -len(last) - 1])}.{last}")) is not None:
            return found
        return anywhere.get(last)

    return find


class Projections(NamedTuple):
    """Last words of the linears of an MLP or expert. ``gate`` is None where activations have no gate."""

    gate: str | None
    up: str
    down: str

    @property
    def ups(self) -> tuple[str, ...]:
        """The linears that SGLang joins into ``w13``: gate and up, or up alone."""
        return (self.up,) if self.gate is None else (self.gate, self.up)

    @property
    def words(self) -> tuple[str, ...]:
        return (*self.ups, self.down)


class OtherHeads(NamedTuple):
    """Layers whose attention has other numbers of heads than the rest, and the keys of ``config.json`` for these.

    A key with a dot is one within an object: ``attention_other_setting.num_attention_heads``.
    """

    kinds: str
    """The list with the kind of each layer: ``layer_types``."""
    kind: object
    """The kind of these layers: ``"sliding_attention"``."""
    query: str
    """The number of attention heads."""
    key_value: str
    """The number of key-value heads; where ``config.json`` has none, that of the rest counts."""


@dataclass(frozen=True, slots=True)
class StackedExperts:
    """A tensor of a projection of all experts of a layer, as some releases store them.

    ``StackedExperts("gate_up_proj", ("gate_proj", "up_proj"))`` is ``...experts.gate_up_proj`` ``[E, 2I, H]``.
    """

    name: str
    """The end of the tensor's name, after ``...experts.`` or, with ``beside``, in its place. Words before its last
    two are those before ``experts``: ``moe.gate_proj.weight`` is of ``moe.experts``."""
    parts: tuple[str, ...]
    """Last words of the linears in each expert's slice, in the order of their outputs."""
    transposed: bool = False
    """Whether a slice is ``[K, N]``, inputs first, so that an expert's bytes are not those of a linear's weight."""
    beside: bool = False
    """Whether the tensor is beside ``experts``: ``...block_sparse_moe.input_linear.weight``."""
    interleaved: bool = False
    """Whether outputs of the parts alternate, instead of following one another."""
    leaf: str = "weight"
    """The linears' tensor that it is of all experts."""
    dtypes: tuple[str, ...] = ("BF16", "F16", "F32")
    together_with: tuple[str, ...] = ()
    """Names of other tensors, as ``name``, without any of which it is not taken apart."""

    def block_of(self, tensor: str, experts: str) -> str | None:
        """The name of the experts of which this is all, ``...mlp.experts``; None for other tensors.

        ``experts`` is the word before their numbers.
        """
        before, found, rest = tensor.rpartition(f".{self.name}")
        if not found or rest:
            return None
        if self.beside:
            above = ".".join(self.name.split(".")[:-2])
            return f"{before}.{above}.{experts}" if above else f"{before}.{experts}"
        return before if before.endswith(f".{experts}") else None


_ON_MARLIN = ("silu", "swiglu_oai", "situ")


@dataclass(frozen=True, slots=True)
class ExpertActivation:
    """What experts compute between up and down: by default SiLU of the gate, times up."""

    name: str = "silu"
    """SGLang's name of it; ``swiglu_oai`` for gpt-oss's and MiniMax-M3's, which have an alpha and a limit."""
    gated: bool = True
    """Whether experts have a gate."""
    weighted_inputs: bool = False
    """Whether SGLang multiplies inputs of experts by the router's weights, instead of their outputs."""
    limit: str = ""
    """The key of ``config.json`` with one limit for outputs of gate and up in all layers, which SGLang's runners on
    Triton and Marlin heed."""
    limits: str = ""
    """The key of ``config.json`` with the limit of each layer's activation, 0 where it has none."""
    limited_layers: frozenset[int] = frozenset()
    """The layers of a model whose activation has a limit."""
    limited: bool = False
    """Whether it has a limit, in the layer that it is of."""

    def in_layer(self, layer: int | None) -> ExpertActivation:
        """What the experts of one layer compute."""
        return replace(self, limited=layer in self.limited_layers) if self.limited_layers else self

    def limit_on(self, kernels: str) -> str | None:
        """The reason why SGLang cannot run such experts on ``kernels``, Triton or others; None if it can."""
        if kernels == "Triton":
            return None
        if self.limit and kernels != "Marlin":
            return f"{kernels} ignores the limit of activations ({self.limit} of config.json)"
        if self.limited:
            return f"{kernels} ignores the limit that {self.limits} of config.json sets for this layer's activation"
        if self.weighted_inputs:
            return f"SGLang multiplies inputs of these experts by the router's weights, which {kernels} does not do"
        if self.gated and self.name not in (_ON_MARLIN if kernels == "Marlin" else ("silu",)):
            return f"SGLang has no {kernels} kernel for experts with this activation ({self.name})"
        return None

    @property
    def split_limit(self) -> str | None:
        """The reason why all projections of an expert must have one format; None if down may have another."""
        if not self.gated:
            return "experts without a gate are computed format by format"
        if self.name != "silu" or self.weighted_inputs or self.limited:
            return "experts that are not activated by SiLU alone are computed format by format"
        return None


class StoredFormat(Protocol):
    """Properties of a storage format that rules need; see :class:`mixprec_build.formats.base.Format`."""

    @property
    def kind(self) -> str: ...
    @property
    def quantized(self) -> bool: ...
    @property
    def rows_in_fused(self) -> int: ...
    @property
    def has_weight(self) -> bool: ...
    @property
    def row_join_limit(self) -> str | None: ...
    @property
    def fp8_blocks(self) -> tuple[str, int, int] | None: ...
    def shared_experts_limit(self, down: Any) -> str | None: ...


@dataclass(frozen=True, slots=True)
class Restriction:
    """Quantized formats that SGLang's model code has no place for in some modules."""

    modules: tuple[str, ...]
    """Ends of their names: ``kv_b_proj``, or more words, as ``indexer.wk``."""
    limit: Callable[[StoredFormat], str | None]
    """The reason why a quantized format has no place there, without a full stop; None if it has."""

    def reason(self, name: str, fmt: StoredFormat) -> str | None:
        """The reason why the module ``name`` cannot be in ``fmt``; None if it can."""
        there = any(name == module or name.endswith(f".{module}") for module in self.modules)
        return self.limit(fmt) if there and fmt.quantized else None


def never_quantized(*modules: str) -> Restriction:
    """The restriction of modules to unquantized formats."""
    return Restriction(modules, lambda _: "SGLang's class for this model makes it without a quantization config")


@dataclass(frozen=True, slots=True)
class ComparedFormats:
    """Two GEMMs of one MLP whose formats SGLang's model code compares."""

    ups: str
    """The end of the fused name of gate and up: ``.shared_experts.gate_up_proj``."""
    down: str
    """The end of the name of down, in place of ``ups``."""
    limit: Callable[[StoredFormat, StoredFormat], str | None]
    """The reason why the formats of gate and up, and of down, do not fit; None if they do."""


@dataclass(frozen=True, slots=True)
class MovedRows:
    """Rows of ``weight`` that a class of SGLang's permutes while loading, in the modules that ``modules`` matches.

    It does not permute scales, packed words or zero points: the model loads without an error, and computes nonsense.
    ``within_heads``: no row leaves its attention head, so that scales of complete heads still fit.
    """

    architecture: str
    modules: re.Pattern[str]
    within_heads: bool = False
