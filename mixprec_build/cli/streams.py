"""Standard output and standard error that may be closed, full, or no longer read."""

from __future__ import annotations

import errno
import io
import os
import sys
from contextlib import suppress
from pathlib import Path

__all__ = ["OutputLostError", "finish_output", "open_streams"]


class OutputLostError(Exception):
    """Standard output cannot be written. Not an ``OSError``, which a command might take for one of its own files."""

    def __init__(self, cause: OSError):
        """The message is empty where a reader went away, as ``head`` does."""
        gone = cause.errno == errno.EPIPE
        self.message = "" if gone else f"standard output: {cause.strerror}; the command itself may have succeeded"
        self.exit_code = 141 if gone else 3
        super().__init__(self.message)


class _Output(io.TextIOWrapper):
    def write(self, text: str, /) -> int:
        try:
            return super().write(text)
        except OSError as error:
            raise OutputLostError(error) from error

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            raise OutputLostError(error) from error


class _Errors(io.TextIOWrapper):
    """Standard error. Where it cannot be written, the exit code has to do."""

    def write(self, text: str, /) -> int:
        with suppress(OSError):
            return super().write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            super().flush()


def open_streams() -> None:
    """Makes standard output and error safe to print to.

    Characters that cannot be encoded are escaped. A closed stream, as daemons have, is opened on ``/dev/null``: else
    the next file would get its number, and what is printed.
    """
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for name, kind in (("stdout", _Output), ("stderr", _Errors)):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115
        elif stream is getattr(sys, f"__{name}__") and isinstance(stream, io.TextIOWrapper):
            encoding, lines = stream.encoding, stream.line_buffering
            safe = kind(stream.detach(), encoding=encoding, errors="backslashreplace", line_buffering=lines)
            setattr(sys, name, safe)
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def finish_output() -> None:
    """Writes out what is still to be printed. Raises :class:`OutputLostError`."""
    try:
        sys.stdout.flush()
    except OutputLostError:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)  # the interpreter tries once more when it ends
        os.close(null)
        raise
