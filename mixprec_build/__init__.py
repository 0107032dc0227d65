"""mixprec: compiles several checkpoints of one model into one whose weights keep the formats they came in.

    import mixprec_build as mp

    plan = mp.plan("mix.yaml")
    mp.build(plan, "out")

:mod:`mixprec_build.api` documents each function. Functions and errors are imported on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .versions import __version__

if TYPE_CHECKING:
    from .api import build, inspect, memory, plan, split, suggest, verify
    from .errors import (
        BudgetError,
        DeviceError,
        HubError,
        InterruptedBuildError,
        MissingPartsError,
        MissingRanksError,
        MixprecError,
        OutputError,
        RecipeError,
        RefusedError,
        SourceError,
        SplitError,
        StatsError,
        VerifyError,
        WriteError,
    )

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
    "__version__",
    "build",
    "inspect",
    "memory",
    "plan",
    "split",
    "suggest",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = import_module(".errors" if name.endswith("Error") else ".api", __name__)
    return getattr(home, name)


def __dir__() -> list[str]:
    return __all__
