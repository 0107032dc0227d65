"""Reads a recipe from YAML.

It has one of two forms, both documented in ``recipes/README.md``: the native one (``model``, ``sources``, ``default``,
``weights``, ``output``) and the one under ``mixed_precision:`` (``fp16_path``, ``weight_mapping``, ...).
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..errors import RecipeError
from ..formats.registry import kinds_of_word
from ..patterns.index import PatternIndex
from ..patterns.pattern import Pattern, PatternError, PatternReader
from .fix import MTP
from .nodes import List, Map, Node, NodeReader, unknown

__all__ = ["DEFAULT_SHARD_SIZE", "Recipe", "Rule", "SourceRef", "load_recipe", "parse_size"]


DEFAULT_SHARD_SIZE = 5_000_000_000

_MAX_RECIPE_BYTES = 16 << 20
_MAX_SOURCES = 100
_UNITS = {"": 1, "B": 1} | {
    unit: scale**power
    for power, letter in enumerate("KMGT", start=1)
    for unit, scale in ((f"{letter}B", 1000), (f"{letter}IB", 1024))
}


@dataclass(frozen=True, slots=True)
class SourceRef:
    """A checkpoint the recipe names: a local folder or a hub id with an optional ``@revision``."""

    name: str
    location: str
    line: int


@dataclass(frozen=True, slots=True)
class Rule:
    """One line of ``weights:``: the modules that ``pattern`` matches come from ``source``.

    ``line`` is 1-based; 0 for a rule that is not in a file yet.
    """

    pattern: Pattern
    source: str
    line: int

    @property
    def mtp(self) -> bool:
        """Whether the line is ``mtp: SOURCE``, for all draft layers."""
        return self.pattern.text == MTP

    @property
    def exact(self) -> bool:
        """Whether the line names one module."""
        return self.pattern.exact and not self.mtp

    def __str__(self) -> str:
        where = f"line {self.line} " if self.line else ""
        return f"{where}`{self.pattern.text}: {self.source}`"


@dataclass(frozen=True, slots=True)
class Recipe:
    """A parsed recipe, checked for form but not against any checkpoint."""

    path: Path
    model: SourceRef
    sources: Mapping[str, SourceRef]
    default: str
    rules: tuple[Rule, ...] = ()
    shard_size: int = DEFAULT_SHARD_SIZE
    tp: tuple[int, ...] = ()
    """Tensor-parallel degrees to cut files for."""
    tp_line: int = 0
    layout: str = "merged"
    """Files of the complete model (``merged``), files cut for ranks (``presplit``), or ``both``."""
    serving: Mapping[str, object] = field(default_factory=dict)
    """The sections ``inference:`` and ``server:``, which have no influence on the build."""
    default_line: int = 0
    """The line of ``default:``, 0 where it is not written."""
    section: str = "weights"
    """The name of the section of rules: ``weights`` or ``weight_mapping``."""
    drop_mtp: bool = False
    """Whether draft layers are left out (``--drop-mtp``)."""

    @property
    def folder(self) -> Path:
        """The folder that relative locations start from."""
        return self.path.parent

    def laid_out(self, layout: str) -> Recipe:
        """The recipe with another layout. Raises :class:`RecipeError` where the layout needs ``tp`` and it has none."""
        if layout == "merged":
            return replace(self, layout=layout, tp=())
        if not self.tp:
            raise RecipeError(f"--layout {layout}: {_NO_TP}", path=self.path)
        return replace(self, layout=layout)

    def globs_matching(self, modules: Iterable[str]) -> dict[str, list[int]]:
        """Module -> indices into ``rules`` of the patterns with wildcards that match it, ascending.

        Raises:
            RecipeError: matching takes too long.
        """
        globs = [i for i, rule in enumerate(self.rules) if not rule.pattern.exact]
        try:
            found = PatternIndex([self.rules[i].pattern for i in globs]).hits(modules)
        except PatternError as error:
            raise RecipeError(
                f"{error}: it has {len(globs):,} patterns; write fewer, or such that begin or end with whole words of "
                "names, as `model.layers.{0..3}.mlp.*` does",
                path=self.path,
            ) from error
        return {name: [globs[at] for at in numbers] for name, numbers in found.items()}


def load_recipe(path: Path) -> Recipe:
    """Reads a recipe of either form.

    Raises:
        RecipeError: naming file and line, for anything from a YAML syntax error to an unknown key.
    """
    try:
        data = _read(path)
    except OSError as error:
        raise RecipeError(f"cannot read the recipe: {error.strerror}", path=path) from error
    reader = NodeReader(path)
    root = reader.parse(data)
    if not isinstance(root, Map):
        raise reader.error("a recipe is a mapping with `model:`, `sources:` and `weights:`", root)
    return _mixed_precision(reader, root) if "mixed_precision" in root else _native(reader, root)


def _read(path: Path) -> bytes:
    """Reads a bounded number of bytes: a pipe cannot block this, and a file without end, as in ``/proc``, ends it."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(fd, "rb", buffering=0, closefd=True) as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise RecipeError("cannot read the recipe: not a regular file", path=path)
        parts = []
        left = _MAX_RECIPE_BYTES + 1
        while left > 0 and (data := os.read(file.fileno(), min(left, 1 << 20))):
            parts.append(data)
            left -= len(data)
    if left <= 0:
        raise RecipeError(f"larger than {_MAX_RECIPE_BYTES >> 20} MiB; write ranges like {{0..15}}", path=path)
    return b"".join(parts)


