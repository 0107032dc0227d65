"""Compares the entries of a compiled checkpoint's folder with the files that its manifest lists."""

from __future__ import annotations

import os
import stat
from collections.abc import Container, Iterator, Sequence
from pathlib import Path

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.manifest import MANIFEST, FileEntry, Manifest
from ..errors import SourceError
from ..ranks.layout import PRESPLIT
from ..storage.disk import checksum_of_file, inside, source_errors
from ..storage.owned import Entry, OwnedFolder

__all__ = ["beside", "file_differences"]


_TOOLS = {".git": True, ".cache": True, ".huggingface": True, ".gitattributes": False, ".gitignore": False}
"""Name of an entry that git or the hub's downloads put beside a checkpoint -> whether it is a folder."""


def beside(owned: OwnedFolder) -> list[str]:
    """Names of the entries of git and of the hub's downloads, which do not belong to the checkpoint."""
    with source_errors(owned.path):
        return [entry.name for entry in owned.entries() if _is_a_tools(entry)]


def _is_a_tools(entry: Entry) -> bool:
    is_folder = _TOOLS.get(entry.name)
    return is_folder is not None and (entry.is_folder if is_folder else entry.is_file)


def file_differences(
    owned: OwnedFolder, manifest: Manifest, checkpoint: Checkpoint, left: Sequence[str], unread: Container[str] = ()
) -> Iterator[str]:
    """Yields entries that do not belong to the checkpoint, and listed files that are not as they were written.

    Links are not followed to tell what an entry is. Entries of tools (:func:`beside`) and those that a stopped split
    ``left`` are no differences. The headers of ``unread`` shards are not compared.
    """
    listed = manifest.files
    with source_errors(owned.path):
        entries = {entry.name: entry for entry in owned.entries()}
    for name, entry in entries.items():
        if name not in listed and name not in {MANIFEST, PRESPLIT, *left} and not _is_a_tools(entry):
            yield f"{name}: {_what(owned, entry)}not in the manifest"
    for name, line in listed.items():
        if line.shard and manifest.rest is not None:
            continue  # its header was compared when it was opened
        if name not in entries:
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
