"""Reads tensors from safetensors files on this machine or elsewhere, with one set of errors.

A checkpoint's :class:`~mixprec_build.storage.folder.Files` decide which reader its tensors need.
"""

from __future__ import annotations

import errno
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Self

import xxhash

from ..errors import SourceError
from .disk import open_regular, pread_all, pread_into
from .dtypes import numpy_dtype
from .header import TensorInfo
from .transposed import PANEL, read_scattered

if TYPE_CHECKING:
    import numpy as np

__all__ = ["BUFFER", "FileReader", "TensorReader", "checksum_on_disk", "read_tensor"]


BUFFER = 4 << 20
"""Bytes of a tensor that are read at a time."""
_MOST_OPEN = 64  # files; a process may usually have 1,024 open


class TensorReader(ABC):
    """Reads tensors, wherever their bytes come from. May be shared by threads.

    Every method raises :class:`SourceError`, with the names of file and tensor, where bytes cannot be read or are
    missing.
    """

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @abstractmethod
    def close(self) -> None:
        """Closes open files; one that is read afterwards is opened again."""

    @abstractmethod
    def read_into(self, tensor: TensorInfo, window: memoryview, at: int = 0) -> None:
        """Fills ``window`` with rows of a tensor: with its bytes from ``at`` on, where a row begins."""

    @abstractmethod
    def chunks(self, tensor: TensorInfo) -> Iterator[bytes]:
        """Yields a tensor's bytes in order, about :data:`BUFFER` at a time."""

    def array(self, tensor: TensorInfo) -> np.ndarray:
        """A tensor's values, ``shape`` as stored; BF16 and FP8 as ml_dtypes types."""
        import numpy as np

        out = np.empty(tensor.shape, numpy_dtype(tensor.dtype))
        if tensor.nbytes:
            self.read_into(tensor, out.reshape(-1).view(np.uint8).data)
        return out


@dataclass(slots=True)
class _OpenFile:
    """An open file. The body of a ``with`` statement reads from it; meanwhile it is not closed."""

    fd: int
    path: Path
    lock: Lock
    readers: int = 0
    """Threads that read from it now."""

    def __enter__(self) -> _OpenFile:
        return self

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.readers -= 1

    def read(self, tensor: TensorInfo, at: int, nbytes: int) -> bytes:
        """``nbytes`` of a tensor from its byte ``at`` on."""
        if not tensor.contiguous:
            window = bytearray(nbytes)
            read_tensor(self.fd, self.path, tensor, memoryview(window), at)
            return bytes(window)
        try:
            data = pread_all(self.fd, nbytes, tensor.start + at)
        except OSError as error:
            raise _unread(tensor, self.path, error) from error
        if len(data) < nbytes:
            raise _unread(tensor, self.path)
        return data

    def has_hole_at(self, tensor: TensorInfo) -> bool:
        """Whether nothing of a tensor was ever written."""
        try:
            return os.lseek(self.fd, tensor.start, os.SEEK_DATA) >= tensor.start + tensor.span
        except OSError as error:
            return error.errno == errno.ENXIO  # a hole up to the end; reading meets any other error again


