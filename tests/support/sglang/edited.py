"""Copies of SGLang's modules in which one name is renamed, or has another signature: what does mixprec find missing?

``python -m support.sglang.edited FOLDER`` prints ``[[name, edit, problems], ...]`` as JSON. Every edit is tried in a
process of its own, forked from one that has imported SGLang.
"""

from __future__ import annotations

import ast
import importlib
import importlib.abc
import importlib.util
import inspect
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from mixprec_build.versions import between
from mixprec_runtime.contact import check
from mixprec_runtime.contact.names import KERNELS, NAMES, Name

__all__ = ["Edit", "edits", "main", "tried"]

MOVED = "_moved"
FIELDS = "sglang.srt.arg_groups.fields."
"""From 0.5.20 on, its modules declare the fields of ``ServerArgs`` and of ``get_parallel()``, made from them."""
MADE_FROM_FIELDS = "sglang.srt.server_args", "sglang.srt.runtime_context"


class Edit(NamedTuple):
    """One change of a copy of ``module``; ``also`` are modules that import it again."""

    name: Name
    what: str
    module: str
    source: str
    also: tuple[str, ...] = ()


def _source(module: str) -> str:
    return Path(str(sys.modules[module].__file__)).read_text(encoding="utf-8")


def edits(name: Name) -> Iterator[Edit]:
    """The edits of one name: renamed, with one more required parameter, and without each of its attributes."""
    module, _, path = name.where.partition(":")
    importlib.import_module(module)
    found = check.resolve(name.where)
    outer = path.partition(".")[0]
    owner, last = check.resolve(f"{module}:{outer}"), path.rpartition(".")[2]

    def edit(what: str, home: str, source: str) -> Edit:
        return Edit(name, what, home, source, tuple(_importers(owner, outer, module) - {home}))

    def field_edit(what: str, of: type, field: str) -> Edit:
        declared = _declared(module, field)
        if declared:
            return Edit(name, what, declared, _renamed(_source(declared), field), MADE_FROM_FIELDS)
        home = _home(of, field)
        return edit(what, home, _renamed(_source(home), field))

    if last != "__init__":
        home = _home(owner, last) if "." in path else module
        if not re.search(rf"(?<!\w){last}(?!\w)", _source(home)):  # the module imports all names of another
            home = found.__module__
        yield edit("renamed", home, _renamed(_source(home), last))
    function = inspect.unwrap(found)
    # In 0.5.23 a name is the method of a list, which has no source.
    if name.call is not None and function.__module__ is not None:
        changed = _with_parameter(_source(function.__module__), function.__qualname__)
        if changed is not None:
            yield edit("one more parameter", function.__module__, changed)
        for word in name.call.split():
            if word.endswith("=") and changed is None:  # parameters are the fields of a class
                yield field_edit(word, found, word[:-1])
    made = type(found()) if name.result else found
    for field in (*name.fields.split(), *name.result.split()):
        if _home(made, field) or _declared(module, field):
            yield field_edit(f".{field}", made, field)


def _importers(owner: Any, name: str, module: str) -> set[str]:
    """The modules from which ``owner`` is imported by way of ``module``."""
    packages = {other for other, loaded in sys.modules.items() if vars(loaded).get(name, MOVED) is owner}
    return {other for other in packages if other == module or hasattr(sys.modules[other], "__path__")}


def _home(owner: type, field: str) -> str:
    """The module of the class that declares ``field``; empty where it is made when it is asked for."""
    for base in owner.__mro__ if isinstance(owner, type) else ():
        own = field in vars(base) or field in vars(base).get("__annotations__", {}) or field in check._assigned(base)
        if base.__module__.startswith("sglang") and own:
            return base.__module__
    return ""


def _declared(module: str, field: str) -> str:
    """The module that declares a field of what ``module`` makes of declarations; empty where there is none."""
    if module in MADE_FROM_FIELDS:
        for home in sorted(sys.modules):
            if home.startswith(FIELDS) and re.search(rf"(?m)^    {field}(:| =)", _source(home)):
                return home
    return ""


