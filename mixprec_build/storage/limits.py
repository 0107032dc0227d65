"""Bounds the memory and time that an untrusted file may cost."""

from __future__ import annotations

import json
from typing import Any

__all__ = ["load_json", "readable_json"]


def load_json(data: bytes, most: int, **hooks: Any) -> Any:
    """Parses JSON from an untrusted file, if it has no more than ``most`` values: each may take 100 bytes of memory.

    Raises:
        ValueError: it has more values, or is not JSON in UTF-8.
        RecursionError: it is nested too deeply.
    """
    # Every value but the first comes after one of these bytes.
    if sum(map(data.count, (b",", b":", b"[", b"{"))) > most:
        raise ValueError(f"more than {most} values")
    return json.loads(data.decode("utf-8"), **hooks)


def readable_json(data: bytes, most: int) -> object:
    """As :func:`load_json`. Raises ``ValueError`` with words for the user, also for JSON that is nested too deeply."""
    try:
        return load_json(data, most)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"JSON that cannot be read: {error}") from error
