"""The interface to a checkpoint's files, and its implementation for a folder on this machine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ..errors import SourceError
from .disk import inside, opened, pread_all
from .reader import FileReader, TensorReader

__all__ = ["Files", "LocalFolder"]


class Files(Protocol):
    """A checkpoint's files, in a local folder or a hub repository. Methods raise :class:`SourceError`."""

    @property
    def files(self) -> Mapping[str, int | None]:
        """Name -> size in bytes."""

    def read(self, name: str, offset: int, length: int) -> bytes:
        """``length`` bytes of a file from ``offset`` on."""

    def cached(self, name: str) -> Path | None:
        """The path of the file, if it is on this machine."""

    def fetch(self, names: Iterable[str]) -> dict[str, Path]:
        """Downloads files that are not on this machine. Returns name -> path."""

    def reader(self) -> TensorReader:
        """A reader of the files' tensors."""


@dataclass(frozen=True, slots=True)
class LocalFolder:
    """A checkpoint in a folder, or a snapshot in the hub's cache (whose files are links into ``blobs/``).

    A file that is a link to elsewhere is listed, but reading it raises.
    """

    folder: Path
    files: Mapping[str, int | None]

    @classmethod
    def open(cls, folder: Path) -> LocalFolder:
        """Lists the files of a folder. Raises :class:`SourceError` if it cannot be read."""
        try:
            files = {p.name: p.stat().st_size for p in sorted(folder.iterdir()) if p.exists() and not p.is_dir()}
        except OSError as error:
            raise SourceError(f"cannot read it: {error.strerror}", path=error.filename or folder) from error
        return cls(folder, files)

    def read(self, name: str, offset: int, length: int) -> bytes:
        path = inside(self.folder, name)
        with opened(path) as fd:
            data = pread_all(fd, length, offset)
        if len(data) != length:
            raise SourceError(f"ends at byte {offset + len(data)}, {offset + length} were expected", path=path)
        return data

    def cached(self, name: str) -> Path | None:
        return inside(self.folder, name)

    def fetch(self, names: Iterable[str]) -> dict[str, Path]:
        return {name: inside(self.folder, name) for name in names}

    def reader(self) -> TensorReader:
        return FileReader(self.cached)
