"""What ``--gpus`` of ``plan`` and ``inspect`` adds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from ..report.memory import Gpus

__all__ = ["add_memory", "gpus_of"]


def gpus_of(text: str | None) -> Gpus | None:
    """The GPUs that an option names."""
    if text is None:
        return None
    from ..report.memory import Gpus

    try:
        return Gpus.parse(text)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--gpus") from error


def add_memory(facts: dict[str, Any], memory: dict[str, Any]) -> None:
    """Adds what a checkpoint needs to the facts that are printed."""
    facts["memory"] = memory
