"""What a stopped split left behind, and what in ``presplit`` is not mixprec's."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ..checkpoint.checkpoint import REST
from ..checkpoint.degree import is_degree, parse_folder
from ..checkpoint.manifest import MANIFEST, layout_of, merged_files
from ..storage.disk import sync_folder, write_errors

__all__ = ["clear_leftovers", "leftovers", "strangers"]


# What was left behind


def leftovers(folder: Path, manifest: Mapping[str, Any]) -> list[str]:
    """What a stopped split left behind, of all that is there: nothing reads it."""
    listed = set(manifest.get("presplit", {}))
    if layout_of(manifest) == "presplit":
        listed.add(REST)
    names = [f".{MANIFEST}.new", *(merged_files(manifest) if REST in listed else ())]
    found = [name for name in names if (folder / name).exists()]
    for path in sorted((*folder.glob("presplit/*"), *folder.glob("presplit/*/*"))):
        name = str(path.relative_to(folder))
        ours = path.name.startswith(".") or name == REST or parse_folder(name) is not None
        if ours and name not in listed:
            found.append(name)
    return found


def strangers(folder: Path, manifest: Mapping[str, Any]) -> list[str]:
    """What lies in ``presplit``, is not listed, and was not left behind by a split, either."""
    listed = manifest.get("presplit", {})
    known = {*listed, *leftovers(folder, manifest), REST}
    found = []
    for path in sorted(folder.glob("presplit/*")) + sorted(folder.glob("presplit/*/*")):
        name, parent = (str(p.relative_to(folder)) for p in (path, path.parent))
        # A split that is stopped at its first rank leaves its folder empty.
        cut = path.is_dir() and parent == "presplit" and is_degree(path.name)
        if name not in known and parent not in known and not cut:
            found.append(name)
            known.add(name)
    return found


def clear_leftovers(folder: Path, manifest: Mapping[str, Any], keep: Collection[str] = ()) -> None:
    """Removes it, but for ``keep``, and for ranks, which another machine may have cut."""
    with write_errors(folder):
        for name in leftovers(folder, manifest):
            path = folder / name
            if parse_folder(name) is not None or name in keep:
                continue
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        sync_folder(folder)
