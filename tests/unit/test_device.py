"""Errors measured by torch are numpy's, for every format, whatever is read and compared at a time.

torch computes on its CPU here, and on a GPU as well where there is one.
"""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from dataclasses import astuple
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.gpt_oss import tensors as gpt_oss_tensors
from support.gpt_oss import write as write_gpt_oss
from support.llama import write_recipe, write_sources
from support.quantized import VARIANTS, write_linears
from support.run import Run
from support.toy_format import Toy, write_toy

from mixprec_build.checkpoint.typed import Source, open_source
from mixprec_build.errors import DeviceError, SourceError
from mixprec_build.formats.registry import FORMATS, with_format
from mixprec_build.suggesting import device
from mixprec_build.suggesting.comparing import Comparer
from mixprec_build.suggesting.device import TorchComparer
from mixprec_build.suggesting.distortion import Distortion, DistortionCache, Moments, comparer_on, measure

DEVICES = ["cpu", *["cuda"] * torch.cuda.is_available()]
QUANTIZED = [variant for variant in VARIANTS if variant != "BF16"]
OUTPUTS, INPUTS = 320, 384  # the last block of scales has half of its rows
MODULES = {f"model.layers.{layer}.mlp.down_proj": (OUTPUTS, INPUTS) for layer in range(2)}
(MODULE, _) = MODULES

