"""Where a checkpoint's files are: the interface, and a folder on this machine."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ..errors import SourceError
from .disk import inside, open_regular, pread_all

__all__ = ["Files", "LocalFolder"]


class Files(Protocol):
    """Where a checkpoint's files are: a local folder or a hub repository."""

    @property
    def files(self) -> Mapping[str, int | None]:
        """Name -> size in bytes."""

    def read(self, name: str, offset: int, length: int) -> bytes:
        """Exactly these bytes of a file."""

    def cached(self, name: str) -> Path | None:
        """The file on this machine, if it is here."""

    def fetch(self, names: Iterable[str]) -> dict[str, Path]:
        """Brings the files to this machine."""


@dataclass(frozen=True, slots=True)
class LocalFolder:
    """A checkpoint in a folder, or a snapshot in the hub's cache (whose files are links into ``blobs/``).

    A file that is a link to elsewhere is listed, and refused when it is asked for.
    """

    folder: Path
    files: Mapping[str, int | None]

    @classmethod
    def open(cls, folder: Path) -> LocalFolder:
        try:
            files = {p.name: p.stat().st_size for p in sorted(folder.iterdir()) if p.exists() and not p.is_dir()}
        except OSError as error:
            raise SourceError(f"cannot read it: {error.strerror}", path=error.filename or folder) from error
        return cls(folder, files)

    def read(self, name: str, offset: int, length: int) -> bytes:
        path = inside(self.folder, name)
        fd = open_regular(path)
        try:
            data = pread_all(fd, length, offset)
        except OSError as error:
            raise SourceError(f"read error: {error.strerror}", path=path) from error
        finally:
            os.close(fd)
        if len(data) != length:
            raise SourceError(f"ends at byte {offset + len(data)}, {offset + length} were expected", path=path)
        return data

    def cached(self, name: str) -> Path | None:
        return inside(self.folder, name)

    def fetch(self, names: Iterable[str]) -> dict[str, Path]:
        return {name: inside(self.folder, name) for name in names}
