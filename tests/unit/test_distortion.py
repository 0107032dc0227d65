"""What is measured, against torch; what is kept of it; and what it takes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import formats
from support.llama import write_sources, write_tiny
from support.quantized import VARIANTS, write_linears

from mixprec_build.checkpoint.typed import Source, open_source
from mixprec_build.errors import SourceError
from mixprec_build.formats.floats import to_float32
from mixprec_build.suggesting import distortion
from mixprec_build.suggesting.comparing import Comparer
from mixprec_build.suggesting.distortion import Distortion, DistortionCache, Moments, measure

MODULE = "model.layers.0.mlp.down_proj"


def opened(folder: Path, **changes: Any) -> dict[str, Source]:
    paths = write_sources(folder, **changes)
    sources = {name: open_source(str(path)) for name, path in paths.items()}
    return {name: Source.of(name, source.checkpoint) for name, source in sources.items()}


def dense(folder: Path, variant: str, module: str = MODULE) -> torch.Tensor:
    """The weight that a source stands for, by torch."""
    tensors = {n: t for path in (folder / variant).glob("*.safetensors") for n, t in load_file(path).items()}
    if variant == "int4":
        words, scales, group = (tensors[f"{module}.{leaf}"] for leaf in ("qweight", "scales", "g_idx"))
        codes = (words[:, None] >> torch.arange(0, 32, 4)[None, :, None]) & 15
        return ((codes.reshape(len(group), -1) - 8) * scales.float()[group.long()]).t()
    weight = tensors[f"{module}.weight"].float()
    return weight * tensors[f"{module}.weight_scale_inv"] if variant == "fp8" else weight


@pytest.mark.parametrize("chunk", [1, 128 * 40, 1 << 21])
def test_errors_are_those_of_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(Comparer, "chunk", chunk)  # a few rows at a time, and all at once
    sources = opened(tmp_path)
    m = torch.rand(128, dtype=torch.float64) + 0.1
    save_file({f"{MODULE}.weight": m}, tmp_path / "moments.safetensors")
    with DistortionCache(None) as cache:
        found = measure(
            {MODULE: (sources["bf16"], [sources["fp8"], sources["int4"]])},
            cache,
            moments=Moments(tmp_path / "moments.safetensors"),
        )
    weight = dense(tmp_path, "bf16").double()
    for name in ("fp8", "int4"):
        delta = dense(tmp_path, name).double() - weight
        one = found[MODULE, name]
        assert one.error == pytest.approx(delta.square().sum().item(), rel=1e-5)
        assert one.power == pytest.approx(weight.square().sum().item(), rel=1e-5)
        assert one.output_error == pytest.approx((delta.square() @ m).sum().item(), rel=1e-5)
        assert one.output_power == pytest.approx((weight.square() @ m).sum().item(), rel=1e-5)


def plain(variant: str, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """The weight in float64 from tensors by leaf, as the layout's documentation says it."""
    if variant == "GPTQ, zero points":
        at, group = torch.arange(0, 32, 4), tensors["g_idx"].long()
        codes = (tensors["qweight"][:, None] >> at[:, None] & 15).flatten(0, 1)
        zeros = (tensors["qzeros"][..., None] >> at & 15).flatten(1) + 1 & 15
        return ((codes - zeros[group]).double() * tensors["scales"].double()[group]).t()
    return formats.dequantize(tensors).double()


@pytest.mark.parametrize("rows", [8, 32, 200, None])
@pytest.mark.parametrize("variant", [variant for variant in VARIANTS if variant != "BF16"])
def test_errors_of_every_format_are_those_of_plain_arithmetic(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: str, rows: int | None
) -> None:
    """Whether a part of a block of scales is compared at a time, some blocks or all."""
    outputs, inputs = 320, 384  # the last block of scales has half of its rows
    if rows is not None:
        monkeypatch.setattr(Comparer, "chunk", rows * inputs)
    random = torch.Generator().manual_seed(0)
    weight = (torch.randn(outputs, inputs, generator=random) * 0.05).bfloat16()
    for each in ("BF16", variant):
        stored = write_linears(tmp_path / each, each, {MODULE: weight})
    m = torch.rand(inputs, dtype=torch.float64, generator=random) + 0.1
    save_file({MODULE: m}, tmp_path / "moments.safetensors")
    reference, source = (Source.of(n, open_source(str(tmp_path / n)).checkpoint) for n in ("BF16", variant))
    moments = Moments(tmp_path / "moments.safetensors")
    with DistortionCache(None) as cache:
        (one,) = measure({MODULE: (reference, [source])}, cache, moments=moments).values()
    exact = weight.double()
    delta = plain(variant, {name.rpartition(".")[2]: tensor for name, tensor in stored.items()}) - exact
    due = [delta.square().sum(), exact.square().sum(), (delta.square() @ m).sum(), (exact.square() @ m).sum()]
    found = [one.error, one.power, one.output_error, one.output_power]
    assert found == pytest.approx([value.item() for value in due], rel=1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1e-15, 1.0, 1e15, 1e30])