Found = dict[tuple[str, str], Distortion]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every variant of two modules, and moments of their inputs."""
    folder, random = tmp_path_factory.mktemp("variants"), torch.Generator().manual_seed(0)
    weights = {name: (torch.randn(shape, generator=random) * 0.05).bfloat16() for name, shape in MODULES.items()}
    for variant in VARIANTS:
        write_linears(folder / variant, variant, weights)
    m = {name: torch.rand(INPUTS, dtype=torch.float64, generator=random) + 0.1 for name in MODULES}
    save_file(m, folder / "moments.safetensors")
    return folder


def opened(folder: Path, variant: str) -> Source:
    return Source.of(variant, open_source(str(folder / variant)).checkpoint)


def measured(comparer: Comparer, reference: Source, *others: Source, moments: Moments | None = None) -> Found:
    with DistortionCache(None) as cache:
        names = [name for name in reference.checkpoint.modules if name in others[0].checkpoint.modules]
        linears = [name for name in names if name.endswith("_proj")]
        found = measure(dict.fromkeys(linears, (reference, others)), cache, moments=moments, comparer=lambda: comparer)
    assert len(found) == len(linears) * len(others) > 0
    return found


def assert_alike(ours: Found, theirs: Found) -> None:
    assert ours.keys() == theirs.keys()
    for key, one in theirs.items():
        mine, due = ([value or 0.0 for value in astuple(each)] for each in (ours[key], one))
        assert mine == pytest.approx(due, rel=1e-6, abs=0), key


def test_every_format_computes_on_a_device() -> None:
    assert all(fmt.portable for fmt in FORMATS)


@pytest.mark.parametrize("place", DEVICES)
@pytest.mark.parametrize("rows", [8, 32, 200, 1 << 20])
@pytest.mark.parametrize("variant", QUANTIZED)
def test_errors_are_those_of_numpy(folder: Path, variant: str, rows: int, place: str) -> None:
    """Whether a part of a block of scales is compared at a time, some blocks or all."""
    compares = TorchComparer(place)
    compares.chunk = rows * INPUTS
    sources, moments = [opened(folder, "BF16"), opened(folder, variant)], Moments(folder / "moments.safetensors")
    assert_alike(measured(compares, *sources, moments=moments), measured(Comparer(), *sources, moments=moments))


@pytest.mark.parametrize("place", DEVICES)
def test_sources_are_compared_with_any_reference_at_once(folder: Path, place: str) -> None:
    sources = [opened(folder, variant) for variant in ("NVFP4", *VARIANTS) if variant != "NVFP4"]
    for reference in (opened(folder, "FP8, blocks"), opened(folder, "GPTQ, 8 bit")):
        assert_alike(measured(TorchComparer(place), reference, *sources), measured(Comparer(), reference, *sources))


@pytest.mark.parametrize("place", DEVICES)
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 3e33])
def test_squares_beyond_float32_are_added_too(tmp_path: Path, scale: float, place: str) -> None:
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(OUTPUTS, INPUTS, generator=random) * scale
    for name, stored in {"a": weight, "b": weight * (1 + 2**-9)}.items():
        write_linears(tmp_path / name, "FP32", {MODULE: stored})
    sources = opened(tmp_path, "a"), opened(tmp_path, "b")
    ours = measured(TorchComparer(place), *sources)
    assert_alike(ours, measured(Comparer(), *sources))
    assert 0 < ours[MODULE, "b"].error < ours[MODULE, "b"].power


@pytest.mark.parametrize("place", DEVICES)
@pytest.mark.parametrize("piece", [1, 100, 4096])
def test_tensors_are_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int, place: str) -> None:
    """Those that lie scattered in stacked experts too, of which a reader takes whole rows."""
    monkeypatch.setattr(device, "_PIECE", piece)
    source = open_source(str(write_gpt_oss(tmp_path / "release", gpt_oss_tensors())))
    scattered, compares = 0, TorchComparer(place)
    with source.checkpoint.storage.reader() as reader:
        for module in source.checkpoint.modules.values():
            for tensor in module.tensors.values():
                scattered += not tensor.contiguous
                read = compares.read(tensor, reader, 0).cpu()
                assert tuple(read.shape) == tensor.shape
                assert read.flatten().view(torch.uint8).numpy().tobytes() == reader.array(tensor).tobytes()
    assert scattered


def spoiled(folder: Path, out: Path, variant: str, leaf: str, value: float) -> Source:
    """A source with one element of a tensor changed."""
    (out / variant).mkdir(parents=True)
    (out / variant / "config.json").write_bytes((folder / variant / "config.json").read_bytes())
    tensors = load_file(folder / variant / "model.safetensors")
    tensors[f"{MODULE}.{leaf}"].view(-1)[5] = value
    save_file(tensors, out / variant / "model.safetensors")
    return opened(out, variant)


@pytest.mark.parametrize(
    ("variant", "leaf", "value"),
    [
        ("FP16", "weight", np.nan),
        ("FP32", "weight", -np.inf),
        ("FP32", "weight", 3e38),
        ("FP8, channels", "weight", np.nan),
        ("FP8, channels", "weight_scale", np.inf),
        ("FP8, blocks, powers of two", "weight_scale_inv", np.nan),
        ("GPTQ", "scales", np.nan),
        ("AWQ", "scales", np.inf),
        ("compressed-tensors Int4", "weight_scale", np.nan),
        ("NVFP4", "weight_scale", np.nan),
        ("GPTQ, act-order", "g_idx", 3),
        ("GPTQ, act-order", "g_idx", -4),
        ("compressed-tensors Int4, act-order", "weight_g_idx", 1 << 30),
        ("GPTQ, act-order", "g_idx", -1),
    ],
)
@pytest.mark.parametrize("place", DEVICES)
def test_values_that_are_none_are_refused_as_by_numpy(
    folder: Path, tmp_path: Path, variant: str, leaf: str, value: float, place: str
) -> None:
    source, reference = spoiled(folder, tmp_path, variant, leaf, value), opened(folder, "BF16")

    def outcome(comparer: Comparer) -> Found | str:
        try:
            return measured(comparer, reference, source)
        except SourceError as error:
            return str(error)

    ours, theirs = outcome(TorchComparer(place)), outcome(Comparer())
    if isinstance(theirs, str):
        assert ours == theirs
        assert MODULE in theirs and variant in theirs
    else:
        assert value in (-1, 3e38)  # numpy counts from the end; and a weight may be large
        assert not isinstance(ours, str)
        assert_alike(ours, theirs)


@pytest.mark.parametrize("place", DEVICES)
def test_shapes_that_differ_are_refused(folder: Path, tmp_path: Path, place: str) -> None:
    write_linears(tmp_path / "GPTQ", "GPTQ", {MODULE: torch.randn(OUTPUTS, INPUTS + 128)})
    with pytest.raises(SourceError, match=rf"{MODULE}: \[320, 512\], but \[320, 384\] in .*BF16"):
        measured(TorchComparer(place), opened(folder, "BF16"), opened(tmp_path, "GPTQ"))


@pytest.mark.parametrize("comparer", [Comparer, *(partial(TorchComparer, place) for place in DEVICES)])
@pytest.mark.parametrize("shape", [(0, 128), (128, 0)])
def test_a_weight_without_values_has_no_error(tmp_path: Path, shape: tuple[int, int], comparer: Any) -> None:
    for variant in ("BF16", "FP16"):
        write_linears(tmp_path / variant, variant, {MODULE: torch.empty(shape)})
    found = measured(comparer(), opened(tmp_path, "BF16"), opened(tmp_path, "FP16"))
    assert found == {(MODULE, "FP16"): Distortion(0.0, 0.0)}


@pytest.mark.parametrize("place", DEVICES)
def test_a_format_that_knows_numpy_alone(tmp_path: Path, place: str) -> None:
    with with_format(Toy):
        write_sources(tmp_path)
        write_toy(tmp_path / "bf16", tmp_path / "toy")
        sources = opened(tmp_path, "bf16"), opened(tmp_path, "toy"), opened(tmp_path, "int4")
        assert {fmt.portable for fmt in sources[1].distinct_formats if fmt.quantized} == {False}
        assert_alike(measured(TorchComparer(place), *sources), measured(Comparer(), *sources))


@pytest.mark.parametrize("place", DEVICES)
def test_numpy_compares_what_a_gpu_has_no_room_for(folder: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    def full(*_: Any) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    compares, sources = TorchComparer(place), (opened(folder, "BF16"), opened(folder, "GPTQ"))
    monkeypatch.setattr(compares, "sums_of_squares", full)
    assert measured(compares, *sources) == measured(Comparer(), *sources)


@pytest.mark.parametrize("place", DEVICES)
def test_either_knows_what_the_other_measured(folder: Path, tmp_path: Path, place: str) -> None:
    pairs = {MODULE: (opened(folder, "BF16"), [opened(folder, "AWQ")])}
    for first in (Comparer, lambda: TorchComparer(place)):
        kept = tmp_path / f"{first!r:.9}.jsonl"
        with DistortionCache(kept) as cache:
            found = measure(pairs, cache, comparer=first)
        with DistortionCache(kept) as cache:
            assert measure(pairs, cache, comparer=lambda: pytest.fail("compared again")) == found


def test_a_device_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert type(comparer_on("cpu")) is Comparer
    monkeypatch.setattr(device, "why_unusable", lambda: None)
    assert type(comparer_on("auto")) is type(comparer_on("cuda")) is TorchComparer
    monkeypatch.setattr(device, "why_unusable", lambda: "torch 1.0 finds no GPU")
    assert type(comparer_on("auto")) is Comparer
    with pytest.raises(DeviceError, match=r"--device cuda: torch 1.0 finds no GPU; see .*, or take --device cpu"):
        comparer_on("cuda")


def test_a_gpu_that_others_have_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise RuntimeError("CUDA error: out of memory\nmore lines")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "zeros", full)
    assert device.why_unusable() == "torch cannot use the GPU (CUDA error: out of memory)"


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None
from mixprec_build.__main__ import main
sys.exit(main())
"""


