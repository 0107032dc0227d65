"""Puts hostile values into valid JSON documents, for fuzzing and for tests with random choices.

Bytes that are mutated at random are hardly ever parsed as a checkpoint. Here choices select where a document gets which
value, or loses one.
"""

from __future__ import annotations

import copy
import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from mixprec_build.checkpoint.manifest import CHECKSUM, MANIFEST, checksum_of

__all__ = ["CONFIG", "INDEX", "RANK", "VALUES", "Choices", "Drawn", "Hostile", "changed", "dump", "sealed"]

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
RANK = "presplit/tp1-ep1/rank-0-of-1"


class Choices(Protocol):
    """The part of ``atheris.FuzzedDataProvider`` that is used here."""

    def ConsumeBool(self) -> bool: ...

    def ConsumeIntInRange(self, low: int, high: int) -> int: ...

    def PickValueInList(self, values: list[Any]) -> Any: ...


class Drawn:
    """Choices at random."""

    def __init__(self, seed: int):
        self._random = random.Random(seed)

    def ConsumeBool(self) -> bool:
        return self._random.random() < 0.5

    def ConsumeIntInRange(self, low: int, high: int) -> int:
        return self._random.randint(low, high)

    def PickValueInList(self, values: list[Any]) -> Any:
        return self._random.choice(values)


DEEP: Any = json.loads("[" * 70 + "]" * 70)
DEEPER = "a list in a list in a list ..."  # only possible as text: see dump()

VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 8, 128, 1 << 31, 1 << 63, 10**400, 0.5, -0.0, float("nan"), float("inf"),
    "", "x", "0", "\x1b[2J", "\x9b", "\u202e", "\ud800", "a\nb", "[/red]", ":smile:", "../x", "/etc/passwd", "C:\\x",
    "a\0b", "~nobody/x", "x" * 5000, "9" * 5000, "gptq", "fp8", "mixprec", "gptq_int4", "fp8_block", "bf16", "awq",
    [], {}, [0], [[]], [None], ["x"], ["*", "bf16"], [["*", "fp8_block"]], [["*", "bf16"]], [["*", "gptq_int4"]],
    {"x": None}, {"": {}}, DEEP, DEEPER,
    [1 << 30, 1 << 30], [1 << 62, 1 << 62], [0, 1 << 62, 1 << 62], [-1],
    {"+:(a|a)*b": {"bits": 8}}, {".*.*.*.*.*b": {"bits": 8}},
    "*", "**", "?", "{0..9999}", "{a,aa}" * 20, "*a*a*a*", "model.layers.*", "model.safetensors", "config.json",
    "presplit/tp1-ep1/rank-7-of-1", "presplit/tp9999-ep1/rank-0-of-9999", "presplit/x",
)  # fmt: skip


def changed(document: Any, choices: Choices) -> Any:
    """A copy of a document with some values replaced, added or removed."""
    document = json.loads(json.dumps(document))
    for _ in range(choices.ConsumeIntInRange(1, 4)):
        _change(document, choices)
    return document


def _change(node: Any, choices: Choices) -> None:
    while isinstance(node, dict | list) and node:
        key = choices.PickValueInList(list(node) if isinstance(node, dict) else list(range(len(node))))
        inner = node[key]
        if isinstance(inner, dict | list) and inner and choices.ConsumeBool():
            node = inner
            continue
        action = choices.ConsumeIntInRange(0, 3)
        if action == 0:
            del node[key]
        elif action == 1 and isinstance(node, dict):
            node[choices.PickValueInList([value for value in VALUES if isinstance(value, str)])] = inner
        else:
            node[key] = copy.deepcopy(choices.PickValueInList(list(VALUES)))
        return


def dump(document: Any) -> bytes:
    return json.dumps(document).replace(f'"{DEEPER}"', "[" * 900 + "]" * 900).encode()


def sealed(text: bytes) -> bytes:
    """The text of a manifest with the checksum in its last line."""
    text = re.sub(rb', "manifest_%s": "[^"]*"}$' % CHECKSUM.encode(), b"}", text)
    text = text[:-1] + b", "
    return text + f' "manifest_{CHECKSUM}": "{checksum_of(text)}"\n}}\n'.encode()


class Hostile:
    """Changes one of ``files`` of a checkpoint (JSON, or the header of a safetensors file) while the context lasts.

    The manifest gets the new checksums. ``file`` is the file chosen.
    """

    def __init__(self, folder: Path, choices: Choices, files: Sequence[str] = ()):
        if not files:
            shards = [str(path.relative_to(folder)) for path in sorted(folder.rglob("*.safetensors"))]
            jsons = (CONFIG, INDEX, MANIFEST, f"{RANK}/index.json")
            files = [*(name for name in jsons if (folder / name).exists()), choices.PickValueInList(shards)]
        self.file: str = choices.PickValueInList(list(files))
        self.path = folder / self.file
        self._before = {path: path.read_bytes() for path in {self.path, *folder.glob(MANIFEST)}}
        self.path.write_bytes(self._changed(choices))
        if self.file == f"{RANK}/index.json":
            manifest = json.loads((folder / MANIFEST).read_bytes())
            manifest["presplit"][RANK][CHECKSUM] = checksum_of(self.path.read_bytes())
            (folder / MANIFEST).write_bytes(sealed(dump(manifest)))

    def _changed(self, choices: Choices) -> bytes:
        before = self._before[self.path]
        if self.path.suffix == ".safetensors":
            end = 8 + int.from_bytes(before[:8], "little")
            text = dump(changed(json.loads(before[8:end]), choices))
            return len(text).to_bytes(8, "little") + text + before[end:]
        text = dump(changed(json.loads(before), choices))
        return sealed(text) if self.file == MANIFEST else text

    def __enter__(self) -> Hostile:
        return self

    def __exit__(self, *_: object) -> None:
        for path, data in self._before.items():
            path.write_bytes(data)
