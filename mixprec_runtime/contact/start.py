"""The check at the start of a server: SGLang has all that this run needs, and mixprec's hooks are in place."""

from __future__ import annotations

import inspect
import pkgutil
import sys
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any

from .check import ContactError, differs, missing, not_wrapped
from .flags import missing_flags

__all__ = ["add_late", "hooked_here", "require_all"]

Hook = tuple[str, Callable[..., Any], str]
"""A function of SGLang's, by its dotted path, the hook on it, and when that is called, as in ``HookType``."""


def hooked_here(target: str) -> bool:
    """Whether this process has imported the module of ``target``, a function or a method."""
    return any(name in sys.modules for name in (target.rpartition(".")[0], target.rsplit(".", 2)[0]))


def add_late(hooks: Iterable[Hook]) -> str | None:
    """Adds hooks on modules that were imported after SGLang loaded its plugins, as classes of models do from 0.5.21 on.

    Returns a line if that is too late: a scheduler is being made, whose start would not be followed.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    late = [one for one in hooks if hooked_here(one[0]) and one[0] not in HookRegistry._hooks]
    for target, hook, kind in late:
        HookRegistry.register(target, hook, HookType[kind])
    if late:
        HookRegistry.apply_hooks()
    for target, *_ in late:
        if target.endswith(".__init__") and _is_running(target):
            return f"{target} began before it was hooked: SGLang loads plugins later than the module"
    return None


def _is_running(target: str) -> bool:
    """Whether a function is among the callers of this one; not if there is none of this name."""
    try:
        code = inspect.unwrap(pkgutil.resolve_name(target)).__code__
    except (ImportError, AttributeError):  # which require_all reports
        return False
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code is code:
            return True
        frame = frame.f_back
    return False


def require_all(uses: Iterable[str], args: Any, hooks: Iterable[Hook]) -> None:
    """Checks the names of ``uses``, the flags in ``args`` (``ServerArgs``) and the hooks.

    Hooks of requests are needed in processes that have SGLang's scheduler.

    Raises:
        ContactError: SGLang is not as mixprec expects it; the message lists each difference.
    """
    hooks = list(hooks)
    problems = [*missing(uses), *missing_flags(args)]
    late = add_late(hooks)
    if late is not None:
        problems.append(late)
    serves = "sglang.srt.managers.scheduler" in sys.modules
    for target, hook, kind in hooks:
        if serves or ".managers." not in target:
            problem = not_wrapped(target, hook, passes=int(kind != "BEFORE"))
            if problem is not None:
                problems.append(problem)
    if problems:
        raise ContactError(differs(problems))
