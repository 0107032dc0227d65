"""Spoils files, and reads the one message that then must come."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from support.hostile import sealed
from support.run import Ended

from mixprec_build.checkpoint.manifest import MANIFEST

Patch = pytest.MonkeyPatch
Change = Callable[[dict[str, Any]], object]

INDEX = "model.safetensors.index.json"
SECRET = "hf_1234567890secret"


def refused(ended: Ended) -> str:
    """The one message of a command that refused."""
    assert ended.code == 1 and ended.out == ""
    assert ended.err.startswith("mixprec: ") and ended.err.count("\n") == 1 and ended.err[:-1].isprintable()
    return ended.err


def change(path: Path, how: Change) -> None:
    """Changes a JSON file; a manifest gets the checksum of what it then holds."""
    document = json.loads(path.read_text())
    replaced = how(document)
    document = replaced if isinstance(replaced, Replaced) else document
    text = json.dumps(document.value if isinstance(document, Replaced) else document)
    data = text.encode(errors="backslashreplace")
    path.write_bytes(sealed(data) if path.name == MANIFEST else data)


class Replaced(NamedTuple):
    """The whole of a document."""

    value: object


def link(path: Path, target: object) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(str(target))
