"""Writing: bytes equal to their sources', and all of it or nothing, whatever fails."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import signal
import stat
import threading
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from support.files import file_tensors, folder_tensors, tree
from support.llama import COMPANIONS, CONFIG, LEFT_BEHIND, write_recipe, write_sources, write_tiny
from support.run import at_most, run_python

from mixprec_build.errors import InterruptedBuildError, MixprecError, OutputError, SourceError, WriteError
from mixprec_build.output import copier
from mixprec_build.output.build import plan_recipe, run_plan
from mixprec_build.output.verify import verify
from mixprec_build.planning.shards import _aligned
from mixprec_build.planning.types import PlannedShard, PlannedTensor
from mixprec_build.storage.dtypes import DTYPE_BITS
from mixprec_build.storage.header import TensorInfo, parse_header

INDEX = "model.safetensors.index.json"
MANIFEST = "mixprec_manifest.json"
MIB = 1 << 20

STAGE = r"\.out\.mixprec"

Patch = pytest.MonkeyPatch


@pytest.fixture(scope="module")
def mix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe of a mix, beside its sources: never written to by these tests."""
    folder = tmp_path_factory.mktemp("mix")
    write_sources(folder)
    return write_recipe(folder / "mix.yaml")


@pytest.fixture
def own_mix(tmp_path: Path) -> Path:
    """As ``mix``, for tests that change the sources."""
    (tmp_path / "own").mkdir()
    write_sources(tmp_path / "own")
    return write_recipe(tmp_path / "own" / "mix.yaml")


def build(recipe: Path, out: Path, *, link: bool = False, **options: Any) -> Path:
    assert run_plan(plan_recipe(recipe, link=link), out, link=link, **options) == out / MANIFEST
    return out


def one_source(folder: Path, tensors: dict[str, torch.Tensor], shard_size: str = "1MiB") -> Path:
    """The recipe of a checkpoint of one source, ``source``, with these tensors: of an encoder, which may have any."""
    (folder / "source").mkdir(parents=True)
    (folder / "source" / "config.json").write_text(json.dumps({"model_type": "bert"}))
    save_file(tensors, folder / "source" / "model.safetensors", metadata={"format": "pt"})
    recipe = folder / "one.yaml"
    recipe.write_text(f"model: ./source\noutput: {{shard_size: {shard_size}}}\n")
    return recipe


# Bytes


def test_every_tensor_has_its_sources_bytes(mix: Path, tmp_path: Path) -> None:
    out = build(mix, tmp_path / "out")
    sources = {name: folder_tensors(mix.parent / name) for name in ("bf16", "fp8", "int4")}
    expected = {}
    for name, tensors in sources.items():
        for tensor, stored in tensors.items():
            owner = "fp8" if ".self_attn." in tensor else "int4" if ".mlp." in tensor else "bf16"
            if owner == name:
                expected[tensor] = stored
    assert folder_tensors(out) == expected
    assert len({dtype for dtype, _, _ in expected.values()}) == 5


