"""Cuts a checkpoint for tensor- and expert-parallel ranks: exactly what each rank of SGLang needs.

A rank's files have SGLang's parameters under SGLang's names, as its weight loaders would fill them and before any
kernel repacks them: q, k and v in one tensor, the experts of a layer in a few. So a rank reads some large tensors
instead of thousands of small ones, and they must fit its parameters exactly.

======================  =============================================================================
cut along outputs       q, k, v (by heads), gate, up, q_b, kv_b; embeddings and lm_head by vocabulary
cut along inputs        o, down
complete on every rank  norms, routers, q_a with kv_a, tensors without the axis that is cut
by expert               experts under expert parallelism, each cut for the ranks that share it
======================  =============================================================================

With data-parallel attention, attention and embeddings are cut for the ranks of one replica, the rest for all.

Where a share of an MLP's columns would end inside of a quantization block or group, or of a kernel's tile, ranks get
complete blocks and zero weights up to the same size: zero columns of gate and up meet zero rows of down, so no result
changes. Layouts are those of SGLang 0.5.17: layers/linear.py, layers/vocab_parallel_embedding.py and
layers/moe/fused_moe_triton/layer.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import lcm, prod

from ..checkpoint.degree import Degree
from ..errors import SplitError
from ..families.base import Family
from ..families.cache_scales import CacheScale, cache_scale, parameters_of
from ..families.expected import ties_head, tower_of
from ..families.expert_groups import expert_groups
from ..families.facts import ModelFacts
from ..families.names import last_word, layer_of
from ..families.parts import CutBy, Role
from ..families.registry import cuttable_types, replicated_types
from ..families.stacked import block_of_stacked
from ..formats.base import Axes, Format
from ..storage.module import StoredModule
from .assemble import as_parameter
from .limits import refused_degree, remarks_on_encoder, remarks_on_zeros
from .pieces import Parameter, Piece
from .sample import one_layer_of_each
from .shares import Expert, Share, known, projections, step_of
from .stacking import Cut, StackedTensors, stack, stack_experts

__all__ = ["Share", "Splitter"]


# Sections of the outputs: K for keys or groups, V for values, H for one output of each value head
_STATES = {CutBy.STATE_SECTIONS: "KKV", CutBy.MAMBA_SECTIONS: "VKK", CutBy.MAMBA_PROJECTIONS: "VVKKH"}
_OF_INPUTS = (CutBy.HEAD_INPUTS, CutBy.STATE_INPUTS, CutBy.GROUP_INPUTS)
_COPIED = (CutBy.KEY_VALUE_HEADS, CutBy.INDEX_HEADS)  # where these are fewer than ranks
_VOCABULARY_STEP = 64  # DEFAULT_VOCAB_PADDING_SIZE
_MOST_ADVISED = 16


@dataclass(slots=True)
class Splitter:
    """The cut of one checkpoint for one degree.

    Raises:
        SplitError: the model's family, its sizes or a format do not allow it.
    """

    modules: Mapping[str, tuple[Format, StoredModule]]
    facts: ModelFacts
    degree: Degree
    replicated_head: bool = False
    """Whether each replica of attention has all of ``lm_head`` (``--enable-dp-lm-head``)."""
    part: bool = False
    """Whether ``modules`` are only some of a checkpoint's: experts may be missing, and no degrees are advised."""
    places: Mapping[int, Sequence[int]] = field(default_factory=dict)
    """Layer -> the expert at each place of all ranks, where that is not each expert at its own number."""
    singles: list[str] = field(init=False, default_factory=list)
    """The modules of the decoder that belong to no expert."""
    left_to_class: list[str] = field(init=False, default_factory=list)
    """The modules of encoders of images and sound, and others that SGLang's class loads itself: every rank gets them as
    they are stored."""
    experts: dict[str, list[Expert]] = field(init=False, default_factory=dict)
    """``...experts`` -> the projections of each, in order."""
    shares: dict[str, Share] = field(init=False, default_factory=dict)
    """MLP or ``...experts`` -> how ranks share its columns."""

    def __post_init__(self) -> None:
        family, model_type = self.family, self.facts.own_model_type
        if not (self.facts.names_family and family.can_be_cut):
            raise SplitError(
                f"model_type {model_type!r:.100} cannot be cut; the families known are {', '.join(cuttable_types())}"
            )
        if self.degree.dp > 1 and not family.attention_replicas:
            raise SplitError(
                f"{self.degree}: SGLang keeps no replicas of {model_type}'s attention (--enable-dp-attention); it does "
                f"of that of {', '.join(replicated_types())}"
            )
        self._find_experts()
        self._share_columns()
        refused = refused_degree(self.facts, self.degree, self.left_to_class, experts=bool(self.experts))
        if refused is not None:
            raise SplitError(f"{refused}{self._advice()}")

    @property
    def family(self) -> Family:
        return self.facts.family

    @property
    def padded(self) -> dict[str, Share]:
        """The shares with added zeros, by SGLang's names."""
        return {self.family.sglang_name(name): share for name, share in self.shares.items() if share.padding}

    def parameters(self, rank: int) -> list[Parameter]:
        """All parameters of ``rank``, in checkpoint order. Raises :class:`SplitError`."""
        out: list[Parameter] = []
        tied = ties_head(self.facts) and self.family.embedding in self.modules
        for joined, members in self.family.joined_groups(self.singles).items():
            if (scale := cache_scale(joined)) is not None:
                out += self._cache_scales(joined, scale)
            elif not (tied and joined == self.family.head):
                cuts = [cut for name in members for cut in self._cuts(name, rank)]
                self._check_tile(joined, cuts)
                out += self._joined(joined, cuts)
        for prefix, stored in self.experts.items():
            out += self._experts(prefix, stored, rank)
        # SGLang names and cuts these itself, and refuses the degrees that are refused here.
        for name in self.left_to_class:
            if tower_of(name) is None and self.family.cut_of(name) is not None:
                self._cuts(name, rank)
        out += [
            as_parameter(tensor) for name in self.left_to_class for tensor in self.modules[name][1].tensors.values()
        ]
        return out

    def total_bytes(self) -> int:
        """Bytes of the parameters of all ranks. Raises :class:`SplitError`."""
        # Ranks that share experts have equally many.
        firsts = range(0, self.degree.tp, self.degree.moe_tp)
        return sum(p.nbytes for rank in firsts for p in self.parameters(rank)) * self.degree.moe_tp

    def remarks(self) -> list[str]:
        """Remarks for the user on added zeros, and on flags that SGLang needs for the degree."""
        on_encoder = remarks_on_encoder(self.facts, self.degree, self.left_to_class)
        return [*remarks_on_zeros(self.degree, self.padded), *on_encoder]

    def _find_experts(self) -> None:
        stored: dict[str, dict[int, dict[str, str]]] = {}
        for name in self.modules:
            found = self.family.expert_of(name)
            if self.family.is_left_to_class(name):
                self.left_to_class.append(name)
            elif found is not None:
                prefix, number, word = found
                stored.setdefault(prefix, {}).setdefault(number, {})[word] = name
            elif block_of_stacked(self.family, name, self._shapes(name), self.facts.experts) is not None:
                raise SplitError(f"{name} has all experts of a layer in one tensor, which is not cut for ranks")
            else:
                self.singles.append(name)
        for prefix, by_number in stored.items():
            for number in range(len(by_number)):
                if number not in by_number and not self.part:
                    raise SplitError(
                        f"{prefix}: expert {number} is missing, and there is an expert {max(by_number)}; "
                        "take all experts from one model"
                    )
            self.experts[prefix] = [
                projections(f"{prefix}.{n}", parts, self.family) for n, parts in sorted(by_number.items())
            ]

    def _shapes(self, name: str) -> list[tuple[int, ...]]:
        return [tensor.shape for tensor in self.modules[name][1].tensors.values()]

    def _share_columns(self) -> None:
        columns: dict[tuple[str, int], list[tuple[str, int, int]]] = {}
        for name, (fmt, stored) in self.modules.items():
            down, joined = self.family.is_down(name), self.family.cut_of(name) is CutBy.GATE_AND_UP
            if not (down or joined or self.family.is_up(name)) or tower_of(name) is not None:
                continue
            expert = self.family.expert_of(name)
            shape, tile = fmt.shape(stored), fmt.tile(experts=expert is not None)
            total, step = (shape[1], tile[1]) if down else (shape[0] // 2 if joined else shape[0], tile[0])
            ranks = self.degree.moe_tp if expert else self.degree.tp
            owner = expert[0] if expert else name.rpartition(".")[0]
            columns.setdefault((owner, ranks), []).append((name, total, step))
        for (owner, ranks), members in columns.items():
            name, total, _ = members[0]
            if any(size != total for _, size, _ in members):
                raise SplitError(f"{owner}: gate, up and down disagree in how many columns it has")
            if total % ranks:
                raise SplitError(f"{owner}: {total} columns cannot be shared by {ranks} ranks{self._advice()}")
            step = lcm(*(step for _, _, step in members))
            native = total // ranks
            per_rank = native if ranks == 1 or native % step == 0 else -(-total // (step * ranks)) * step
            self.shares[owner] = Share(total, ranks, per_rank, step)

    def _advice(self) -> str:
        """The end of a message with degrees that the checkpoint can be cut for."""
        if self.part:
            return ""
        part = one_layer_of_each(self.modules, self.family)
        fitting = [str(tp) for tp in range(1, _MOST_ADVISED + 1) if self._fits(part, tp)]
        parts = [f"{name} {n}" for name, n in (("ep", self.degree.ep), ("dp", self.degree.dp)) if n > 1]
        beside = f" with {' and '.join(parts)}" if parts else ""
        found = f"tp {', '.join(fitting)}" if fitting else f"no tp up to {_MOST_ADVISED}"
        return f"; {found}{beside} would do"

    def _fits(self, modules: Mapping[str, tuple[Format, StoredModule]], tp: int) -> bool:
        try:
            degree = Degree(tp, self.degree.ep, self.degree.dp)
            splitter = Splitter(modules, self.facts, degree, self.replicated_head, part=True)
            for rank in range(0, tp, degree.moe_tp):  # ranks that share experts are cut alike
                splitter.parameters(rank)
        except SplitError:
            return False
        return True

    def _cuts(self, name: str, rank: int) -> list[Cut]:
        """A module's part on a rank: one range of its outputs, or several one after the other."""
        cut, tp = self.family.cut_of(name), self.degree.attention_tp
        if cut is CutBy.GATE_AND_UP:
            return self._gate_and_up(name, self.shares[name.rpartition(".")[0]], rank)
        # Heads, rows of all of them, and whether several ranks may have the same.
        if cut in _STATES:
            keys, values = self._state_heads()
            parts = {"K": keys, "V": values, "H": (values[0], 1)}
            sections = [(parts[part][0], parts[part][0] * parts[part][1], False) for part in _STATES[cut]]
        elif cut is CutBy.QKV_SECTIONS:
            own, shared = self._heads(name)
            size = self._outputs(name) // (own + 2 * shared)
            sections = [(own, own * size, False), (shared, shared * size, True), (shared, shared * size, True)]
        else:
            return [self._cut(name, rank)]
        if sum(rows for _, rows, _ in sections) != self._outputs(name):
            raise SplitError(f"{name}: {self._outputs(name)} rows are not those of the heads in config.json")
        if tp == 1:
            return [Cut(name)]
        cuts, start = [], 0
        for heads, rows, copied in sections:
            first, end, share = self._by_heads(name, rows, heads, rank % tp, copied=copied)
            self._check_start(name, start)
            cuts.append(Cut(name, n=(start + first, start + end, share)))
            start += rows
        return cuts

    def _gate_and_up(self, name: str, columns: Share, rank: int) -> list[Cut]:
        if columns.ranks == 1:
            return [Cut(name)]
        self._check_start(name, columns.total)
        start, end = columns.of(rank)
        return [Cut(name, n=(at + start, at + end, columns.columns)) for at in (0, columns.total)]

    def _check_start(self, name: str, row: int) -> None:
        """Raises where a part of the outputs of one stored linear begins inside of a block."""
        fmt, stored = self.modules[name]
        step = step_of(fmt, stored, inputs=False)
        if row % step:
            raise SplitError(
                f"{name} ({fmt.kind}): a part of its rows begins at {row}, inside of a block of {step}: take it from a "
                "source in another format"
            )

    def _outputs(self, name: str) -> int:
        fmt, stored = self.modules[name]
        return fmt.shape(stored)[0]

    def _state_heads(self) -> tuple[tuple[int, int], tuple[int, int]]:
        keys, values = self.facts.state_keys, self.facts.state_values
        if keys is None or values is None:
            raise SplitError(
                "config.json does not say which heads its delta nets have (linear_num_key_heads and so on)"
            )
        return keys, values

    def _cut(self, name: str, rank: int) -> Cut:
        fmt, stored = self.modules[name]
        shape, cut = fmt.shape(stored), self.family.cut_of(name)
        owner = self.shares.get(name.rpartition(".")[0])
        if owner is not None and self.family.is_up(name):
            return Cut(name, n=(*owner.of(rank), owner.columns))
        if owner is not None and self.family.is_down(name):
            return Cut(name, k=(*owner.of(rank), owner.columns))
        if cut is CutBy.VOCABULARY and not self.replicated_head and self.family.role_by_name(name) is Role.HEAD:
            return self._vocabulary(name, shape[0], rank, self.degree.tp)
        # Each replica of attention has all of the rest.
        tp = self.degree.attention_tp
        rank %= tp
        if self.degree.dp > 1 and last_word(name) in self.family.complete_in_replicas:
            return Cut(name)
        if cut is CutBy.VOCABULARY:
            return self._vocabulary(name, shape[0], rank, tp)
        if cut in _OF_INPUTS:
            return Cut(name, k=self._even(name, shape[1], self._parts(cut, name), rank, tp, inputs=True))
        if cut in _COPIED:
            return Cut(name, n=self._by_heads(name, shape[0], self._parts(cut, name), rank, copied=True))
        if cut is not None:
            return Cut(name, n=self._even(name, shape[0], self._parts(cut, name), rank, tp))
        if tp > 1 and cut is None and self.family.members_of(last_word(name)):
            raise SplitError(
                f"{name} is stored as one, and how ranks share it is not known for {self.facts.own_model_type}"
            )
        return Cut(name)

    def _parts(self, cut: CutBy, name: str) -> int:
        """The number of heads or groups that a linear is cut by."""
        if cut in (CutBy.OUTPUT_GROUPS, CutBy.GROUP_INPUTS):
            return known(self.facts.output_groups, "o_groups")
        if cut is CutBy.INDEX_HEADS:
            return known(self.facts.index_heads, "sparse_attention_config.sparse_num_index_heads")
        if cut is CutBy.STATE_KEY_HEADS:
            return self._state_heads()[0][0]
        if cut in (CutBy.STATE_VALUE_HEADS, CutBy.STATE_INPUTS):
            return self._state_heads()[1][0]
        return self._heads(name)[1 if cut is CutBy.KEY_VALUE_HEADS else 0]

    def _vocabulary(self, name: str, size: int, rank: int, ranks: int) -> Cut:
        padded = -(-size // _VOCABULARY_STEP) * _VOCABULARY_STEP
        if padded % ranks:
            raise SplitError(f"{name}: a vocabulary of {padded} rows cannot be shared by {ranks} ranks{self._advice()}")
        share = Share(size, ranks, padded // ranks)
        return Cut(name, n=(*share.of(rank), share.columns))

    def _by_heads(self, name: str, size: int, heads: int, rank: int, *, copied: bool) -> tuple[int, int, int]:
        """A rank's range of ``size`` outputs; with ``copied``, consecutive ranks may have the same head."""
        tp = self.degree.attention_tp
        copies = max(1, tp // heads) if copied else 1
        if copied and heads < tp and tp % heads:
            raise SplitError(
                f"{name}: {heads} shared heads on {tp} ranks; one must be a multiple of the other{self._advice()}"
            )
        return self._even(name, size, heads, rank // copies, tp // copies)

    def _heads(self, name: str) -> tuple[int, int]:
        """The attention heads and the key-value heads of a module's layer."""
        layer = layer_of(name)
        other = None if layer is None else self.facts.heads_of.get(layer)
        return other or (
            known(self.facts.attention_heads, "num_attention_heads"),
            known(self.facts.key_value_heads, "num_key_value_heads"),
        )

    def _even(
        self, name: str, size: int, heads: int, rank: int, ranks: int, *, inputs: bool = False
    ) -> tuple[int, int, int]:
        if heads % ranks or size % heads:
            of = "groups" if self.family.cut_of(name) in (CutBy.OUTPUT_GROUPS, CutBy.GROUP_INPUTS) else "heads"
            raise SplitError(f"{name}: {heads} {of} cannot be shared by {ranks} ranks{self._advice()}")
        share = size // ranks
        fmt, stored = self.modules[name]
        step = step_of(fmt, stored, inputs=inputs)
        if ranks > 1 and share % step:
            raise self._uneven(name, fmt, share, size, f"the format is stored in blocks of {step}")
        return rank * share, (rank + 1) * share, share

    def _uneven(self, name: str, fmt: Format, share: int, size: int, why: str) -> SplitError:
        part = "rows" if self.family.cut_of(name) is CutBy.VOCABULARY else "heads"
        return SplitError(
            f"{name} ({fmt.kind}): a rank's {part} have {share} of its {size} columns, and {why}; "
            f"{part} cannot be filled up with zeros: use fewer ranks, or another format here{self._advice()}"
        )

    def _check_tile(self, joined: str, cuts: Sequence[Cut]) -> None:
        """Raises where SGLang's kernels would not take a rank's part of a layer. MLPs are cut in complete tiles."""
        fmt = self.modules[cuts[0].name][0]
        tile = fmt.tile(experts=False)
        if tile == (1, 1):
            return
        shapes = [other.shape(stored) for other, stored in (self.modules[cut.name] for cut in cuts)]
        outputs = [shape[0] if cut.n is None else cut.n[2] for shape, cut in zip(shapes, cuts, strict=True)]
        width, inputs = shapes[0][1], shapes[0][1] if cuts[0].k is None else cuts[0].k[2]
        if fmt.fits_untiled(outputs, inputs):
            return
        # Parts that run as one have their outputs side by side.
        total = sum(dict(zip((cut.name for cut in cuts), (n for n, _ in shapes), strict=True)).values())
        for share, size, step in ((sum(outputs), total, tile[0]), (inputs, width, tile[1])):
            if share < size and share % step:
                raise self._uneven(joined, fmt, share, size, f"SGLang's kernels take multiples of {step}")

    def _joined(self, joined: str, parts: Sequence[Cut]) -> Iterator[Parameter]:
        """One layer of SGLang's, of one module or of several that run as one."""
        for stacked in self._leaves(joined, [part.name for part in parts]):
            name = self.family.sglang_name(f"{joined}.{stacked.name}" if stacked.name else joined)
            if stacked.axes == Axes() and prod(stacked.tensors[0].shape) == 1:
                pieces = [Piece(t, (0, 1), (0, 1), (0, i, 0)) for i, t in enumerate(stacked.tensors)]
                yield Parameter(name, stacked.dtype, (len(pieces),), tuple(pieces))
                continue
            # All parts have the same tensor if it has no outputs, like an order of inputs.
            count = 1 if stacked.axes.n is None else len(parts)
            yield stack(name, list(zip(stacked.tensors[-count:], parts[-count:], strict=True)), stacked)

    def _cache_scales(self, name: str, scale: CacheScale) -> Iterator[Parameter]:
        """A scale of the KV cache, which every rank has."""
        tensor = self.modules[name][1].tensors[""]
        for parameter in parameters_of(scale, self.modules):
            served = self.family.sglang_name(parameter)
            yield Parameter(served, tensor.dtype, (), (Piece(tensor, (0, 1), (0, 1), (0, 0, 0)),))

    def _experts(self, prefix: str, stored: Sequence[Expert], rank: int) -> Iterator[Parameter]:
        """The parameters of a FusedMoE: this rank's experts, format by format."""
        share, layer = self.shares[prefix], layer_of(prefix)
        places = self.places.get(-1 if layer is None else layer, range(len(stored)))
        ep, here = rank // self.degree.moe_tp, len(places) // self.degree.ep
        if len(places) % self.degree.ep:
            raise SplitError(
                f"{prefix}: {len(places)} experts cannot be shared by {self.degree.ep} expert-parallel ranks"
            )
        columns = (*share.of(rank % self.degree.moe_tp), share.columns)
        kinds: dict[int, tuple[object, object]] = {
            expert: (self.modules[parts.ups[0]][0].fuses_as, self.modules[parts.down][0].fuses_as)
            for expert, parts in enumerate(stored)
        }
        groups = expert_groups(kinds, places[ep * here : (ep + 1) * here])
        mixed = len({kind for both in kinds.values() for kind in both}) > 1
        served = self.family.sglang_name(prefix)
        for number, (ups, downs) in enumerate(groups):
            home = f"{served}.groups.{number}" if mixed else served
            for weight, cut, parts in (
                ("w13", Cut("", n=columns), [stored[expert].ups for expert in ups]),
                ("w2", Cut("", k=columns), [(stored[expert].down,) for expert in downs]),
            ):
                names = [name for part in parts for name in part]
                if self.degree.moe_tp > 1 and any(self.modules[name][0].act_order for name in names):
                    raise SplitError(f"{prefix}: experts in act-order cannot be cut; use as many ep as tp ranks")
                for stacked in self._leaves(prefix, names):
                    count = len(parts[0])
                    each = [stacked.tensors[i : i + count] for i in range(0, len(stacked.tensors), count)]
                    yield stack_experts(f"{home}.{weight}_{stacked.name}", each, cut, stacked)

    def _leaves(self, owner: str, names: Sequence[str]) -> list[StackedTensors]:
        """The tensors of modules that run as one, which must all have the same, in the same dtypes."""
        out: dict[str, StackedTensors] = {}
        for name in names:
            fmt, stored = self.modules[name]
            for leaf, tensor in stored.tensors.items():
                key, dtype = fmt.sglang_name(leaf), fmt.dtype_of(leaf, tensor.dtype)
                stacked = out.get(key)
                if stacked is None:
                    stacked = StackedTensors(
                        key, dtype, fmt.axes(leaf), fmt.filler(leaf), fmt.transposed_in_experts(leaf), []
                    )
                    out[key] = stacked
                stacked.tensors.append(tensor)
                if stacked.dtype != dtype:
                    raise SplitError(
                        f"{owner}: {stacked.name} is {stacked.dtype} in {names[0]} and {dtype} in {name}; a "
                        "rank's file holds them as one tensor: take both from one source"
                    )
        for stacked in out.values():
            if len(stacked.tensors) != len(names):
                raise SplitError(f"{owner}: not all of its parts have {stacked.name}")
        return list(out.values())
