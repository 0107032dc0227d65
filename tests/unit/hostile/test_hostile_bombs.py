"""Bombs: small files that would become gigabytes, or hours."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from support.hostile import sealed
from support.run import Ended, run_python

from mixprec_build.checkpoint.manifest import MANIFEST
from mixprec_build.checkpoint.opening import open_checkpoint
from mixprec_build.errors import SourceError
from mixprec_build.storage.header import build_header

from .spoil import INDEX, Patch, change, refused

LIMITED = """
import resource, sys
memory, seconds = int(sys.argv[1]) << 20, int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
sys.argv[1:3] = []
from mixprec_build.cli.app import main
main()
"""


def limited(*arguments: object, monkeypatch: Patch, mebibytes: int = 1024, seconds: int = 60) -> Ended:
    """Runs a command in a process of so much memory and CPU time."""
    # Neither reserves more address space for each thread than it uses.
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
    ended = run_python("-c", LIMITED, str(mebibytes), str(seconds), *map(str, arguments), timeout=300)
    return Ended(ended.returncode, ended.stdout, ended.stderr)


def repeated(head: str, unit: str, tail: str, size: int) -> str:
    return head + unit * ((size - len(head) - len(tail)) // len(unit)) + tail


def distinct(unit: str, size: int) -> str:
    """An object of so many bytes with keys that are all different."""
    return "{" + ",".join(unit % i for i in range(size // (len(unit % 0) + 1))) + "}"


def shard_of(header: str) -> bytes:
    return len(header).to_bytes(8, "little") + header.encode()


def many_tensors(prefix: str, count: int) -> bytes:
    return build_header((f"{prefix}.{i}", "U8", (), 1) for i in range(count)) + bytes(count)


MIB = 1 << 20
MILLION = b'{"version":1,"checksum":"xxh3_128","a":%s}'
BOMBS: dict[str, tuple[str, str, Callable[[], str | bytes | int], str]] = {
    "config of lists": ("inspect", "config.json", lambda: repeated('{"a":[', "[],", "0]}", 16 * MIB), "more than"),
    "config of maps": ("inspect", "config.json", lambda: repeated('{"a":[', '{"a":0},', "0]}", 16 * MIB), "more than"),
    "config of keys": ("inspect", "config.json", lambda: distinct('"%06x":1', 16 * MIB), "more than 2000000"),
    "config of one text": ("inspect", "config.json", lambda: repeated('{"model_type":"', "x", '"}', 16 * MIB), ""),
    "config of depth": ("inspect", "config.json", lambda: '{"a":' + "[" * 900 + "]" * 900 + "}", "nested deeper"),
    "index of keys": ("inspect", INDEX, lambda: distinct('"%06x":1', 60 * MIB), "more than 4000000"),
    "index of lists": ("inspect", INDEX, lambda: repeated('{"a":[', "[],", "0]}", 60 * MIB), "more than 4000000"),
    "header of lists": (
        "inspect", "model.safetensors", lambda: shard_of(repeated('{"a":[', "[],", "0]}", 32 * MIB)), "more than 4000",
    ),
    "header of keys": (
        "inspect", "model.safetensors", lambda: shard_of(distinct('"%06x":{}', 32 * MIB)), "more than 4000000 values",
    ),
    "header of a long name": (
        "inspect", "model.safetensors", lambda: build_header([("x" * 30 * MIB, "U8", (), 1)]) + b"0", "is longer than",
    ),
    "names that are all different": (
        "inspect", "model.safetensors", lambda: many_tensors("a.%s" % ("b." * 20), 150_000), "",
    ),
    "manifest of lists": ("verify", MANIFEST, lambda: repeated('{"a":[', "[],", "0]}", 127 * MIB), "more than 4000000"),
    "manifest of keys": ("verify", MANIFEST, lambda: distinct('"%06x":1', 127 * MIB), "takes more memory"),
    "manifest of a million": (
        "verify", MANIFEST, lambda: sealed(MILLION % distinct('"%06x":1', 11 * MIB).encode()), "damaged",
    ),
    "manifest of anything": ("verify", MANIFEST, lambda: 1025 * MIB, "at most 1073741824 are read"),
}  # fmt: skip


@pytest.mark.parametrize("case", BOMBS)
def test_a_bomb(mix: Path, monkeypatch: Patch, case: str) -> None:
    command, file, content, message = BOMBS[case]
    folder = mix / ("out" if command == "verify" else "bf16")
    data = content()
    if isinstance(data, int):
        os.truncate(folder / file, data)  # a hole
    else:
        (folder / file).write_bytes(data.encode() if isinstance(data, str) else data)
    ended = limited(command, folder, *["--quiet"] * (command == "verify"), monkeypatch=monkeypatch)
    if message:
        assert message in refused(ended)
    else:
        assert ended.code == 0 and "serve it with" in ended.out and len(ended.out) < 200_000


@pytest.mark.parametrize(
    ("limit", "message"),
    [("_MAX_TENSORS", "more than 1000 tensors"), ("_MAX_HEADERS_BYTES", "headers of more than 1000 bytes in all")],
)
def test_shards_are_bounded_together(tmp_path: Path, monkeypatch: Patch, limit: str, message: str) -> None:
    monkeypatch.setattr(f"mixprec_build.checkpoint.opening.{limit}", 1000)
    (tmp_path / "config.json").write_text("{}")
    files = [f"{i}.safetensors" for i in range(20)]
    for file in files:
        (tmp_path / file).write_bytes(many_tensors(file, 100))
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {f"{file}.0": file for file in files}}))
    with pytest.raises(SourceError) as caught:
        open_checkpoint(str(tmp_path))
    assert str(caught.value) == f"{tmp_path}: {message}"


@pytest.mark.parametrize("file", ["tokenizer.json", "LICENSE"])
def test_a_companion_of_a_terabyte(mix: Path, monkeypatch: Patch, file: str) -> None:
    """A file may be a hole: what it says of its size costs nothing."""
    for folder in (mix / "bf16", mix / "out"):
        os.truncate(folder / file, 1 << 40)
    change(mix / "out" / MANIFEST, lambda m: m["files"][file].update(bytes=1 << 40))
    for command in (("verify", mix / "out"), ("build", mix / "mix.yaml", "-o", mix / "new")):
        ended = limited(*command, "--quiet", monkeypatch=monkeypatch)
        assert ended.code == 1 and f"{file}: 1099511627776 bytes; at most 268435456 are read\n" in ended.err
    assert not (mix / "new").exists()
