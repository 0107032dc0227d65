"""Writes the words of a recipe as YAML."""

from __future__ import annotations

import json
import re

__all__ = ["quoted"]

_PLAIN = re.compile(r"[A-Za-z0-9_./~][A-Za-z0-9_./~@+{},\-*?]*")


def quoted(text: str) -> str:
    """A name, pattern or location as YAML, without quotes where no YAML reader needs them."""
    return text if _PLAIN.fullmatch(text) else json.dumps(text, ensure_ascii=False)
