"""YAML nodes that know their line.

They are made from YAML's event stream, never by a constructor: tags and aliases are refused, and scalars stay text.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from ..errors import RecipeError
from ..text import hide_password

__all__ = ["List", "Map", "Node", "NodeReader", "Text", "unknown"]

_MAX_DEPTH = 16
_MAX_NODES = 500_000
_MAX_WORD = 4096  # as long as a path may be


def unknown(what: str, word: str, known: Iterable[str]) -> str:
    """A message about an unknown ``word``, with the known one that is most like it, or all."""
    known, word = sorted(known), word[:100]
    near = difflib.get_close_matches(word, known, n=1)
    hint = f"did you mean `{near[0]}`?" if near else "known: " + ", ".join(f"`{k}`" for k in known)
    return f"unknown {what} `{word}`; {hint if known else 'there are none'}"


@dataclass(frozen=True, slots=True)
class Text:
    """A scalar. ``line`` of each node is 1-based."""

    text: str
    line: int


@dataclass(frozen=True, slots=True)
class List:
    """A sequence."""

    items: list[Node]
    line: int


@dataclass(frozen=True, slots=True)
class Map:
    """A mapping, in the file's order."""

    items: list[tuple[Text, Node]]
    line: int
    index: dict[str, int] = field(default_factory=dict)
    """Key -> position in ``items``."""

    def __contains__(self, key: str) -> bool:
        return key in self.index

    def __getitem__(self, key: str) -> Node:
        return self.items[self.index[key]][1]

    def get(self, key: str) -> Node | None:
        at = self.index.get(key)
        return None if at is None else self.items[at][1]

    def line_of(self, key: str) -> int:
        return self.items[self.index[key]][0].line


Node = Text | List | Map
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class NodeReader:
    """Reads one file. Every method raises :class:`RecipeError` with the file's path and the line."""

    def __init__(self, path: Path):
        self.path = path
        self._nodes = 0

    def error(self, message: str, at: Node | int | None) -> RecipeError:
        """Returns an error at a node or line."""
        line = at if at is None or isinstance(at, int) else at.line
        return RecipeError(message, path=self.path, line=line)

    def parse(self, data: bytes) -> Node:
        """The root node of the only document in ``data``."""
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
            raise self.error("not UTF-8 text; is this a recipe?", line) from error
        try:
            events = (e for e in yaml.parse(text, Loader=_Loader) if not isinstance(e, yaml.StreamStartEvent))
            first = next(events)
            if isinstance(first, yaml.StreamEndEvent):
                raise self.error("the recipe is empty", None)
            root = self._node(next(events), events, depth=0)
            next(events)  # the document's end
            if not isinstance(next(events), yaml.StreamEndEvent):
                raise self.error("one document only; remove the second `---`", None)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            at = None if mark is None else mark.line + 1
            if "nesting" in (error.problem or ""):  # libyaml reads ahead and has a limit of its own
                raise self.error(f"nested deeper than {_MAX_DEPTH} levels", at) from error
            # YAML reads `*.mlp: fp8` as an alias with a bad name.
            hint = "; quote names that start with *" if "alias" in (error.context or "") else ""
            if r"'\t'" in (error.problem or "") or (mark and mark.index < len(text) and text[mark.index] == "\t"):
                hint = "; a tab: YAML wants spaces"
            raise self.error(f"not valid YAML: {error.problem or error.context}{hint}", at) from error
        except yaml.YAMLError as error:
            raise self.error(f"not valid YAML: {error}", None) from error
        return root

    def _node(self, event: yaml.Event, events: Iterator[yaml.Event], depth: int) -> Node:
        line = 1 if event.start_mark is None else event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise self.error("anchors (&) and aliases (*) are not allowed; quote names that start with *", line)
        tag = getattr(event, "tag", None)
        if tag is not None:
            raise self.error(f"tags like {tag[:100]!r} are not allowed", line)
        if depth > _MAX_DEPTH:
            raise self.error(f"nested deeper than {_MAX_DEPTH} levels", line)
        self._nodes += 1
        if self._nodes > _MAX_NODES:
            raise self.error(f"more than {_MAX_NODES} words; write ranges like {{0..15}}", line)
        if isinstance(event, yaml.ScalarEvent):
            return Text(event.value, line)
        if isinstance(event, yaml.SequenceStartEvent):
            items = []
            while not isinstance(event := next(events), yaml.SequenceEndEvent):
                items.append(self._node(event, events, depth + 1))
            return List(items, line)
        node = Map([], line)
        while not isinstance(event := next(events), yaml.MappingEndEvent):
            key = self._node(event, events, depth + 1)
            if not isinstance(key, Text):
                raise self.error("a key must be a plain name; quote patterns that start with `{`", key)
            if key.text in node:
                first = node.line_of(key.text)
                raise self.error(f"`{key.text[:200]}` is given twice; first on line {first}", key)
            node.index[key.text] = len(node.items)
            node.items.append((key, self._node(next(events), events, depth + 1)))
        return node

    def need(self, node: Map, key: str, what: str) -> Node:
        """The value of a required key; ``what`` explains the key in the message."""
        if key not in node:
            raise self.error(f"`{key}:` is missing: {what}", node)
        return node[key]

    def only(self, node: Map, known: set[str], where: str) -> None:
        """Refuses keys that are not ``known``."""
        for key, _ in node.items:
            if key.text not in known:
                raise self.error(f"in {where}: {unknown('key', key.text, known)}", key)

    def text(self, node: Node) -> Text:
        """A word or name: not empty, not too long, no URL with a password."""
        if not isinstance(node, Text) or not node.text:
            raise self.error("expected one word or name here", node)
        if len(node.text) > _MAX_WORD:
            raise self.error(f"a word of {len(node.text)} characters", node)
        if hide_password(node.text) != node.text:
            raise self.error("a URL with a password; write org/name, and log in with `hf auth login` or HF_TOKEN", node)
        return node

    def map(self, node: Node | None) -> Map:
        """A mapping, empty for a missing or empty section."""
        if node is None or (isinstance(node, Text) and not node.text):
            return Map([], 1 if node is None else node.line)
        if not isinstance(node, Map):
            raise self.error("expected `key: value` lines here", node)
        return node
