"""Words and numbers for messages: counts, sizes, text that is safe to print."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

__all__ = ["URL", "as_word", "counted", "hide_password", "human", "printable", "some"]


URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/")


def hide_password(text: str) -> str:
    """Replaces user name and password of a URL by ``***``; returns other text unchanged."""
    return re.sub(r"(:/+).*@", r"\1***@", text, flags=re.DOTALL) if URL.match(text) else text


def printable(text: str) -> str:
    """Escapes control characters, line ends and changes of direction: untrusted names must not control a terminal."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def as_word(path: Path | str) -> str:
    """A path as one word of a command that a user copies into a shell: in quotes where it has spaces and the like."""
    return shlex.quote(str(path))


def human(nbytes: float) -> str:
    """``138_400_000_000`` -> ``"138.4 GB"``, in powers of ten like disks and hubs."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} TB"


def counted(number: int, what: str) -> str:
    """``"1 file"``, ``"2 files"``."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def some(words: Sequence[str], most: int = 4) -> str:
    """Lists the first ``most`` words and counts the others: ``"a, b and 3 more"``."""
    more = f" and {len(words) - most} more" if len(words) > most else ""
    return ", ".join(words[:most]) + more
