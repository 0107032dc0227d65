"""What a model family is: which projections SGLang fuses, what it never quantizes, what its config says.

Names are those of Hugging Face checkpoints. The rules by the last word of a module's name hold for every
decoder of this kind; :data:`FAMILIES` lists those checked against SGLang's model code.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

__all__ = [
    "ATTENTION_REPLICAS",
    "FAMILIES",
    "FUSED",
    "GroupMembers",
    "Model",
    "Role",
    "expert_groups",
    "expert_parts",
    "fused_groups",
    "gemms",
    "gemms_of",
    "is_down",
    "is_expert",
    "joined_groups",
    "layer_prefix",
    "norms_before",
    "place_of",
    "role_by_name",
    "role_of",
    "scaled_before",
]


FAMILIES = frozenset(
    {
        "llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe",
        "deepseek_v2", "deepseek_v3",
    }
)  # fmt: skip
"""``model_type`` of the families whose fused groups and names were compared with SGLang's."""

ATTENTION_REPLICAS = frozenset({"qwen2_moe", "qwen3", "qwen3_moe", "deepseek_v2", "deepseek_v3"})
"""Of these, those whose attention SGLang can keep in replicas (``--enable-dp-attention``)."""

FUSED = {
    "q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj", "up_proj": "gate_up_proj",
    "q_a_proj": "fused_qkv_a_proj_with_mqa", "kv_a_proj_with_mqa": "fused_qkv_a_proj_with_mqa",
}  # fmt: skip
"""Modules that SGLang joins into one layer -> its name."""

_EXPERT = re.compile(r"(.+\.experts\.\d+)\.(gate_proj|up_proj|down_proj|w1|w2|w3)")
_LAYER = re.compile(r"\.(\d+)\.")

# The norm whose output is a module's input: in its layer, or beside it. Where there are two names, the first that
# a model has.
_ATTENTION_NORM = (
    "input_layernorm", "attention_norm", "ln_1", "norm1", "self_attn_layer_norm", "pre_attention_layernorm",
    "operator_norm", "norm",
)  # fmt: skip
_MLP_NORM = (
    "pre_feedforward_layernorm",
    "pre_mlp_layernorm",
    "post_attention_layernorm",
    "ffn_norm",
    "ln_2",
    "norm2",
    "final_layer_norm",
    "pre_ff_layernorm",
    "post_mixer_norm",
    *_ATTENTION_NORM,  # of blocks side by side, which one norm feeds both
)
_IN_LAYER = {
    "q_proj": _ATTENTION_NORM, "k_proj": _ATTENTION_NORM, "v_proj": _ATTENTION_NORM,
    "q_a_proj": _ATTENTION_NORM, "kv_a_proj_with_mqa": _ATTENTION_NORM,
    "gate_proj": _MLP_NORM, "up_proj": _MLP_NORM, "w1": _MLP_NORM, "w3": _MLP_NORM,
    "gate": _MLP_NORM, "router": _MLP_NORM, "shared_expert_gate": _MLP_NORM,
}  # fmt: skip
# By the block that a linear is in, for those of other names.
_ATTENTION_BLOCK = re.compile(
    r"(.*\.)?(self_attn|attn|attention|linear_attn|self_attention|mixer|mamba|conv|temporal_block)(\.indexer)?"
)
_MLP_BLOCK = re.compile(
    r"(.*\.)?(mlp|feed_forward|ffn|moe|block_sparse_moe|experts|shared_experts?|router|gate)(\..*)?"
)
_OUTPUTS = re.compile(
    r"o_proj|down_proj|w2|wo|out_proj|c_proj|dense|dense_4h_to_h|fc2|fc_out|output_linear|.*norm\d?|.*_(a|b)_proj|wq_b|"
    r".*(bias|scale|A_log|conv1d)|D"
)
"""Linears at the end of a block, or in the middle of it: what feeds them is in the block, too."""
_BESIDE = {"q_b_proj": "q_a_layernorm", "kv_b_proj": "kv_a_layernorm"}
# The linear whose outputs, one for one, become a module's inputs.
_LINEAR_BEFORE = {
    "o_proj": "v_proj", "down_proj": "up_proj", "w2": "w3", "wo": "wv", "fc2": "fc1", "out_proj": "v_proj",
    "dense_4h_to_h": "dense_h_to_4h", "c_proj": "c_fc",
}  # fmt: skip

