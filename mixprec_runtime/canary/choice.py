"""Chooses which of a checkpoint's weights the kernels are compared on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from mixprec_build.families.base import Family
from mixprec_build.families.names import numbered_part
from mixprec_build.families.parts import Role
from mixprec_build.formats.base import Format

__all__ = ["Experts", "Linear", "choose"]

_EACH = 2
"""Experts of each pair of formats."""
_MOST = 8
"""Pairs of formats in one layer of the canary."""


@dataclass(frozen=True, slots=True)
class Linear:
    """One linear."""

    name: str
    fmt: Format

    @property
    def text(self) -> str:
        return f"linear in {self.fmt.kind} ({self.name})"


@dataclass(frozen=True, slots=True)
class Experts:
    """Some experts of one layer."""

    layer: str
    parts: tuple[tuple[str, str, str], ...]
    """The modules of each expert: its gate, up and down."""
    formats: tuple[tuple[Format, Format], ...]
    """The formats of each expert: of its gate and up, and of its down."""

    @property
    def text(self) -> str:
        kinds = dict.fromkeys(ups.kind if ups == downs else f"{ups.kind}/{downs.kind}" for ups, downs in self.formats)
        return f"experts in {' + '.join(kinds)} ({self.layer})"


def choose(formats: Mapping[str, Format], family: Family) -> Iterator[Linear | Experts]:
    """Yields a linear for each quantized format, and experts for each combination of formats in one layer.

    ``formats``: module -> its format. Experts without a gate are left out.
    """
    linears: dict[object, Linear] = {}
    layers: dict[str, dict[int, dict[str, str]]] = defaultdict(lambda: defaultdict(dict))
    for name, fmt in formats.items():
        part = numbered_part(name) if family.role_by_name(name) is Role.EXPERT else None
        if part is not None:
            parent, number, word = part
            layers[parent][number][word] = name
        elif fmt.quantized:
            linears.setdefault(fmt.fuses_as, Linear(name, fmt))
    yield from linears.values()
    seen: set[frozenset[tuple[object, object]]] = set()
    for layer, numbered in layers.items():
        made = _experts(layer, numbered, formats, family)
        if made is not None:
            combination = frozenset((ups.fuses_as, downs.fuses_as) for ups, downs in made.formats)
            if combination not in seen and any(fmt.quantized for pair in made.formats for fmt in pair):
                seen.add(combination)
                yield made


def _experts(
    layer: str, numbered: Mapping[int, Mapping[str, str]], formats: Mapping[str, Format], family: Family
) -> Experts | None:
    """Two experts of each pair of formats; None where they have no gate."""
    found: dict[tuple[object, object], list[tuple[tuple[str, str, str], tuple[Format, Format]]]] = defaultdict(list)
    for words in numbered.values():
        trio = family.projections_among(words)
        if trio.gate is None or not {trio.gate, trio.up, trio.down} <= words.keys():
            return None
        parts = words[trio.gate], words[trio.up], words[trio.down]
        ups, downs = formats[parts[0]], formats[parts[2]]
        key = ups.fuses_as, downs.fuses_as
        if (key in found or len(found) < _MOST) and len(found[key]) < _EACH:
            found[key].append((parts, (ups, downs)))
    chosen = [one for experts in found.values() for one in experts]
    return Experts(layer, tuple(parts for parts, _ in chosen), tuple(pair for _, pair in chosen))
