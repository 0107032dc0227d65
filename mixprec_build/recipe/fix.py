"""Edits a recipe's text and keeps the rest as it is: comments, order, blank lines."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..errors import RecipeError
from ..text import some
from .writer import quoted

__all__ = ["MTP", "Line", "RecipeFix"]

MTP = "mtp"
"""The word for all draft layers in the place of a pattern."""


class Line(NamedTuple):
    """``pattern: source`` on a line of a recipe (1-based; 0 for a new line)."""

    line: int
    pattern: str
    source: str

    def __str__(self) -> str:
        return f"`{self.pattern}: {self.source}`"


@dataclass(frozen=True, slots=True)
class RecipeFix:
    """The smallest edit of a recipe that resolves a problem."""

    change: tuple[Line, ...] = ()
    """Lines as they should be."""
    remove: tuple[Line, ...] = ()
    """Lines as they are."""
    add: tuple[Line, ...] = ()
    below: int = 0
    """The line under which new ones are added: the section's last; 0 where the section has none."""
    section: str = "weights"
    """The section of rules: ``weights``, or ``weight_mapping`` in ``mixed_precision``."""
    default: Line | None = None
    """``default:`` as it should be."""

    def sentence(self) -> str:
        """The edit in words, as in ``"Change line 6 to `a.b: bf16`"``; lists at most eight new lines."""
        changed = [line for line in (self.default, *self.change) if line is not None and line.line]
        steps = [f"change line {line.line} to {line}" for line in changed]
        steps += [f"take out line {line.line} {line}" for line in self.remove]
        if self.add:
            where = f"below line {self.below}" if self.below else f"under `{self.section}:`"
            steps.append(f"add {where}: {some(list(map(str, self.add)), 8)}")
        if self.default is not None and not self.default.line:
            steps.append(f"add {self.default}")
        text = ", ".join(steps)
        return text[:1].upper() + text[1:]

    def to_json(self) -> dict[str, object]:
        """Plain data: ``change``, ``remove`` and ``add`` are lists of ``line`` (0: new), ``pattern`` and ``source``.

        ``default`` is one such line with the pattern ``default``, or None.
        """
        return {
            "change": [line._asdict() for line in self.change],
            "remove": [line._asdict() for line in self.remove],
            "add": [line._asdict() for line in self.add],
            "below": self.below,
            "section": self.section,
            "default": None if self.default is None else self.default._asdict(),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> RecipeFix:
        """Inverse of :meth:`to_json`. Raises ``KeyError``, ``TypeError`` or ``ValueError`` if ``data`` is malformed."""
        lines = {key: tuple(Line(**line) for line in data[key]) for key in ("change", "remove", "add")}
        default = data.get("default")
        default = None if default is None else Line(**default)
        return cls(**lines, below=int(data["below"]), section=str(data["section"]), default=default)

    def apply(self, text: str) -> str:
        """Returns the edited text of the recipe that the problem was found in.

        Several fixes have to be :meth:`merged` first, for each one moves lines that the next one refers to.

        Raises:
            RecipeError: a line to edit has more than one rule, as in ``weights: {a: b, c: d}``.
        """
        lines = text.splitlines(keepends=True)
        changed = [line for line in (self.default, *self.change) if line is not None and line.line]
        for line in changed:
            indent = _rule_indent(lines, line.line)
            lines[line.line - 1] = f"{indent}{_rule(line)}\n"
        new = [_rule(line) for line in self.add]
        if self.below and new:
            indent = _rule_indent(lines, self.below)
            if not lines[self.below - 1].endswith("\n"):
                lines[self.below - 1] += "\n"
            lines[self.below - 1] += "".join(f"{indent}{rule}\n" for rule in new)
        elif new:
            self._add_to_empty_section(lines, new)
        for line in self.remove:
            _rule_indent(lines, line.line)
            lines[line.line - 1] = "".join(lines[line.line - 1].splitlines(keepends=True)[1:])
        if self.default is not None and not self.default.line:
            lines.insert(0, f"{_rule(self.default)}\n")
        return "".join(lines)

    @classmethod
    def merged(cls, fixes: Iterable[RecipeFix]) -> RecipeFix:
        """Combines fixes of one recipe into one edit, without duplicates."""
        fixes = list(fixes)
        both = {
            key: tuple(dict.fromkeys(line for fix in fixes for line in getattr(fix, key)))
            for key in ("change", "remove", "add")
        }
        first = fixes[0] if fixes else cls()
        default = next((fix.default for fix in fixes if fix.default is not None), None)
        return cls(**both, below=first.below, section=first.section, default=default)

    def _add_to_empty_section(self, lines: list[str], new: list[str]) -> None:
        for at, line in enumerate(lines):
            found = re.match(rf"(\s*){self.section}:\s*(\{{\s*\}}|~|null)?\s*(#.*)?$", line)
            if found:
                body = "".join(f"{found[1]}  {rule}\n" for rule in new)
                lines[at] = f"{found[1]}{self.section}:\n{body}"
                return
        if lines and not lines[-1].endswith("\n"):
            lines[-1] += "\n"
        if self.section == "weights":
            lines.append("weights:\n" + "".join(f"  {rule}\n" for rule in new))
            return
        at = next(i for i, line in enumerate(lines) if line.startswith("mixed_precision:"))
        lines[at] += f"  {self.section}:\n" + "".join(f"    {rule}\n" for rule in new)


def _rule(line: Line) -> str:
    return f"{quoted(line.pattern)}: {quoted(line.source)}"


def _rule_indent(lines: list[str], number: int) -> str:
    """The indent of a line. Raises :class:`RecipeError` where it is not exactly one rule."""
    line = lines[number - 1].splitlines()[0] if 0 < number <= len(lines) and lines[number - 1] else ""
    import yaml

    try:
        found = yaml.safe_load(line)
    except yaml.YAMLError:
        found = None
    if not (isinstance(found, dict) and len(found) == 1 and isinstance(next(iter(found.values())), str | int | float)):
        raise RecipeError(f"{line.strip()!r:.200} is not one rule; write each rule on a line of its own", line=number)
    return line[: len(line) - len(line.lstrip())]