@pytest.mark.parametrize("place", ["auto", "cpu", "cuda"])
def test_without_torch(tmp_path: Path, place: str) -> None:
    write_sources(tmp_path)
    base, out = write_recipe(tmp_path / "base.yaml"), tmp_path / "out.yaml"
    arguments = ["suggest", base, "--budget", "1GB", "-o", out, "--errors", tmp_path / "errors", "--device", place]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *map(str, arguments)], capture_output=True, text=True, cwd=tmp_path
    )
    if place == "cuda":
        assert done.returncode == 1 and not out.exists()
        assert "--device cuda: torch cannot be imported (" in done.stderr
        assert "; pip install -U torch, or take --device cpu" in done.stderr
    else:
        assert done.returncode == 0, done.stderr
        assert out.exists()


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mixprec: Run) -> None:
    write_sources(tmp_path)
    base = write_recipe(tmp_path / "base.yaml")
    asked: list[str] = []

    def comparer(place: str) -> Comparer:
        asked.append(place)
        return TorchComparer("cpu") if place == "cuda" else comparer_on(place)

    monkeypatch.setattr("mixprec_build.suggesting.allocate.comparer_on", comparer)
    losses = []
    for number, options in enumerate([[], ["--device", "cpu"], ["--device", "cuda"], ["--device", "cuda"]]):
        kept = tmp_path / f"errors-{min(number, 2)}"
        arguments = ["--budget", "1GB", "-o", tmp_path / f"{number}.yaml", "--errors", kept, "--json", *options]
        done = mixprec("suggest", base, *arguments)
        assert done.code == 0, done.err
        losses.append(json.loads(done.out)["loss"])
    assert asked == ["auto", "cpu", "cuda", "cuda", "cuda"]  # looked for at once; the last had nothing to measure
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-6)
    assert mixprec("suggest", base, "--budget", "1GB", "-o", "x.yaml", "--device", "tpu").code == 2


def test_the_benchmark_compares_with_numpy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    errors = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "errors.py"))
    size = ["--gigabytes", "0.001", "--hidden", "256", "--intermediate", "128", "--rounds", "1"]
    arguments = ["--device", "cpu", "--folder", str(tmp_path / "errors"), *size, "--formats", "GPTQ", "NVFP4"]
    monkeypatch.setattr(sys, "argv", ["errors.py", *arguments])
    errors["main"]()
    head, reading, *lines = capsys.readouterr().out.splitlines()
    assert "16 modules of 128 x 256" in head and reading.startswith("reading alone: ")
    assert [line.split()[0] for line in lines] == ["GPTQ", "NVFP4"]
    assert all("GB/s numpy" in line and line.endswith(" apart") for line in lines)
    assert not (tmp_path / "errors").exists()
    monkeypatch.setattr(TorchComparer, "sums_of_squares", lambda _, values: values.double().square_().sum(0) * 1.001)
    with pytest.raises(SystemExit, match="errors differ by more than a millionth"):
        errors["main"]()