def test_index_and_metadata(tmp_path: Path) -> None:
    tensors = {f"model.layers.{i}.mlp.up_proj.weight": torch.randn(150, 500).half() for i in range(12)}
    out = build(one_source(tmp_path, tensors), tmp_path / "out")
    shards = sorted(path.name for path in out.glob("*.safetensors"))
    assert shards == [f"model-{i:05d}-of-00002.safetensors" for i in (1, 2)]
    index = json.loads((out / INDEX).read_bytes())
    held = {name: shard for shard in shards for name in file_tensors(out / shard)}
    assert index == {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": held}
    for shard in shards:
        with safe_open(out / shard, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}


def test_shards_are_no_larger_than_asked(tmp_path: Path) -> None:
    sizes = [300_000, 300_000, 300_000, 300_000, 3 * MIB, 1, MIB, 500_000, MIB - 500_000, 1]
    tensors = {f"model.layers.{i}.mlp.up_proj.weight": torch.randn((n + 1) // 2).half() for i, n in enumerate(sizes)}
    out = build(one_source(tmp_path, tensors), tmp_path / "out")
    shards = {path.name: file_tensors(path) for path in sorted(out.glob("*.safetensors"))}
    stored = [[len(data) for _, _, data in shard.values()] for shard in shards.values()]
    assert sum(map(len, stored)) == len(sizes)
    assert all(sum(shard) <= MIB or len(shard) == 1 for shard in stored)
    order = [name for shard in shards.values() for name in sorted(shard, key=lambda n: int(n.split(".")[2]))]
    assert order == list(tensors), "in checkpoint order"


def test_shards_have_no_more_tensors_than_are_read(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr("mixprec_build.planning.shards.MOST_TENSORS", 7)
    tensors = {f"model.layers.{i}.mlp.up_proj.{leaf}": torch.ones(4) for i in range(10) for leaf in ("bias", "weight")}
    out = build(one_source(tmp_path, tensors), tmp_path / "out")
    held = [file_tensors(path) for path in sorted(out.glob("*.safetensors"))]
    assert [len(shard) for shard in held] == [6, 6, 6, 2], "modules are not torn apart"
    assert not verify(out).differences


def awkward() -> dict[str, torch.Tensor]:
    """Tensors around the size of the copy buffer, a thousand tiny ones, empty ones, odd ones."""
    random = torch.Generator().manual_seed(0)
    sizes = {
        "larger": copier._BUFFER * 2 + 3,
        "equal": copier._BUFFER,
        "one_more": copier._BUFFER + 1,
        "one_less": copier._BUFFER - 1,
    }
    tensors = {
        f"{name}.A_log": torch.randint(256, (size,), generator=random, dtype=torch.uint8)
        for name, size in sizes.items()
    }
    for i in range(1000):
        tensors[f"model.layers.{i}.norm.weight"] = torch.tensor([i], dtype=torch.float32)
    for i, dtype in enumerate((torch.uint8, torch.float16, torch.float32, torch.float64, torch.bool, torch.int16)):
        tensors[f"odd.{i}.a"] = torch.ones(3, dtype=dtype)
        tensors[f"odd.{i}.b"] = torch.ones(0, 3, dtype=dtype)
        tensors[f"odd.{i}.c"] = torch.ones((), dtype=dtype)
    return tensors


@pytest.mark.parametrize("jobs", [1, 8])
def test_tensors_of_awkward_sizes(tmp_path: Path, jobs: int) -> None:
    recipe = one_source(tmp_path, awkward(), "2MiB")
    done: list[int] = []
    out = build(recipe, tmp_path / "out", jobs=jobs, progress=done.append)
    written = folder_tensors(out)
    assert written == folder_tensors(tmp_path / "source")
    assert sum(done) == sum(len(data) for _, _, data in written.values())
    for path in out.glob("*.safetensors"):
        assert_aligned(path.read_bytes())
    assert verify(out).differences == ()


def assert_aligned(data: bytes) -> None:
    start = 8 + int.from_bytes(data[:8], "little")
    tensors, _ = parse_header(data[:start], path="x", file="x", file_size=len(data))
    assert start % 4096 == 0
    for tensor in tensors.values():
        assert tensor.start % max(1, DTYPE_BITS[tensor.dtype] // 8) == 0, tensor


DTYPES = sorted(dtype for dtype, bits in DTYPE_BITS.items() if bits >= 8)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3)), max_size=12))
def test_every_tensor_starts_at_a_multiple_of_its_dtype(drawn: list[tuple[str, list[int]]]) -> None:
    """Readers that map a file and cast a pointer need it, whatever mix of dtypes a shard holds."""
    tensors = []
    for i, (dtype, shape) in enumerate(drawn):
        nbytes = prod(shape) * DTYPE_BITS[dtype] // 8
        tensors.append(PlannedTensor("s", TensorInfo(str(i), dtype, tuple(shape), "x", 0, nbytes)))
    shard = PlannedShard("x", tuple(_aligned(tensors)))
    assert_aligned(shard.header + bytes(shard.data_bytes))


def test_the_same_bytes_whatever_the_number_of_threads(mix: Path, tmp_path: Path) -> None:
    first = tree(build(mix, tmp_path / "first", jobs=1))
    for jobs in (1, 2, 8):
        assert tree(build(mix, tmp_path / f"jobs-{jobs}", jobs=jobs)) == first


@pytest.mark.filterwarnings("default")  # transformers' own
def test_transformers_loads_what_is_written(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    write_tiny(tmp_path / "bf16")
    out = build(write_recipe(tmp_path / "one.yaml", {}, sources=["bf16"]), tmp_path / "out")
    config = json.loads((out / "config.json").read_bytes())
    del config["quantization_config"]  # transformers knows no method mixprec
    (out / "config.json").write_text(json.dumps(config))
    models = [AutoModelForCausalLM.from_pretrained(path, dtype="auto") for path in (out, tmp_path / "bf16")]
    tokens = torch.arange(16).reshape(1, 16)
    with torch.no_grad():
        ours, theirs = (model(tokens).logits for model in models)
    assert torch.equal(ours, theirs) and ours.isfinite().all()
    loaded = {name: tensor.view(torch.uint8) for name, tensor in models[0].state_dict().items()}
    stored = folder_tensors(out)
    assert loaded.keys() == stored.keys()
    assert all(loaded[name].numpy().tobytes() == data for name, (_, _, data) in stored.items())


# The files beside the weights


def test_companions_are_copied_and_nothing_else(mix: Path, tmp_path: Path) -> None:
    written = tree(build(mix, tmp_path / "out"))
    assert {name: written.pop(name) for name in COMPANIONS} == COMPANIONS
    assert not written.keys() & LEFT_BEHIND.keys()
    assert set(written) == {"config.json", INDEX, MANIFEST, "model-00001-of-00001.safetensors"}


def test_config_keeps_the_models_keys(own_mix: Path, tmp_path: Path) -> None:
    """Of the source's quantization nothing is left, wherever a tool put it."""
    path = own_mix.parent / "bf16" / "config.json"
    before = {**CONFIG, "compression_config": {"quant_method": "compressed-tensors"}, "text": "\ud800 \udcff é"}
    path.write_text(json.dumps(before))
    written = (build(own_mix, tmp_path / "out") / "config.json").read_bytes()
    after = json.loads(written)
    declared = after.pop("quantization_config")
    del before["compression_config"]
    assert after == before and list(after) == list(before)
    assert declared["quant_method"] == "mixprec" and declared["formats"].keys() == {"bf16", "fp8_block", "gptq_int4"}
    assert "é".encode() in written and b"\\ud800 \\udcff" in written


def test_the_quantization_of_a_quantized_model_is_replaced(own_mix: Path, tmp_path: Path) -> None:
    recipe = own_mix.with_name("fp8.yaml")
    recipe.write_text("model: ./fp8\nsources: {fp8: ./fp8}\n")
    config = json.loads((build(recipe, tmp_path / "out") / "config.json").read_bytes())
    assert config["quantization_config"]["quant_method"] == "mixprec"
    assert "weight_block_size" not in config["quantization_config"]


@pytest.mark.parametrize("kind", ["fifo", "device"])
def test_a_companion_that_would_never_end(own_mix: Path, tmp_path: Path, kind: str) -> None:
    path = own_mix.parent / "bf16" / "tokenizer.json"
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    with at_most(30), pytest.raises(SourceError, match=f"{path}: (not a regular file|a link to /dev/zero)"):
        build(own_mix, tmp_path / "out")


@pytest.fixture
def umask() -> Iterator[Callable[[int], int]]:
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


@pytest.mark.parametrize(("mask", "file", "folder"), [(0o022, 0o644, 0o755), (0o027, 0o640, 0o750), (0, 0o666, 0o777)])
def test_modes_follow_the_umask(
    mix: Path, tmp_path: Path, umask: Callable[[int], int], mask: int, file: int, folder: int
) -> None:
    """A server often runs as another user than the build."""
    umask(mask)
    out = build(mix, tmp_path / "deep" / "out")
    assert {stat.S_IMODE(path.stat().st_mode) for path in out.iterdir()} == {file}
    assert stat.S_IMODE(out.stat().st_mode) == stat.S_IMODE(out.parent.stat().st_mode) == folder


# --link


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """The recipe of a build that takes over both files of its one source."""
    write_tiny(tmp_path / "bf16")
    return write_recipe(tmp_path / "one.yaml", {}, sources=["bf16"])


def assert_taken_over(recipe: Path, out: Path) -> None:
    sources = sorted((recipe.parent / "bf16").glob("*.safetensors"))
    taken = sorted(out.glob("*.safetensors"))
    assert sorted(p.read_bytes() for p in taken) == sorted(p.read_bytes() for p in sources)
    assert not any(path.is_symlink() for path in out.iterdir())
    assert json.loads((out / INDEX).read_bytes())["weight_map"].keys() == folder_tensors(out).keys()
    result = verify(out)
    assert (result.differences, result.by_checksum) == ((), 0)


def inodes(folder: Path) -> set[int]:
    return {path.stat().st_ino for path in folder.glob("*.safetensors")}


def test_link_takes_whole_files_over(whole: Path, tmp_path: Path) -> None:
    done: list[int] = []
    plan = plan_recipe(whole, link=True)
    assert {shard.link for shard in plan.shards} == {("bf16", f"model-0000{i}-of-00002.safetensors") for i in (1, 2)}
    run_plan(plan, tmp_path / "out", link=True, progress=done.append)
    assert_taken_over(whole, tmp_path / "out")
    assert sum(done) == plan.tensor_bytes


def refuse_ioctl(*_: object) -> int:
    raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))


def test_link_falls_back_to_hard_links(whole: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(fcntl, "ioctl", refuse_ioctl)
    out = build(whole, tmp_path / "out", link=True)
    assert_taken_over(whole, out)
    assert inodes(out) == inodes(tmp_path / "bf16")


def test_link_through_the_links_of_a_hub_cache(whole: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(fcntl, "ioctl", refuse_ioctl)
    repository = tmp_path / "models--org--name"
    snapshot, blobs = repository / "snapshots" / "0123", repository / "blobs"
    snapshot.parent.mkdir(parents=True)
    blobs.mkdir()
    (tmp_path / "bf16").rename(snapshot)
    (tmp_path / "bf16").symlink_to(snapshot)
    for path in snapshot.glob("*.safetensors"):
        path.rename(blobs / path.name)
        path.symlink_to(Path("../../blobs") / path.name)
    out = build(whole, tmp_path / "out", link=True)
    assert_taken_over(whole, out)
    assert inodes(out) == inodes(blobs)


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EPERM, errno.EMLINK])
def test_link_falls_back_to_copies(whole: Path, tmp_path: Path, monkeypatch: Patch, number: int) -> None:
    def refuse_link(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "ioctl", refuse_ioctl)
    monkeypatch.setattr(os, "link", refuse_link)
    out = build(whole, tmp_path / "out", link=True)
    assert_taken_over(whole, out)
    assert not inodes(out) & inodes(tmp_path / "bf16")


def test_link_across_devices(whole: Path, tmp_path: Path) -> None:
    shm = Path("/dev/shm")
    if not shm.is_dir() or shm.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs a second file system")
    out = shm / f"mixprec-test-{os.getpid()}"
    try:
        assert_taken_over(whole, build(whole, out, link=True))
    finally:
        for path in out.glob("*"):
            path.unlink()
        out.rmdir()


def test_link_leaves_files_that_are_not_whole(mix: Path, tmp_path: Path) -> None:
    plan = plan_recipe(mix, link=True)
    assert [shard.link for shard in plan.shards] == [None]
    run_plan(plan, tmp_path / "out", link=True)
    assert tree(tmp_path / "out") == tree(build(mix, tmp_path / "copied"))


@pytest.mark.parametrize("metadata", [None, {"made": "by hand"}, {"format": "np"}])
def test_link_leaves_files_that_do_not_say_pt(whole: Path, tmp_path: Path, metadata: dict[str, str] | None) -> None:
    for path in (tmp_path / "bf16").glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no dict)
        save_file(tensors, path, metadata)
    assert [shard.link for shard in plan_recipe(whole, link=True).shards] == [None]


# The output folder


def refused(recipe: Path, out: Path, *, force: bool = False) -> str:
    before = listing(out.parent)
    with pytest.raises(OutputError) as caught:
        build(recipe, out, force=force)
    assert listing(out.parent) == before
    assert caught.value.exit_code == 2
    return str(caught.value)


def listing(folder: Path) -> dict[str, object]:
    """All there is below a folder, links not followed."""
    return {
        str(path.relative_to(folder)): (path.lstat().st_mode, path.lstat().st_ino, path.lstat().st_size)
        for path in sorted(folder.rglob("*"))
    }


@pytest.mark.parametrize("force", [False, True])
def test_an_output_that_is_a_source(own_mix: Path, tmp_path: Path, force: bool) -> None:
    folder = own_mix.parent
    (tmp_path / "alias").symlink_to(folder)
    for out in (
        folder / "fp8",
        folder / "fp8" / "out",
        folder,
        tmp_path / "alias" / "fp8",
        folder / "x" / ".." / "fp8",
    ):
        message = refused(own_mix, out, force=force)
        assert message.startswith(f"{out}: overlaps the source `") and message.endswith("name another folder")


def test_an_output_in_the_model_that_is_no_source_of_weights(own_mix: Path) -> None:
    recipe = own_mix.with_name("model.yaml")
    recipe.write_text("model: ./bf16\nsources: {fp8: ./fp8}\ndefault: fp8\n")
    assert "overlaps the source `model`" in refused(recipe, own_mix.parent / "bf16" / "out")


def test_an_output_that_exists(mix: Path, tmp_path: Path) -> None:
    out = build(mix, tmp_path / "out")
    hint = "exists and is not empty; pass --force to replace it, or name another folder"
    assert refused(mix, out) == f"{out}: {hint}"


def test_force_replaces_what_mixprec_wrote(mix: Path, whole: Path, tmp_path: Path) -> None:
    out = build(mix, tmp_path / "out")
    build(whole, out, force=True)
    assert tree(out) == tree(build(whole, tmp_path / "other"))
    assert {path.name for path in tmp_path.iterdir()} == {"out", "other", "bf16", "one.yaml"}


def foreign_folder(out: Path) -> None:
    out.mkdir()
    (out / "thesis.tex").write_text("...")


def foreign_file(out: Path) -> None:
    (out / "thesis.tex").write_text("...")


def foreign_link(out: Path) -> None:
    (out / "thesis.tex").symlink_to("/nowhere")


def damaged_manifest(out: Path) -> None:
    (out / MANIFEST).write_bytes(b"{}")


@pytest.mark.parametrize("change", [foreign_folder, foreign_file, foreign_link, damaged_manifest])
def test_force_replaces_nothing_else(mix: Path, tmp_path: Path, change: Callable[[Path], None]) -> None:
    out = tmp_path / "out"
    if change is not foreign_folder:
        build(mix, out)
    change(out)
    message = refused(mix, out, force=True)
    assert message.startswith(f"{out}: holds files that mixprec did not write (")
    assert ("thesis.tex" in message) != (change is damaged_manifest)


@pytest.mark.parametrize("force", [False, True])
def test_an_empty_folder_is_as_good_as_none(mix: Path, tmp_path: Path, force: bool) -> None:
    (tmp_path / "out").mkdir()
    assert (build(mix, tmp_path / "out", force=force) / MANIFEST).is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_current_folder(mix: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    build(mix, Path())
    monkeypatch.chdir(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["here"]
    assert verify(Path("here")).differences == ()


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("file", "is a file; name a folder"),
        ("file/out", "cannot be created ("),
        ("file/deep/out", "cannot be created ("),
        ("n" * 250, "cannot be created ("),
        ("n" * 300, "cannot be used: File name too long"),
        ("new/" + "n" * 250, "cannot be created ("),
        ("link", "is a link; name the folder itself"),
        ("dangling", "is a link; name the folder itself"),
        ("loop", "is a link; name the folder itself"),
        ("loop/out", "cannot be"),
    ],
)
def test_an_output_that_cannot_be(mix: Path, tmp_path: Path, out: str, message: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    before = listing(tmp_path)
    with pytest.raises(OutputError) as caught:
        build(mix, tmp_path / out)
    assert str(caught.value).startswith(f"{tmp_path / out}: {message}")
    assert listing(tmp_path) == before


@pytest.mark.parametrize("force", [False, True])
def test_an_output_that_is_a_mount_point(mix: Path, tmp_path: Path, monkeypatch: Patch, force: bool) -> None:
    """It could not be renamed, which would be found out after all was copied."""
    out, real = tmp_path / "out", os.path.ismount
    out.mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: path == out or real(path))
    hint = "is a mount point, which no folder can replace; name a folder inside it"
    assert refused(mix, out, force=force) == f"{out}: {hint}"
    assert (build(mix, out / "inside") / MANIFEST).is_file()


def test_a_folder_that_is_a_link_above_the_output(mix: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "models").symlink_to("disk")
    build(mix, tmp_path / "models" / "out")
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["out"]


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_that_appears_meanwhile_is_left_alone(mix: Path, tmp_path: Path, force: bool) -> None:
    """Two builds with one output: the later one does not replace what it has never seen."""
    out = tmp_path / "out"

    def appear(_: int) -> None:
        out.mkdir(exist_ok=True)
        (out / "thesis.tex").write_text("...")

    with pytest.raises(OutputError, match=f"{out}: "):
        build(mix, out, force=force, progress=appear)
    assert tree(out) == {"thesis.tex": b"..."}
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.mixprec", "out"], "what was copied is kept"


# Failures


class Fault:
    """Makes the ``nth`` call of a function of ``os`` fail (0: none); ``calls`` counts them."""

    def __init__(self, monkeypatch: Patch, function: str, number: int = 0, nth: int = 0):
        self.calls = 0
        self._lock = threading.Lock()
        real = getattr(os, function)

        def call(*arguments: Any, **options: Any) -> Any:
            with self._lock:
                self.calls += 1
                fails = self.calls == nth
            if fails:
                paths = [str(a) for a in arguments if isinstance(a, (str, Path))]
                raise OSError(number, os.strerror(number), *([paths[0], None, *paths[1:]] if paths else []))
            return real(*arguments, **options)

        monkeypatch.setattr(os, function, call)


WRITES = ("pwrite", "fsync", "posix_fallocate", "rename", "statvfs")
READS = ("preadv",)
ERRORS = (errno.ENOSPC, errno.EIO, errno.EDQUOT)


def count(recipe: Path, out: Path, function: str) -> int:
    """How often a build calls a function."""
    with Patch.context() as monkeypatch:
        fault = Fault(monkeypatch, function)
        build(recipe, out, jobs=1, force=True)
    return fault.calls


@pytest.mark.parametrize("force", [False, True], ids=["fresh", "force"])
@pytest.mark.parametrize("function", [*WRITES, *READS])
def test_nothing_is_left_and_nothing_is_lost_when_a_call_fails(
    mix: Path, tmp_path: Path, function: str, force: bool
) -> None:
    out = tmp_path / "out"
    if force:
        build(mix, out)
    calls = count(mix, out if force else tmp_path / "counted" / "out", function)
    before = listing(tmp_path)
    step = max(1, calls // 12)
    for nth in {*range(1, calls + 1, step), calls}:
        number = ERRORS[nth % 3]
        with Patch.context() as monkeypatch:
            Fault(monkeypatch, function, number, nth)
            with pytest.raises(MixprecError) as caught:
                build(mix, out, force=force, jobs=1 + nth % 2)
        message = str(caught.value)
        assert os.strerror(number) in message
        if function in READS:
            assert type(caught.value) is SourceError
            assert re.match(rf"{mix.parent}/(bf16|fp8|int4)/model-0000\d-of-00002\.safetensors: cannot read ", message)
        else:
            assert type(caught.value) is WriteError and caught.value.exit_code == 3
            assert message.startswith(f"{tmp_path}")
            if function == "posix_fallocate":
                assert re.match(rf"{tmp_path}/{STAGE}/[\w./-]+: ", message)
            assert ("quota" in message) == (number == errno.EDQUOT)
        assert ("finished and kept in" in message) == (tmp_path / ".out.mixprec").exists()
        shutil.rmtree(tmp_path / ".out.mixprec", ignore_errors=True)
        assert listing(tmp_path) == before, (function, nth)


def test_a_header_that_cannot_be_read_is_the_sources_fault(mix: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    plan = plan_recipe(mix)
    Fault(monkeypatch, "pread", errno.EIO, 2)  # the first is that of the lock
    with pytest.raises(SourceError, match=f"{mix.parent}/.*safetensors: cannot read it: Input/output error"):
        run_plan(plan, tmp_path / "out")
    assert listing(tmp_path) == {}


@pytest.mark.parametrize("function", ["fstat", "close"])
def test_an_error_beside_reads_and_writes_names_its_file(mix: Path, tmp_path: Path, function: str) -> None:
    calls = count(mix, tmp_path / "counted" / "out", function)
    plan = plan_recipe(mix)
    named = 0
    for nth in range(1, calls + 1, 2):
        out = tmp_path / str(nth) / "out"
        with Patch.context() as monkeypatch:
            Fault(monkeypatch, function, errno.EIO, nth)
            try:
                run_plan(plan, out)
            except MixprecError as error:
                assert re.search(rf"({mix.parent}|{tmp_path})/[^:]+: .*{os.strerror(errno.EIO)}", str(error)), nth
                named += 1
    assert named > 4


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.EACCES, OutputError), (errno.EROFS, OutputError), (errno.ENOSPC, WriteError)]
)
def test_a_folder_that_cannot_be_made(
    mix: Path, tmp_path: Path, monkeypatch: Patch, number: int, kind: type[MixprecError]
) -> None:
    Fault(monkeypatch, "mkdir", number, 2)  # the first is that of the parent, which exists
    with pytest.raises(kind, match=os.strerror(number)):
        build(mix, tmp_path / "out")
    assert listing(tmp_path) == {}


def test_short_reads_and_writes_are_continued(mix: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    expected = tree(build(mix, tmp_path / "whole"))
    pwrite, preadv = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:1009], at))
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: preadv(fd, [buffers[0][:997]], at))
    assert tree(build(mix, tmp_path / "short")) == expected


def test_a_disk_too_small_is_told_before_a_byte_is_written(mix: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    real = os.statvfs

    def almost_full(path: Path) -> os.statvfs_result:
        found = list(real(path))
        found[1], found[4] = 1, 4096  # f_frsize, f_bavail
        return os.statvfs_result(found)

    monkeypatch.setattr(os, "statvfs", almost_full)
    with pytest.raises(WriteError) as caught:
        build(mix, tmp_path / "out")
    assert str(caught.value) == f"{tmp_path}: 229408 bytes are needed, 4096 are free; nothing was left behind"
    assert listing(tmp_path) == {}


def test_folders_that_were_made_for_a_failed_build_go_with_it(mix: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    (tmp_path / "kept").mkdir()
    Fault(monkeypatch, "fsync", errno.EIO, 1)
    with pytest.raises(WriteError):
        build(mix, tmp_path / "kept" / "a" / "b" / "out")
    assert list(listing(tmp_path)) == ["kept"]


def test_an_old_output_that_cannot_be_removed_is_named(mix: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    out = build(mix, tmp_path / "out")
    Fault(monkeypatch, "rmdir", errno.EIO, 1)
    with pytest.raises(WriteError, match=rf"{tmp_path}/{STAGE}/replaced: .*the new checkpoint is in place"):
        build(mix, out, force=True)
    assert verify(out).differences == ()


@pytest.mark.parametrize("force", [False, True], ids=["fresh", "force"])
@pytest.mark.parametrize(("nth", "jobs"), [(1, 1), (2, 4), (5, 2)])
def test_an_interrupt_leaves_nothing(mix: Path, tmp_path: Path, nth: int, jobs: int, force: bool) -> None:
    out = tmp_path / "out"
    if force:
        build(mix, out)
    before, calls = listing(tmp_path), 0

    def interrupt(_: int) -> None:
        nonlocal calls
        calls += 1
        if calls == nth:
            raise KeyboardInterrupt

    plan = plan_recipe(mix)
    with Patch.context() as monkeypatch, pytest.raises(InterruptedBuildError, match="nothing was left behind"):
        monkeypatch.setattr(copier, "_BUFFER", 10_000)  # many small steps
        run_plan(plan, out, force=force, jobs=jobs, progress=interrupt)
    assert listing(tmp_path) == before


@pytest.mark.parametrize("force", [False, True], ids=["fresh", "force"])
def test_a_kill_leaves_no_output_but_the_one_before(mix: Path, tmp_path: Path, force: bool) -> None:
    out = tmp_path / "out"
    if force:
        build(mix, out)
    before = listing(tmp_path)
    script = (
        "import os, signal, sys; from pathlib import Path; from mixprec_build.output import copier\n"
        "from mixprec_build.output.build import plan_recipe, run_plan\n"
        "copier._BUFFER, calls = 10_000, []\n"
        "def kill(done):\n"
        "    calls.append(done)\n"
        "    if len(calls) == 9: os.kill(os.getpid(), signal.SIGKILL)\n"
        "run_plan(plan_recipe(Path(sys.argv[1])), Path(sys.argv[2]), force=True, progress=kill)\n"
    )
    assert run_python("-c", script, str(mix), str(out)).returncode == -signal.SIGKILL
    after = listing(tmp_path)
    assert before.items() <= after.items()
    stage = {name.partition("/")[0] for name in after.keys() - before.keys()}
    assert len(stage) == 1 and re.fullmatch(STAGE, stage.pop())
    assert verify(build(mix, out, force=force)).differences == ()


# Sources that change


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def grow(path: Path) -> None:
    os.truncate(path, path.stat().st_size + 1)


def remove(path: Path) -> None:
    path.unlink()


def change_header(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data.replace(b"layers.0", b"layers.9", 1))


def become_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def touch(path: Path) -> None:
    os.utime(path, ns=(0, 0))


def rewrite(path: Path) -> None:
    """A value, in place."""
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")


SHARD = Path("int4") / "model-00001-of-00002.safetensors"


@pytest.mark.parametrize("change", [truncate, grow, remove, change_header, become_fifo, touch, rewrite])
def test_a_source_that_changed_since_the_plan(own_mix: Path, tmp_path: Path, change: Callable[[Path], None]) -> None:
    plan = plan_recipe(own_mix)
    path = own_mix.parent / SHARD
    change(path)
    messages: dict[object, str] = {
        remove: "cannot open it: No such file or directory",
        become_fifo: "not a regular file",
    }
    with pytest.raises(SourceError) as caught:
        run_plan(plan, tmp_path / "out")
    assert str(caught.value) == f"{path}: {messages.get(change, 'changed since it was planned; start again')}"
    assert [path.name for path in tmp_path.iterdir()] == ["own"]


def cut_short(path: Path) -> None:
    os.truncate(path, 5000)


@pytest.mark.parametrize("change", [cut_short, grow, touch, rewrite])
def test_a_source_that_changes_while_it_is_copied(
    own_mix: Path, tmp_path: Path, monkeypatch: Patch, change: Callable[[Path], None]
) -> None:
    path = own_mix.parent / SHARD
    done: list[int] = []

    def progress(nbytes: int) -> None:
        if not done:
            change(path)
        done.append(nbytes)

    plan = plan_recipe(own_mix)
    monkeypatch.setattr(copier, "_BUFFER", 10_000)
    with pytest.raises(SourceError) as caught:
        run_plan(plan, tmp_path / "out", jobs=1, progress=progress)
    expected = "ends inside model.layers." if change is cut_short else "changed while it was copied; start again"
    assert str(caught.value).startswith(f"{path}: {expected}")
    assert not (tmp_path / "out").exists()


def test_a_source_that_is_replaced_while_it_is_copied(own_mix: Path, tmp_path: Path) -> None:
    """By another file of its name: all that is copied is of the files that were planned with."""
    path = own_mix.parent / SHARD
    expected = tree(build(own_mix, tmp_path / "before"))

    def replaced(_: int) -> None:
        other = path.with_name("other")
        other.write_bytes(bytes(path.stat().st_size))
        other.replace(path)

    out = build(own_mix, tmp_path / "out", jobs=1, progress=replaced)
    assert tree(out) == expected


def test_no_file_stays_open(mix: Path, tmp_path: Path) -> None:
    before = set(Path("/proc/self/fd").iterdir())
    build(mix, tmp_path / "out")
    for function, nth in (("fsync", 1), ("fsync", 2), ("pwrite", 2), ("pwrite", 3), ("posix_fallocate", 1)):
        with Patch.context() as patch:
            Fault(patch, function, errno.EIO, nth)
            with pytest.raises(WriteError):
                build(mix, tmp_path / "fails")
        shutil.rmtree(tmp_path / ".fails.mixprec", ignore_errors=True)
    assert set(Path("/proc/self/fd").iterdir()) == before