def parse_size(text: str) -> int:
    """``"5GB"`` -> 5000000000, ``"512MiB"`` -> 536870912. Raises ``ValueError``."""
    match = re.fullmatch(r"(\d{1,12}(?:\.\d{1,6})?)\s*([A-Za-z]*)", text.strip())
    if match is None or match[2].upper() not in _UNITS:
        raise ValueError(f"{text!r} is no size; write 5GB, 512MiB or a number of bytes")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def _native(reader: NodeReader, root: Map) -> Recipe:
    if MTP in root:
        where = f"the source of the draft layers is a line of `weights:`; write there `{MTP}: SOURCE`"
        raise reader.error(f"`{MTP}:` at the top: {where}", root.line_of(MTP))
    reader.only(root, {"model", "sources", "default", "weights", "output", "inference", "server"}, "the recipe")
    model = reader.text(reader.need(root, "model", "the checkpoint that gives config and tokenizer"))
    sources = {
        name.text: SourceRef(name.text, reader.text(value).text, name.line)
        for name, value in reader.map(root.get("sources")).items
    }
    if len(sources) > _MAX_SOURCES:
        raise reader.error(f"more than {_MAX_SOURCES} sources", root["sources"])
    for ref in sources.values():
        if not re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", ref.name):
            raise RecipeError(f"{ref.name[:64]!r} is no name for a source", path=reader.path, line=ref.line)
    model_ref = SourceRef("model", model.text, model.line)
    same = [ref for ref in sources.values() if ref.location == model.text]
    if "default" in root:
        default = reader.text(root["default"]).text
        if default not in sources:
            raise reader.error(unknown("source", default, sources), root["default"])
    elif same:
        default = same[0].name
    elif "model" in sources:
        raise reader.error(
            "the source `model` is another checkpoint than `model:`; say which is meant with `default:`",
            sources["model"].line,
        )
    else:
        default = model_ref.name
        sources[default] = model_ref
    rules = _rules(reader, reader.map(root.get("weights")), sources)
    line = root["default"].line if "default" in root else 0
    return Recipe(reader.path, model_ref, sources, default, rules, *_output(reader, root), _serving(reader, root), line)


_PATHS = {
    "fp16_path": "fp16",
    "fp8_path": "fp8",
    "int4_path": "int4",
    "gptq_int4_path": "gptq_int4",
    "awq_int4_path": "awq_int4",
    "int8_path": "int8",
}


