"""Compares the entries of a compiled checkpoint's folder with the files that its manifest lists."""

from __future__ import annotations

import os
import stat
from collections.abc import Container, Iterator, Sequence
from pathlib import Path

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.manifest import MANIFEST, FileEntry, ManifestHead, is_new_manifest
from ..errors import SourceError
from ..planning.companions import CARD
from ..ranks.layout import PRESPLIT
from ..storage.disk import checksum_of_file, inside, source_errors
from ..storage.owned import Entry, OwnedFolder

__all__ = ["beside", "edited_card", "file_differences"]


_TOOLS = {".git": True, ".cache": True, ".huggingface": True, ".gitattributes": False, ".gitignore": False, CARD: False}
"""Name of an entry that git, the hub's downloads or people put beside a checkpoint -> whether it is a folder."""


def beside(owned: OwnedFolder, manifest: ManifestHead) -> list[str]:
    """Names of the entries of git, of the hub's downloads and a card of the user's own: no part of the checkpoint."""
    with source_errors(owned.path):
        return [entry.name for entry in owned.entries() if _is_beside(entry, manifest)]


def edited_card(folder: Path, manifest: ManifestHead) -> str | None:
    """What became of the card that a build wrote: ``edited``, ``removed``, ``unreadable``; None for nothing.

    People edit a card, and nothing else reads it. Entries that are no files are left to :func:`file_differences`.
    """
    line, path = manifest.files.get(CARD), folder / CARD
    if line is None:
        return None
    try:
        with source_errors(path):
            if not path.is_file():
                return None if os.path.lexists(path) else "removed"
        return None if checksum_of_file(path) == line.checksum else "edited"
    except SourceError:
        return "unreadable"


def _is_beside(entry: Entry, manifest: ManifestHead) -> bool:
    is_folder = None if entry.name in manifest.files else _TOOLS.get(entry.name)
    return is_folder is not None and (entry.is_folder if is_folder else entry.is_file)


def file_differences(
    owned: OwnedFolder, manifest: ManifestHead, checkpoint: Checkpoint, left: Sequence[str], unread: Container[str] = ()
) -> Iterator[str]:
    """Yields entries that do not belong to the checkpoint, and listed files that are not as they were written.

    Links are not followed to tell what an entry is. Entries of tools (:func:`beside`), those that a stopped split
    ``left`` and another text of the card (:func:`edited_card`) are no differences. The headers of ``unread`` shards are
    not compared.
    """
    listed = manifest.files
    with source_errors(owned.path):
        entries = {entry.name: entry for entry in owned.entries()}
    for name, entry in entries.items():
        if entry.is_file and is_new_manifest(name):
            continue  # of a split that stopped, or that lists its ranks just now
        if name not in listed and name not in {MANIFEST, PRESPLIT, *left} and not _is_beside(entry, manifest):
            yield f"{name}: {_what(owned, entry)}not in the manifest"
    for name, line in listed.items():
        if line.shard and manifest.rest is not None:
            continue  # its header was compared when it was opened
        if name not in entries:
            if name != CARD:
                yield f"{name}: missing"
            continue
        try:
            yield from _file_difference(owned, entries[name], line, checkpoint, name in unread)
        except SourceError as error:
            yield str(error)


def _what(owned: OwnedFolder, entry: Entry) -> str:
    """The kind of an entry for messages, ``"a FIFO, "``; empty for files and folders; with its target for a link."""
    if entry.is_file or entry.is_folder:
        return ""
    return f"{_link(owned, entry.name) if stat.S_ISLNK(entry.mode) else entry.kind}, "


def _link(owned: OwnedFolder, name: str) -> str:
    path = owned.path / name
    with source_errors(path):
        return f"a {'' if path.exists() else 'dangling '}link to {os.readlink(name, dir_fd=owned.fd)}"


def _file_difference(
    owned: OwnedFolder, entry: Entry, line: FileEntry, checkpoint: Checkpoint, unread: bool
) -> Iterator[str]:
    name = entry.name
    path = inside(owned.path, name)  # refuses links, except within the folder and into the hub's cache
    with source_errors(path):
        mode = entry.mode
        if stat.S_ISLNK(mode):
            if Path(os.path.realpath(owned.path)) in Path(os.path.realpath(path)).parents:
                yield f"{name}: is {_link(owned, name)}, a file was written"
                return
            mode = path.stat().st_mode
        size = path.stat().st_size
    if not stat.S_ISREG(mode):
        yield f"{name}: is {Entry(name, mode).kind}, a file was written"
    elif name == CARD:
        return
    elif size != line.nbytes:
        yield f"{name}: {size} bytes, {line.nbytes} were written"
    elif line.shard:
        shard = checkpoint.shards.get(name)
        if shard is None and not unread:
            yield f"{name}: not in the index"
        elif shard is not None and shard.header_checksum != line.checksum:
            yield f"{name}: its header was changed"
    elif checksum_of_file(path) != line.checksum:
        yield f"{name}: its bytes were changed"
