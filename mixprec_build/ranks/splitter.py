"""A checkpoint cut for tensor- and expert-parallel ranks: what each rank of SGLang holds, and nothing else.

A rank's files hold SGLang's parameters under SGLang's names, as its weight loaders would fill them and before any
kernel's repacking: q, k and v in one tensor, the experts of a layer in a few. A rank so reads some large tensors
instead of thousands of small ones, and what it reads must fit its parameters exactly.

====================  =============================================================================
cut along outputs     q, k, v (by heads), gate, up, q_b, kv_b; embeddings and lm_head by vocabulary
cut along inputs      o, down
whole on every rank   norms, routers, q_a with kv_a, tensors without the axis that is cut
by expert             whole experts under expert parallelism, each cut by what parallelism is left
====================  =============================================================================

With data-parallel attention, attention and embeddings are cut for the ranks of one replica, the rest for all.

Where a share of an MLP's columns would end inside a quantization block or group, or on no tile of the kernel, ranks
get whole blocks and zero weights up to the same size: zero columns of gate and up meet zero rows of down, so no
result changes. Layouts are those of SGLang 0.5.17: layers/linear.py, layers/vocab_parallel_embedding.py and
layers/moe/fused_moe_triton/layer.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import lcm, prod

from ..checkpoint.degree import Degree
from ..errors import SplitError
from ..families.base import ATTENTION_REPLICAS, FAMILIES, expert_groups, is_down, joined_groups, layer_prefix
from ..formats.base import Axes, Format
from ..patterns.compress import compress
from ..storage.module import StoredModule
from .pieces import Parameter, Piece
from .stacking import Cut, StackedTensors, stack, stack_experts

__all__ = ["Share", "Splitter"]


_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj|w1|w2|w3)")
_GATES, _UPS, _DOWNS = ("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")
_QUERY_HEADS = {"q_proj", "q_b_proj", "kv_b_proj"}
_KV_HEADS = {"k_proj", "v_proj"}
_EMBEDDING, _HEAD = "embed_tokens", "lm_head"
_VOCABULARY_STEP = 64  # DEFAULT_VOCAB_PADDING_SIZE
WASTEFUL = 0.4
_MOST_ADVISED = 16


@dataclass(frozen=True, slots=True)
class Share:
    """How many of an MLP's ``whole`` columns a rank of ``ranks`` would hold, and ``held`` with zeros added."""

    whole: int
    ranks: int
    held: int
    step: int = 1
    """What ``held`` is to be a multiple of."""

    @property
    def native(self) -> int:
        return self.whole // self.ranks

    @property
    def padding(self) -> float:
        """Added columns, as a part of ``whole``."""
        return self.held * self.ranks / self.whole - 1

    def of(self, rank: int) -> tuple[int, int]:
        return min(rank * self.held, self.whole), min((rank + 1) * self.held, self.whole)


