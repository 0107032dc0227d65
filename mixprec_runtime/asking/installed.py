"""Compares the installed SGLang with what mixprec uses of it, and lists the repairs that it needs."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from ..contact.check import explained, installed, missing
from ..contact.flags import FLAGS, missing_flags
from ..contact.names import NAMES

__all__ = ["examine"]


def examine() -> dict[str, Any]:
    """Names that are missing, and the repairs that are in force.

    Returns:
        ``version``, ``names`` and ``flags`` (how many are used), ``problems`` (one line for each that is missing), and
        ``repairs``: ``format``, ``name``, ``source`` and ``issues`` of each.
    """
    # Names of the server are compared only where its module is imported.
    importlib.import_module("sglang.srt.managers.scheduler")
    arguments: Any = importlib.import_module("sglang.srt.server_args").ServerArgs
    version = installed()
    problems = [*missing({name.use for name in NAMES}), *missing_flags(_Declared(arguments))]
    found: dict[str, Any] = {
        "version": version,
        "names": len({name.where for name in NAMES}),
        "flags": len(FLAGS),
        "problems": problems,
        "repairs": [],
    }
    if not problems:
        try:
            registry = importlib.import_module("mixprec_runtime.formats.registry")
        except Exception as error:  # of any type, if the table lacks a name
            found["problems"] = [explained(error)]
        else:
            found["repairs"] = [
                {"format": fmt, "name": repair.name, "source": repair.source, "issues": [*repair.issues]}
                for fmt, repair in registry.repairs()
                if repair.needed_by(version)
            ]
    return found


@dataclass(frozen=True, slots=True)
class _Declared:
    """An object that has the attributes that a class declares."""

    owner: type

    def __getattr__(self, name: str) -> None:
        if not any(name in vars(base).get("__annotations__", {}) for base in self.owner.__mro__):
            raise AttributeError(name)