def _mixed_precision(reader: NodeReader, root: Map) -> Recipe:
    reader.only(root, {"mixed_precision", "output", "inference", "server"}, "a recipe with `mixed_precision:`")
    section = reader.map(root["mixed_precision"])
    reader.only(section, {*_PATHS, "base_model_path", "weight_mapping"}, "`mixed_precision:`")
    sources = {
        name: SourceRef(name, reader.text(section[key]).text, section.line_of(key))
        for key, name in _PATHS.items()
        if key in section
    }
    if not sources:
        raise reader.error(f"`mixed_precision:` names no checkpoint; give one of {', '.join(_PATHS)}", section)
    if "base_model_path" in section:
        base = reader.text(section["base_model_path"]).text
        model = SourceRef("model", base, section.line_of("base_model_path"))
    else:
        model = next(iter(sources.values()))
    same = [ref.name for ref in sources.values() if ref.location == model.location]
    if same:
        default = same[0]
    elif "fp16" in sources:
        default = "fp16"
    else:
        default = model.name
        sources[default] = model
    rules = _rules(reader, reader.map(section.get("weight_mapping")), sources)
    output, serving = _output(reader, root), _serving(reader, root)
    return Recipe(reader.path, model, sources, default, rules, *output, serving, section="weight_mapping")


def _rules(reader: NodeReader, section: Map, sources: Mapping[str, SourceRef]) -> tuple[Rule, ...]:
    rules, patterns = [], PatternReader()
    for key, value in section.items:
        source = reader.text(value)
        # A rule may name a format instead of a source; Sources.resolve finds the source that has it.
        if source.text not in sources and not kinds_of_word(source.text):
            raise reader.error(unknown("source", source.text, sources), source)
        # `X.weight` names the module X, even where a source stores it as qweight, qzeros, scales and g_idx.
        name = key.text.removesuffix(".weight")
        try:
            rules.append(Rule(patterns.read(name), source.text, key.line))
        except PatternError as error:
            raise reader.error(str(error), key) from error
    return tuple(rules)


_LAYOUTS = ("merged", "presplit", "both")
_NO_TP = "which ranks are files to be cut for? Add to the recipe `output: {tp: [4]}`"


def _output(reader: NodeReader, root: Map) -> tuple[int, tuple[int, ...], int, str]:
    """``shard_size`` in bytes, ``tp``, the line of ``tp``, and ``layout``."""
    output = reader.map(root.get("output"))
    reader.only(output, {"shard_size", "tp", "layout"}, "`output:`")
    size = DEFAULT_SHARD_SIZE
    if "shard_size" in output:
        try:
            size = parse_size(reader.text(output["shard_size"]).text)
        except ValueError as error:
            raise reader.error(str(error), output["shard_size"]) from error
        if size < 1 << 20:
            raise reader.error("shard_size must be at least 1MiB", output["shard_size"])
    layout = "both" if "tp" in output else "merged"
    if "layout" in output:
        layout = reader.text(output["layout"]).text
        if layout not in _LAYOUTS:
            raise reader.error(f"layout must be one of {', '.join(_LAYOUTS)}", output["layout"])
        if (layout == "merged") == ("tp" in output):
            contradiction = "no files are cut with it; leave out `tp`" if layout == "merged" else _NO_TP
            raise reader.error(f"layout {layout}: {contradiction}", output["layout"])
    if "tp" not in output:
        return size, (), 0, layout
    node = output["tp"]
    words = [reader.text(item).text for item in (node.items if isinstance(node, List) else (node,))]
    if not words or not all(re.fullmatch(r"[1-9]\d{0,3}", word) for word in words) or len(set(words)) != len(words):
        raise reader.error("tp must be numbers of tensor-parallel ranks, as in `tp: [4, 8]`", node)
    return size, tuple(map(int, words)), node.line, layout


def _serving(reader: NodeReader, root: Map) -> dict[str, object]:
    return {key: _plain(reader.map(root[key])) for key in ("inference", "server") if key in root}


def _plain(node: Node) -> object:
    if isinstance(node, Map):
        return {key.text: _plain(value) for key, value in node.items}
    return [_plain(item) for item in node.items] if isinstance(node, List) else node.text