def test_squares_beyond_float32_are_added_too(scale: float) -> None:
    values = np.random.default_rng(0).standard_normal((300, 40)).astype(np.float32) * np.float32(scale)
    due = np.square(values.astype(np.float64)).sum(axis=0)
    np.testing.assert_allclose(Comparer().sums_of_squares(values), due, rtol=1e-6)


def test_the_error_of_outputs_is_that_of_real_inputs(tmp_path: Path) -> None:
    """With inputs that have the moments and no correlation, E‖Δx‖² is what the moments say."""
    sources = opened(tmp_path)
    x = torch.randn(200_000, 128, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 3, 128)
    save_file({MODULE: x.square().mean(0)}, tmp_path / "m.safetensors")
    with DistortionCache(None) as cache:
        (one,) = measure(
            {MODULE: (sources["bf16"], [sources["int4"]])}, cache, moments=Moments(tmp_path / "m.safetensors")
        ).values()
    delta = dense(tmp_path, "int4") - dense(tmp_path, "bf16")
    assert one.output_error == pytest.approx((x @ delta.t()).square().sum(1).mean().item(), rel=0.05)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2])
def test_casts_are_those_of_ml_dtypes(dtype: Any) -> None:
    size = np.dtype(dtype).itemsize
    values = np.arange(1 << 8 * size, dtype=f"u{size}").view(dtype)
    with np.errstate(invalid="ignore"):  # some are no numbers
        np.testing.assert_array_equal(to_float32(values), values.astype(np.float32))


def test_nothing_is_measured_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = opened(tmp_path)
    pairs = {MODULE: (sources["bf16"], [sources["fp8"], sources["int4"]])}
    kept = tmp_path / "kept.jsonl"
    with DistortionCache(kept) as cache:
        first = measure(pairs, cache)
    monkeypatch.setattr(distortion, "_distortions", lambda *_: pytest.fail("measured again"))
    done: list[int] = []
    with DistortionCache(kept) as cache:
        assert measure(pairs, cache, progress=done.append) == first
    assert sum(done) == sum(s.checkpoint.modules[MODULE].nbytes for s in pairs[MODULE][1])


def test_a_changed_file_is_measured_again(tmp_path: Path) -> None:
    kept = tmp_path / "kept.jsonl"
    sources = opened(tmp_path)
    with DistortionCache(kept) as cache:
        (before,) = measure({MODULE: (sources["bf16"], [sources["int4"]])}, cache).values()
    for path in (tmp_path / "int4").glob("*.safetensors"):
        path.unlink()
    (tmp_path / "int4" / "model.safetensors.index.json").unlink()
    write_tiny(tmp_path / "other", "int4", seed=1)
    for path in (tmp_path / "other").iterdir():
        path.rename(tmp_path / "int4" / path.name)
    again = Source.of("int4", open_source(str(tmp_path / "int4")).checkpoint)
    with DistortionCache(kept) as cache:
        (after,) = measure({MODULE: (sources["bf16"], [again])}, cache).values()
    assert after.error > 2 * before.error


def test_a_torn_line_costs_that_line_only(tmp_path: Path) -> None:
    kept = tmp_path / "kept.jsonl"
    with DistortionCache(kept) as cache:
        cache.put("a", Distortion(1.0, 2.0))
        cache.put("b", Distortion(3.0, 4.0, 5.0, 6.0))
    whole = kept.read_bytes()
    kept.write_bytes(whole[:-10])
    with DistortionCache(kept) as cache:
        assert cache.get("a") == Distortion(1.0, 2.0)
        assert cache.get("b") is None
        cache.put("b", Distortion(3.0, 4.0, 5.0, 6.0))
    with DistortionCache(kept) as cache:
        assert cache.get("b") == Distortion(3.0, 4.0, 5.0, 6.0)


