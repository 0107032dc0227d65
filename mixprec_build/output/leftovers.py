"""Finds what a stopped split left behind, and entries of ``presplit`` that are not mixprec's."""

from __future__ import annotations

import stat
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path

from ..checkpoint.checkpoint import REST
from ..checkpoint.degree import parse_folder
from ..checkpoint.manifest import ManifestHead, is_new_manifest
from ..errors import SourceError, VerifyError
from ..ranks.files import INDEX, read_index
from ..ranks.layout import PRESPLIT, SPLIT_LOCK, is_ours
from ..storage.disk import inside, write_errors
from ..storage.owned import Entry, OwnedFolder

__all__ = ["clear_leftovers", "leftovers", "locks", "unknown_entries"]


def leftovers(folder: Path, manifest: ManifestHead) -> list[str]:
    """Names of entries that a stopped split left behind. Nothing reads them."""
    with write_errors(folder), OwnedFolder.open(folder) as owned:
        return _leftovers(owned, manifest)


def unknown_entries(folder: Path, manifest: ManifestHead, *, cached: bool = False) -> list[str]:
    """Names of entries in ``presplit``, at any depth, that neither a build nor a split puts there.

    With ``cached`` a link into the hub's cache counts as a file.
    """
    with write_errors(folder), OwnedFolder.open(folder) as owned:

        def is_own(entry: Entry) -> bool:
            return is_ours(entry) or (cached and is_ours(_as_cached(folder, entry)))

        found = [entry.name for entry in _presplit(owned) if not is_own(entry)]
        listed = dict(manifest.ranks)
        if manifest.rest is not None:
            listed[REST] = manifest.rest
        for name, line in listed.items():
            with suppress(VerifyError):  # without its index a rank's files are known by their names alone
                index = read_index(folder, name, line)
                known = {f"{name}/{file}" for file in (INDEX, *index.files)}
                found += [entry.name for entry in owned.entries(name) if is_own(entry) and entry.name not in known]
    return found


def _as_cached(folder: Path, entry: Entry) -> Entry:
    """A link into the hub's cache as the file that it stands for; any other entry as it is."""
    if stat.S_ISLNK(entry.mode):
        with suppress(SourceError, OSError):
            return Entry(entry.name, inside(folder, entry.name).stat().st_mode)
    return entry


def clear_leftovers(owned: OwnedFolder, manifest: ManifestHead, keep: Collection[str] = ()) -> None:
    """Removes what stopped splits left, except ``keep`` and files of ranks, which another machine may have cut.

    The caller holds :data:`SPLIT_LOCK`, which stays: all other locks are of splits that ended.
    """
    with write_errors(owned.path):
        for name in _leftovers(owned, manifest):
            if parse_folder(name) is None and name not in keep and name != SPLIT_LOCK:
                owned.remove(name, lambda entry: is_ours(entry) or "/" not in entry.name)
        owned.sync()


def locks(owned: OwnedFolder) -> list[str]:
    """The lock files of splits that run, or were stopped."""
    return [entry.name for entry in _presplit(owned) if is_ours(entry) and entry.name.endswith(".lock")]


def _leftovers(owned: OwnedFolder, manifest: ManifestHead) -> list[str]:
    listed = set(manifest.ranks)
    if manifest.rest is not None:
        listed.add(REST)
    there = [entry.name for entry in owned.entries() if not entry.is_folder]
    dropped = manifest.shards if REST in listed else {}
    found = [name for name in there if is_new_manifest(name) or name in dropped]
    for entry in _presplit(owned):
        last = entry.name.rpartition("/")[2]
        folder = entry.is_folder and (entry.name == REST or parse_folder(entry.name) is not None)
        if is_ours(entry) and (last.startswith(".") or folder) and entry.name not in listed:
            found.append(entry.name)
    return found


def _presplit(owned: OwnedFolder) -> Iterator[Entry]:
    """Yields ``presplit``, if it exists, and what is in those of its folders that are mixprec's."""
    root = owned.entry(PRESPLIT)
    if root is not None:
        yield root
        yield from owned.below(PRESPLIT, is_ours) if is_ours(root) else ()
