"""Why a mix is refused, and the smallest edit of the recipe that resolves it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..patterns.compress import compress
from ..text import some

if TYPE_CHECKING:
    from ..recipe.recipe import Recipe, Rule

__all__ = ["Mend", "Problem", "Problems"]


@dataclass(frozen=True, slots=True)
class Problem:
    """One reason to refuse. ``hard`` ones hold whoever serves the checkpoint."""

    text: str
    hard: bool


class Problems:
    """Collects problems; the same one in many modules is told once, with their names as patterns."""

    def __init__(self, recipe: Recipe):
        self._recipe = recipe
        self._hard: list[str] = []
        self._soft: dict[tuple[str, Mend | None], tuple[list[str], list[str]]] = {}

    def hard(self, text: str) -> None:
        self._hard.append(text)

    def soft(self, modules: Iterable[str], text: str, mend: Mend | None = None, change: Iterable[str] = ()) -> None:
        """``text`` is about all of ``modules``; ``mend`` also says which source ``change`` should come from."""
        about, changed = self._soft.setdefault((text, mend), ([], []))
        about += modules
        changed += change

    def found(self) -> list[Problem]:
        soft = [
            Problem(f"{some(compress(about))}: {text}{self.mended(mend, change)}", hard=False)
            for (text, mend), (about, change) in self._soft.items()
        ]
        return [Problem(text, hard=True) for text in dict.fromkeys(self._hard)] + soft

    def mended(self, mend: Mend | None, change: Sequence[str]) -> str:
        """The sentence that ends a problem."""
        return "" if mend is None else mend.sentence(change, self._recipe)


@dataclass(frozen=True, slots=True)
class Mend:
    """The smallest change: ``source`` for some modules, by changing the exact lines that name them or by new lines.

    ``needless`` are lines to take out.
    """

    source: str | None
    rules: tuple[Rule, ...] = ()
    needless: tuple[Rule, ...] = ()

    @classmethod
    def of(cls, source: str | None, modules: Iterable[tuple[str, Rule | None]]) -> tuple[Mend, list[str]]:
        """For modules with the lines that chose their sources; also which of them need a new line."""
        exact: dict[Rule, None] = {}
        others = []
        for name, rule in modules:
            if rule is not None and rule.pattern.exact:
                exact[rule] = None
            else:
                others.append(name)
        return cls(source, tuple(sorted(exact, key=lambda rule: rule.line))), others

    def sentence(self, modules: Sequence[str], recipe: Recipe) -> str:
        if self.source is None:
            return ". No source of this recipe can take their place: add one that can"
        steps = [f"change line {rule.line} to `{rule.pattern.text}: {self.source}`" for rule in self.rules]
        steps += [f"take out {rule}" for rule in self.needless]
        lines = []
        by_text = {rule.pattern.text: rule for rule in recipe.rules}
        for pattern in compress(modules):
            rule = by_text.get(pattern)  # a line that is there cannot be added
            if rule is not None and not _is_overruled(rule, modules, recipe):
                steps.append(f"change line {rule.line} to `{pattern}: {self.source}`")
                continue
            if rule is not None:
                steps.append(f"take out {rule}")
            lines.append(f"`{pattern}: {self.source}`")
        if lines:
            last = max((rule.line for rule in recipe.rules), default=None)
            where = f"under `{recipe.section}:`" if last is None else f"below line {last}"
            steps.append(f"add {where}: {some(lines, 8)}")
        sentence = ", ".join(steps)
        return f". {sentence[0].upper()}{sentence[1:]}"


def _is_overruled(rule: Rule, modules: Iterable[str], recipe: Recipe) -> bool:
    """Whether a later line decides for one of ``modules`` that ``rule`` matches."""
    matched = [name for name in modules if rule.pattern.matches(name)]
    later = [other.pattern for other in recipe.rules if other.line > rule.line]
    return any(pattern.matches(name) for pattern in later for name in matched)