SLOW = """
import sys, time
from pathlib import Path
from mixprec_build.formats.floats import to_float32
from mixprec_build.suggesting import distortion
from mixprec_build.suggesting.comparing import Comparer
from mixprec_build.suggesting.distortion import DistortionCache, measure
from mixprec_build.checkpoint.typed import Source, open_source

folder = Path(sys.argv[1])
a, b = (Source.of(n, open_source(str(folder / n)).checkpoint) for n in ("bf16", "int4"))
work = distortion._distortions
def slowly(*arguments):
    time.sleep(0.2)
    return work(*arguments)
distortion._distortions = slowly
names = [n for n in a.checkpoint.modules if n.endswith("_proj")]
with DistortionCache(folder / "kept.jsonl") as cache:
    measure({n: (a, [b]) for n in names}, cache, jobs=1)
"""


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    sources = opened(tmp_path)
    kept = tmp_path / "kept.jsonl"
    process = subprocess.Popen([sys.executable, "-c", SLOW, str(tmp_path)])
    end = time.monotonic() + 60
    while not (kept.exists() and kept.read_bytes().count(b"\n") >= 3):
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = kept.read_bytes().count(b"\n")
    names = [n for n in sources["bf16"].checkpoint.modules if n.endswith("_proj")]
    assert 3 <= before < len(names)
    with DistortionCache(kept) as cache:
        found = measure({n: (sources["bf16"], [sources["int4"]]) for n in names}, cache)
    assert len(found) == kept.read_bytes().count(b"\n") == len(names)
    assert len({json.loads(line)["key"] for line in kept.read_text().splitlines()}) == len(names)


def test_memory_is_bounded_by_what_is_read(tmp_path: Path) -> None:
    """A module of 128 MiB in BF16 takes what is stored, 192 MiB with FP8's, and not many times its size."""
    weight = torch.randn(8192, 8192).bfloat16()
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    for variant in ("bf16", "fp8"):
        folder = tmp_path / variant
        folder.mkdir()
        tensors = {f"{MODULE}.weight": weight}
        if variant == "fp8":
            tensors = {
                f"{MODULE}.weight": weight.to(torch.float8_e4m3fn),
                f"{MODULE}.weight_scale_inv": torch.ones(64, 64),
            }
            config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}  # type: ignore[assignment]
        save_file(tensors, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(config))
    code = (
        "import resource, sys; from pathlib import Path\n"
        "from mixprec_build.suggesting.distortion import DistortionCache, measure\n"
        "from mixprec_build.checkpoint.typed import open_source\n"
        "a, b = (open_source(str(Path(sys.argv[1]) / n)) for n in ('bf16', 'fp8'))\n"
        "import numpy, ml_dtypes\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        f"found = measure({{'{MODULE}': (a, [b])}}, DistortionCache(None))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert int(done.stdout) * 1024 < 320 << 20


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, f"has no moments of {MODULE}; it needs a tensor of that name for every module with a choice"),
        ({MODULE: torch.ones(64)}, rf"{MODULE} is \[64\], the module has 128 inputs"),
        ({MODULE: -torch.ones(128)}, f"{MODULE} has values that are negative or no numbers"),
        ({MODULE: torch.full((128,), torch.nan)}, f"{MODULE} has values that are negative or no numbers"),
    ],
)
def test_moments_that_do_not_fit(tmp_path: Path, tensors: dict[str, torch.Tensor], message: str) -> None:
    sources = opened(tmp_path)
    save_file(tensors, tmp_path / "m.safetensors")
    with DistortionCache(None) as cache, pytest.raises(SourceError, match=message):
        measure({MODULE: (sources["bf16"], [sources["fp8"]])}, cache, moments=Moments(tmp_path / "m.safetensors"))


def test_a_weight_that_is_no_number(tmp_path: Path) -> None:
    sources = opened(tmp_path)
    for path in (tmp_path / "int4").glob("*.safetensors"):
        tensors = load_file(path)
        if f"{MODULE}.scales" in tensors:
            tensors[f"{MODULE}.scales"][0, 3] = torch.nan
            save_file(tensors, path, metadata={"format": "pt"})
    again = Source.of("int4", open_source(str(tmp_path / "int4")).checkpoint)
    with DistortionCache(None) as cache, pytest.raises(SourceError, match=f"{MODULE} has weights that are infinite"):
        measure({MODULE: (sources["bf16"], [again])}, cache)


def test_a_cache_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"cannot keep errors there: .*; name a file with --errors"):
        DistortionCache(tmp_path)
