"""Changes manifests and makes their checksums valid again."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mixprec_build.checkpoint.manifest import CHECKSUM, MANIFEST, dump_manifest

__all__ = ["rewrite_manifest", "sealed"]


class _Raw(NamedTuple):
    """A module's entry with any contents."""

    entry: Any

    def to_json(self) -> Any:
        return self.entry


def sealed(manifest: Mapping[str, Any]) -> bytes:
    """The bytes of a manifest's file, with a valid checksum, from its JSON."""
    head = {key: value for key, value in manifest.items() if key not in ("modules", f"manifest_{CHECKSUM}")}
    modules: Any = ((name, _Raw(entry)) for name, entry in manifest["modules"].items())
    return b"".join(dump_manifest(head, modules))


def rewrite_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Applies ``change`` to the manifest's JSON, and writes it with a valid checksum."""
    path = folder / MANIFEST
    manifest = json.loads(path.read_bytes())
    change(manifest)
    path.write_bytes(sealed(manifest))
