"""Compares the table of names with the installed SGLang."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import importlib.util
import inspect
import sys
import textwrap
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import cache
from typing import Any

from mixprec_build.text import some
from mixprec_build.versions import INSTALL, __version__, between

from .names import KERNELS, NAMES, SERVER, Name

__all__ = ["ContactError", "differs", "explained", "installed", "missing", "not_wrapped", "resolve"]


class ContactError(RuntimeError):
    """Raised for an SGLang that lacks a name that mixprec uses, or has it with another signature."""


def installed() -> str:
    """The version of the imported SGLang."""
    found = getattr(importlib.import_module("sglang.version"), "__version__", None)
    return str(found or importlib.metadata.version("sglang"))


def differs(problems: Collection[str]) -> str:
    """The message for problems that :func:`missing` and others list."""
    return (
        f"SGLang {installed()} differs from what mixprec {__version__} works with: {some(list(problems), 8)}. Use "
        f"another release of SGLang ({INSTALL}), or a newer mixprec"
    )


def explained(error: Exception) -> str:
    """The message for an exception while this package was imported or registered: the names behind it, if any."""
    found = missing({name.use for name in NAMES} - {SERVER})
    return differs(found or [f"{type(error).__name__}: {error}".splitlines()[0][:300]])


def missing(uses: Iterable[str], names: Iterable[Name] = NAMES) -> list[str]:
    """One line for each name of ``uses`` that the imported SGLang lacks, or has with other parameters or attributes.

    Names of a server are imported only where its scheduler is: importing it takes seconds.
    """
    version, wanted = installed(), {*uses}
    if not _on_gpu():
        wanted.discard(KERNELS)
    found: dict[str, None] = {}
    for name in names:
        if name.use in wanted and between(name.since, name.until, version):
            found |= dict.fromkeys(_problems(name))
    return list(found)


def _on_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _problems(name: Name) -> Iterator[str]:
    if name.use == SERVER and "sglang.srt.managers.scheduler" not in sys.modules:
        module = name.where.partition(":")[0]
        try:
            known = importlib.util.find_spec(module) is not None
        except ModuleNotFoundError:
            known = False
        if not known:
            yield f"{module} is missing ({name.use})"
        return
    try:
        found = resolve(name.where)
    except Exception as error:  # a module that lacks a name itself raises any type
        yield f"{name.text} is missing ({name.use}: {error})"
        return
    if name.call is not None:
        reason = _unfit_signature(found, name.call)
        if reason:
            yield f"{name.text} has other parameters ({name.use}: {reason})"
            return
    for field in name.fields.split():
        if not _has_attribute(found, field):
            yield f"{name.text}.{field} is missing ({name.use})"
    if name.result:
        made = found()
        for field in name.result.split():
            if not _reads(made, field):
                yield f"{name.text}().{field} is missing ({name.use})"


def _reads(made: Any, field: str) -> bool:
    """Whether an object has an attribute, be it one that has no value yet."""
    try:
        getattr(made, field)
    except AttributeError:
        return hasattr(type(made), field)
    except Exception:  # SGLang raises several types for values that are not set up yet
        return True
    return True


def resolve(where: str) -> Any:
    """The object of ``module:name``. Raises ``ImportError`` or ``AttributeError`` where there is none."""
    module, _, path = where.partition(":")
    found: Any = importlib.import_module(module)
    for part in path.split("."):
        # A method that a class only inherits is another function, with other parameters.
        found = _own(found, part) if isinstance(found, type) else getattr(found, part)
    return getattr(found, "__func__", found)


def _own(owner: type, name: str) -> Any:
    if name not in vars(owner):
        raise AttributeError(f"class {owner.__name__} has no {name} of its own")
    return vars(owner)[name]


def _unfit_signature(function: Any, call: str) -> str | None:
    """Why a function cannot be called as ``call`` says (see :attr:`.Name.call`); None if it can."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError) as error:
        return str(error)
    words = call.split()
    if inspect.isclass(function) and words[:1] == ["self"]:
        words = words[1:]
    positional = [word for word in words if not word.endswith("=")]
    try:
        signature.bind(*positional, **{word[:-1]: None for word in words if word.endswith("=")})
    except TypeError as error:
        return f"{error}: {signature}"
    named = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
    declared = [parameter.name for parameter in signature.parameters.values() if parameter.kind in named]
    for number, (word, name) in enumerate(zip(positional, declared, strict=False)):
        if word not in ("_", name):
            return f"parameter {number} is {name}, not {word}"
    return None


def _has_attribute(owner: Any, field: str) -> bool:
    """Whether a class declares an attribute, or a method of it assigns one to ``self``."""
    if hasattr(owner, field):
        return True
    return any(
        field in vars(base).get("__annotations__", {}) or field in _assigned(base)
        for base in (owner.__mro__ if isinstance(owner, type) else ())
        if base.__module__.startswith("sglang")
    )


@cache
def _assigned(owner: type) -> frozenset[str]:
    """The attributes that methods of a class assign to ``self``."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(owner)))
    except (OSError, TypeError, SyntaxError):
        return frozenset()
    return frozenset(
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    )


def not_wrapped(target: str, hook: Callable[..., Any], *, passes: int) -> str | None:
    """Why ``hook`` is not around the function ``target`` (a dotted path), as one line; None if it is.

    Also compares their parameters: SGLang passes those of the function on to the hook, after ``passes`` others.
    """
    import pkgutil

    try:
        found: Any = pkgutil.resolve_name(target)
    except (ImportError, AttributeError) as error:
        return f"{target} is missing ({error})"
    function = found
    while function is not None:
        cells = getattr(function, "__closure__", None) or ()
        if any(cell.cell_contents is hook for cell in cells):
            break
        function = getattr(function, "__wrapped__", None)
    if function is None:
        return f"{target} is not hooked: the log above says why"
    theirs = [p for p in inspect.signature(found).parameters.values() if p.kind is not p.VAR_KEYWORD]
    given = [None] * (passes + sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in theirs))
    named = {p.name: None for p in theirs if p.kind is p.KEYWORD_ONLY}
    try:
        inspect.signature(hook).bind(*given, **named)
    except TypeError as error:
        return f"{target} has other parameters ({error}: {inspect.signature(found)})"
    return None