_NORM = re.compile(r".*norm\d?|ln_\w+|norm_f")
_EMBEDDINGS = {"embed_tokens", "wte", "word_embeddings", "embed_in"}
_HEADS = {"lm_head", "embed_out"}
_ROUTERS = {"gate", "router", "shared_expert_gate"}


class Role(Enum):
    """What a module is to a serving engine."""

    LINEAR = "linear"
    EXPERT = "expert"
    EMBEDDING = "embedding"
    HEAD = "lm_head"
    ROUTER = "router"
    NORM = "norm"
    PARAMETER = "parameter"

    def __init__(self, word: str):
        self.never_quantized = word in ("router", "norm", "parameter")
        """Globs that map whole layers to a quantized source do not mean these."""


@dataclass(frozen=True, slots=True)
class Model:
    """The facts of ``config.json`` that planning needs."""

    model_type: str
    tied_embeddings: bool

    @classmethod
    def from_config(cls, config: Mapping[str, object]) -> Model:
        # Multimodal checkpoints keep the decoder's configuration one level down.
        text = config.get("text_config")
        flat = {**config, **text} if isinstance(text, dict) else config
        return cls(str(flat.get("model_type", "")), bool(flat.get("tie_word_embeddings", False)))


def role_of(name: str, shape: tuple[int, ...], leaves: Iterable[str]) -> Role:
    """The role of the module ``name``, whose weight has ``shape`` and whose tensors are ``leaves``."""
    return role_by_name(name) or (Role.PARAMETER if len(shape) < 2 or "" in leaves else Role.LINEAR)


def role_by_name(name: str) -> Role | None:
    """The role of the module ``name``, where the name says it."""
    last = name.rpartition(".")[2]
    if _EXPERT.fullmatch(name):
        return Role.EXPERT
    if last in _EMBEDDINGS:
        return Role.EMBEDDING
    if last in _HEADS or name.endswith("shared_head.head"):
        return Role.HEAD
    if last in _ROUTERS:
        return Role.ROUTER
    return Role.NORM if _NORM.fullmatch(last) else None


def fused_groups(names: Iterable[str]) -> dict[str, list[str]]:
    """SGLang's name of each fused module or expert -> its members among ``names``; single linears stay alone."""
    groups: dict[str, list[str]] = {}
    for name in names:
        expert = _EXPERT.fullmatch(name)
        parent, _, last = name.rpartition(".")
        key = expert[1] if expert else f"{parent}.{FUSED[last]}" if last in FUSED else name
        groups.setdefault(key, []).append(name)
    return groups


def joined_groups(names: Iterable[str]) -> dict[str, list[str]]:
    """As :func:`fused_groups`, under the names of SGLang's layers and in the order that it joins their parts in."""
    order = list(FUSED)
    groups = {}
    for joined, members in fused_groups(names).items():
        # DeepSeek-V2-Lite's q_proj has no partners.
        whole = sorted(members, key=lambda name: order.index(name.rpartition(".")[2])) if len(members) > 1 else members
        groups[joined if len(members) > 1 else members[0]] = whole
    return groups


def gemms(names: Iterable[str]) -> dict[str, list[str]]:
    """What must be in one format: :func:`gemms_of` all groups of :func:`fused_groups`."""
    return {
        gemm: members
        for group, fused in fused_groups(names).items()
        for gemm, members in gemms_of(group, fused).items()
    }


