"""The model card, ``README.md``: what the hub shows of a compiled checkpoint.

It has no path of the builder's machine. A source in a local folder is shown by its name in the recipe, the type of its
model, and a checksum of the headers of its files, which are equal in every copy of the checkpoint.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path

import xxhash

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.degree import Degree
from ..checkpoint.manifest import CHECKSUM, FileEntry
from ..planning.rules import half_only
from ..planning.types import Plan
from ..recipe.writer import quoted
from ..storage.disk import read_chunks
from ..storage.hub import HubRepo
from ..text import counted, human, printable
from ..versions import INSTALL, __version__
from .front_matter import merged_front_matter

__all__ = ["card"]

_MOST_PATTERNS = 8
_PLAIN = re.compile(r"[A-Za-z0-9./-]+")

# Keys of another card that describe other weights, or another library's way to load them.
_NOT_THEIRS = ("library_name", "base_model", "base_model_relation", "quantized_by", "model-index", "inference")


def card(plan: Plan, files: Mapping[str, FileEntry], theirs: Path | None) -> Iterator[bytes]:
    """Yields the card of what a plan builds.

    Args:
        files: the build's other files, shards excepted.
        theirs: the card of the recipe's model, which is kept below.

    Raises:
        SourceError: ``theirs`` cannot be read.
    """
    old = "" if theirs is None else b"".join(read_chunks(theirs)).decode(errors="replace")
    front, below = merged_front_matter(_front(plan), old, _NOT_THEIRS)
    parts = [
        front,
        *_head(plan),
        *_serving(plan),
        *_formats(plan),
        *_sources(plan),
        *_recipe(plan),
        *_files(plan, files),
    ]
    if below.strip():
        parts.append(f"\n---\n\n*The card of {_place(plan.sources.model, 'model')}:*\n\n{below.lstrip()}")
    text = "\n".join(parts)
    yield (text if text.endswith("\n") else f"{text}\n").encode(errors="backslashreplace")


def _front(plan: Plan) -> dict[str, object]:
    model = plan.sources.model
    kinds = sorted({module.format.kind for module in plan.modules.values() if module.format.quantized})
    return {
        **({} if _is_local(model) else {"base_model": _hub_id(model), "base_model_relation": "quantized"}),
        "library_name": "sglang",
        "tags": ["mixprec", "mixed-precision", "sglang", *kinds],
    }


def _head(plan: Plan) -> Iterator[str]:
    parameters = sum(prod(module.shape) for module in plan.modules.values())
    bits = f", {8 * plan.tensor_bytes / parameters:.2f} bits a weight" if parameters else ""
    used = {tensor.source for shard in plan.shards for tensor in shard.tensors}
    model = plan.sources.model
    title = (model.facts.model_type or "model") if _is_local(model) else _hub_id(model)
    yield f"\n# {title if _PLAIN.fullmatch(title) else _code(title)}, mixed precision\n"
    yield (
        f"{human(plan.tensor_bytes)} of weights{bits}, compiled by mixprec {__version__} from "
        f"{counted(len(used), 'checkpoint')} of one model. Every weight has the bytes and the format of the checkpoint "
        "that it comes from: nothing was quantized again.\n"
    )


def _serving(plan: Plan) -> Iterator[str]:
    yield "## Serve it\n"
    if plan.unservable:
        yield "SGLang cannot serve this mix:\n"
        for problem in plan.problems:  # whose messages may name a folder
            yield f"- {_code(problem.code)}: {', '.join(map(_code, problem.modules[:_MOST_PATTERNS]))}"
        yield ""
        return
    stored = {name: (m.format, m.stored) for name, m in plan.modules.items() if m.format.quantized}
    half = " --dtype half" if any(half_only(stored, plan.sources.model.facts)) else ""
    ranks = f" {Degree(min(plan.recipe.tp)).options}" if plan.recipe.layout == "presplit" else ""
    yield f"With mixprec installed beside SGLang ({_code(INSTALL)}), which finds it by its entry point:\n"
    yield f"```console\n$ python -m sglang.launch_server --model-path FOLDER{half}{ranks}\n```\n"


def _formats(plan: Plan) -> Iterator[str]:
    yield "## Formats\n"
    yield "| format | modules | parameters | bytes | bits a weight |\n|---|---|---|---|---|"
    modules, parameters, nbytes = Counter[str](), Counter[str](), Counter[str]()
    for module in plan.modules.values():
        kind = module.format.kind
        modules[kind] += 1
        parameters[kind] += prod(module.shape)
        nbytes[kind] += module.nbytes
    for kind in sorted(modules):
        bits = f"{8 * nbytes[kind] / parameters[kind]:.2f}" if parameters[kind] else ""
        yield f"| {_code(kind)} | {modules[kind]:,} | {parameters[kind]:,} | {human(nbytes[kind])} | {bits} |"


def _sources(plan: Plan) -> Iterator[str]:
    yield "\n## Sources\n"
    yield "| source | checkpoint | modules | bytes |\n|---|---|---|---|"
    modules = Counter(module.source for module in plan.modules.values())
    nbytes = Counter[str]()
    for shard in plan.shards:
        for tensor in shard.tensors:
            nbytes[tensor.source] += tensor.info.nbytes
    for name, source in plan.sources.by_name.items():
        place = _place(source.checkpoint, name)
        yield f"| {_code(name)} | {place} | {modules[name]:,} | {human(nbytes[name])} |"


def _recipe(plan: Plan) -> Iterator[str]:
    """The recipe, with names in place of local folders."""
    recipe, sources = plan.recipe, plan.sources

    def location(checkpoint: Checkpoint, name: str) -> str:
        return f"./{name}" if _is_local(checkpoint) else _pinned(checkpoint)

    named = [name for name, source in sources.by_name.items() if source.checkpoint is sources.model]
    lines = [f"model: {_word(location(sources.model, named[0] if named else 'model'))}", "sources:"]
    lines += [f"  {_word(name)}: {_word(location(s.checkpoint, name))}" for name, s in sources.by_name.items()]
    lines.append(f"default: {_word(recipe.default)}")
    if recipe.rules:
        lines += ["weights:", *(f"  {_word(rule.pattern.text)}: {_word(rule.source)}" for rule in recipe.rules)]
    if recipe.tp:
        lines.append(f"output: {{tp: {list(recipe.tp)}, layout: {recipe.layout}}}")
    text = "\n".join(lines) + "\n"
    yield "\n## Recipe\n"
    if any(_is_local(checkpoint) for checkpoint in (sources.model, *(s.checkpoint for s in sources.by_name.values()))):
        yield "`./NAME` stands for a local folder.\n"
    fence = _fence(text)
    yield f"{fence}yaml\n{text}{fence}\n"


def _files(plan: Plan, files: Mapping[str, FileEntry]) -> Iterator[str]:
    yield "## Verify it\n"
    yield (
        "`mixprec_manifest.json` has the source and the checksum of every tensor, and the checksum of every file; "
        "`mixprec verify FOLDER` compares the files with it, and the tensors with their sources where these can be "
        "read.\n"
    )
    yield f"| file | bytes | {CHECKSUM} |\n|---|---|---|"
    for name, entry in sorted(files.items()):
        yield f"| {_code(name)} | {entry.nbytes:,} | {entry.checksum} |"
    if plan.recipe.layout != "presplit":
        for shard in plan.shards:
            yield f"| {_code(shard.file)} | {shard.file_bytes(plan.sources):,} | of each tensor |"


def _is_local(checkpoint: Checkpoint) -> bool:
    return not isinstance(checkpoint.storage, HubRepo)


def _hub_id(checkpoint: Checkpoint) -> str:
    return checkpoint.location.partition("@")[0]


def _pinned(checkpoint: Checkpoint) -> str:
    return f"{_hub_id(checkpoint)}@{checkpoint.commit}" if checkpoint.commit else checkpoint.location


def _place(checkpoint: Checkpoint, name: str) -> str:
    """A checkpoint for readers elsewhere: a hub id with its commit, or what identifies a local folder."""
    if not _is_local(checkpoint):
        return _code(_pinned(checkpoint))
    digest = xxhash.xxh3_128()
    for file, shard in sorted(checkpoint.shards.items()):
        digest.update(f"{file}\0{shard.size}\0{shard.header_checksum}\n".encode(errors="backslashreplace"))
    model_type = _code(checkpoint.facts.model_type or "unknown type")
    tensors = f"{sum(len(module.tensors) for module in checkpoint.modules.values()):,} tensors"
    return f"a local folder ({_code(name)}): {model_type}, {tensors}, headers {digest.hexdigest()}"


def _word(text: str) -> str:
    return printable(quoted(text))


def _code(text: str) -> str:
    """Untrusted text as code in a line or a cell of a table."""
    shown = printable(text).replace("|", "\\|")
    fence = "`" * (1 + max(map(len, re.findall("`+", shown)), default=0))
    pad = " " if "`" in shown or shown != shown.strip() else ""
    return f"{fence}{pad}{shown}{pad}{fence}" if shown else "(empty)"


def _fence(text: str) -> str:
    return "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
