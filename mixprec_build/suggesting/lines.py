"""Writes the lines of a suggested recipe, in blocks with a comment that has the reasons."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from ..patterns.compress import compress
from ..patterns.pattern import Pattern
from ..recipe.recipe import Rule
from ..text import human
from .choices import Choices, Group, Option
from .knapsack import Solution

__all__ = ["recipe_lines"]


def recipe_lines(
    groups: Sequence[Group], solution: Solution, choices: Choices
) -> tuple[tuple[str, tuple[Rule, ...]], ...]:
    """Blocks of ``(comment, rules)``: for each column first the source of most groups, then the exceptions."""
    default = choices.recipe.default
    blocks: list[tuple[str, tuple[Rule, ...]]] = []
    if choices.rules:
        blocks.append((f"as in {choices.recipe.path.name}", choices.rules))
    columns: dict[str, list[tuple[Group, Option]]] = {}
    for group, pick in zip(groups, solution.picks, strict=True):
        columns.setdefault(group.column, []).append((group, group.options[group.allowed[pick]]))
    for column, picked in columns.items():
        counts = Counter(option.source for _, option in picked)
        # Ties go to the default, which needs no line.
        usual = max(counts, key=lambda source: (counts[source], source == default))
        order = [usual, *(source for source in counts if source != usual)]
        for source in order:
            mine = [(group, option) for group, option in picked if option.source == source]
            covers = picked if source == usual else mine
            if source == default and source == usual:
                rules = []
            else:
                rules = [Rule(Pattern(p), source, 0) for p in _patterns(column, [group for group, _ in covers])]
            blocks.append((_comment(column, mine, len(picked), solution), tuple(rules)))
    return tuple(blocks)


def _patterns(column: str, groups: Sequence[Group]) -> list[str]:
    if column == "experts":
        return [f"{pattern}.*" for pattern in compress(group.name for group in groups)]
    return compress(member for group in groups for member in group.members)


def _comment(column: str, mine: Sequence[tuple[Group, Option]], of: int, solution: Solution) -> str:
    """Describes a block: its size, its share of the loss, and the reasons."""
    options = [option for _, option in mine]
    kinds = ", ".join(sorted({option.kind for option in options}))
    nbytes = sum(option.nbytes for option in options)
    loss = sum(option.loss for option in options)
    share = loss / solution.loss if solution.loss else 0.0
    power = sum(group.power for group, _ in mine)
    relative = (sum(option.error for option in options) / power) ** 0.5 if power else 0.0
    text = (
        f"{column}: {len(mine):,} of {of:,} {kinds} from {options[0].source}, {human(nbytes)}, "
        f"{share:.1%} of the loss, ‖Ŵ−W‖/‖W‖ {relative:.4f}"
    )
    if column == "experts":
        text += f"; {sum(g.frequency for g, _ in mine) / len(mine):.2%} of the tokens each"
    reasons = Counter(group.reason or _why(group, option) for group, option in mine)
    return text + "".join(f"\n{count:,} of them: {reason}" for reason, count in reasons.most_common(4))


def _why(group: Group, option: Option) -> str:
    losses = [group.options[i].loss for i in group.allowed]
    sizes = [group.options[i].nbytes for i in group.allowed]
    if len(losses) == 1:
        return "there is no other source"
    smallest = option.nbytes <= min(sizes)
    if option.loss <= min(losses):
        return (
            "no other source loses less here, and none is smaller"
            if smallest
            else "the source that loses least; its bytes save more loss here than they would elsewhere"
        )
    return (
        "the smallest source; a larger one would save more loss elsewhere for the same bytes"
        if smallest
        else "a source in between; a smaller one would lose too much for the bytes it frees, a larger one would save "
        "too little loss for the bytes it takes"
    )