@dataclass(slots=True)
class Splitter:
    """The cut of one checkpoint for one degree.

    Raises:
        SplitError: the model's family, its sizes or a format do not allow it.
    """

    modules: Mapping[str, tuple[Format, StoredModule]]
    config: Mapping[str, object]
    degree: Degree
    replicated_head: bool = False
    """Whether each replica of attention has all of ``lm_head`` (``--enable-dp-lm-head``)."""
    part: bool = False
    """Whether ``modules`` are some of a checkpoint's only: experts may be missing, and no degrees are advised."""
    singles: list[str] = field(init=False, default_factory=list)
    """The modules that are of no expert."""
    experts: dict[str, list[tuple[str, str, str]]] = field(init=False, default_factory=dict)
    """``...experts`` -> gate, up and down of each, in order."""
    shares: dict[str, Share] = field(init=False, default_factory=dict)
    """MLP or ``...experts`` -> how its columns are shared out."""

    def __post_init__(self) -> None:
        family = self.config.get("model_type")
        if not isinstance(family, str) or family not in FAMILIES:
            raise SplitError(
                f"model_type {family!r:.100} cannot be cut; the families known are {', '.join(sorted(FAMILIES))}"
            )
        if self.degree.dp > 1 and family not in ATTENTION_REPLICAS:
            raise SplitError(
                f"{self.degree}: SGLang keeps no replicas of {family}'s attention (--enable-dp-attention); it does of "
                f"that of {', '.join(sorted(ATTENTION_REPLICAS))}"
            )
        self._find_experts()
        self._share_columns()

    @property
    def padded(self) -> dict[str, Share]:
        """The shares with added zeros."""
        return {name: share for name, share in self.shares.items() if share.padding}

    def parameters(self, rank: int) -> list[Parameter]:
        """All that ``rank`` holds, in checkpoint order."""
        out: list[Parameter] = []
        tied = self.config.get("tie_word_embeddings") and "model.embed_tokens" in self.modules
        for joined, members in joined_groups(self.singles).items():
            if not (tied and joined == "lm_head"):
                cuts = [self._cut(name, rank) for name in members]
                self._check_tile(joined, cuts)
                out += self._joined(joined, cuts)
        for prefix, stored in self.experts.items():
            out += self._experts(prefix, stored, rank)
        return out

    def total_bytes(self) -> int:
        """What the files of all ranks hold together."""
        # Ranks that share experts hold as much as one another.
        firsts = range(0, self.degree.tp, self.degree.moe_tp)
        return sum(p.nbytes for rank in firsts for p in self.parameters(rank)) * self.degree.moe_tp

    def remarks(self) -> list[str]:
        """What a user should know of the added zeros."""
        by_share: dict[Share, list[str]] = {}
        for name, share in self.padded.items():
            by_share.setdefault(share, []).append(name)
        remarks = []
        for share, names in by_share.items():
            fitting = [n for n in range(share.ranks - 1, 0, -1) if share.whole % (n * share.step) == 0]
            advice = f"; {fitting[0]} ranks would need none" if share.padding > WASTEFUL and fitting else ""
            remarks.append(
                f"{self.degree}: a rank's {share.native} columns of {', '.join(compress(names)[:3])} are filled up to "
                f"{share.held} with zeros ({share.padding:.0%} more weights there){advice}"
            )
        return remarks

    # What is cut, and where

    def _find_experts(self) -> None:
        stored: dict[str, dict[int, dict[str, str]]] = {}
        for name in self.modules:
            found = _EXPERT.fullmatch(name)
            if found:
                stored.setdefault(found[1], {}).setdefault(int(found[2]), {})[found[3]] = name
            else:
                self.singles.append(name)
        for prefix, by_number in stored.items():
            for number in range(len(by_number)):
                if number not in by_number and not self.part:
                    raise SplitError(
                        f"{prefix}: expert {number} is missing, and there is an expert {max(by_number)}; "
                        "take all experts from one model"
                    )
            self.experts[prefix] = [_trio(f"{prefix}.{n}", parts) for n, parts in sorted(by_number.items())]

    def _share_columns(self) -> None:
        columns: dict[tuple[str, int], list[tuple[str, int, int]]] = {}
        for name, (fmt, stored) in self.modules.items():
            parent, _, last = name.rpartition(".")
            down = is_down(name)
            if not down and last not in _GATES + _UPS:
                continue
            expert = _EXPERT.fullmatch(name)
            shape, tile = fmt.shape(stored), fmt.tile(experts=expert is not None)
            whole, step = (shape[1], tile[1]) if down else (shape[0], tile[0])
            ranks = self.degree.moe_tp if expert else self.degree.tp
            columns.setdefault((expert[1] if expert else parent, ranks), []).append((name, whole, step))
        for (owner, ranks), members in columns.items():
            name, whole, _ = members[0]
            if any(size != whole for _, size, _ in members):
                raise SplitError(f"{owner}: gate, up and down disagree in how many columns it has")
            if whole % ranks:
                raise SplitError(f"{owner}: {whole} columns cannot be shared by {ranks} ranks{self._advice()}")
            step = lcm(*(step for _, _, step in members))
            native = whole // ranks
            held = native if ranks == 1 or native % step == 0 else -(-whole // (step * ranks)) * step
            self.shares[owner] = Share(whole, ranks, held, step)

    def _advice(self) -> str:
        """The degrees at which all of the checkpoint can be cut."""
        if self.part:
            return ""
        part = _one_layer_of_each(self.modules)
        fitting = [str(tp) for tp in range(1, _MOST_ADVISED + 1) if self._fits(part, tp)]
        parts = [f"{name} {n}" for name, n in (("ep", self.degree.ep), ("dp", self.degree.dp)) if n > 1]
        beside = f" with {' and '.join(parts)}" if parts else ""
        found = f"tp {', '.join(fitting)}" if fitting else f"no tp up to {_MOST_ADVISED}"
        return f"; {found}{beside} would do"

    def _fits(self, modules: Mapping[str, tuple[Format, StoredModule]], tp: int) -> bool:
        try:
            degree = Degree(tp, self.degree.ep, self.degree.dp)
            splitter = Splitter(modules, self.config, degree, self.replicated_head, part=True)
            for rank in range(0, tp, degree.moe_tp):  # those that share experts are cut alike
                splitter.parameters(rank)
        except SplitError:
            return False
        return True

    def _cut(self, name: str, rank: int) -> Cut:
        fmt, stored = self.modules[name]
        shape, last = fmt.shape(stored), name.rpartition(".")[2]
        owner = self.shares.get(name.rpartition(".")[0])
        if owner is not None and last in _GATES + _UPS:
            return Cut(name, n=(*owner.of(rank), owner.held))
        if owner is not None and is_down(name):
            return Cut(name, k=(*owner.of(rank), owner.held))
        if last == _HEAD and not self.replicated_head:
            return self._vocabulary(name, shape[0], rank, self.degree.tp)
        # The rest is what each replica of attention has.
        tp = self.degree.attention_tp
        rank %= tp
        if last in (_EMBEDDING, _HEAD):
            return self._vocabulary(name, shape[0], rank, tp)
        if last in _QUERY_HEADS:
            return Cut(name, n=self._even(name, shape[0], self._number("num_attention_heads"), rank, tp))
        if last in _KV_HEADS:
            heads = self._number("num_key_value_heads", "num_attention_heads")
            # With fewer heads than ranks, ranks that follow one another hold the same head.
            copies = max(1, tp // heads)
            if heads < tp and tp % heads:
                raise SplitError(
                    f"{name}: {heads} key-value heads on {tp} ranks; one must be a multiple of the other"
                    f"{self._advice()}"
                )
            return Cut(name, n=self._even(name, shape[0], heads, rank // copies, tp // copies))
        if last == "o_proj":
            return Cut(name, k=self._even(name, shape[1], self._number("num_attention_heads"), rank, tp))
        return Cut(name)

    def _vocabulary(self, name: str, size: int, rank: int, ranks: int) -> Cut:
        padded = -(-size // _VOCABULARY_STEP) * _VOCABULARY_STEP
        if padded % ranks:
            raise SplitError(f"{name}: a vocabulary of {padded} rows cannot be shared by {ranks} ranks{self._advice()}")
        share = Share(size, ranks, padded // ranks)
        return Cut(name, n=(*share.of(rank), share.held))

    def _number(self, *keys: str) -> int:
        value = next((self.config[key] for key in keys if self.config.get(key) is not None), None)
        if type(value) is not int or value < 1:
            raise SplitError(f"config.json has no {keys[0]}, which says how attention is cut")
        return value

    def _even(self, name: str, size: int, heads: int, rank: int, ranks: int) -> tuple[int, int, int]:
        if heads % ranks or size % heads:
            raise SplitError(f"{name}: {heads} heads cannot be shared by {ranks} ranks{self._advice()}")
        share = size // ranks
        fmt, stored = self.modules[name]
        axes = [fmt.axes(leaf) for leaf in stored.tensors]
        inputs = name.endswith("o_proj")
        step = lcm(*(axis.per for axis in ((a.k if inputs else a.n) for a in axes) if axis is not None))
        if ranks > 1 and share % step:
            raise self._uneven(name, fmt, share, size, f"the format is stored in blocks of {step}")
        return rank * share, (rank + 1) * share, share

    def _uneven(self, name: str, fmt: Format, share: int, size: int, why: str) -> SplitError:
        return SplitError(
            f"{name} ({fmt.kind}): a rank's heads have {share} of its {size} columns, and {why}; "
            f"heads cannot be filled up with zeros: use fewer ranks, or another format here{self._advice()}"
        )

    def _check_tile(self, joined: str, cuts: Sequence[Cut]) -> None:
        """Raises where SGLang's kernels would not take a rank's part of a layer. MLPs are cut by whole tiles."""
        fmt = self.modules[cuts[0].name][0]
        tile = fmt.tile(experts=False)
        if tile == (1, 1):
            return
        shapes = [other.shape(stored) for other, stored in (self.modules[cut.name] for cut in cuts)]
        outputs = [shape[0] if cut.n is None else cut.n[2] for shape, cut in zip(shapes, cuts, strict=True)]
        whole, inputs = shapes[0][1], shapes[0][1] if cuts[0].k is None else cuts[0].k[2]
        if fmt.fits_untiled(outputs, inputs):
            return
        # Parts that run as one have their outputs side by side.
        for share, size, step in ((sum(outputs), sum(n for n, _ in shapes), tile[0]), (inputs, whole, tile[1])):
            if share < size and share % step:
                raise self._uneven(joined, fmt, share, size, f"SGLang's kernels take multiples of {step}")

    # The parameters

    def _joined(self, joined: str, parts: Sequence[Cut]) -> Iterator[Parameter]:
        """One layer of SGLang's, of one module or of several that run as one."""
        for held in self._leaves(joined, [part.name for part in parts]):
            name = f"{joined}.{held.name}" if held.name else joined
            if held.axes == Axes() and prod(held.tensors[0].shape) == 1:
                pieces = [Piece(t, (0, 1), (0, 1), (0, i, 0)) for i, t in enumerate(held.tensors)]
                yield Parameter(name, held.dtype, (len(pieces),), tuple(pieces))
                continue
            # Where a tensor has no outputs, as an order of inputs, all parts have the same.
            count = 1 if held.axes.n is None else len(parts)
            yield stack(name, list(zip(held.tensors[-count:], parts[-count:], strict=True)), held)

    def _experts(self, prefix: str, stored: Sequence[tuple[str, str, str]], rank: int) -> Iterator[Parameter]:
        """The parameters of a FusedMoE: those of this rank's experts, format by format."""
        share = self.shares[prefix]
        ep, here = rank // self.degree.moe_tp, len(stored) // self.degree.ep
        if len(stored) % self.degree.ep:
            raise SplitError(
                f"{prefix}: {len(stored)} experts cannot be shared by {self.degree.ep} expert-parallel ranks"
            )
        columns = (*share.of(rank % self.degree.moe_tp), share.held)
        kinds: dict[int, tuple[object, object]] = {
            expert: (self.modules[gate][0].fuses_as, self.modules[down][0].fuses_as)
            for expert, (gate, _, down) in enumerate(stored)
        }
        groups = expert_groups(kinds, range(ep * here, (ep + 1) * here))
        mixed = len({kind for both in kinds.values() for kind in both}) > 1
        for number, (ups, downs) in enumerate(groups):
            home = f"{prefix}.groups.{number}" if mixed else prefix
            for weight, members, first, count in (("w13", ups, 0, 2), ("w2", downs, 2, 1)):
                names = [name for expert in members for name in stored[expert][first : first + count]]
                if self.degree.moe_tp > 1 and any(self.modules[name][0].scattered for name in names):
                    raise SplitError(f"{prefix}: experts in act-order cannot be cut; use as many ep as tp ranks")
                for held in self._leaves(prefix, names):
                    each = [held.tensors[i : i + count] for i in range(0, len(held.tensors), count)]
                    yield stack_experts(f"{home}.{weight}_{held.name}", each, columns, held)

    def _leaves(self, owner: str, names: Sequence[str]) -> list[StackedTensors]:
        """The tensors of modules that run as one, which must all have the same, in the same dtypes."""
        out: dict[str, StackedTensors] = {}
        for name in names:
            fmt, stored = self.modules[name]
            for leaf, tensor in stored.tensors.items():
                key = fmt.held_as(leaf)
                held = out.get(key)
                if held is None:
                    held = StackedTensors(key, tensor.dtype, fmt.axes(leaf), fmt.filler(leaf), fmt.turned(leaf), [])
                    out[key] = held
                held.tensors.append(tensor)
                if held.dtype != tensor.dtype:
                    raise SplitError(
                        f"{owner}: {held.name} is {held.dtype} in {names[0]} and {tensor.dtype} in {name}; a rank's "
                        "file holds them as one tensor: take both from one source"
                    )
        for held in out.values():
            if len(held.tensors) != len(names):
                raise SplitError(f"{owner}: not all of its parts have {held.name}")
        return list(out.values())


def _trio(expert: str, parts: Mapping[str, str]) -> tuple[str, str, str]:
    """An expert's gate, up and down projections; ``parts``: last word -> name."""
    lasts = max(zip(_GATES, _UPS, _DOWNS, strict=True), key=lambda lasts: len(parts.keys() & {*lasts}))
    lacking = [last for last in lasts if last not in parts]
    if lacking:
        raise SplitError(f"{expert}: has no {' and no '.join(lacking)}; take the whole expert from one model")
    gate, up, down = lasts
    return parts[gate], parts[up], parts[down]


def _one_layer_of_each(
    modules: Mapping[str, tuple[Format, StoredModule]],
) -> dict[str, tuple[Format, StoredModule]]:
    """The modules outside of layers, and of all layers that hold the same formats and shapes one."""
    layers: dict[str, list[str]] = {}
    for name in modules:
        layers.setdefault(layer_prefix(name), []).append(name)
    kinds: dict[object, list[str]] = {}
    for prefix, names in layers.items():
        kind = set()
        for name in names:
            fmt, stored = modules[name]
            expert = _EXPERT.fullmatch(name)
            inner = expert[3] if expert else name.removeprefix(prefix)
            kind.add((inner, fmt, *((leaf, t.dtype, t.shape) for leaf, t in stored.tensors.items())))
        kinds.setdefault((len(names), frozenset(kind)), names)
    return {name: modules[name] for names in kinds.values() for name in names}
