"""Finds scales that a quantizer folded into the modules before the ones it quantized.

AWQ, and SmoothQuant for Int8, multiply the input channels of a weight by scales before rounding it, and divide the
module that produces these inputs by them: the norm before q/k/v or before gate and up, ``v_proj`` before ``o_proj``,
``up_proj`` before ``down_proj``. The model computes the same, but its modules no longer fit those of another
checkpoint. So

- a norm must have the values that all modules it feeds were quantized with. It is taken from their source where they
  agree on its values, and the router with it; where they do not, the mix is refused.
- a pair like ``up_proj`` and ``down_proj`` must come from one source.

Norms show most scales, but not all: llm-compressor folds only between linears where a family has no norm before them.
So a pair from two sources whose norms agree is compared itself. Where scales go is from AutoAWQ 0.2.9: ``awq/models``,
``get_layers_for_scaling``, and ``awq/quantize/scale.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING

from ..families.names import layer_prefix
from ..families.parts import Role
from ..patterns.compress import compress
from ..text import some
from .probe import WeightProbe
from .problems import Problems, Replacement
from .rules import by_votes, can_serve_from, origin

if TYPE_CHECKING:
    import numpy as np

    from ..checkpoint.checkpoint import ValueReader
    from ..checkpoint.typed import Source
    from ..recipe.sources import Sources
    from ..storage.module import StoredModule
    from .types import PlannedModule

__all__ = ["Folding"]


_PAIRS_LOOKED_AT = 16
_JOINED_LOOKED_AT = 2
"""The limit for linears of which all rows have to be read."""


class Folding:
    """Compares the norms of a recipe's sources to find folded scales.

    Args:
        modules: the names of the model's modules.
    """

    def __init__(self, modules: Iterable[str], sources: Sources, reader: ValueReader):
        self._sources, self._reader = sources, reader
        self._family = family = sources.family
        names = list(modules)
        norms = {name for name in names if family.role_by_name(name) is Role.NORM}
        self.fed: dict[str, list[str]] = {}
        """Norm -> the modules that it feeds."""
        for name in names:
            for norm in family.norms_before(name):
                if norm in norms:
                    self.fed.setdefault(norm, []).append(name)
                    break
        self._differ: dict[tuple[str, str, str], bool] = {}
        self._apart: dict[tuple[str, str], bool] = {}
        self._fixed: set[str] = set()
        self._probe = WeightProbe(sources)
        self._scaled: dict[tuple[str, str, str], list[bool]] = {}
        self._unseen: dict[tuple[str, str, str, str], list[str]] = {}

    @cached_property
    def _folding(self) -> frozenset[str]:
        """Sources in formats whose quantizers fold scales, and those whose weights show it."""
        sources = self._sources.by_name.values()
        by_format = {
            source.name for source in sources if any(fmt.folds_activation_scales for fmt in source.distinct_formats)
        }
        quantized = [s for s in sources if s.name not in by_format and any(fmt.quantized for fmt in s.distinct_formats)]
        return frozenset(by_format | {source.name for source in quantized if self._has_folded(source)})

    def _has_folded(self, source: Source) -> bool:
        """Whether weights of a source are another's times the scales that its norms were divided by."""
        looked_at = 0
        for norm, fed in self.fed.items():
            for other in self._sources.by_name.values():
                if not self.differ(norm, source.name, other.name):
                    continue
                for name in fed:
                    fmt = source.known_format(name)
                    if fmt is None or not fmt.quantized or looked_at >= _PAIRS_LOOKED_AT:
                        continue
                    looked_at += 1
                    ours, theirs = self._values(norm, source), self._values(norm, other)
                    if ours is not None and theirs is not None:
                        # Gemma's norms multiply by 1 + weight.
                        ratios = [theirs / ours, (1 + theirs) / (1 + ours)]
                        if any(self._probe.columns_follow(name, source.name, other.name, ratio) for ratio in ratios):
                            return True
        return False

    def between(self, a: str, b: str) -> bool:
        """Whether norms may differ between two sources although these are one model."""
        return a != b and bool({a, b} & self._folding)

    def differ(self, norm: str, a: str, b: str) -> bool:
        """Whether a norm's values differ between two sources; False where one lacks them, or the file with them."""
        if a == b:
            return False
        key = (norm, min(a, b), max(a, b))
        if key not in self._differ:
            import numpy as np

            values = [self._values(norm, self._sources.by_name[name]) for name in (a, b)]
            # Releases of one model differ by a rounding to FP16 or BF16 at most.
            self._differ[key] = (
                values[0] is not None
                and values[1] is not None
                and not np.allclose(values[0], values[1], rtol=2**-7, atol=1e-6)
            )
        return self._differ[key]

    def _values(self, norm: str, source: Source) -> np.ndarray | None:
        module: StoredModule | None = source.module(norm)
        if module is None or "weight" not in module.tensors:
            return None
        values = self._reader.read(source.name, module.tensors["weight"])
        return None if values is None else values.astype("float32")

    def _are_apart(self, a: str, b: str) -> bool:
        """Whether any norm shows scales that are folded in one of two sources and not in the other."""
        key = (min(a, b), max(a, b))
        if key not in self._apart:
            self._apart[key] = self.between(a, b) and any(self.differ(norm, a, b) for norm in self.fed)
        return self._apart[key]

    def follow(self, norm: str, current: str, voters: Iterable[str]) -> str | None:
        """The source that a norm must come from instead of ``current``; ``voters`` are the sources of what it feeds.

        None where it may stay, or where they do not agree on its values.
        """
        voters = dict.fromkeys(voters)
        if not any(self.between(current, source) and self.differ(norm, current, source) for source in voters):
            return None
        return next((s for s in voters if not any(self.differ(norm, s, other) for other in voters)), None)

    def check(self, modules: Mapping[str, PlannedModule], problems: Problems) -> set[str]:
        """Adds to ``problems`` modules whose scales would be lost or applied twice.

        Returns the modules that the fixes of these problems take from one source.
        """
        self._fixed = set()
        if not self._folding:
            return self._fixed
        for norm, names in self.fed.items():
            if norm in modules:
                self._check_norm(modules[norm], [modules[name] for name in names if name in modules], modules, problems)
        group_of = {name: members for members in self._family.fused_groups(modules).values() for name in members}
        for name, module in modules.items():
            before = self._before(name, modules)
            if before is not None and before.source != module.source:
                fused = dict.fromkeys((*group_of[before.name], name))
                self._check_pair(before, module, [modules[part] for part in fused], problems)
        return self._fixed

    def is_traced(self, name: str, modules: Mapping[str, PlannedModule]) -> bool:
        """Whether a linear is known by its name to have its inputs from some norm or linear of the model."""
        known = name in self._norm_of and self._family.knows_norm_before(name)
        return known or self._before(name, modules) is not None

    def is_explained(self, module: PlannedModule, other: str, modules: Mapping[str, PlannedModule]) -> bool:
        """Whether the norm that seems to feed a linear comes along with it and is another one in ``other``."""
        norm = modules.get(self._norm_of.get(module.name, ""))
        return norm is not None and norm.source == module.source and self.differ(norm.name, module.source, other)

    @cached_property
    def _norm_of(self) -> dict[str, str]:
        return {name: norm for norm, names in self.fed.items() for name in names}

    def _check_norm(
        self,
        norm: PlannedModule,
        fed: list[PlannedModule],
        modules: Mapping[str, PlannedModule],
        problems: Problems,
    ) -> None:
        used = dict.fromkeys(module.source for module in (norm, *fed))
        for name in used:
            checkpoint = self._sources.by_name[name].checkpoint
            shard = checkpoint.absent.get(norm.name)
            if shard is not None and any(self.between(name, other) for other in used):
                repository = checkpoint.location.partition("@")[0]
                problems.hard(
                    f"`{name}` is read from the cache, which lacks {shard}: scales may be folded into {norm.name} "
                    f"there; bring it with `hf download {repository} {shard} --revision {checkpoint.commit}`",
                    code="not_cached",
                    modules=[norm.name],
                )

        def unlike(module: PlannedModule) -> bool:
            return self.between(norm.source, module.source) and self.differ(norm.name, norm.source, module.source)

        if not any(unlike(module) for module in fed):
            return
        prefix = layer_prefix(norm.name)
        owners: dict[str, list[str]] = {}
        for module in (norm, *fed):
            owners.setdefault(origin(module), []).append(module.name.removeprefix(prefix))
        folded = sorted({m.source for m in (norm, *fed)} & self._folding)
        parts = "; ".join(f"{', '.join(compress(words))} from {owner}" for owner, words in owners.items())
        text = (
            f"a norm and what it feeds must come from one source where scales are folded into it, as they are in "
            f"{' and '.join(f'`{name}`' for name in folded)} ({parts})"
        )
        named = {part.name for part in fed}
        pairs = [(before, m) for m in modules.values() if (before := self._before(m.name, modules)) is not None]
        partners = [m for before, m in pairs if before.name in named and self._pairs(before, m)]
        block = [m for m in chain(fed, partners) if not m.role.never_quantized]
        problems.soft([norm.name], text, *self._from_one_source([norm, *fed], block), code="folded_scales")

    def _from_one_source(self, about: list[PlannedModule], block: list[PlannedModule]) -> tuple[Replacement, list[str]]:
        """A fix that takes all of ``block`` from one source, and removes lines for norms and routers of ``about``."""
        for source in by_votes(block, self._sources):
            change = [(m.name, m.rule) for m in block if m.source != source.name]
            lines = {m.rule: None for m in about if m.role.never_quantized and m.rule and m.source != source.name}
            if (change or lines) and can_serve_from(source, block, self._family):
                self._fixed.update(module.name for module in block)
                found, others = Replacement.of(source.name, change)
                return replace(found, remove=tuple(lines)), others
        return Replacement(None), []

    def _before(self, name: str, modules: Mapping[str, PlannedModule]) -> PlannedModule | None:
        """The linear that scales of the inputs of ``name`` may be folded into."""
        candidates = (self._family.scaled_before(name) or "", *self._family.joined_scaled_before(name))
        return next((modules[before] for before in candidates if before in modules), None)

    def _is_joined(self, before: PlannedModule, after: PlannedModule) -> bool:
        """Whether only some outputs of ``before`` are inputs of ``after``."""
        return before.name in self._family.joined_scaled_before(after.name)

    def _pairs(self, before: PlannedModule, after: PlannedModule) -> bool:
        """Whether scales of ``after``'s inputs can be folded into ``before``: not through grouped-query attention."""
        if self._is_joined(before, after) and len(before.shape) == len(after.shape) == 2:
            # gate and up; q, k and v of equally many heads; MLA, where each head has keys and values of its own
            return before.shape[0] in (2 * after.shape[1], 3 * after.shape[1]) or self._is_latent(before)
        return before.shape[:1] == after.shape[1:2]

    def _is_latent(self, before: PlannedModule) -> bool:
        return before.name.rpartition(".")[2] in self._family.norms_beside

    def _check_pair(
        self, before: PlannedModule, after: PlannedModule, block: list[PlannedModule], problems: Problems
    ) -> None:
        if not self._pairs(before, after):
            return
        if not self._are_apart(before.source, after.source):
            if self._is_scaled(before, after):
                self._refuse_pair(before, after, block, problems)
            return
        prefix = layer_prefix(after.name)
        here = any(self.differ(norm, before.source, after.source) for norm in self.fed if layer_prefix(norm) == prefix)
        if not (here or before.format.folds_activation_scales or after.format.folds_activation_scales):
            return  # one source is itself a mix, which has this layer from the other
        self._refuse_pair(before, after, block, problems)

    def _is_scaled(self, before: PlannedModule, after: PlannedModule) -> bool:
        """Whether scales were folded into ``before`` in one of two sources whose norms agree, by a few of its kind."""
        pair = sorted((before.source, after.source))
        if not {*pair} & self._folding:
            return False
        key = (before.name.rpartition(".")[2], pair[0], pair[1])
        joined = self._is_joined(before, after)
        seen = self._scaled.setdefault(key, [])
        if len(seen) < (_JOINED_LOOKED_AT if joined else _PAIRS_LOOKED_AT) and not any(seen):
            found = self._probe.is_scaled(before.name, before.source, after.source, all_rows=joined)
            if found is None:
                words = key[0], after.name.rpartition(".")[2]
                self._unseen.setdefault((*words, before.source, after.source), []).append(after.name)
            seen.append(found is True)
        return any(seen)

    def unseen(self) -> Iterator[str]:
        """Yields notes on pairs that :meth:`check` could not compare."""
        for (first, last, source, other), names in self._unseen.items():
            yield (
                f"{some(compress(names))}: {first} is from `{source}` and {last} from `{other}`, and whether scales "
                "were folded between them cannot be seen, since their values are not on this machine; take both from "
                "one source to be sure"
            )

    def _refuse_pair(
        self, before: PlannedModule, after: PlannedModule, block: list[PlannedModule], problems: Problems
    ) -> None:
        folded = sorted({before.source, after.source} & self._folding)
        last, first = (module.name.rpartition(".")[2] for module in (after, before))
        text = (
            f"scales of {last}'s inputs are folded into {first} in {' and '.join(f'`{name}`' for name in folded)}, so "
            f"both must come from one source, but {first} is from {origin(before)} and {last} from {origin(after)}"
        )
        problems.soft([before.name, after.name], text, *self._from_one_source([], block), code="folded_scales")
