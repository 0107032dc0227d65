"""Reasons to refuse a mix, each with the smallest edit of the recipe that resolves it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..patterns.compress import compress
from ..patterns.index import PatternIndex
from ..recipe.fix import MTP, Line, RecipeFix
from ..text import some

if TYPE_CHECKING:
    from ..recipe.recipe import Recipe, Rule

__all__ = ["CODES", "Problem", "Problems", "Replacement"]

CODES = {
    "different_models": "sources, or their config.json, are of different models",
    "different_weights": "sources hold different weights of one model, or scales that mean something else or nothing",
    "folded_scales": "scales of activations are folded into modules that come from elsewhere",
    "fused_formats": "modules that SGLang runs as one GEMM are in different formats",
    "incomplete_model": "the mix lacks modules that its model needs",
    "kernel_limit": "SGLang has no kernel for the shape, the format or the values",
    "lost_drafts": "the mix has no draft layers (MTP), and another source has",
    "missing_module": "a source lacks modules that the recipe takes from it",
    "moved_rows": "a model class of SGLang's moves rows of the weight and leaves its scales behind",
    "not_cached": "the hub is out of reach, and its cache lacks files",
    "role_limit": "modules of this role are served unquantized only",
    "shared_experts": "SGLang compares shared experts' formats in a way that this mix does not pass",
    "stacked_experts": "all experts of a layer are stored in one tensor, which cannot be taken apart",
    "unserved_model": "no class of SGLang's serves the model, or its draft layers, as compiled",
}
"""Code of a problem, for programs -> its meaning."""

_NO_SOURCE = "No source of this recipe can take their place: add one that can"


@dataclass(frozen=True, slots=True)
class Problem:
    """One reason to refuse a mix. ``str(problem)`` is the message for the user, the fix included."""

    code: str
    """One of :data:`CODES`."""
    text: str
    """The message without names of modules and fix."""
    modules: tuple[str, ...] = ()
    """Patterns of the modules concerned, if any."""
    fix: RecipeFix | None = None
    hard: bool = False
    """Whether no server could use the mix. Other problems can be allowed."""
    advice: str = ""
    """Advice where no edit of the recipe's rules helps."""

    def __str__(self) -> str:
        about = f"{some(self.modules)}: " if self.modules and not self.hard else ""
        advice = self.fix.sentence() if self.fix is not None else self.advice
        return f"{about}{self.text}{advice and f'. {advice}'}"

    def to_json(self) -> dict[str, object]:
        """Plain data, for ``--json`` and the manifest."""
        return {
            "code": self.code,
            "message": str(self),
            "modules": list(self.modules),
            "hard": self.hard,
            "fix": None if self.fix is None else self.fix.to_json(),
        }


@dataclass(frozen=True, slots=True)
class Replacement:
    """Takes modules from another source, by changing the exact lines that name them, or by new lines."""

    source: str | None
    """None if no source can replace the present one."""
    rules: tuple[Rule, ...] = ()
    """Exact lines to change."""
    remove: tuple[Rule, ...] = ()
    """Lines to remove."""
    is_default: bool = False
    """Whether the source becomes the default of the recipe; other modules stay with the present one."""
    is_mtp: bool = False
    """Whether it becomes the source of all draft layers, by the line ``mtp: SOURCE``."""

    @classmethod
    def of(cls, source: str | None, modules: Iterable[tuple[str, Rule | None]]) -> tuple[Replacement, list[str]]:
        """A replacement for modules, each with the line that chose its source; and the modules that need a new line."""
        exact: dict[Rule, None] = {}
        others = []
        for name, rule in modules:
            if rule is not None and rule.exact:
                exact[rule] = None
            else:
                others.append(name)
        return cls(source, tuple(sorted(exact, key=lambda rule: rule.line))), others

    def fix(self, modules: Sequence[str], recipe: Recipe) -> RecipeFix | None:
        """The edit of ``recipe`` that takes ``modules`` and those named by ``rules`` from the source; from the present
        default if another one becomes it."""
        if self.source is None or (self.is_default and not self._can_become_default(recipe, modules)):
            return None
        below = max((rule.line for rule in recipe.rules), default=0)
        if self.is_mtp:
            line = max((rule.line for rule in recipe.rules if rule.mtp), default=0)
            edit = (Line(line, MTP, self.source),)
            return RecipeFix(edit if line else (), (), () if line else edit, below, recipe.section)
        source = recipe.default if self.is_default else self.source
        change = [Line(rule.line, rule.pattern.text, source) for rule in self.rules]
        remove = [_line(rule) for rule in self.remove]
        add = []
        by_text = {rule.pattern.text: rule for rule in recipe.rules}
        for pattern in compress(modules):
            rule = by_text.get(pattern)  # a key may be in YAML only once
            if rule is not None and not _is_overruled(rule, modules, recipe):
                change.append(Line(rule.line, pattern, source))
                continue
            if rule is not None:
                remove.append(_line(rule))
            add.append(Line(0, pattern, source))
        default = Line(recipe.default_line, "default", self.source) if self.is_default else None
        return RecipeFix(tuple(change), tuple(remove), tuple(add), below, recipe.section, default)

    def _can_become_default(self, recipe: Recipe, stay: Sequence[str]) -> bool:
        """Whether the recipe has a line ``default:`` or may have one, and a name for the source of those that stay."""
        named = recipe.sources.get(recipe.default) is not recipe.model
        return recipe.section == "weights" and (named or not stay)


