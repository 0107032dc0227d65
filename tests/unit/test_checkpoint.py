"""Opening checkpoints: what an index may say, what a shard may be, what is read and what never is."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save, save_file
from support.files import folder_tensors
from support.llama import write_recipe, write_sources, write_tiny
from support.run import at_most, cpu_seconds, run_python

from mixprec_build.checkpoint.checkpoint import Checkpoint, ValueReader
from mixprec_build.checkpoint.opening import open_checkpoint
from mixprec_build.errors import SourceError
from mixprec_build.formats.registry import leaves
from mixprec_build.output.build import plan_recipe, run_plan
from mixprec_build.storage.header import build_header
from mixprec_build.storage.module import split_name

INDEX = "model.safetensors.index.json"
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"

Patch = pytest.MonkeyPatch


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    """A file that is waited for, say a FIFO, fails its test instead of stopping the run."""
    with at_most(60):
        yield


def checkpoint(folder: Path, index: object = None, **shards: Mapping[str, torch.Tensor]) -> Path:
    """A folder of these shards (without their suffix) and this index: a ``weight_map`` or the whole of it."""
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    for name, tensors in shards.items():
        save_file(dict(tensors), folder / f"{name.replace('__', '-')}.safetensors")
    if index is not None:
        whole = index if not isinstance(index, dict) or "weight_map" in index else {"weight_map": index}
        (folder / INDEX).write_text(json.dumps(whole))
    return folder


def refusal(folder: Path | str) -> str:
    with pytest.raises(SourceError) as caught:
        open_checkpoint(str(folder))
    return str(caught.value)


def weights(*names: str) -> dict[str, torch.Tensor]:
    return {name: torch.arange(4, dtype=torch.float16) for name in names}


# The index


@pytest.mark.parametrize(
    "shard",
    [
        "../one.safetensors",
        "..",
        "sub/one.safetensors",
        "/etc/one.safetensors",
        "..\\one.safetensors",
        "sub\\one.safetensors",
        "\\\\server\\share\\one.safetensors",
        "C:one.safetensors",
        "c:\\one.safetensors",
        "one.bin",
        "one.safetensors.bin",
        "one",
        ".safetensors",
        "",
    ],
)
def test_an_index_names_only_shards_of_its_folder(tmp_path: Path, shard: str) -> None:
    folder = checkpoint(tmp_path / "a", {"x.weight": shard}, one=weights("x.weight"))
    for path in (tmp_path / "one.safetensors", folder / shard):
        if shard.endswith(".safetensors") and not path.is_absolute():
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(save(weights("x.weight")))
    assert refusal(folder) == f"{folder}/{INDEX}: names the file {shard!r}, which is no shard in this folder"


@pytest.mark.parametrize("shard", ["two.safetensors", "one\0.safetensors", "./one.safetensors", "\x1b[2J.safetensors"])
def test_a_missing_shard_is_named(tmp_path: Path, shard: str) -> None:
    folder = checkpoint(tmp_path / "a", {"x.weight": shard}, one=weights("x.weight"))
    assert refusal(folder) == f"{folder}: the shard {shard} is missing; fetch it again"


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("", "not a JSON object"),
        ([], "not a JSON object"),
        ({"metadata": {}, "weight_map": None}, "`weight_map` must map tensor names to file names"),
        ({"weight_map": ["one.safetensors"]}, "`weight_map` must map tensor names to file names"),
        ({"weight_map": {"x.weight": 1}}, "`weight_map` must map tensor names to file names"),
        ({"weight_map": {"x.weight": ["one.safetensors"]}}, "`weight_map` must map tensor names to file names"),
    ],
)
def test_an_index_maps_names_to_files(tmp_path: Path, index: object, message: str) -> None:
    folder = checkpoint(tmp_path / "a", index, one=weights("x.weight", "y.weight"))
    assert refusal(folder) == f"{folder}/{INDEX}: {message}"


def test_an_index_without_a_weight_map(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "a", None, one=weights("x.weight"))
    (folder / INDEX).write_text("{}")
    assert refusal(folder) == f"{folder}/{INDEX}: `weight_map` must map tensor names to file names"


@pytest.mark.parametrize(
    ("index", "remark"),
    [
        ({"x.weight": "one.safetensors"}, "does not list y.weight, which its files hold"),
        (
            {"x.weight": "one.safetensors", "y.weight": "one.safetensors", "mtp.fc.weight": "one.safetensors"},
            "lists mtp.fc.weight, which its files do not hold",
        ),
    ],
)
def test_what_an_index_says_otherwise_is_a_remark(tmp_path: Path, index: Mapping[str, str], remark: str) -> None:
    folder = checkpoint(tmp_path / "a", index, one=weights("x.weight", "y.weight"))
    opened = open_checkpoint(str(folder))
    assert opened.remarks == (remark,) and list(opened.tensors()) == ["x.weight", "y.weight"]


def test_a_tensor_is_in_another_shard_than_its_index_says(tmp_path: Path) -> None:
    index = {"x.weight": "two.safetensors", "y.weight": "two.safetensors", "z.weight": "one.safetensors"}
    folder = checkpoint(tmp_path / "a", index, one=weights("x.weight", "z.weight"), two=weights("y.weight"))
    opened = open_checkpoint(str(folder))
    assert opened.remarks == ("lists x.weight in another file than the one that holds it",)
    assert opened.tensors()["x.weight"].file == "one.safetensors"


@pytest.mark.parametrize("meant", ["one.safetensors", "two.safetensors"])
def test_of_a_tensor_in_two_shards_the_index_says_which_is_meant(tmp_path: Path, meant: str) -> None:
    index = {"x.weight": meant, "y.weight": "two.safetensors", "z.weight": "one.safetensors"}
    folder = checkpoint(tmp_path / "a", index, one=weights("x.weight", "z.weight"), two=weights("x.weight", "y.weight"))
    opened = open_checkpoint(str(folder))
    assert opened.tensors()["x.weight"].file == meant
    assert opened.remarks == ("lists x.weight in one of two files that hold it: that one is read",)


def test_a_tensor_in_two_shards_that_no_index_lists(tmp_path: Path) -> None:
    index = {"z.weight": "one.safetensors", "y.weight": "two.safetensors"}
    folder = checkpoint(tmp_path / "a", index, one=weights("x.weight", "z.weight"), two=weights("x.weight", "y.weight"))
    assert refusal(folder) == (
        f"{folder}: tensor 'x.weight' is in one.safetensors and in two.safetensors, and no index says which of them is "
        "meant; fetch both again, or remove the file that is left over"
    )


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"x.weight": "one.safetensors"}, "model.safetensors.index.json: does not list y.weight"),
        ({"x.weight": "two.safetensors", "y.weight": "one.safetensors"}, "tensor 'x.weight' is in one.safetensors and"),
    ],
)
def test_a_compiled_checkpoint_and_its_index_agree(tmp_path: Path, index: Mapping[str, str], message: str) -> None:
    files = {"one": weights("x.weight", "y.weight")} | ({"two": weights("x.weight")} if len(index) > 1 else {})
    folder = checkpoint(
        tmp_path / "a", {**index, **({"y.weight": "one.safetensors"} if len(index) > 1 else {})}, **files
    )
    config = {"quantization_config": {"quant_method": "mixprec", "version": 1, "formats": {}, "modules": []}}
    (folder / "config.json").write_text(json.dumps(config))
    assert message in refusal(folder)


def test_an_index_of_another_checkpoint(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "a", {"x.weight": "model-00001-of-00010.safetensors"}, model=weights("x.weight"))
    assert refusal(folder).endswith("the index is another checkpoint's; remove it")


def test_counted_shards_need_no_index(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "a", **{"model-00001-of-00002": weights("x.weight"), "b": weights("y.weight")})
    (folder / "b.safetensors").rename(folder / "model-00002-of-00002.safetensors")
    assert sorted(open_checkpoint(str(folder)).tensors()) == ["x.weight", "y.weight"]
    (folder / "model-00001-of-00002.safetensors").rename(folder / "model-00003-of-00002.safetensors")
    assert refusal(folder) == f"{folder}: 2 .safetensors files but no {INDEX} that says which belong together"


def test_files_that_an_index_does_not_name_are_not_read(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "a", {"x.weight": "one.safetensors"}, one=weights("x.weight"))
    (folder / "consolidated.safetensors").write_bytes(b"not one at all")
    os.mkfifo(folder / "adapter.safetensors")
    assert list(open_checkpoint(str(folder)).tensors()) == ["x.weight"]


# Which files are the checkpoint


def test_a_single_file_of_any_name_opens(tmp_path: Path) -> None:
    name = "gptq_model-4bit-128g.safetensors"
    folder = checkpoint(tmp_path / "a", one=weights("x.weight"))
    (folder / "one.safetensors").rename(folder / name)
    assert list(open_checkpoint(str(folder)).shards) == [name]


def test_the_standard_name_goes_before_others(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "a", model=weights("x.weight"), consolidated=weights("y.weight"))
    assert list(open_checkpoint(str(folder)).tensors()) == ["x.weight"]


def test_several_files_need_an_index(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "a", model__1=weights("x.weight"), model__2=weights("y.weight"))
    assert refusal(folder) == f"{folder}: 2 .safetensors files but no {INDEX} that says which belong together"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt", "model.gguf"])
def test_a_folder_of_pickles_is_refused_with_a_way_out(tmp_path: Path, name: str) -> None:
    folder = checkpoint(tmp_path / "a")
    (folder / name).write_bytes(b"\x80\x04.")
    assert refusal(folder) == (
        f"{folder}: only safetensors files are read, and there are none here; convert it first, "
        "e.g. with transformers: save_pretrained(..., safe_serialization=True)"
    )


def test_an_empty_folder(tmp_path: Path) -> None:
    assert refusal(checkpoint(tmp_path / "a")) == f"{tmp_path / 'a'}: no safetensors files"


@pytest.mark.parametrize("location", ["/no/such/folder", "./nowhere", "../a/b", "a/b/c", "name", "org/name with space"])
def test_what_is_neither_a_folder_nor_a_hub_id(location: str) -> None:
    message = refusal(location)
    where = ", and" if location.startswith("/") else " (/"
    assert message.startswith(f"{location}: no such folder{where}")
    assert message.endswith("not a hub id like org/name@revision")


def test_a_file_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(save(weights("x.weight")))
    assert "is no folder; name the folder that the checkpoint's files are in" in refusal(tmp_path / "model.safetensors")


def test_relative_locations_and_the_home_folder(tmp_path: Path, monkeypatch: Patch) -> None:
    folder = checkpoint(tmp_path / "a", model=weights("x.weight"))
    monkeypatch.setenv("HOME", str(tmp_path))
    for opened in (open_checkpoint("a", relative_to=tmp_path), open_checkpoint("~/a"), open_checkpoint(str(folder))):
        assert opened.folder == str(folder)
        assert list(opened.tensors()) == ["x.weight"]


def test_a_snapshot_of_the_hub_cache_is_followed(tmp_path: Path) -> None:
    plain = write_tiny(tmp_path / "plain")
    repository = tmp_path / "models--org--name"
    snapshot = repository / "snapshots" / ("0123456789" * 4)
    (repository / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for i, path in enumerate(sorted(plain.iterdir())):
        blob = repository / "blobs" / f"{i:064x}"
        path.rename(blob)
        (snapshot / path.name).symlink_to(Path("../../blobs") / blob.name)
    opened = open_checkpoint(str(snapshot))
    assert opened.tensors().keys() == folder_tensors(snapshot).keys()
    assert all(opened.read(t).nbytes == t.nbytes for t in opened.tensors().values())

    (snapshot / ONE).resolve().unlink()
    assert refusal(snapshot) == f"{snapshot}: the shard {ONE} is missing; fetch it again"


def special(path: Path, kind: str) -> None:
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()


@pytest.mark.parametrize("kind", ["fifo", "device"])
@pytest.mark.parametrize("name", ["model.safetensors", INDEX, "config.json"])
def test_what_would_never_end_is_refused_at_once(tmp_path: Path, name: str, kind: str) -> None:
    folder = checkpoint(tmp_path / "a", {"x.weight": "model.safetensors"}, model=weights("x.weight"))
    (folder / name).unlink()
    special(folder / name, kind)
    link = "a link to /dev/zero, outside of the checkpoint; put the file itself there"
    assert refusal(folder).endswith(f"{name}: {link if kind == 'device' else 'not a regular file'}")


def test_a_folder_is_no_shard(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "a", {"x.weight": "model.safetensors"})
    special(folder / "model.safetensors", "folder")
    assert refusal(folder) == f"{folder}: the shard model.safetensors is missing; fetch it again"


# config.json


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid JSON: Expecting value"),
        ("{", "not valid JSON: Expecting property name"),
        ("\ufeff{}", "not valid JSON: Unexpected UTF-8 BOM"),
        ("[]", "not a JSON object"),
        ('"text"', "not a JSON object"),
        ("[" * 100_000, "not valid JSON: maximum recursion depth exceeded"),
        ('{"n": ' + "9" * 5000 + "}", "not valid JSON: Exceeds the limit"),
        ('{"quantization_config": "gptq"}', "`quantization_config` is not an object"),
        ('{"quantization_config": []}', "`quantization_config` is not an object"),
    ],
)
def test_a_damaged_config_is_named(tmp_path: Path, text: str, message: str) -> None:
    folder = checkpoint(tmp_path / "a", model=weights("x.weight"))
    (folder / "config.json").write_text(text)
    assert refusal(folder).startswith(f"{folder}/config.json: {message}")


def test_a_config_that_is_no_text(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "a", model=weights("x.weight"))
    (folder / "config.json").write_bytes(b"\xff\xfe{}")
    assert refusal(folder).startswith(f"{folder}/config.json: not valid JSON: 'utf-8' codec can't decode")


def test_a_missing_config(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "a", model=weights("x.weight"))
    (folder / "config.json").unlink()
    assert refusal(folder) == f"{folder}: no config.json: this is no Hugging Face checkpoint"


@pytest.mark.parametrize(("name", "cap"), [("config.json", 16 << 20), (INDEX, 256 << 20)])
def test_json_of_any_size_is_not_read(tmp_path: Path, name: str, cap: int) -> None:
    folder = checkpoint(tmp_path / "a", model=weights("x.weight"))
    with (folder / name).open("ab") as file:
        file.truncate(cap + 1)
    assert refusal(folder) == f"{folder}/{name}: {cap + 1} bytes; at most {cap} are read"


def test_quantization_is_read_from_config_before_quantize_config(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "a", model=weights("x.weight"))
    opened = open_checkpoint(str(folder))
    assert (opened.quantization, opened.quantization_file) == ({}, "config.json")
    (folder / "quantize_config.json").write_text('{"bits": 4}')
    opened = open_checkpoint(str(folder))
    assert opened.quantization == {"quant_method": "gptq", "bits": 4}
    assert opened.quantization_file == "quantize_config.json"
    (folder / "config.json").write_text('{"quantization_config": {"bits": 8}}')
    opened = open_checkpoint(str(folder))
    assert (opened.quantization, opened.quantization_file) == ({"bits": 8}, "config.json")
    (folder / "config.json").write_text("{}")
    (folder / "quantize_config.json").write_text("[]")
    assert refusal(folder) == f"{folder}/quantize_config.json: not a JSON object"


# Names


@pytest.mark.parametrize(
    "name",
    ["", "a b.weight", "a\n.weight", "a\0.weight", "\x1b[2J", "a\x9b2J", "a*", "a?", "a{0..3}.weight", "a[0]"],
)
def test_names_no_model_uses_are_refused(tmp_path: Path, name: str) -> None:
    folder = checkpoint(tmp_path / "a", model={name: torch.zeros(1)})
    where = f"{folder}/model.safetensors"
    assert refusal(folder) == f"{where}: tensor name {name!r} has characters no model uses"


def test_a_lone_surrogate_is_no_name(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "a")
    header = b'{"\\ud800":{"dtype":"U8","shape":[],"data_offsets":[0,1]}}'
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"1")
    assert "tensor name '\\ud800' has characters" in refusal(folder)


def test_a_name_is_never_a_path(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "a", model=weights("../../x", "/etc/passwd"))
    assert set(open_checkpoint(str(folder)).modules) == {"../../x", "/etc/passwd"}


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "a")
    os.truncate(folder / TWO, (folder / TWO).stat().st_size - 1)
    assert refusal(folder).startswith(f"{folder}/{TWO}: damaged safetensors file: ")


@pytest.mark.parametrize(
    ("tensor", "module", "leaf"),
    [
        ("model.layers.0.mlp.up_proj.qweight", "model.layers.0.mlp.up_proj", "qweight"),
        ("model.norm.weight", "model.norm", "weight"),
        ("model.layers.0.mixer.A_log", "model.layers.0.mixer.A_log", ""),
        ("weight", "weight", ""),
        (".weight", ".weight", ""),
    ],
)
def test_modules_of_tensors(tensor: str, module: str, leaf: str) -> None:
    assert split_name(tensor, leaves()) == (module, leaf)


# Values


def test_values_are_those_that_torch_reads(tmp_path: Path, monkeypatch: Patch) -> None:
    tensors = {
        "a.weight": torch.randn(3, 5).bfloat16(),
        "b.weight": torch.randn(4, 4).to(torch.float8_e4m3fn),
        "c.weight": torch.randn(2, 0),
        "d.weight": torch.tensor(-7, dtype=torch.int32),
        "e.weight": torch.randn(3).double(),
        "f.weight": torch.tensor([True, False]),
        "g.weight": torch.randn(9).half(),
    }
    opened = open_checkpoint(str(checkpoint(tmp_path / "a", model=tensors)))
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: real(fd, [buffers[0][:3]], offset))
    for name, tensor in tensors.items():
        values = opened.read(opened.tensors()[name])
        assert values.shape == tuple(tensor.shape)
        assert np.array_equal(values.astype(np.float64), tensor.double().numpy())


def test_values_of_four_bits_are_refused(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "a")
    (folder / "model.safetensors").write_bytes(build_header([("x.weight", "F4", (2,), 1)]) + b"1")
    opened = open_checkpoint(str(folder))
    with pytest.raises(SourceError, match="values of dtype F4 are not read"):
        opened.read(opened.tensors()["x.weight"])


def test_a_file_that_became_shorter_is_named(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "a", model=weights("x.weight"))
    opened = open_checkpoint(str(folder))
    size = (folder / "model.safetensors").stat().st_size
    os.truncate(folder / "model.safetensors", size - 3)
    with ValueReader({"a": opened}) as reader:
        for read in (opened.read, lambda tensor: reader.read("a", tensor)):
            with pytest.raises(SourceError) as caught:
                read(opened.tensors()["x.weight"])
            assert str(caught.value) == f"{folder}/model.safetensors: ends inside x.weight; fetch the file again"
    with pytest.raises(SourceError) as caught:
        opened.storage.read("model.safetensors", 0, size)
    assert str(caught.value) == f"{folder}/model.safetensors: ends at byte {size - 3}, {size} were expected"


def sparse(folder: Path) -> Checkpoint:
    """``a`` in a hole, ``b`` written, ``c`` in a hole but for its end, ``d`` in the hole the file ends with."""
    size = 1 << 20
    folder = checkpoint(folder)
    header = build_header((f"{name}.weight", "U8", (size,), size) for name in "abcd")
    with (folder / "model.safetensors").open("wb") as file:
        file.write(header)
        file.seek(len(header) + size)
        file.write(b"\1" * size)
        file.seek(len(header) + 3 * size - 4096)
        file.write(b"\2" * 4096)
        file.truncate(len(header) + 4 * size)
    return open_checkpoint(str(folder))


def test_holes_are_not_read(tmp_path: Path) -> None:
    opened = sparse(tmp_path / "a")
    info = opened.tensors()
    with (tmp_path / "a" / "model.safetensors").open("rb") as file:
        if os.lseek(file.fileno(), info["a.weight"].start, os.SEEK_DATA) == info["a.weight"].start:
            pytest.skip("this file system does not tell holes from data")
    with ValueReader({"a": opened}) as reader:
        assert reader.read("a", info["a.weight"]) is None
        assert reader.read("a", info["d.weight"]) is None
        b, c = reader.read("a", info["b.weight"]), reader.read("a", info["c.weight"])
    assert b is not None and (b == 1).all() and b.nbytes == ValueReader.LIMIT
    assert c is not None and not c.any() and c.nbytes == ValueReader.LIMIT


def test_values_of_files_that_are_elsewhere_or_empty(tmp_path: Path) -> None:
    tensors = {"x.weight": torch.arange(3), "empty.weight": torch.zeros(0)}
    opened = open_checkpoint(str(checkpoint(tmp_path / "a", model=tensors)))

    class Remote:
        def cached(self, name: str) -> Path | None:
            return None

    away = object.__new__(Checkpoint)
    object.__setattr__(away, "storage", Remote())
    object.__setattr__(away, "values", {})
    with ValueReader({"here": opened, "away": away}) as reader:
        assert reader.read("away", opened.tensors()["x.weight"]) is None
        assert reader.read("here", opened.tensors()["empty.weight"]) is None
        values = reader.read("here", opened.tensors()["x.weight"])
    assert values is not None and values.tolist() == [0, 1, 2]


def test_value_reader_closes_its_files(tmp_path: Path) -> None:
    opened = open_checkpoint(str(checkpoint(tmp_path / "a", model=weights("x.weight"))))
    before = set(Path("/proc/self/fd").iterdir())
    with ValueReader({"a": opened}) as reader:
        reader.read("a", opened.tensors()["x.weight"])
    assert set(Path("/proc/self/fd").iterdir()) == before


# What is never done


def test_weights_are_never_mapped(tmp_path: Path) -> None:
    """A mapped file that gets shorter kills the process (SIGBUS); a read one gives an error."""
    write_sources(tmp_path)
    mapped: list[str] = []

    def look(_: int) -> None:
        mapped.extend(line for line in Path("/proc/self/maps").read_text().splitlines() if "safetensors" in line)

    run_plan(plan_recipe(write_recipe(tmp_path / "mix.yaml")), tmp_path / "out", progress=look)
    assert [line for line in mapped if str(tmp_path) in line] == []


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
def test_no_system_call_maps_a_weight(tmp_path: Path) -> None:
    write_sources(tmp_path)
    write_recipe(tmp_path / "mix.yaml")
    log = tmp_path / "calls"
    script = (
        "import sys; from mixprec_build.cli.app import main; from contextlib import suppress\n"
        "for line in ('plan mix.yaml', 'build mix.yaml -o out', 'inspect out', 'verify out --against bf16'):\n"
        "    sys.argv = ['mixprec', *line.split()]\n"
        "    with suppress(SystemExit): main()\n"
    )
    traced = run_python("-c", script, cwd=tmp_path, under=["strace", "-f", "-y", "-e", "trace=mmap", "-o", str(log)])
    if "ptrace" in traced.stderr:
        pytest.skip("tracing is forbidden here")
    assert traced.stdout.endswith("no difference\n"), traced.stderr
    calls = log.read_text()
    assert "mmap(" in calls and ".safetensors" not in calls


HEAVY = ("torch", "safetensors", "numpy", "transformers", "huggingface_hub", "yaml", "ml_dtypes")


def test_inspect_starts_light(tmp_path: Path) -> None:
    write_sources(tmp_path)
    run_plan(plan_recipe(write_recipe(tmp_path / "mix.yaml")), tmp_path / "out")
    script = (
        "import sys; from contextlib import suppress; from mixprec_build.cli.app import main\n"
        "for name in ('bf16', 'fp8', 'int4', 'out'):\n"
        "    for options in ([], ['--json']):\n"
        "        sys.argv = ['mixprec', 'inspect', name, *options]\n"
        "        with suppress(SystemExit): main()\n"
        f"print('heavy:', [name for name in {HEAVY!r} if name in sys.modules])"
    )
    ended = run_python("-c", script, cwd=tmp_path)
    assert ended.stdout.count("Layer map") == 4 and ended.stdout.endswith("heavy: []\n")


def test_inspect_takes_little_time(tmp_path: Path) -> None:
    """CPU time beside that of the command line alone, each round in turn: a busy machine slows both of one round."""
    folder = str(write_tiny(tmp_path / "a", "int4"))

    def seconds(*arguments: str) -> float:
        return cpu_seconds("-m", "mixprec_build", *arguments, bytecode=tmp_path / "bytecode")

    assert any(seconds("inspect", folder) / seconds("--version") < 1.7 for _ in range(12))


def test_opening_reads_headers_only(tmp_path: Path, monkeypatch: Patch) -> None:
    folder = write_tiny(tmp_path / "a")
    done: list[int] = []
    real = os.pread

    def counting(fd: int, length: int, offset: int) -> bytes:
        data = real(fd, length, offset)
        done.append(len(data))
        return data

    big = {"x.weight": torch.zeros(4 << 20, dtype=torch.uint8)}
    save_file(big, folder / "big.safetensors")
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["x.weight"] = "big.safetensors"
    (folder / INDEX).write_text(json.dumps(index))
    monkeypatch.setattr(os, "pread", counting)
    open_checkpoint(str(folder))
    assert sum(done) < 2 << 20


def test_a_checkpoint_describes_itself(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "a", "fp8")
    opened = open_checkpoint(str(folder))
    assert opened.commit is None and opened.folder == str(folder)
    assert opened.path_of(ONE) == f"{folder}/{ONE}"
    module = opened.modules["model.layers.0.mlp.up_proj"]
    assert module.tensors.keys() == {"weight", "weight_scale_inv"} and module.nbytes == 128 * 128 + 4
    stored = {
        name: (t.dtype, list(t.shape), (folder / t.file).read_bytes()[t.start : t.start + t.nbytes])
        for name, t in opened.tensors().items()
    }
    assert stored == folder_tensors(folder)


def test_a_git_lfs_pointer_is_called_by_its_name(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "a", model={"x.weight": torch.arange(3)})
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    assert refusal(folder).endswith(
        "model.safetensors: a Git LFS pointer, not the file that it stands for; fetch it with `git lfs pull`"
    )