class FileReader(TensorReader):
    """Reads from safetensors files, of which the last ones used stay open.

    Args:
        path_of: returns the path of a tensor's ``file``; None where it is not on this machine.
        elsewhere: reads bytes of such a file: ``(file, offset, length)``.
        ahead: tensor -> its first bytes, if they were read from such a file before.
    """

    def __init__(
        self,
        path_of: Callable[[str], Path | None],
        elsewhere: Callable[[str, int, int], bytes] | None = None,
        ahead: Mapping[str, bytes] | None = None,
    ):
        self._path_of, self._elsewhere, self._ahead = path_of, elsewhere, {} if ahead is None else ahead
        self._open: dict[str, _OpenFile] = {}
        """Open files, the one that was used last at the end."""
        self._lock = Lock()

    def close(self) -> None:
        for opened in self._open.values():
            os.close(opened.fd)
        self._open.clear()

    def read_into(self, tensor: TensorInfo, window: memoryview, at: int = 0) -> None:
        with self._reading(tensor.file) as opened:
            if opened is None:
                window[:] = self._from_elsewhere(tensor, at, len(window))
            else:
                read_tensor(opened.fd, opened.path, tensor, window, at)

    def read(self, tensor: TensorInfo, at: int, nbytes: int) -> bytes:
        """``nbytes`` of a tensor from its byte ``at`` on."""
        with self._reading(tensor.file) as opened:
            return self._from_elsewhere(tensor, at, nbytes) if opened is None else opened.read(tensor, at, nbytes)

    def chunks(self, tensor: TensorInfo) -> Iterator[bytes]:
        most = BUFFER if tensor.contiguous else PANEL
        for at in range(0, tensor.nbytes, most):
            yield self.read(tensor, at, min(most, tensor.nbytes - at))

    def first_values(self, tensor: TensorInfo, nbytes: int) -> np.ndarray | None:
        """The values in the first ``nbytes`` of a tensor, flat; None where it is empty or not on this machine.

        A hole of a sparse file is not read, so that files with nothing but a header are enough to plan with.
        """
        import numpy as np

        with self._reading(tensor.file) as opened:
            if opened is None:
                data = self._ahead.get(tensor.name)
            else:
                data = opened.read(tensor, 0, nbytes) if tensor.nbytes and not opened.has_hole_at(tensor) else None
        return None if data is None else np.frombuffer(data, dtype=numpy_dtype(tensor.dtype))

    def _from_elsewhere(self, tensor: TensorInfo, at: int, nbytes: int) -> bytes:
        if self._elsewhere is None:
            raise SourceError(f"{tensor.file} is not on this machine")
        if not tensor.contiguous:
            return self._scattered_from_elsewhere(tensor, at, nbytes)
        data = self._elsewhere(tensor.file, tensor.start + at, nbytes)
        if len(data) < nbytes:
            raise _unread(tensor, tensor.file)
        return data

    def _scattered_from_elsewhere(self, tensor: TensorInfo, at: int, nbytes: int) -> bytes:
        """Of all that they lie in: one request instead of one for each row."""
        assert self._elsewhere is not None
        matrix = self._elsewhere(tensor.file, tensor.start, tensor.span)

        def read_into(window: memoryview, offset: int) -> None:
            found = matrix[offset - tensor.start : offset - tensor.start + len(window)]
            if len(found) < len(window):
                raise _unread(tensor, tensor.file)
            window[:] = found

        out = bytearray(nbytes)
        read_scattered(tensor, read_into, memoryview(out), at)
        return bytes(out)

    def _reading(self, file: str) -> AbstractContextManager[_OpenFile | None]:
        """Opens a file for the body of a ``with`` statement, which gets None where it is not on this machine."""
        with self._lock:
            opened = self._open.pop(file, None)
            if opened is None and (path := self._path_of(file)) is not None:
                self._make_room()
                opened = _OpenFile(open_regular(path), path, self._lock)
            if opened is not None:
                self._open[file] = opened
                opened.readers += 1
        return nullcontext() if opened is None else opened

    def _make_room(self) -> None:
        idle = [file for file, opened in self._open.items() if not opened.readers]
        for file in idle[: max(0, len(self._open) - _MOST_OPEN + 1)]:
            os.close(self._open.pop(file).fd)


def checksum_on_disk(path: Path, tensor: TensorInfo) -> str:
    """The hexadecimal xxh3_128 of a tensor in the file that is now at ``path``."""
    digest = xxhash.xxh3_128()
    with FileReader(lambda _: path) as reader:
        for chunk in reader.chunks(tensor):
            digest.update(chunk)
    return str(digest.hexdigest())


def read_tensor(fd: int, path: Path, tensor: TensorInfo, window: memoryview, at: int = 0) -> None:
    """Fills ``window`` from an open file with a tensor's bytes from its byte ``at`` on.

    Raises:
        SourceError: they cannot be read, or the file ends before. ``path`` is its name in the message.
    """

    def read_into(window: memoryview, offset: int) -> None:
        try:
            got = pread_into(fd, window, offset)
        except OSError as error:
            raise _unread(tensor, path, error) from error
        if got < len(window):
            raise _unread(tensor, path)

    if tensor.contiguous:
        read_into(window, tensor.start + at)
    else:
        read_scattered(tensor, read_into, window, at)


def _unread(tensor: TensorInfo, path: Path | str, error: OSError | None = None) -> SourceError:
    what = f"ends inside {tensor.name}; fetch the file again"
    return SourceError(what if error is None else f"cannot read {tensor.name}: {error.strerror}", path=path)
