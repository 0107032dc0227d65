"""A model family: names of its modules, what SGLang makes of them, and how it cuts them for ranks.

Names are those of Hugging Face checkpoints. What a family does not say is as in Llama: most decoders are. Rules go by
the last words of names, so that they hold wherever a decoder lies in a larger model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from .blocks import ATTENTION, MLP, block_fed_by_norm
from .expected import is_for_drafts, tower_of
from .names import last_word, layer_of, layer_prefix
from .parts import (
    ComparedFormats,
    CutBy,
    FusedGroup,
    MovedRows,
    Projections,
    Restriction,
    Role,
    StackedExperts,
    StoredFormat,
)

__all__ = ["EXPERTS_COLUMN", "Family"]

EXPERTS_COLUMN = "experts"
"""What a layer map calls the experts of a layer, all of them."""

_CUTS = {
    "q_proj": CutBy.QUERY_HEADS, "k_proj": CutBy.KEY_VALUE_HEADS, "v_proj": CutBy.KEY_VALUE_HEADS,
    "o_proj": CutBy.HEAD_INPUTS, "embed_tokens": CutBy.VOCABULARY, "lm_head": CutBy.VOCABULARY,
}  # fmt: skip


_ATTENTION_NORMS = (
    "input_layernorm", "attention_norm", "ln_1", "norm1", "self_attn_layer_norm", "pre_attention_layernorm",
    "operator_norm", "norm",
)  # fmt: skip
_MLP_NORMS = (
    "pre_feedforward_layernorm", "pre_mlp_layernorm", "post_attention_layernorm", "ffn_norm", "ln_2", "norm2",
    "final_layer_norm", "pre_ff_layernorm", "post_mixer_norm",
    *_ATTENTION_NORMS,  # of blocks side by side, which one norm feeds both
)  # fmt: skip
_LINEARS_BEFORE = {
    "o_proj": "v_proj", "wo": "wv", "out_proj": "v_proj",
    "fc2": "fc1", "dense_4h_to_h": "dense_h_to_4h", "c_proj": "c_fc",
}  # fmt: skip
_JOINED_BEFORE = {
    "o_proj": ("qkv_proj", "W_pack", "kv_b_proj"), "down_proj": ("gate_up_proj",), "wo": ("wqkv",),
    "dense": ("query_key_value",), "out_proj": ("in_proj_qkv",), "w2": ("w13",),
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Family:
    """One family, or several that are alike. Compared by identity; the fields are all there is to say."""

    model_types: frozenset[str] = frozenset()
    """``model_type`` of its ``config.json``; empty in the rules for unknown models."""
    architectures: frozenset[str] = frozenset()
    """Names of its model classes, which count before ``model_type``, as they do to SGLang."""
    alike: tuple[str, ...] = ()
    """Beginnings of both, in small letters, of models that are of no family here and follow these rules."""
    checked: bool = False
    """Whether its names and groups were compared with SGLang's model code; a plan notes those that were not."""

    # Where the decoder is

    embedding: str = "model.embed_tokens"
    """The embedding's name."""
    head: str = "lm_head"
    """The name of the head that may be tied to the embedding."""
    renamed: tuple[tuple[str, str], ...] = ()
    """Beginnings of names in the checkpoint, and what they are among SGLang's parameters:
    ``("model.language_model.", "model.")``. The first that fits counts."""
    dropped: tuple[str, ...] = ()
    """Words that SGLang's class takes out of the names of its parameters."""
    left_out: tuple[str, ...] = ("model.",)
    """Beginnings of parameters' names that a class of SGLang's may leave out of what it tells its layers they are
    called (models/mixtral.py:291 in 0.5.17)."""

    # Roles, by the last word

    embeddings: frozenset[str] = frozenset({"embed_tokens", "wte", "word_embeddings", "embed_in"})
    heads: frozenset[str] = frozenset({"lm_head", "embed_out"})
    routers: frozenset[str] = frozenset({"gate", "router"})
    norms: re.Pattern[str] = re.compile(r".*norm\d?|ln_\w+|norm_f")
    """Matches all of their last words."""
    parameters: frozenset[str] = frozenset({"conv1d"})
    """Modules whose weights SGLang's classes never quantize, beside routers and norms."""
    last_norms: tuple[str, ...] = (
        "norm", "final_layernorm", "final_layer_norm", "ln_f", "norm_f", "final_norm",
    )  # fmt: skip
    """Last words of the one after the last layer."""

    in_some_layers: frozenset[str] = frozenset()
    """Blocks that some layers have and others, by ``config.json``, have not."""

    # Layers for speculative decoding

    drafts: tuple[str, ...] = ()
    """Beginnings of the names of their modules, beside the usual ones (``mtp.``) and layers that are numbered past the
    last."""
    draft_heads: tuple[str, ...] = ()
    """Ends of the names of heads in them."""

    # What SGLang joins

    fused: tuple[FusedGroup, ...] = (
        FusedGroup("qkv_proj", ("q_proj", "k_proj", "v_proj")),
        FusedGroup("gate_up_proj", ("gate_proj", "up_proj")),
    )
    experts: str = "experts"
    """The word before the numbers of experts."""
    projections: tuple[Projections, ...] = (
        Projections("gate_proj", "up_proj", "down_proj"),
        Projections("w1", "w3", "w2"),
    )
    """Of MLPs and experts; every one that a checkpoint may use."""
    stacked_experts: tuple[StackedExperts, ...] = ()
    """Tensors that hold all experts of a layer in some releases; see :mod:`mixprec_build.checkpoint.experts_apart`."""
    shared_experts: tuple[str, ...] = ()
    """What the MLP beside the experts is called where SGLang may make it one more of them."""

    # What SGLang does not run

    restrictions: tuple[Restriction, ...] = ()
    compared: tuple[ComparedFormats, ...] = ()
    moved: tuple[MovedRows, ...] = ()
    """Weights whose rows SGLang moves as it loads them."""
    quantized_head: bool = False
    """Whether SGLang's class asks the quantization config how the head is stored: what passes ``quant_config`` to
    ``ParallelLMHead`` does."""

    # Ranks

    can_be_cut: bool = False
    """Whether ``cuts`` were compared with SGLang's model code."""
    cuts: Mapping[str, CutBy] = field(default_factory=lambda: _CUTS)
    """Last word -> how ranks share such a module; others are whole on every rank, but for projections of MLPs."""
    attention_replicas: bool = False
    """Whether SGLang can keep its attention in replicas (``--enable-dp-attention``)."""

    # What makes a linear's inputs

    attention_norms: tuple[str, ...] = _ATTENTION_NORMS
    """Names in a layer of the norm before attention: the first that a model has."""
    attention_inputs: frozenset[str] = frozenset({"q_proj", "k_proj", "v_proj"})
    """Linears that it feeds, beside others that stand at the start of a block of attention."""
    mlp_norms: tuple[str, ...] = _MLP_NORMS
    """The same of the norm before the MLP; it feeds routers, and what ``projections`` has but ``down``."""
    norms_beside: Mapping[str, str] = field(default_factory=dict)
    """Last word of a linear -> that of the norm of the same parent that feeds it."""
    linears_before: Mapping[str, str] = field(default_factory=lambda: _LINEARS_BEFORE)
    """Last word of a linear -> that of the linear whose outputs, one for one, become its inputs. ``up`` and ``down``
    of MLPs are such pairs anyway."""
    joined_before: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: _JOINED_BEFORE)
    """The same of linears of whose outputs some become its inputs: ``up`` in ``gate_up_proj``, ``v`` in others. A model
    has one of them at most."""

    # Looked up by name, for each of a hundred thousand modules

    @cached_property
    def _expert(self) -> re.Pattern[str]:
        words = "|".join(dict.fromkeys(re.escape(word) for trio in self.projections for word in trio.words))
        return re.compile(rf"((.+\.{re.escape(self.experts)})\.(\d+))\.({words})")

    @cached_property
    def _expert_group(self) -> re.Pattern[str]:
        return re.compile(rf"\.{re.escape(self.experts)}\.\d+(\.w13|\.w2)?$")

    @cached_property
    def _joined(self) -> dict[str, FusedGroup]:
        return {member: group for group in self.fused for member in group.members}

    @cached_property
    def _downs(self) -> frozenset[str]:
        return frozenset(trio.down for trio in self.projections)

    @cached_property
    def _ups(self) -> frozenset[str]:
        return frozenset(up for trio in self.projections for up in trio.ups)

    @cached_property
    def _norms_in_layer(self) -> dict[str, tuple[str, ...]]:
        return dict.fromkeys(self.attention_inputs, self.attention_norms) | dict.fromkeys(
            (*self._ups, *self.routers), self.mlp_norms
        )

    @cached_property
    def _linears_before(self) -> dict[str, str]:
        return {**self.linears_before, **{trio.down: trio.up for trio in self.projections}}

    # Roles

    def role_of(self, name: str, shape: tuple[int, ...], leaves: Iterable[str]) -> Role:
        """The role of the module ``name``, whose weight has ``shape`` and whose tensors are ``leaves``."""
        return self.role_by_name(name) or (Role.PARAMETER if len(shape) < 2 or "" in leaves else Role.LINEAR)

    def role_by_name(self, name: str) -> Role | None:
        """The role of the module ``name``, where the name says it."""
        last = last_word(name)
        if self._expert.fullmatch(name):
            return Role.EXPERT
        if last in self.embeddings:
            return Role.EMBEDDING
        if last in self.heads or (self.draft_heads and name.endswith(self.draft_heads)):
            return Role.HEAD
        if last in self.routers:
            return Role.ROUTER
        if last in self.parameters or tower_of(name) is not None:
            return Role.PARAMETER
        return Role.NORM if self.norms.fullmatch(last) else None

    def is_norm(self, name: str) -> bool:
        return self.norms.fullmatch(last_word(name)) is not None

    def is_draft(self, name: str, layers: int | None) -> bool:
        """Whether a module or tensor is for speculative decoding only; ``layers`` is how many the model has."""
        layer = layer_of(name)
        past_the_last = layer is not None and layers is not None and layer >= layers
        return past_the_last or is_for_drafts(name) or (bool(self.drafts) and name.startswith(self.drafts))

    # Fused groups

    def fused_groups(self, names: Iterable[str]) -> dict[str, list[str]]:
        """SGLang's name of each fused module or expert -> its members among ``names``; single linears stay alone."""
        expert_of, joined = self._expert.fullmatch, self._joined
        groups: dict[str, list[str]] = {}
        for name in names:
            expert = expert_of(name)
            parent, _, last = name.rpartition(".")
            key = expert[1] if expert else f"{parent}.{joined[last].name}" if last in joined else name
            groups.setdefault(key, []).append(name)
        return groups

    def joined_groups(self, names: Iterable[str]) -> dict[str, list[str]]:
        """As :meth:`fused_groups`, under the names of SGLang's layers and in the order that it joins their parts in."""
        groups = {}
        for joined, members in self.fused_groups(names).items():
            if len(members) > 1:
                order = self._joined[last_word(members[0])].members
                groups[joined] = sorted(members, key=lambda name: order.index(last_word(name)))
            else:  # DeepSeek-V2-Lite's q_proj has no partners.
                groups[members[0]] = members
        return groups

    def ragged_end(self, names: Iterable[str]) -> str | None:
        """The one of a fused linear's parts that may end inside of a block of scales; None where none may."""
        for name in names:
            group = self._joined.get(last_word(name))
            if group is not None and group.ragged_end and last_word(name) == group.members[-1]:
                return name
        return None

    def members_of(self, joined: str) -> tuple[str, ...]:
        """Last words of the linears that a layer whose last word is ``joined`` is made of; empty for others."""
        return next((group.members for group in self.fused if group.name == joined), ())

    def gemms(self, names: Iterable[str]) -> dict[str, list[str]]:
        """What must be in one format: :meth:`gemms_of` all groups of :meth:`fused_groups`."""
        return {
            gemm: members
            for group, fused in self.fused_groups(names).items()
            for gemm, members in self.gemms_of(group, fused).items()
        }

    def gemms_of(self, group: str, members: list[str]) -> dict[str, list[str]]:
        """What must be in one format of a group of :meth:`fused_groups`: all of it, but of an expert gate and up apart
        from down, under ``...experts.7.w13`` and ``.w2``."""
        if not self.is_expert(group):
            return {group: members}
        out: dict[str, list[str]] = {}
        for member in members:
            out.setdefault(f"{group}.{'w2' if self.is_down(member) else 'w13'}", []).append(member)
        return out

    # MLPs and experts

    def is_down(self, name: str) -> bool:
        """Whether a module is a down projection."""
        return last_word(name) in self._downs

    def is_up(self, name: str) -> bool:
        """Whether a module is a gate or up projection."""
        return last_word(name) in self._ups

    def is_expert(self, group: str) -> bool:
        """Whether a name from :meth:`fused_groups` or :meth:`gemms` is an expert's."""
        return self._expert_group.search(group) is not None

    def expert_of(self, name: str) -> tuple[str, int, str] | None:
        """``("model.layers.7.mlp.experts", 3, "up_proj")`` of a projection of an expert; None for other modules."""
        found = self._expert.fullmatch(name)
        return (found[2], int(found[3]), found[4]) if found else None

    def projections_among(self, words: Iterable[str]) -> Projections:
        """Those that one MLP or expert has, of which ``words`` are some: the ones that share most with them."""
        there = {*words}
        return max(self.projections, key=lambda trio: len(there.intersection(trio.words)))

    def missing_of(self, words: Iterable[str]) -> Projections | None:
        """The projections that an expert needs, if ``words`` are not just these."""
        there = {*words}
        expected = self.projections_among(there)
        return None if there == {*expected.words} else expected

    def stacked_experts_of(self, name: str) -> StackedExperts | None:
        """What the tensor ``name`` holds, if it is one of all experts of a layer in this family's releases."""
        block, _, last = name.rpartition(".")
        if last_word(block) != self.experts:
            return None
        return next((stacked for stacked in self.stacked_experts if stacked.name == last), None)

    def place_of(self, name: str) -> tuple[int | None, str]:
        """A module's row and column in a layer map: its decoder layer, which is the first number between dots, and its
        name within the layer, experts folded into one."""
        prefix = layer_prefix(name)
        if not prefix:
            return None, name
        inner = name[len(prefix) :]
        within = f".{self.experts}." in inner or inner.startswith(f"{self.experts}.")
        layer = int(last_word(prefix[:-1]))
        return layer, EXPERTS_COLUMN if within and self._expert.fullmatch(name) else inner

    # Norms and what they feed

    def norms_before(self, name: str) -> tuple[str, ...]:
        """Names of the norm that feeds a module, if it is one that a norm feeds: the first that the model has."""
        parent, _, last = name.rpartition(".")
        if last in self.norms_beside:
            return (f"{parent}.{self.norms_beside[last]}",)
        prefix = layer_prefix(name)
        norms = self._norms_in_layer.get(last, ())
        if prefix and not norms and last not in self._linears_before and not self.norms.fullmatch(last):
            block = block_fed_by_norm(parent.removeprefix(prefix) if parent != prefix[:-1] else "", last)
            norms = {MLP: self.mlp_norms, ATTENTION: self.attention_norms}.get(block or "", ())
        return tuple([prefix + norm for norm in norms]) if prefix else ()

    def scaled_before(self, name: str) -> str | None:
        """The linear that a scaling of this linear's inputs can be folded into."""
        parent, _, last = name.rpartition(".")
        return f"{parent}.{self._linears_before[last]}" if last in self._linears_before else None

    def joined_scaled_before(self, name: str) -> Iterator[str]:
        """Names of linears, of which a model may have one, into some of whose outputs such a scaling can be folded."""
        parent, _, last = name.rpartition(".")
        for joined in self.joined_before.get(last, ()):
            yield f"{parent}.{joined}"

    # What SGLang does not run

    def format_limit(self, name: str, role: Role, fmt: StoredFormat) -> str | None:
        """Why SGLang has no place for a module in ``fmt``, whatever its shape."""
        if not fmt.quantized:
            return None
        if role is Role.HEAD and self.quantized_head and not is_for_drafts(name):
            # SGLang makes the heads of layers for drafts in other classes.
            return f"mixprec serves no quantized {last_word(name)} of layers for drafts" if layer_prefix(name) else None
        if role in (Role.EMBEDDING, Role.HEAD, Role.ROUTER):
            of_model = " of this family of models" if role is Role.HEAD else ""
            return f"mixprec serves no quantized {role.value}{of_model}"
        reasons = (rule.reason(name, fmt) for rule in self.restrictions)
        return next((reason for reason in reasons if reason is not None), None)

    def compared_with(self, gemm: str) -> tuple[str, ComparedFormats] | None:
        """The down projection that SGLang compares with ``gemm``, gate and up of the same MLP, and how it does."""
        for rule in self.compared:
            if gemm.endswith(rule.ups):
                return gemm.removesuffix(rule.ups) + rule.down, rule
        return None

    # SGLang's names

    def sglang_name(self, name: str) -> str:
        """What a module or layer of the checkpoint is called among SGLang's parameters."""
        found = (served + name[len(stored) :] for stored, served in self.renamed if name.startswith(stored))
        name = next(found, name)
        for word in self.dropped:
            name = name.replace(f".{word}.", ".")
        return name

    def served_names(self, told: str) -> tuple[str, ...]:
        """What a layer may be called among SGLang's parameters whose own name for itself is ``told``, likeliest
        first."""
        return (told, *(beginning + told for beginning in self.left_out))

    def stored_names(self, told: str) -> Iterator[str]:
        """The same of its name in the checkpoint."""
        for served in self.served_names(told):
            yield served
            for stored, beginning in self.renamed:
                if served.startswith(beginning):
                    yield stored + served[len(beginning) :]
