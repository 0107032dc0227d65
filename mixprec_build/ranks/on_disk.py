"""Opens any checkpoint on this machine: a plain one, or a compiled one whatever files it has."""

from __future__ import annotations

from pathlib import Path

from ..checkpoint.checkpoint import REST
from ..checkpoint.manifest import MANIFEST, read_manifest
from ..checkpoint.typed import Source, open_source

__all__ = ["open_on_disk"]


def open_on_disk(location: str) -> Source:
    """As :func:`open_source`, but also opens a compiled checkpoint whose merged files were dropped."""
    folder = Path(location)
    if not (folder / MANIFEST).exists() or not (folder / REST).exists():
        return open_source(location)
    from .merged import open_compiled  # with numpy, which headers alone do not need

    return Source.of(location, open_compiled(folder, read_manifest(folder)))
