"""What is written: bytes equal to their sources', aligned, in files no larger than asked."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from support.files import file_tensors, folder_tensors, tree
from support.llama import write_recipe, write_tiny

from mixprec_build.output import copier
from mixprec_build.output.verify import verify
from mixprec_build.planning.shards import _aligned
from mixprec_build.planning.types import PlannedShard, PlannedTensor
from mixprec_build.storage.dtypes import DTYPE_BITS
from mixprec_build.storage.header import TensorInfo, parse_header

from .steps import INDEX, MIB, Patch, build, one_source


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
