"""The YAML at the start of a model card, between two lines of ``---``, which the hub reads."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import yaml

from ..errors import RecipeError
from ..recipe.nodes import List, Map, NodeReader, Text
from ..text import printable

__all__ = ["merged_front_matter"]

_FRONT = re.compile(r"---[ \t]*\r?\n(.*?)^---[ \t]*(?:\r?\n|\Z)", re.DOTALL | re.MULTILINE)
_PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9_./-]*")
_READER = Path("README.md")


def merged_front_matter(ours: Mapping[str, object], theirs: str, dropped: Collection[str]) -> tuple[str, str]:
    """Our front matter with the keys of another card's that ours lacks, and that card's text.

    Keys such as ``license`` and ``language`` are copied as they are written; ``tags`` are joined. A front matter that
    is not plain YAML stays in that text, in a block of code.

    Args:
        ours: keys and words, of which ``tags`` is a list.
        theirs: the complete other card; empty for none.
        dropped: keys of the other card that would be wrong here.
    """
    text = theirs.removeprefix("\ufeff")
    found = _FRONT.match(text)
    if found is None:
        return _fenced_by_lines(_dumped(ours)), text
    front, body = found[1].replace("\r\n", "\n"), text[found.end() :]
    combined = _combined(ours, front, dropped)
    if combined is not None:
        return _fenced_by_lines(combined), body
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", front)), default=0))
    return _fenced_by_lines(_dumped(ours)), f"{fence}yaml\n{front}{fence}\n\n{body}"


def _combined(ours: Mapping[str, object], front: str, dropped: Collection[str]) -> str | None:
    """YAML of our keys and those of another front matter; None where that is not plain YAML."""
    try:
        kept, tags = _blocks(front, {*ours, *dropped})
        tags = list(dict.fromkeys((*_strings(ours.get("tags")), *tags)))
        combined = _dumped({**ours, "tags": tags}) + "".join(kept.values())
        return combined if list(_parsed(combined).index) == [*ours, *kept] else None
    except RecipeError:
        return None


def _fenced_by_lines(front: str) -> str:
    return f"---\n{front}---\n"


def _dumped(values: Mapping[str, object]) -> str:
    """YAML of words and lists of words, one a line, each in quotes where it could be read as anything else."""
    lines = []
    for key, value in values.items():
        words = _strings(value)
        lines += [f"{key}: {_word(str(value))}"] if not isinstance(value, list) else [f"{key}:", *map(_item, words)]
    return "".join(f"{line}\n" for line in lines)


def _item(word: str) -> str:
    return f"- {_word(word)}"


def _word(text: str) -> str:
    plain = _PLAIN.fullmatch(text) is not None and yaml.safe_load(text) == text  # not `yes` or `null`
    return text if plain else printable(json.dumps(text, ensure_ascii=False))  # which are escapes of YAML's, too


def _parsed(text: str) -> Map:
    root = NodeReader(_READER).parse(text.encode(errors="strict"))
    if not isinstance(root, Map):
        raise RecipeError("no mapping", path=_READER)
    return root


def _blocks(front: str, without: Collection[str]) -> tuple[dict[str, str], list[str]]:
    """The lines of each top-level key as they are written, without those keys, and the words of ``tags``.

    Raises:
        RecipeError: it is not YAML, or several keys share a line.
    """
    try:
        root = _parsed(front)
    except UnicodeEncodeError as error:
        raise RecipeError("no UTF-8", path=_READER) from error
    lines = front.splitlines(keepends=True)
    starts = [key.line for key, _ in root.items]
    if not front.endswith("\n") or len(set(starts)) < len(starts) or front.splitlines() != front.split("\n")[:-1]:
        raise RecipeError("not one key a line", path=_READER)
    kept = {}
    for (key, _), start, end in zip(root.items, starts, [*starts[1:], len(lines) + 1], strict=True):
        if key.text not in without:
            kept[key.text] = "".join(lines[start - 1 : end - 1])
    tags = root.get("tags")
    words = [item.text for item in tags.items if isinstance(item, Text)] if isinstance(tags, List) else []
    return kept, words


def _strings(value: object) -> Sequence[str]:
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []
