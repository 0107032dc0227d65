"""Verifying: every bit of a compiled checkpoint is vouched for, with its sources or without them."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.files import file_tensors, folder_tensors
from support.llama import LINEARS, write_recipe, write_sources, write_tiny
from support.manifest import rewrite_manifest, sealed
from support.run import at_most

from mixprec_build.checkpoint.manifest import read_head, read_manifest
from mixprec_build.checkpoint.opening import open_checkpoint
from mixprec_build.checkpoint.typed import open_source
from mixprec_build.errors import MixprecError, SourceError, VerifyError
from mixprec_build.output.build import plan_recipe, run_plan
from mixprec_build.output.verify import Verification, verify
from mixprec_build.output.weight_errors import weight_errors

INDEX = "model.safetensors.index.json"
MANIFEST = "mixprec_manifest.json"
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
TENSORS = 47

Patch = pytest.MonkeyPatch


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sources and a checkpoint of two shards in one folder: copied, never changed."""
    folder = tmp_path_factory.mktemp("built")
    write_sources(folder)
    with Patch.context() as monkeypatch:
        # The least shard size of a recipe is more than all of this model.
        monkeypatch.setattr("mixprec_build.recipe.recipe.DEFAULT_SHARD_SIZE", 150_000)
        plan = plan_recipe(write_recipe(folder / "mix.yaml", shard_size=None))
    run_plan(plan, folder / "out")
    assert sorted(path.name for path in (folder / "out").glob("*.safetensors")) == [ONE, TWO]
    return folder


@pytest.fixture
def out(built: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint; its sources are where they were."""
    return Path(shutil.copytree(built / "out", tmp_path / "out"))


@pytest.fixture
def movable(built: Path, tmp_path: Path) -> Path:
    """A folder with a checkpoint and sources of its own."""
    folder = tmp_path / "own"
    shutil.copytree(built, folder, ignore=shutil.ignore_patterns("out"))
    run_plan(plan_recipe(folder / "mix.yaml"), folder / "out")
    return folder


def found(folder: Path) -> str:
    """What is wrong with a checkpoint, in one text: differences, or the error that ends it."""
    try:
        return "\n".join(verify(folder).differences)
    except MixprecError as error:
        assert error.exit_code == 1
        return str(error)


def test_an_intact_checkpoint(built: Path) -> None:
    done: list[int] = []
    assert verify(built / "out", watch=lambda total: done.append) == Verification(TENSORS, 0, (), ())
    stored = folder_tensors(built / "out")
    assert len(stored) == TENSORS and sum(done) == sum(len(data) for _, _, data in stored.values())


# Single bits


def flip(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def owner(data: bytes, path: Path, at: int) -> str:
    """The tensor that a byte of a shard belongs to."""
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__")
    spans: dict[str, list[int]] = {name: entry["data_offsets"] for name, entry in header.items()}
    assert spans.keys() == file_tensors(path).keys()
    return next(name for name, (begin, end) in spans.items() if begin <= at - start < end)


@pytest.mark.parametrize("gone", [False, True], ids=["with sources", "without"])
def test_a_flipped_bit_of_a_tensor(movable: Path, gone: bool) -> None:
    out = movable / "out"
    if gone:
        (movable / "int4").rename(movable / "away")
    (path,) = out.glob("*.safetensors")
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    rng = random.Random(0)
    bits = [8 * start, 8 * len(data) - 1, *(rng.randrange(8 * start, 8 * len(data)) for _ in range(30))]
    names = {}
    for bit in bits:
        path.write_bytes(data)
        name = names[bit] = owner(data, path, bit // 8)
        path.write_bytes(flip(data, bit))
        result = verify(out)
        assert len(result.differences) == 1
        by_checksum = gone and ".mlp." in name
        what = "its checksum is not the manifest's" if by_checksum else "is not its source's"
        assert result.differences[0].startswith(f"{name} in {path.name}: ") and what in result.differences[0]
    assert len({name.rpartition(".")[2] for name in names.values()}) > 2, "several kinds of tensors"


@pytest.mark.parametrize("part", ["length", "JSON", "padding"])
def test_a_flipped_bit_of_a_header(out: Path, part: str) -> None:
    path = out / ONE
    data = path.read_bytes()
    end = len(data[: 8 + int.from_bytes(data[:8], "little")].rstrip())
    first, last = {"length": (0, 8), "JSON": (8, end), "padding": (end, 8 + int.from_bytes(data[:8], "little"))}[part]
    rng = random.Random(0)
    for _ in range(40):
        bit = rng.randrange(8 * first, 8 * last)
        path.write_bytes(flip(data, bit))
        assert ONE in found(out), bit


FILES = ("config.json", INDEX, "tokenizer.json", "tokenizer.model", "generation_config.json", "LICENSE", "merges.txt")


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_of_another_file(out: Path, name: str) -> None:
    path = out / name
    data = path.read_bytes()
    rng = random.Random(0)
    for _ in range(25):
        bit = rng.randrange(8 * len(data))
        path.write_bytes(flip(data, bit))
        text = found(out)
        assert name in text or (name == INDEX and "the shard model-" in text and "is missing" in text), (bit, text)


def test_a_flipped_bit_of_the_manifest(out: Path) -> None:
    path = out / MANIFEST
    data = path.read_bytes()
    rng = random.Random(0)
    tail = 8 * (len(data) - 60)
    bits = [*(rng.randrange(8 * len(data)) for _ in range(600)), *range(tail, 8 * len(data), 7)]
    for bit in bits:
        path.write_bytes(flip(data, bit))
        with pytest.raises(VerifyError, match=str(path)):
            read_manifest(out)
    assert found(out).startswith(f"{path}: ")


# Files


def truncate(out: Path) -> str:
    os.truncate(out / ONE, (out / ONE).stat().st_size - 1)
    return f"{out}/{ONE}: damaged safetensors file: "


def append(out: Path) -> str:
    os.truncate(out / ONE, (out / ONE).stat().st_size + 1)
    return f"{out}/{ONE}: damaged safetensors file: "


def empty(out: Path) -> str:
    os.truncate(out / ONE, 0)
    return f"{out}/{ONE}: damaged safetensors file: too short for its header"


def lose_shard(out: Path) -> str:
    (out / ONE).unlink()
    return f"{ONE}: missing"


def rename_shard(out: Path) -> str:
    (out / ONE).rename(out / "model-00003-of-00003.safetensors")
    return f"model-00003-of-00003.safetensors: not in the manifest\n{ONE}: missing"


def swap_shards(out: Path) -> str:
    (out / ONE).rename(out / "x")
    (out / TWO).rename(out / ONE)
    (out / "x").rename(out / TWO)
    return f"{out}/{INDEX}: lists "


def lose_index(out: Path) -> str:
    (out / INDEX).unlink()
    return f"{INDEX}: missing"


def lose_config(out: Path) -> str:
    (out / "config.json").unlink()
    return f"{out}: no config.json"


def lose_tokenizer(out: Path) -> str:
    (out / "tokenizer.json").unlink()
    return "tokenizer.json: missing"


def rename_tokenizer(out: Path) -> str:
    (out / "tokenizer.json").rename(out / "tokenizer.json.old")
    return "tokenizer.json.old: not in the manifest\ntokenizer.json: missing"


def truncate_tokenizer(out: Path) -> str:
    os.truncate(out / "tokenizer.json", 3)
    return "tokenizer.json: 3 bytes, 35 were written"


def tokenizer_as_fifo(out: Path) -> str:
    (out / "tokenizer.json").unlink()
    os.mkfifo(out / "tokenizer.json")
    return "tokenizer.json: is a FIFO, a file was written"


def extra_file(out: Path) -> str:
    (out / "added_tokens.json").write_text("{}")
    return "added_tokens.json: not in the manifest"


def extra_shard(out: Path) -> str:
    save_file({"x.weight": torch.zeros(1)}, out / "model-00003-of-00003.safetensors")
    return "model-00003-of-00003.safetensors: not in the manifest"


def another_quantization(out: Path) -> str:
    config = json.loads((out / "config.json").read_bytes())
    config["quantization_config"]["formats"]["fp8_block"]["block"] = [64, 64]
    (out / "config.json").write_text(json.dumps(config))
    return "config.json: "


def no_quantization(out: Path) -> str:
    config = json.loads((out / "config.json").read_bytes())
    del config["quantization_config"]
    (out / "config.json").write_text(json.dumps(config))
    return "config.json: "


CHANGES = (
    truncate, append, empty, lose_shard, rename_shard, swap_shards, lose_index, lose_config, lose_tokenizer,
    rename_tokenizer, truncate_tokenizer, tokenizer_as_fifo, extra_file, extra_shard, another_quantization,
    no_quantization,
)  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_is_not_as_it_was(out: Path, change: Callable[[Path], str]) -> None:
    expected = change(out)
    with at_most(30):
        assert found(out).startswith(expected)


def rewrite_shard(out: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> str:
    """Changes the tensors of a shard by the library, and the index with it; returns what is found."""
    with safe_open(out / ONE, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(out / ONE)
    change(tensors)
    save_file(tensors, out / ONE, metadata)
    index = json.loads((out / INDEX).read_bytes())
    index["weight_map"] = {n: f for n, f in index["weight_map"].items() if f != ONE} | dict.fromkeys(tensors, ONE)
    (out / INDEX).write_text(json.dumps(index))
    return found(out)


def test_tensors_that_are_not_as_they_were(out: Path) -> None:
    name = next(iter(sorted(file_tensors(out / ONE))))
    text = rewrite_shard(out, lambda tensors: tensors.update({name: tensors[name].float()}))
    assert f"{ONE}: " in text and f"{INDEX}: " in text
    assert f"{name}: F32 [64, 128] in {ONE}, built as BF16 [64, 128] in {ONE}" in text
    assert f"{name} in {ONE}: F32 [64, 128], BF16 [64, 128] in its source" in text
    text = rewrite_shard(out, lambda tensors: tensors.update(x=tensors.pop(name)))
    assert f"{name}: missing from {ONE}" in text and f"x: in {ONE}, but not in the manifest" in text


# Sources


def test_sources_that_are_gone_are_replaced_by_checksums(movable: Path) -> None:
    (movable / "fp8").rename(movable / "elsewhere")
    result = verify(movable / "out")
    assert result == Verification(TENSORS - 16, 16, result.gone, ())
    assert len(result.gone) == 1 and result.gone[0].startswith(f"`fp8`: {movable / 'fp8'}: no such folder")
    for name in ("bf16", "int4"):
        shutil.rmtree(movable / name)
    result = verify(movable / "out")
    assert (result.bit_for_bit, result.by_checksum, len(result.gone), result.differences) == (0, TENSORS, 3, ())


def test_sources_that_have_moved(movable: Path, monkeypatch: Patch) -> None:
    (movable / "fp8").rename(movable / "elsewhere")
    assert verify(movable / "out", sources={"fp8": str(movable / "elsewhere")}) == Verification(TENSORS, 0, (), ())
    monkeypatch.chdir(movable)
    assert verify(Path("out"), sources={"fp8": "elsewhere"}) == Verification(TENSORS, 0, (), ())
    with pytest.raises(SourceError, match="no such folder"):
        verify(movable / "out", sources={"fp8": str(movable / "fp8")})
    with pytest.raises(VerifyError, match="the checkpoint has no source `fp4`; its sources are bf16, fp8, int4"):
        verify(movable / "out", sources={"fp4": str(movable / "elsewhere")})


def test_a_checkpoint_that_has_moved(built: Path, out: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.chdir(out)
    assert verify(Path()) == verify(built / "out")


def test_a_source_that_has_changed_since(movable: Path) -> None:
    path = movable / "fp8" / ONE
    data = path.read_bytes()
    name = owner(data, path, len(data) - 1)
    path.write_bytes(flip(data, 8 * len(data) - 1))
    size = len(file_tensors(path)[name][2])
    expected = f"{name}: source `fp8` has changed since the build (byte {size - 1})"
    assert verify(movable / "out").differences == (expected,)


def test_a_source_that_is_another_model_now(movable: Path) -> None:
    shutil.rmtree(movable / "fp8")
    write_tiny(movable / "fp8", "fp8", seed=1)
    differences = verify(movable / "out").differences
    assert 8 < len(differences) <= 16
    assert all("source `fp8` has changed since the build" in difference for difference in differences)


def test_a_source_that_is_another_checkpoint_now(movable: Path) -> None:
    shutil.rmtree(movable / "int4")
    write_tiny(movable / "int4", "bf16")
    result = verify(movable / "out")
    assert result == Verification(TENSORS - 24, 24, result.gone, ()), "its tensors have other names"
    (gone,) = result.gone
    assert gone.startswith(
        f"`int4`: {movable / 'int4'} lacks 24 of its tensors: model.layers.{{0..1}}.mlp.down_proj.{{"
    )
    with pytest.raises(VerifyError, match=r"source `int4`: .* lacks 24 of its tensors.*; is this the right folder\?"):
        verify(movable / "out", sources={"int4": str(movable / "int4")})
    shutil.rmtree(movable / "fp8")
    write_tiny(movable / "fp8", "bf16")
    result = verify(movable / "out")
    assert len(result.differences) == 8
    assert all("F8_E4M3 [128, 128], BF16 [128, 128] in its source" in text for text in result.differences)


def test_a_source_that_cannot_be_read_is_no_difference(built: Path, monkeypatch: Patch) -> None:
    real = os.pread

    def pread(fd: int, length: int, offset: int) -> bytes:
        if "int4" in Path(f"/proc/self/fd/{fd}").readlink().parts and offset > 0:
            raise OSError(5, os.strerror(5))
        return real(fd, length, offset)

    monkeypatch.setattr(os, "pread", pread)
    result = verify(built / "out")
    assert not result.differences and 0 < result.by_checksum < TENSORS
    (reason,) = result.gone
    assert re.match(r"`int4`: .*int4/model-.*: cannot read model\.layers.*: Input/output error \(and \d+ more", reason)


def test_a_source_whose_path_is_no_text(tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    write_sources(folder)
    run_plan(plan_recipe(write_recipe(folder / "mix.yaml")), tmp_path / "out")
    assert verify(tmp_path / "out") == Verification(TENSORS, 0, (), ())


# The manifest


def test_the_manifest_ends_with_its_own_checksum(out: Path) -> None:
    data = (out / MANIFEST).read_bytes()
    lines = data.splitlines(keepends=True)
    assert lines[-1] == b"}\n" and lines[-2].startswith(b' "manifest_xxh3_128": "') and len(lines[-2]) == 57
    manifest = json.loads(data)
    assert list(manifest)[-2:] == ["modules", "manifest_xxh3_128"]
    assert sealed(manifest) == data == b"".join(read_manifest(out).dump())


def test_a_missing_manifest(built: Path, tmp_path: Path) -> None:
    expected = f"{MANIFEST}: not there; this is for what `mixprec build` wrote"
    for folder in (built / "bf16", tmp_path, tmp_path / "nothing"):
        assert found(folder) == f"{folder}/{expected}"


def test_a_manifest_that_would_never_end(out: Path) -> None:
    (out / MANIFEST).unlink()
    os.mkfifo(out / MANIFEST)
    with at_most(30):
        assert found(out) == f"{out / MANIFEST}: not a regular file"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "damaged: "),
        (b"{", "damaged: "),
        (b"\xff", "damaged: "),
        (b"[]", "damaged: "),
        (b"null", "damaged: "),
        (b"{}", "damaged: "),
        (b"[" * 100_000, "damaged: "),
        (b'{"version": 2, "checksum": "xxh3_128"}', "version 2; this mixprec reads version 1"),
        (b'{"version": 1, "checksum": "md5"}', "version 1"),
        (b'{"version": 1, "checksum": "xxh3_128"}', "was changed after it was written"),
    ],
)
def test_a_damaged_manifest(out: Path, data: bytes, message: str) -> None:
    (out / MANIFEST).write_bytes(data)
    assert found(out).startswith(f"{out / MANIFEST}: {message}")


def test_a_manifest_without_its_last_line(out: Path) -> None:
    lines = (out / MANIFEST).read_bytes().splitlines(keepends=True)
    (out / MANIFEST).write_bytes(b"".join([*lines[:-3], lines[-3].replace(b",\n", b"\n"), lines[-1]]))
    json.loads((out / MANIFEST).read_bytes())
    assert found(out) == f"{out / MANIFEST}: was changed after it was written; build the checkpoint again"


@pytest.mark.parametrize("name", ["fp8", "modules"])
def test_the_head_of_a_manifest_is_that_of_the_whole(out: Path, name: str) -> None:
    """Also where a source is named as the section that follows the head."""
    rewrite_manifest(out, lambda m: m["sources"].update({name: {"location": "x", "path": None, "commit": None}}))
    head, whole = read_head(out), read_manifest(out)
    assert name in head.sources and whole.modules
    assert all(getattr(head, field.name) == getattr(whole, field.name) for field in fields(head))


def test_the_head_of_a_manifest_whose_modules_were_changed(out: Path) -> None:
    data = (out / MANIFEST).read_bytes()
    (out / MANIFEST).write_bytes(data.replace(b'"dtype":"BF16"', b'"dtype":"FP16"', 1))
    with pytest.raises(VerifyError, match="was changed after it was written"):
        read_head(out)


def first_tensor(manifest: dict[str, Any]) -> dict[str, Any]:
    tensor: dict[str, Any] = manifest["modules"]["lm_head"]["tensors"]["lm_head.weight"]
    return tensor


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.pop("modules") and m.update(modules={"a": {}}),
        lambda m: m["modules"].update(a=None),
        lambda m: m["modules"].update(a={"tensors": {"a.weight": {}}}),
        lambda m: m.update(files=[]),
        lambda m: m["files"].update(x={}),
        lambda m: m["files"].update(x=1),
        lambda m: m["files"].update({"../../x": {"bytes": 0, "xxh3_128": ""}}),
        lambda m: m.update(sources=None),
        lambda m: m["sources"].update(x={"location": "x"}),
        lambda m: m.pop("sources"),
    ],
)
def test_a_manifest_of_another_shape(out: Path, change: Callable[[dict[str, Any]], object]) -> None:
    rewrite_manifest(out, change)
    assert found(out).startswith(f"{out / MANIFEST}: damaged: ")


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("dtype", None, "TypeError('dtype is NoneType')"),
        ("dtype", "x" * 5000, "ValueError('dtype has 5000 characters')"),
        ("shape", "12", "TypeError('shape is str')"),
        ("shape", [1, True], "ValueError('a shape holds more than whole numbers')"),
        ("shape", [1, 2.0], "ValueError('a shape holds more than whole numbers')"),
        ("bytes", "1", "TypeError('bytes is str')"),
        ("bytes", -1, "ValueError('bytes is -1')"),
        ("bytes", 1 << 63, f"ValueError('bytes is {1 << 63}')"),
        ("file", 1, "TypeError('file is int')"),
        ("source", ["x"], "TypeError('source is list')"),
        ("xxh3_128", {}, "TypeError('xxh3_128 is dict')"),
    ],
)
def test_a_manifest_with_another_field(out: Path, field: str, value: object, expected: str) -> None:
    rewrite_manifest(out, lambda m: first_tensor(m).update({field: value}))
    assert found(out) == f"{out / MANIFEST}: damaged: {expected}; build the checkpoint again"


def test_a_manifest_without_a_field(out: Path) -> None:
    rewrite_manifest(out, lambda m: first_tensor(m).pop("file"))
    assert found(out) == f"{out / MANIFEST}: damaged: KeyError('file'); build the checkpoint again"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda m: first_tensor(m).update(xxh3_128="0" * 32), "lm_head.weight in "),
        (lambda m: first_tensor(m).update(dtype="F16"), "lm_head.weight: BF16 [64, 128] in "),
        (lambda m: first_tensor(m).update(file=TWO), "lm_head.weight: BF16 [64, 128] in "),
        (lambda m: m["modules"].pop("lm_head"), "lm_head.weight: in "),
        (lambda m: m["files"].pop("LICENSE"), "LICENSE: not in the manifest"),
        (lambda m: m["files"].pop(TWO), f"{TWO}: not in the manifest"),
        (lambda m: m["files"].update(x={"bytes": 0, "xxh3_128": ""}), "x: missing"),
        (lambda m: m["files"][TWO].update(header="0" * 32), f"{TWO}: its header was changed"),
        (lambda m: m["formats"].update(x={"kind": "bf16"}), "config.json: its formats are not those of the manifest"),
    ],
)
def test_a_manifest_of_another_checkpoint(out: Path, change: Callable[[dict[str, Any]], object], expected: str) -> None:
    rewrite_manifest(out, change)
    assert found(out).startswith(expected)


# How far from FP16


def dequantized(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """The weight of a linear by the definition of its format, one value at a time where it is packed."""
    if f"{name}.weight_scale_inv" in tensors:
        return tensors[f"{name}.weight"].float() * tensors[f"{name}.weight_scale_inv"]
    words, scales = tensors[f"{name}.qweight"], tensors[f"{name}.scales"].float()
    weight = torch.empty(words.shape[1], words.shape[0] * 8)
    for k in range(weight.shape[1]):
        codes = (words[k // 8].long() >> 4 * (k % 8)) & 15
        weight[:, k] = (codes - 8) * scales[tensors[f"{name}.g_idx"][k]]
    return weight


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "source"])
def test_weight_errors_are_those_that_torch_computes(built: Path, compiled: bool) -> None:
    folder = built / ("out" if compiled else "int4")
    tensors, exact = (
        {name: tensor for path in part.glob("*.safetensors") for name, tensor in load_file(path).items()}
        for part in (folder, built / "bf16")
    )
    seen: list[str] = []
    errors = list(weight_errors(open_source(str(folder)), open_source(str(built / "bf16")), seen.append))
    assert {e.module for e in errors} == {f"model.layers.{i}.{linear}" for i in (0, 1) for linear in LINEARS}
    assert seen == [error.module for error in errors]
    for error in errors:
        weight = exact[f"{error.module}.weight"].float()
        expected = (weight - dequantized(tensors, error.module)).norm() / weight.norm()
        assert error.relative == pytest.approx(expected.item(), rel=1e-5)
        low, high = {"fp8_block": (0.02, 0.03), "gptq_int4": (0.08, 0.12)}[error.kind]
        assert low < error.relative < high


def test_weight_errors_of_nothing_quantized(built: Path) -> None:
    bf16 = open_source(str(built / "bf16"))
    assert list(weight_errors(bf16, bf16)) == []


def test_weight_errors_need_an_unquantized_reference(built: Path, tmp_path: Path) -> None:
    out, int4 = open_source(str(built / "out")), open_source(str(built / "int4"))
    with pytest.raises(VerifyError, match=r"int4: holds no unquantized model\.layers\.0\.mlp\.\w+ to compare with"):
        list(weight_errors(out, int4))
    small = {f"model.layers.{i}.{linear}.weight": torch.zeros(64, 128) for i in (0, 1) for linear in LINEARS}
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "config.json").write_text("{}")
    save_file(small, tmp_path / "small" / "model.safetensors")
    with pytest.raises(VerifyError, match=r": \[128, 128\], but \[64, 128\] in .*small"):
        list(weight_errors(out, open_source(str(tmp_path / "small"))))


def test_weight_errors_of_zero_weights(built: Path, tmp_path: Path) -> None:
    zeros = {f"model.layers.{i}.{linear}.weight": torch.zeros(128, 128) for i in (0, 1) for linear in LINEARS}
    (tmp_path / "zero").mkdir()
    (tmp_path / "zero" / "config.json").write_text("{}")
    save_file(zeros, tmp_path / "zero" / "model.safetensors")
    errors = list(weight_errors(open_source(str(built / "out")), open_source(str(tmp_path / "zero"))))
    assert all(0 < error.relative < 100 for error in errors), "absolute where there is nothing to relate it to"


def test_a_checkpoint_is_opened_by_its_declaration(built: Path) -> None:
    opened = open_checkpoint(str(built / "out"))
    assert opened.quantization["quant_method"] == "mixprec" and opened.quantization_file == "config.json"
    kinds = {name: fmt.kind for name, fmt in open_source(str(built / "out")).formats.items() if hasattr(fmt, "kind")}
    assert kinds.keys() == opened.modules.keys()
    assert {kinds[f"model.layers.1.{linear}"] for linear in LINEARS} == {"fp8_block", "gptq_int4"}
