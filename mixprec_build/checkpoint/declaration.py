"""``quantization_config`` of a compiled checkpoint, version 1: which module is stored in which format.

It is small and complete: the formats with their parameters and, as patterns, which module has which (the last matching
line wins, as in a recipe)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from reprlib import repr as brief
from typing import TYPE_CHECKING, Any

from ..errors import SourceError
from ..patterns.budget import MatchBudget
from ..patterns.compress import compress
from ..patterns.index import PatternIndex
from ..patterns.pattern import Pattern, PatternError, PatternReader

if TYPE_CHECKING:
    from ..formats.base import Format

__all__ = ["METHOD", "Declaration", "name_formats", "quantization_config"]


METHOD = "mixprec"
VERSION = 1


@dataclass(frozen=True, slots=True)
class Declaration:
    """``quantization_config`` of a compiled checkpoint, read back."""

    formats: Mapping[str, Format]
    rules: tuple[tuple[Pattern, str], ...]
    default: str
    _budget: MatchBudget = field(default_factory=MatchBudget, repr=False, compare=False)
    _index: PatternIndex = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_index", PatternIndex([pattern for pattern, _ in self.rules]))

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> Declaration:
        """Parses a declaration. Raises :class:`SourceError` for another version or a damaged one."""
        from ..formats.registry import format_from_json

        if config.get("version") != VERSION:
            found = config.get("version")
            raise SourceError(f"quantization_config version {brief(found)}; this mixprec reads {VERSION}")
        patterns = PatternReader()
        try:
            formats = {str(name): format_from_json(data) for name, data in config["formats"].items()}
            rules = tuple((patterns.read(pattern), str(name)) for pattern, name in config["modules"])
            default = config["default"]
            for name in (default, *(name for _, name in rules)):
                if name not in formats:
                    raise ValueError(f"format {brief(name)} is not declared")
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, PatternError) as error:
            raise SourceError(f"quantization_config of method mixprec is damaged: {error!r:.500}") from error
        return cls(formats, rules, default)

    def format_of(self, module: str) -> Format:
        """The format of a module. Raises :class:`SourceError` when the patterns take too long."""
        return self.formats_of([module])[module]

    def formats_of(self, modules: Iterable[str]) -> dict[str, Format]:
        """Module -> :meth:`format_of` it, in their order."""
        try:
            return {
                module: self.formats[self.default if line is None else self.rules[line][1]]
                for module, line in self._index.lasts(modules, self._budget)
            }
        except PatternError as error:
            raise SourceError(f"quantization_config of method mixprec {error}") from error


def name_formats(formats: Iterable[Format]) -> dict[Format, str]:
    """A short name for each distinct format: its kind, numbered where several share one."""
    names: dict[Format, str] = {}
    counts: dict[str, int] = {}
    for fmt in formats:
        if fmt not in names:
            counts[fmt.kind] = counts.get(fmt.kind, 0) + 1
            names[fmt] = fmt.kind if counts[fmt.kind] == 1 else f"{fmt.kind}-{counts[fmt.kind]}"
    return names


def quantization_config(modules: Mapping[str, Format]) -> dict[str, object]:
    """The declaration of a checkpoint whose modules have these formats (in checkpoint order)."""
    names = name_formats(modules.values())
    # The most frequent unquantized format, so that norms and embeddings need no line.
    counts = Counter(modules.values())
    default = max(names, key=lambda fmt: (not fmt.quantized, counts[fmt]))
    by_format: dict[Format, list[str]] = {fmt: [] for fmt in names if fmt != default}
    for module, fmt in modules.items():
        if fmt != default:
            by_format[fmt].append(module)
    return {
        "quant_method": METHOD,
        "version": VERSION,
        "formats": {name: fmt.to_json() for fmt, name in names.items()},
        "modules": [[pattern, names[fmt]] for fmt, members in by_format.items() for pattern in compress(members)],
        "default": names[default],
    }