def _renamed(source: str, name: str) -> str:
    """The source with another identifier in place of ``name``; a name that is imported is only bound to another."""
    tree = ast.parse(source)
    imported = [
        alias
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if (alias.asname or alias.name) == name
    ]
    if imported:
        for alias in imported:
            alias.asname = name + MOVED
        for node in ast.walk(tree):
            if isinstance(node, ast.Name) and node.id == name:
                node.id = name + MOVED
        return ast.unparse(tree)
    return re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", name + MOVED, source)


def _with_parameter(source: str, qualname: str) -> str | None:
    """The source in which a function, or a class's constructor, has one more required parameter; None for a class
    without a constructor of its own."""
    tree: Any = ast.parse(source)
    scopes: list[Any] = [tree]
    for part in qualname.split("."):
        scopes = [
            node
            for scope in scopes
            for node in ast.walk(scope)
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == part
        ]
    functions = [node for node in scopes if isinstance(node, ast.FunctionDef)]
    for node in scopes:
        if isinstance(node, ast.ClassDef):
            functions += [own for own in node.body if isinstance(own, ast.FunctionDef) and own.name == "__init__"]
    for function in functions:
        function.args.kwonlyargs.append(ast.arg("mixprec_added"))
        function.args.kw_defaults.append(None)
    return ast.unparse(tree) if functions else None


class _Served(importlib.abc.MetaPathFinder):
    """Imports one module from a copy."""

    def __init__(self, module: str, path: Path):
        self.module, self.path = module, path

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: Any = None) -> Any:
        if fullname != self.module:
            return None
        original = Path(str(self.origin))
        package = [str(original.parent)] if original.name == "__init__.py" else None
        return importlib.util.spec_from_file_location(fullname, self.path, submodule_search_locations=package)

    origin: str | None = None


def _problems(edit: Edit, folder: Path) -> list[str]:
    from sglang.srt.layers.moe.moe_runner import base

    copy = folder / f"{edit.module}.{os.getpid()}.py"
    copy.write_text(edit.source, encoding="utf-8")
    finder = _Served(edit.module, copy)
    finder.origin = sys.modules[edit.module].__file__
    sys.meta_path.insert(0, finder)
    for module in (edit.module, *edit.also):
        sys.modules.pop(module, None)
    for pool in (base.FusedOpPool, base.PermuteMethodPool):  # modules register their functions once
        for registered in vars(pool).values():
            if isinstance(registered, dict):
                registered.clear()
    with suppress(Exception):  # which is then what the check finds
        importlib.import_module(edit.module)
    try:
        return check.missing({edit.name.use}, [edit.name])
    finally:
        copy.unlink()


def tried(edit: Edit, folder: Path) -> list[str]:
    """What is missing for the name of ``edit``, found in a process of its own."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.close(reader)
            sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: PTH123, SIM115
            found = [problem[:400] for problem in _problems(edit, folder)]
            os.write(writer, json.dumps(found).encode())
        except BaseException as error:
            os.write(writer, json.dumps([f"the copy: {type(error).__name__}: {error}"[:400]]).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, encoding="utf-8") as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    missing: list[str] = json.loads(text)
    return missing


def main() -> None:
    folder = Path(sys.argv[1])
    importlib.import_module("sglang.srt.managers.scheduler")
    here = [name for name in NAMES if between(name.since, name.until, check.installed())]
    names = [name for name in here if check.missing({name.use}, [name]) == []]
    results: list[tuple[str, str, list[str]]] = []
    seen: set[tuple[str, str]] = set()
    for name in names:
        module = name.where.partition(":")[0]
        if name.use == KERNELS:  # imported only where there is a GPU
            continue
        if (module, "") not in seen:
            importlib.import_module(module)
            results.append((name.text, "", tried(Edit(name, "", module, _source(module)), folder)))
        for edit in edits(name):
            if (name.where, edit.what) not in seen:
                seen.add((name.where, edit.what))
                results.append((name.text, edit.what, tried(edit, folder)))
        seen.add((module, ""))
    print(json.dumps(results))


if __name__ == "__main__":
    main()
