"""Modules whose values a model class of SGLang's moves while it loads them.

Such a class permutes the rows of ``weight`` and leaves scales, packed words and zero points where they are: it loads
without an error, and answers nonsense. By reading of ``models/`` in SGLang 0.5.15 to 0.5.23.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..families.base import fused_groups
from ..formats.base import Format
from .problems import Problems, Replacement
from .rules import by_votes, can_give, origin

if TYPE_CHECKING:
    from ..recipe.sources import Sources
    from .types import PlannedModule

__all__ = ["Move", "check_moved", "moves_of"]


@dataclass(frozen=True, slots=True)
class Move:
    """What one model class moves: rows of ``weight`` in the modules that ``modules`` matches.

    ``within_heads`` where no row leaves its attention head, so that scales of whole heads still fit.
    """

    architecture: str
    families: frozenset[str]
    modules: re.Pattern[str]
    within_heads: bool = False

    def limit(self, fmt: Format, head_dim: object) -> str | None:
        """Why a module in ``fmt`` would be loaded wrongly; None where it would not."""
        if not fmt.quantized:
            return None
        if self.within_heads and fmt.has_weight:
            beside = (fmt.axes(leaf).n for leaf in fmt.leaves - {fmt.values_leaf, "bias"})
            rows = [axis.per for axis in beside if axis is not None]
            # One scale for all rows, or scales of whole heads.
            if not rows or (isinstance(head_dim, int) and head_dim > 0 and all(n % head_dim == 0 for n in rows)):
                return None
        return (
            f"SGLang's {self.architecture} moves the rows of this module's weight as it loads it, and not what "
            f"{fmt.kind} keeps beside it, or in its place"
        )


_MOVES = (
    # mllama4.py, permute_qk_weight_for_rotary: names that end in `weight`, and no others
    Move(
        "Llama4ForConditionalGeneration",
        frozenset({"llama4"}),
        re.compile(r"(?!.*vision).*\.(q_proj|k_proj|wq|wk)"),
        within_heads=True,
    ),
    # internlm2.py, internvl.py: wqkv is cut into heads of q, k and v
    Move("InternLM2ForCausalLM", frozenset({"internlm2"}), re.compile(r".*\.wqkv")),
    Move("InternVLChatModel", frozenset({"internvl_chat"}), re.compile(r".*\.wqkv")),
    # persimmon.py: query_key_value is stored head by head
    Move("PersimmonForCausalLM", frozenset({"persimmon"}), re.compile(r".*\.query_key_value")),
    # gpt2.py: Conv1D is stored transposed
    Move("GPT2LMHeadModel", frozenset({"gpt2"}), re.compile(r".*\.(c_attn|c_proj|c_fc)")),
)


def moves_of(config: Mapping[str, object]) -> list[Move]:
    """What the model class of a ``config.json`` moves."""
    architectures = config.get("architectures")
    if isinstance(architectures, list) and architectures:
        return [move for move in _MOVES if move.architecture in architectures]
    return [move for move in _MOVES if config.get("model_type") in move.families]


def check_moved(modules: Mapping[str, PlannedModule], sources: Sources, problems: Problems) -> None:
    """Adds to ``problems`` the modules whose scales SGLang would leave behind."""
    config = sources.model.config
    moves = moves_of(config)
    if not moves:
        return
    text_config = config.get("text_config")
    flat = {**config, **text_config} if isinstance(text_config, dict) else config
    head_dim = flat.get("head_dim")

    def limit(name: str, fmt: Format) -> str | None:
        found = (move.limit(fmt, head_dim) for move in moves if move.modules.fullmatch(name))
        return next((why for why in found if why is not None), None)

    for members in fused_groups(modules).values():
        parts = [modules[member] for member in members]
        for part in parts:
            why = limit(part.name, part.format)
            if why is None:
                continue
            for source in by_votes(parts, sources):
                if can_give(source, parts) and not any(limit(p.name, source.format_of(p.name)) for p in parts):
                    others = [(p.name, p.rule) for p in parts if p.source != source.name]
                    edit, change = Replacement.of(source.name, others)
                    break
            else:
                edit, change = Replacement(None), []
            text = f"{part.format.kind} from {origin(part)}: {why}"
            problems.soft([p.name for p in parts if limit(p.name, p.format)], text, edit, change, code="moved_rows")
            break
