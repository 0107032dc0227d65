"""Rules that only some releases of SGLang keep: what a plan needs of its release, and what that release lacks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..patterns.compress import compress
from ..versions import UNTILED
from .problems import Problems
from .rules import common_source, described, half_only_groups, origin, replacement

if TYPE_CHECKING:
    from ..recipe.sources import Sources
    from .types import PlannedModule

__all__ = ["check_release"]


def check_release(
    modules: Mapping[str, PlannedModule], sources: Sources, problems: Problems, version: str
) -> dict[str, list[str]]:
    """Adds to ``problems`` what SGLang ``version`` does not serve, but other releases do.

    Returns what the plan needs of a release, for servers of others: name of a rule -> patterns of modules.
    """
    needed: dict[str, list[str]] = {}
    quantized = {name: (module.format, module.stored) for name, module in modules.items() if module.format.quantized}
    for _, why, members in half_only_groups(quantized, sources.family):
        if UNTILED.holds_in(version):
            needed.setdefault(UNTILED.name, []).extend(members)
            continue
        parts = [modules[name] for name in members]
        source = common_source(parts, sources, other_than=parts[0].source)
        text = f"{described(parts[0].format)} from {origin(parts[0])}: {why}, and the plan is for SGLang {version}"
        problems.soft(members, text, *replacement(source, parts), code="kernel_limit")
    return {name: list(compress(members)) for name, members in needed.items()}