def gemms_of(group: str, members: list[str]) -> dict[str, list[str]]:
    """What must be in one format of a group of :func:`fused_groups`: all of it, but of an expert gate and up apart from
    down, under ``...experts.7.w13`` and ``.w2``."""
    if not is_expert(group):
        return {group: members}
    out: dict[str, list[str]] = {}
    for member in members:
        out.setdefault(f"{group}.{'w2' if is_down(member) else 'w13'}", []).append(member)
    return out


def is_down(name: str) -> bool:
    """Whether a module is a down projection."""
    return name.rpartition(".")[2] in ("down_proj", "w2")


class GroupMembers(NamedTuple):
    """The experts of one layer on one rank whose gate and up, and whose down, are in one format."""

    ups: list[int]
    downs: list[int]


def expert_groups(formats: Mapping[int, tuple[object, object]], here: Iterable[int]) -> list[GroupMembers]:
    """The experts of one layer on one rank by format, in the order that formats come up; ``formats`` are those of gate
    and up, and of down.

    Where these are not the same experts, they are two groups: SGLang's layers hold as many of the one as of the other.
    """
    ups: dict[object, list[int]] = {}
    downs: dict[object, list[int]] = {}
    for expert in here:
        for kind, of_kind, others in zip(formats[expert], (ups, downs), (downs, ups), strict=True):
            of_kind.setdefault(kind, []).append(expert)
            others.setdefault(kind, [])
    groups = []
    for kind, members in ups.items():
        if members == downs[kind]:
            groups.append(GroupMembers(members, members))
        else:
            groups += [group for group in (GroupMembers(members, []), GroupMembers([], downs[kind])) if any(group)]
    return groups


def expert_parts(members: Iterable[str]) -> tuple[str, str, str] | None:
    """``(gate, up, down)`` of one expert's members, or None if they are not these three."""
    by_last = {name.rpartition(".")[2]: name for name in members}
    for gate, up, down in (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")):
        if by_last.keys() == {gate, up, down}:
            return by_last[gate], by_last[up], by_last[down]
    return None


def is_expert(group: str) -> bool:
    """Whether a name from :func:`fused_groups` or :func:`gemms` is an expert's."""
    return re.search(r"\.experts\.\d+(\.w13|\.w2)?$", group) is not None


def place_of(name: str) -> tuple[int | None, str]:
    """A module's row and column in a layer map: its decoder layer, which is the first number between dots, and its
    name within the layer, experts folded into one."""
    found = _LAYER.search(name)
    layer, inner = (int(found[1]), name[found.end() :]) if found else (None, name)
    within = ".experts." in inner or inner.startswith("experts.")
    return layer, "experts" if within and _EXPERT.fullmatch(name) else inner


def layer_prefix(name: str) -> str:
    """``"model.layers.7."`` of a module of that layer; empty outside of layers."""
    found = _LAYER.search(name)
    return name[: found.end()] if found else ""


def norms_before(name: str) -> tuple[str, ...]:
    """Names of the norm that feeds a module, if it is one that a norm feeds: the first that the model has."""
    parent, _, last = name.rpartition(".")
    if last in _BESIDE:
        return (f"{parent}.{_BESIDE[last]}",)
    prefix = layer_prefix(name)
    norms = _IN_LAYER.get(last, ())
    if prefix and not norms and not _OUTPUTS.fullmatch(last):
        block = parent.removeprefix(prefix) if parent != prefix[:-1] else ""
        norms = (
            _MLP_NORM if _MLP_BLOCK.fullmatch(block) else _ATTENTION_NORM if _ATTENTION_BLOCK.fullmatch(block) else ()
        )
    return tuple([prefix + norm for norm in norms]) if prefix else ()


def scaled_before(name: str) -> str | None:
    """The linear that a scaling of this linear's inputs can be folded into."""
    parent, _, last = name.rpartition(".")
    return f"{parent}.{_LINEAR_BEFORE[last]}" if last in _LINEAR_BEFORE else None
