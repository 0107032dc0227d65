"""Manifests, declarations and data of compiled checkpoints. Rows that fuzzing found (``tests/fuzz``) say so."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from support.hostile import RANK, Drawn, Hostile

from mixprec_build.checkpoint.degree import Degree
from mixprec_build.checkpoint.manifest import CHECKSUM, MANIFEST
from mixprec_build.checkpoint.opening import open_checkpoint
from mixprec_build.checkpoint.typed import open_source
from mixprec_build.errors import MixprecError
from mixprec_build.output.split import split
from mixprec_build.output.weight_errors import weight_errors
from mixprec_build.report.doctor import _checkpoint

from .spoil import Change, Patch, Replaced, change, refused


def deep(levels: int) -> Any:
    return json.loads("[" * levels + "]" * levels)


def first_tensor(manifest: dict[str, Any]) -> dict[str, Any]:
    module: dict[str, Any] = next(iter(manifest["modules"].values()))
    tensor: dict[str, Any] = next(iter(module["tensors"].values()))
    return tensor


def first_source(manifest: dict[str, Any]) -> dict[str, Any]:
    source: dict[str, Any] = manifest["sources"]["fp8"]
    return source


NO_FILE = {"bytes": 0, CHECKSUM: ""}
ESCAPES = ("../x", "a/../../x", "/etc/passwd", "..\\x", "C:\\x", "C:/x", "\\\\server\\share\\x", "..")

MANIFESTS: dict[str, tuple[Change, str]] = {
    "a list": (lambda m: Replaced([]), "damaged"),
    "null": (lambda m: Replaced(None), "damaged"),
    "nothing": (lambda m: Replaced({"x": 0}), "damaged: KeyError('version')"),
    "another version": (lambda m: m.update(version=2), "version 2; this mixprec reads version 1"),
    "a version that is a list": (lambda m: m.update(version=[1] * 1000), "version [1, 1, 1, 1, 1, 1, ...]; this"),
    "a version that is no number": (lambda m: m.update(version=float("nan")), "version nan; this"),
    "sources a list": (lambda m: m.update(sources=[]), "sources is list"),
    "101 sources": (lambda m: m["sources"].update({str(i): first_source(m) for i in range(101)}), "more than 100"),
    "a location null": (lambda m: first_source(m).update(location=None), "location is NoneType"),
    "a path that is a number": (lambda m: first_source(m).update(path=0), "path is int"),
    "a commit that is a list": (lambda m: first_source(m).update(commit=[]), "commit is list"),
    "unservable an object": (lambda m: m.update(unservable={"x": "x"}), "unservable is dict"),  # found by fuzzing
    "unservable of numbers": (lambda m: m.update(unservable=[1]), "unservable is int"),
    "unservable null": (lambda m: m.update(unservable=None), "unservable is NoneType"),
    **{f"the file {name}": (lambda m, name=name: m["files"].update({name: NO_FILE}), "is not in this folder")  # type: ignore[misc]
       for name in ESCAPES},
}  # fmt: skip
MODULES: dict[str, tuple[Change, str]] = {
    "modules null": (lambda m: m.update(modules=None), "modules is NoneType"),
    "modules a list": (lambda m: m.update(modules=[]), "modules is list"),
    "a module null": (lambda m: m["modules"].update(x=None), "damaged"),
    "tensors a list": (lambda m: m["modules"].update(x={"tensors": []}), "tensors is list"),
    "a tensor null": (lambda m: m["modules"].update(x={"tensors": {"x": None}}), "an entry is NoneType"),
    "bytes a text": (lambda m: first_tensor(m).update(bytes="1"), "bytes is str"),
    "bytes a fraction": (lambda m: first_tensor(m).update(bytes=float("inf")), "bytes is float"),
    "bytes below 0": (lambda m: first_tensor(m).update(bytes=-1), "bytes is -1"),
    "bytes of 400 digits": (lambda m: first_tensor(m).update(bytes=10**400), "bytes is 1000"),
    "a shape of lists": (lambda m: first_tensor(m).update(shape=[[1]]), "more than whole numbers"),
    "a shape that is deep": (lambda m: first_tensor(m).update(shape=deep(900)), "more than whole numbers"),
    "a source as a list": (lambda m: first_tensor(m).update(source=[]), "source is list"),
    "a name of 5000": (lambda m: first_tensor(m).update(source="x" * 5000), "source has 5000 characters"),
}


@pytest.mark.parametrize("case", MODULES)
def test_hostile_modules_of_a_manifest(mix: Path, mixprec: Any, case: str) -> None:
    """``inspect`` shows what the files hold, and of the manifest nothing but its head."""
    how, message = MODULES[case]
    before = json.loads(mixprec("inspect", "--json", mix / "out").out)
    change(mix / "out" / MANIFEST, how)
    assert message in refused(mixprec("verify", mix / "out"))
    after = json.loads(mixprec("inspect", "--json", mix / "out").out)
    assert before.pop("manifest_checksum") != after.pop("manifest_checksum")
    assert before == after


@pytest.mark.parametrize("case", MANIFESTS)
def test_a_hostile_manifest(mix: Path, mixprec: Any, monkeypatch: Patch, case: str) -> None:
    how, message = MANIFESTS[case]
    change(mix / "out" / MANIFEST, how)
    (mix / "x").write_text("outside")
    opened: list[str] = []
    real = os.open

    def recording(path: Any, *arguments: Any, **named: Any) -> int:
        opened.append(os.path.realpath(path))
        return real(path, *arguments, **named)

    monkeypatch.setattr(os, "open", recording)
    for command in ("verify", "inspect"):
        assert message in refused(mixprec(command, mix / "out"))
    assert str(mix / "x") not in opened and "/etc/passwd" not in opened


@pytest.fixture(scope="module")
def cut(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As ``built``, with files cut for one rank, which tests leave as they were."""
    folder = Path(shutil.copytree(built, tmp_path_factory.mktemp("cut") / "mix"))
    split(folder / "out", Degree(1))
    return folder