def _line(rule: Rule) -> Line:
    return Line(rule.line, rule.pattern.text, rule.source)


def _is_overruled(rule: Rule, modules: Iterable[str], recipe: Recipe) -> bool:
    """Whether a later line decides for one of ``modules`` that ``rule`` matches."""
    later = PatternIndex([other.pattern for other in recipe.rules if other.line > rule.line])
    return any(rule.pattern.matches(name) and later.last(name) is not None for name in modules)


@dataclass(slots=True)
class _About:
    """The modules that one problem concerns, and those whose source its fix changes."""

    modules: list[str] = field(default_factory=list)
    change: list[str] = field(default_factory=list)


class Problems:
    """Collects problems; the same one in many modules is reported once, with their names as patterns."""

    def __init__(self, recipe: Recipe):
        self._recipe = recipe
        self._hard: dict[Problem, None] = {}
        self._warnings: dict[Problem, None] = {}
        self._soft: dict[tuple[str, str, Replacement | None], _About] = {}

    def __bool__(self) -> bool:
        return bool(self._hard or self._soft)

    def hard(
        self,
        text: str,
        replacement: Replacement | None = None,
        change: Sequence[str] = (),
        *,
        code: str,
        modules: Iterable[str] = (),
        advice: str = "",
    ) -> None:
        """Adds a problem that cannot be allowed. ``replacement`` has the source that ``change`` should come from.

        ``advice`` is for the user where no edit of the recipe helps.
        """
        about = tuple(compress(modules))
        self._hard[self._problem(code, text, about, replacement, change, hard=True, advice=advice)] = None

    def warn(
        self,
        text: str,
        replacement: Replacement,
        change: Sequence[str] = (),
        *,
        code: str,
        modules: Iterable[str] = (),
    ) -> None:
        """Adds what the user most likely did not mean. It prevents nothing. Arguments are as in :meth:`hard`."""
        about = tuple(compress(modules))
        self._warnings[self._problem(code, text, about, replacement, change, hard=False)] = None

    def warnings(self) -> tuple[Problem, ...]:
        """All that :meth:`warn` added."""
        return tuple(self._warnings)

    def soft(
        self,
        modules: Iterable[str],
        text: str,
        replacement: Replacement | None = None,
        change: Iterable[str] = (),
        *,
        code: str,
    ) -> None:
        """Adds a reason why SGLang could not serve ``modules``; ``replacement`` and ``change`` as in :meth:`hard`."""
        about = self._soft.setdefault((code, text, replacement), _About())
        about.modules += modules
        about.change += change

    def found(self) -> list[Problem]:
        """All problems, hard ones first."""
        soft = [
            self._problem(code, text, tuple(compress(about.modules)), replacement, about.change, hard=False)
            for (code, text, replacement), about in self._soft.items()
        ]
        return [*self._hard, *soft]

    def _problem(
        self,
        code: str,
        text: str,
        modules: tuple[str, ...],
        replacement: Replacement | None,
        change: Sequence[str],
        *,
        hard: bool,
        advice: str = "",
    ) -> Problem:
        assert code in CODES, code
        fix = None if replacement is None else replacement.fix(change, self._recipe)
        if fix is None and not advice and replacement is not None:
            advice = _NO_SOURCE if replacement.source is None else f"Make `{replacement.source}` the default"
        return Problem(code, text, modules, fix, hard, advice)
