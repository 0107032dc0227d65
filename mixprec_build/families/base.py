"""A model family: names of its modules, what SGLang makes of them, and how it cuts them for ranks.

Names are those of Hugging Face checkpoints. Defaults are those of Llama, which most decoders share. Rules go by the
last words of names, so that they also apply to a decoder inside of a larger model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from .blocks import ATTENTION, ATTENTION_NORMS, JOINED_BEFORE, LINEARS_BEFORE, MLP, MLP_NORMS, block_fed_by_norm
from .degrees import DegreeLimits
from .draft_class import DraftClass
from .draft_layers import PLAIN, DraftLayout, place_of_draft, without_marks
from .expected import is_for_drafts, tower_of
from .names import last_word, layer_of, layer_prefix, with_words
from .parts import (
    CUTS,
    ComparedFormats,
    CutBy,
    ExpertActivation,
    FusedGroup,
    MovedRows,
    OtherHeads,
    Projections,
    Restriction,
    Role,
    StackedExperts,
    StoredFormat,
    group_finder,
)

__all__ = ["EXPERTS_COLUMN", "Family"]

EXPERTS_COLUMN = "experts"
"""The column of all experts in a layer map."""


@dataclass(frozen=True, eq=False)
class Family:
    """The description of one family, or of several that are alike. Compared by identity."""

    model_types: frozenset[str] = frozenset()
    """``model_type`` of its ``config.json``; empty in the rules for unknown models."""
    architectures: frozenset[str] = frozenset()
    """Names of its model classes, which have precedence over ``model_type``, as in SGLang."""
    alike: tuple[str, ...] = ()
    """Prefixes of both, in lower case, of models without a family here that follow these rules."""
    checked: bool = False
    """Whether its names and groups were compared with SGLang's model code; if not, a plan has a note."""

    # Where the decoder is

    embedding: str = "model.embed_tokens"
    """The embedding's name."""
    head: str = "lm_head"
    """The name of the head that may be tied to the embedding."""
    renamed: tuple[tuple[str, str], ...] = ()
    """Prefixes of names in the checkpoint, and those of SGLang's parameters in their place:
    ``("model.language_model.", "model.")``. The first that fits counts."""
    dropped: tuple[str, ...] = ()
    """Words that SGLang's class drops from the names of its parameters."""
    inner: tuple[tuple[str, str], ...] = ()
    """Words within names in the checkpoint, and those in names of SGLang's parameters in their place."""
    in_prefixes: tuple[tuple[str, str], ...] = ()
    """Words within the ``prefix`` that SGLang's class passes to a layer, and those in names of its parameters in their
    place."""
    left_out: tuple[str, ...] = ("model.",)
    """Prefixes of parameters' names that a class of SGLang's may omit from the name that it passes to its layers
    (models/mixtral.py:291 in 0.5.17)."""

    # Roles, by the last word

    embeddings: frozenset[str] = frozenset({"embed_tokens", "wte", "word_embeddings", "embed_in"})
    heads: frozenset[str] = frozenset({"lm_head", "embed_out"})
    routers: frozenset[str] = frozenset({"gate", "router"})
    """Last words, or more of a name's end: ``router.proj``."""
    norms: re.Pattern[str] = re.compile(r".*norm\d?|ln_\w+|norm_f")
    """Matches all of their last words."""
    parameters: frozenset[str] = frozenset({"conv1d"})
    """Modules whose weights SGLang's classes never quantize, beside routers and norms."""
    last_norms: tuple[str, ...] = ("norm", "final_layernorm", "final_layer_norm", "ln_f", "norm_f", "final_norm")
    """Last words of the norm after the last layer."""

    in_some_layers: frozenset[str] = frozenset()
    """Blocks that only some layers have, by ``config.json``."""

    # Layers for speculative decoding

    drafts: tuple[str, ...] = ()
    """Prefixes of the names of their modules, beside ``mtp.`` and layers that are numbered past the last."""
    draft_heads: tuple[str, ...] = ()
    """Ends of the names of their heads."""
    draft_layout: DraftLayout | None = None
    """What they need beside a decoder layer; None where it is to be guessed by their names."""
    draft_class: DraftClass | None = None
    """SGLang's class for them; None where there is none, or it was not compared with the names here."""

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
    """Projections of MLPs and experts, in every spelling that a checkpoint may use."""
    stacked_experts: tuple[StackedExperts, ...] = ()
    """Tensors of all experts of a layer in some releases; see :mod:`mixprec_build.checkpoint.experts_apart`."""
    activation: ExpertActivation = ExpertActivation()  # noqa: RUF009  (immutable)
    """What experts compute between up and down."""
    shared_experts: tuple[str, ...] = ()
    """Names of the MLP beside the experts, if SGLang may run it as one more of them."""

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
    cuts: Mapping[str, CutBy] = field(default_factory=lambda: CUTS)
    """Last word, or last two, -> how ranks share such a module. Others are complete on every rank, except projections
    of MLPs."""
    other_heads: OtherHeads | None = None
    degrees: DegreeLimits = DegreeLimits()  # noqa: RUF009  (immutable)
    """Which degrees SGLang's class refuses beside."""
    class_loads: tuple[str, ...] = ()
    """Ends of names of modules and parameters that are complete on every rank and that SGLang's class loads itself,
    because it computes a parameter from several tensors."""
    taken_in_part: tuple[str, ...] = ()
    """Ends of names of tensors of which SGLang's class takes the first entries, and ignores the others."""
    needs_own_loader: bool = False
    """Whether SGLang's class cannot load single experts: only mixprec's loader can, and ``load_weights`` gets none."""
    attention_replicas: bool = False
    """Whether SGLang can keep its attention in replicas (``--enable-dp-attention``)."""
    complete_in_replicas: frozenset[str] = frozenset()
    """Last words of modules that every rank has complete then, and of which it has a share otherwise."""

    # What makes a linear's inputs

    attention_norms: tuple[str, ...] = ATTENTION_NORMS
    """Names within a layer of the norm before attention; the first that a model has counts."""
    attention_inputs: frozenset[str] = frozenset({"q_proj", "k_proj", "v_proj"})
    """Linears that it feeds, beside others at the start of a block of attention."""
    mlp_norms: tuple[str, ...] = MLP_NORMS
    """The same for the norm before the MLP, which feeds routers, gate and up."""
    norms_beside: Mapping[str, str] = field(default_factory=dict)
    """Last word of a linear -> that of the norm of the same parent that feeds it."""
    linears_before: Mapping[str, str] = field(default_factory=lambda: LINEARS_BEFORE)
    """Last word of a linear -> that of the linear whose outputs, one for one, become its inputs. ``up`` and ``down``
    of MLPs are always such a pair."""
    joined_before: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: JOINED_BEFORE)
    """The same for linears of whose outputs only some become its inputs: ``up`` in ``gate_up_proj``, ``v`` in others. A
    model has one of them at most."""

    # Made once, for they are looked up for each of a hundred thousand modules

    @cached_property
    def _expert(self) -> re.Pattern[str]:
        words = "|".join(dict.fromkeys(re.escape(word) for trio in self.projections for word in trio.words))
        return re.compile(rf"((.+\.{re.escape(self.experts)})\.(\d+))\.({words})")

    @cached_property
    def _expert_group(self) -> re.Pattern[str]:
        return re.compile(rf"\.{re.escape(self.experts)}\.\d+(\.w13|\.w2)?$")

    @cached_property
    def _group_of(self) -> Callable[[str], FusedGroup | None]:
        return group_finder(self.fused)

    @cached_property
    def _router_ends(self) -> tuple[str, ...]:
        return tuple(f".{router}" for router in self.routers if "." in router)

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
        """The role of the module ``name``, if its name determines it; None if its shape does."""
        last = last_word(name)
        if self._expert.fullmatch(name):
            return Role.EXPERT
        if last in self.embeddings:
            return Role.EMBEDDING
        if last in self.heads or (self.draft_heads and name.endswith(self.draft_heads)):
            return Role.HEAD
        if last in self.routers or (self._router_ends and name.endswith(self._router_ends)):
            return Role.ROUTER
        if last in self.parameters or tower_of(name) is not None:
            return Role.PARAMETER
        return Role.NORM if self.norms.fullmatch(last) else None

    def is_norm(self, name: str) -> bool:
        return self.norms.fullmatch(last_word(name)) is not None

    def is_draft(self, name: str, layers: int | None) -> bool:
        """Whether a module or tensor is for speculative decoding only; ``layers``: how many the model has."""
        if is_for_drafts(name) or (bool(self.drafts) and name.startswith(self.drafts)):
            return True
        layer = layer_of(name)
        past_the_last = layer is not None and layers is not None and layer >= layers
        return past_the_last and tower_of(name) is None  # an encoder may have more layers than the decoder

    def means_no_draft(self, name: str, layers: int | None) -> str:
        """A name that only globs match that do not single out draft layers, see :func:`.draft_layers.without_marks`."""
        return without_marks(name, layers, self.drafts)

    # Fused groups

    def fused_groups(self, names: Iterable[str]) -> dict[str, list[str]]:
        """SGLang's name of each fused module or expert -> its members among ``names``; others are groups of one."""
        expert_of, group_of = self._expert.fullmatch, self._group_of
        groups: dict[str, list[str]] = {}
        for name in names:
            expert = expert_of(name)
            group = None if expert else group_of(name)
            key = expert[1] if expert else name if group is None else f"{name.rpartition('.')[0]}.{group.name}"
            groups.setdefault(key, []).append(name)
        return groups

    def joined_groups(self, names: Iterable[str]) -> dict[str, list[str]]:
        """As :meth:`fused_groups`, with members in SGLang's order; a group of one has the name of its member."""
        groups = {}
        for joined, members in self.fused_groups(names).items():
            if len(members) > 1:
                order = self.members_of(last_word(joined))
                groups[joined] = sorted(members, key=lambda name: order.index(last_word(name)))
            else:  # DeepSeek-V2-Lite's q_proj has no partners.
                groups[members[0]] = members
        return groups

    def ragged_end(self, names: Iterable[str]) -> str | None:
        """The part of a fused linear that may end inside of a block of scales; None where none may."""
        groups = ((name, self._group_of(name)) for name in names)
        return next((n for n, g in groups if g and g.ragged_end and last_word(n) == g.members[-1]), None)

    def members_of(self, joined: str) -> tuple[str, ...]:
        """Last words of the linears that a layer whose last word is ``joined`` is made of; empty for others."""
        return next((group.members for group in self.fused if group.name == joined), ())

    def gemms(self, names: Iterable[str]) -> dict[str, list[str]]:
        """The members of each GEMM, which must share a format: :meth:`gemms_of` all groups of :meth:`fused_groups`."""
        return {
            gemm: members
            for group, fused in self.fused_groups(names).items()
            for gemm, members in self.gemms_of(group, fused).items()
        }

    def gemms_of(self, group: str, members: list[str]) -> dict[str, list[str]]:
        """The GEMMs of a group of :meth:`fused_groups`, each of which must share a format.

        That is the group itself; for an expert, gate and up as ``...experts.7.w13`` and down as ``.w2``.
        """
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
        """The projections of one MLP or expert, which has ``words``: those that share most with them."""
        there = {*words}
        return max(self.projections, key=lambda trio: len(there.intersection(trio.words)))

    def missing_of(self, words: Iterable[str]) -> Projections | None:
        """The projections that an expert needs; None if ``words`` are exactly these."""
        there = {*words}
        expected = self.projections_among(there)
        return None if there == {*expected.words} else expected

    def stacked_experts_of(self, name: str) -> StackedExperts | None:
        """The description of the tensor ``name``, if it has all experts of a layer in this family's releases."""
        return next((one for one in self.stacked_experts if one.block_of(name, self.experts) is not None), None)

    def place_of(self, name: str) -> tuple[int | None, str]:
        """A module's row and column in a layer map.

        They are its decoder layer, the first number between dots, and its name within the layer, one for all experts.
        """
        prefix = layer_prefix(name)
        if not prefix or is_for_drafts(name):
            return None, name
        inner = name[len(prefix) :]
        within = f".{self.experts}." in inner or inner.startswith(f"{self.experts}.")
        layer = int(last_word(prefix[:-1]))
        return layer, EXPERTS_COLUMN if within and self._expert.fullmatch(name) else inner

    # Norms and what they feed

    def norms_before(self, name: str) -> tuple[str, ...]:
        """Names of the norm that feeds a module, of which the first that the model has counts; none if no norm does."""
        parent, _, last = name.rpartition(".")
        if last in self.norms_beside:
            return (f"{parent}.{self.norms_beside[last]}",)
        prefix = layer_prefix(name)
        norms = self._norms_in_layer.get(last, ())
        if prefix and not norms and last not in self._linears_before and not self.norms.fullmatch(last):
            block = block_fed_by_norm(parent.removeprefix(prefix) if parent != prefix[:-1] else "", last)
            norms = {MLP: self.mlp_norms, ATTENTION: self.attention_norms}.get(block or "", ())
        return tuple([prefix + norm for norm in norms]) if prefix else ()

    def knows_norm_before(self, name: str) -> bool:
        """Whether :meth:`norms_before` knows a linear by its name, and does not guess by the block that it is in."""
        last = last_word(name)
        return last in self.norms_beside or last in self._norms_in_layer

    def scaled_before(self, name: str) -> str | None:
        """The linear that scales of this linear's inputs can be folded into; None where there is none."""
        parent, _, last = name.rpartition(".")
        return f"{parent}.{self._linears_before[last]}" if last in self._linears_before else None

    def joined_scaled_before(self, name: str) -> Iterator[str]:
        """Yields names of linears, of which a model has one at most, into some of whose outputs they can be folded."""
        parent, _, last = name.rpartition(".")
        for joined in self.joined_before.get(last, ()):
            yield f"{parent}.{joined}"

    # What SGLang does not run

    def format_limit(self, name: str, role: Role, fmt: StoredFormat) -> str | None:
        """The reason why a module cannot be served in ``fmt``, whatever its shape; None if there is none."""
        if not fmt.quantized:
            return None
        if role is Role.HEAD and self.quantized_head and not is_for_drafts(name):
            # SGLang makes the heads of layers for drafts in other classes.
            return f"mixprec serves no quantized {last_word(name)} of layers for drafts" if layer_prefix(name) else None
        if role in (Role.EMBEDDING, Role.HEAD, Role.ROUTER):
            of_model = " of this family of models" if role is Role.HEAD else ""
            return f"mixprec serves no quantized {role.value}{of_model}"
        if self._is_plain_in_drafts(name):
            return "SGLang's class for draft layers makes it a torch.nn.Linear, which has no quantization"
        reasons = (rule.reason(name, fmt) for rule in self.restrictions)
        return next((reason for reason in reasons if reason is not None), None)

    def _is_plain_in_drafts(self, name: str) -> bool:
        plain = frozenset[str]() if self.checked else PLAIN
        if self.draft_layout is not None:
            plain = self.draft_layout.plain
        parts = name.rsplit(".", 2)[-2:]
        if plain.isdisjoint(parts) or place_of_draft(name).inner not in plain:
            return False
        return is_for_drafts(name) or last_word(name) == "eh_proj"  # a word that nothing else has

    def compared_with(self, gemm: str) -> tuple[str, ComparedFormats] | None:
        """The down projection that SGLang compares with ``gemm``, gate and up of the same MLP, and how it does."""
        for rule in self.compared:
            if gemm.endswith(rule.ups):
                return gemm.removesuffix(rule.ups) + rule.down, rule
        return None

    # What ranks share, and what SGLang's class loads

    def cut_of(self, name: str) -> CutBy | None:
        """How ranks share a module; None for one that is complete on every rank, and for projections of MLPs."""
        last = last_word(name)
        return self.cuts.get(f"{last_word(name[: -len(last) - 1])}.{last}") or self.cuts.get(last)

    def is_left_to_class(self, name: str) -> bool:
        """Whether a tensor or parameter is read by SGLang's class: of encoders (towers) and of :attr:`class_loads`."""
        module = name.rpartition(".")[0]
        return tower_of(name) is not None or (
            bool(self.class_loads) and (name.endswith(self.class_loads) or module.endswith(self.class_loads))
        )

    # SGLang's names

    def sglang_name(self, name: str) -> str:
        """The name of a module or layer of the checkpoint among SGLang's parameters."""
        found = (served + name[len(stored) :] for stored, served in self.renamed if name.startswith(stored))
        name = next(found, name)
        for word in self.dropped:
            name = name.replace(f".{word}.", ".")
        for stored, served in self.inner:
            name = with_words(name, stored, served)
        return name

    def served_names(self, layer: str) -> tuple[str, ...]:
        """Names that a layer may have among SGLang's parameters, likeliest first, if its class calls it ``layer``."""
        for passed, served in self.in_prefixes:
            layer = with_words(layer, passed, served)
        return (layer, *(beginning + layer for beginning in self.left_out))

    def stored_names(self, layer: str) -> Iterator[str]:
        """Yields names that such a layer may have in the checkpoint, where some may have SGLang's words."""
        for served in self.served_names(layer):
            stored = served
            for word, inner in self.inner:
                stored = with_words(stored, inner, word)
            for name in dict.fromkeys((stored, served)):
                yield name
                yield from (old + name[len(new) :] for old, new in self.renamed if name.startswith(new))