@pytest.mark.parametrize("seed", range(8))
def test_whatever_is_damaged_ends_in_a_message(cut: Path, mixprec: Any, seed: int) -> None:
    """Values of any kind at any place of any file that describes a checkpoint, or files cut for a rank."""
    changed = set()
    for i in range(25):
        with Hostile(cut / "out", Drawn(100 * seed + i)) as hostile:
            changed.add(hostile.file)
            shown = {command: mixprec(command, cut / "out") for command in ("inspect", "verify")}
            list(_checkpoint(cut / "out", None))
        for ended in shown.values():
            assert ended.code in (0, 1) and "Traceback" not in ended.err, (seed, i)
            assert all(line.isprintable() for line in (ended.out + ended.err).split("\n")), (seed, i)
        # A manifest that is changed and vouches for itself may say nothing that matters.
        assert shown["verify"].code == 1 or hostile.file in (MANIFEST, f"{RANK}/index.json"), (seed, i)
    assert len(changed) >= 4
    assert mixprec("verify", cut / "out").code == 0


@pytest.mark.parametrize("source", ["bf16", "fp8", "int4"])
def test_whatever_a_source_says_is_planned_or_refused(cut: Path, mixprec: Any, source: str) -> None:
    for i in range(40):
        with Hostile(cut / source, Drawn(i)):
            ended = mixprec("plan", cut / "mix.yaml")
        assert ended.code in (0, 1) and ended.err.startswith("mixprec: " if ended.code else ""), i
        assert all(line.isprintable() for line in (ended.out + ended.err).split("\n")), i


FP8: dict[str, Any] = {"kind": "fp8_block", "block": [128, 128], "activations": "dynamic"}

