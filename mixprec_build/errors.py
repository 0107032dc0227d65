"""Every error a user of mixprec can cause.

    MixprecError                 exit code 1
    ├── RecipeError              the YAML: syntax, an unknown key, a name that matches nothing
    ├── SourceError              a checkpoint: a missing or damaged file, a format that contradicts itself
    │   └── HubError             a checkpoint on the Hugging Face Hub that cannot be reached or read
    ├── StatsError               expert activity that cannot be read, or that belongs to another model
    ├── DeviceError              a GPU was asked for that cannot be used
    ├── BudgetError              no mix of the sources fits into the budget
    ├── RefusedError             the recipe and its sources are sound, the mix is not; carries every problem
    ├── OutputError              exit code 2: the output folder exists, overlaps a source, cannot be used
    │   ├── MissingPartsError    a build on many machines cannot be finished yet; names the parts
    │   └── MissingRanksError    a split on many machines cannot be finished yet; names the ranks
    ├── WriteError               exit code 3: copying failed; the output folder was not created
    │   └── InterruptedBuildError  exit code 130 after Ctrl-C, 143 after SIGTERM
    ├── SplitError               a checkpoint that cannot be cut for so many ranks
    └── VerifyError              a written checkpoint differs from its manifest or its sources

A message names the file, the recipe line or the tensor, says what is wrong, and what to do about it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

__all__ = [
    "BudgetError",
    "DeviceError",
    "HubError",
    "InterruptedBuildError",
    "MissingPartsError",
    "MissingRanksError",
    "MixprecError",
    "OutputError",
    "RecipeError",
    "RefusedError",
    "SourceError",
    "SplitError",
    "StatsError",
    "VerifyError",
    "WriteError",
]


class MixprecError(Exception):
    """Base of the errors above. ``str(error)`` is meant for the user, without a traceback."""

    exit_code: ClassVar[int] = 1


class RecipeError(MixprecError):
    """A recipe that cannot be read. ``path`` and ``line`` (1-based) say where, if known.

    ``fix`` is a :class:`~mixprec_build.recipe.fix.RecipeFix` where an edit of the recipe is proposed.
    """

    def __init__(
        self, message: str, *, path: Path | str | None = None, line: int | None = None, fix: Any | None = None
    ):
        self.path, self.line, self.fix = path, line, fix
        where = "" if path is None else f"{path}: " if line is None else f"{path}:{line}: "
        super().__init__(where + message)


class SourceError(MixprecError):
    """A checkpoint that cannot be used as a source. ``path`` is the file or folder at fault."""

    def __init__(self, message: str, *, path: Path | str | None = None):
        self.path = path
        super().__init__(message if path is None else f"{path}: {message}")


class HubError(SourceError):
    """A repository or file of the Hugging Face Hub that is missing, private or out of reach."""


class StatsError(MixprecError):
    """A file of expert activity that is damaged, of another kind, or of another model than the recipe's."""


class DeviceError(MixprecError):
    """A GPU that was asked for and cannot be used here."""


class BudgetError(MixprecError):
    """A budget below the size of the smallest mix, which the message states."""


class RefusedError(MixprecError):
    """A mix that is refused before anything is written.

    ``problems`` has a :class:`~mixprec_build.planning.problems.Problem` for each reason: ``str(problem)`` is its
    message, ``problem.fix`` the edit of the recipe that resolves it, if there is one.
    """

    def __init__(self, problems: Sequence[Any]):
        self.problems = tuple(problems)
        count = len(self.problems)
        head = f"refused, {count} problem{'s' if count != 1 else ''}:"
        super().__init__("\n".join([head, *(f"  - {p}" for p in self.problems)]))


class OutputError(MixprecError):
    """An output folder that mixprec will not write to."""

    exit_code = 2


class MissingPartsError(OutputError):
    """A build on many machines that lacks parts: ``parts``, such as ``"3/16"``; empty where none was begun."""

    def __init__(self, message: str, parts: Sequence[str] = ()):
        self.parts = tuple(parts)
        super().__init__(message)


class MissingRanksError(OutputError):
    """A split on many machines that lacks ranks, which ``ranks`` names."""

    def __init__(self, message: str, ranks: Sequence[int] = ()):
        self.ranks = tuple(ranks)
        super().__init__(message)


class WriteError(MixprecError):
    """A build that stopped while writing."""

    exit_code = 3


class InterruptedBuildError(WriteError):
    """A build or split that the user stopped. The message says how to go on."""

    exit_code = 130


class VerifyError(MixprecError):
    """A checkpoint whose files, index, manifest or bytes disagree."""


class SplitError(MixprecError):
    """A checkpoint that cannot be cut for the ranks asked for. Names the module or the number at fault."""