DECLARATIONS: dict[str, tuple[Change, str]] = {
    "another version": (lambda q: q.update(version="x" * 5000), "version 'xxxxxxxxxxxx...xxxxxxxxxxxxx'; this mixprec"),
    "formats null": (lambda q: q.update(formats=None), "is damaged"),
    "formats a list": (lambda q: q.update(formats=[]), "is damaged"),
    "a format null": (lambda q: q["formats"].update(x=None), "is damaged"),
    "an unknown kind": (lambda q: q["formats"].update(x={"kind": "x"}), "is damaged: KeyError('x')"),
    "a kind that is a list": (lambda q: q["formats"].update(x={"kind": []}), "is damaged"),
    "a block of 0": (lambda q: q["formats"].update(x=FP8 | {"block": [0, 0]}), "is no pair of positive numbers"),
    "a long block": (lambda q: q["formats"].update(x=FP8 | {"block": [1] * 9999}), "[1, 1, 1, 1, 1, 1, ...] is no"),
    "modules null": (lambda q: q.update(modules=None), "is damaged"),
    "a module alone": (lambda q: q.update(modules=["x"]), "is damaged"),
    "a pattern null": (lambda q: q.update(modules=[[None, "bf16"]]), "is damaged"),
    "a format not declared": (lambda q: q.update(modules=[["*", "x"]]), "format 'x' is not declared"),
    "a default that is a list": (lambda q: q.update(default=[]), "is damaged"),
    "no default": (lambda q: q.pop("default"), "is damaged: KeyError('default')"),
    "a pattern that commands": (lambda q: q.update(modules=[["\x1b[2J", "bf16"]]), "characters that no name has"),
    "2,001 patterns": (lambda q: q.update(modules=[[f"{i}*", "bf16"] for i in range(2001)]), "more than 2000 patterns"),
    "large patterns": (
        lambda q: q.update(modules=[["{0..9999}*", "bf16"]] * 100), "more than 1000000 characters"
    ),
    "a deep list": (lambda q: q.update(modules=deep(70)), "nested deeper than 64 levels"),
}  # fmt: skip


@pytest.mark.parametrize("case", DECLARATIONS)
def test_a_hostile_declaration(mix: Path, mixprec: Any, case: str) -> None:
    how, message = DECLARATIONS[case]
    change(mix / "out" / "config.json", lambda config: how(config["quantization_config"]))
    assert message in refused(mixprec("inspect", mix / "out"))


@pytest.mark.parametrize("fmt", ["bf16", "fp8_block", "gptq_int4"])
def test_a_declaration_that_lies(mix: Path, mixprec: Any, fmt: str) -> None:
    """Every module declared to be what most are not. Found by fuzzing."""
    change(mix / "out" / "config.json", lambda c: c["quantization_config"].update(modules=[["*", fmt]]))
    ended = mixprec("inspect", mix / "out")
    assert ended.code == 0 and "not read: " in ended.out
    with suppress(MixprecError):
        list(weight_errors(open_source(str(mix / "out")), open_source(str(mix / "bf16"))))


def test_patterns_may_take_seconds_in_all(mix: Path, mixprec: Any, monkeypatch: Patch) -> None:
    monkeypatch.setattr("mixprec_build.patterns.budget.MatchBudget.SECONDS", 0.1)
    slow = [[f"*{{m,mo}}*{{l,la}}*{{e,er}}*{i}", "bf16"] for i in range(1000)]
    change(mix / "out" / "config.json", lambda c: c["quantization_config"].update(modules=slow))
    assert "takes more than 0 seconds to match" in refused(mixprec("inspect", mix / "out"))


def test_a_block_larger_than_the_weight(mix: Path) -> None:
    """Its size is a stranger's word; 477 GiB were asked for."""
    formats: Change = lambda c: c["quantization_config"]["formats"]["fp8_block"].update(block=[10**9, 10**9])  # noqa: E731
    change(mix / "out" / "config.json", formats)
    list(weight_errors(open_source(str(mix / "out")), open_source(str(mix / "bf16"))))


def test_a_g_idx_that_points_nowhere(mix: Path) -> None:
    """A weight that cannot be dequantized is named."""
    shard = next((mix / "out").glob("*.safetensors"))
    tensors = open_checkpoint(str(mix / "out")).tensors()
    g_idx = next(t for name, t in tensors.items() if name.endswith("g_idx"))
    data = bytearray(shard.read_bytes())
    data[g_idx.start : g_idx.start + g_idx.nbytes] = b"\x7f" * g_idx.nbytes
    shard.write_bytes(data)
    with pytest.raises(MixprecError, match=r"cannot be dequantized: index .* is out of bounds"):
        list(weight_errors(open_source(str(mix / "out")), open_source(str(mix / "bf16"))))
