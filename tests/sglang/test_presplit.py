"""What a rank's own files hold is, bit for bit, what SGLang's loading of the merged files leaves in its parameters."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import load, make, rank_of, serve
from mixes import EIGHT, MIXES, mix
from safetensors.torch import load_file

from mixprec_build.manifest import read_manifest
from mixprec_build.presplit import Degree
from mixprec_build.split import split

pytestmark = pytest.mark.usefixtures("sglang")

DEGREES = [Degree(2), Degree(4), Degree(2, 2), Degree(4, 2)]


CASES = [(name, degree) for name in MIXES for degree in DEGREES if degree.ep == 1 or MIXES[name][0].experts]
CASES += [(name, Degree(tp)) for name in EIGHT for tp in (2, 8)] + [("qwen3_moe_8", Degree(8, ep)) for ep in (4, 8)]


@pytest.mark.parametrize(("name", "degree"), CASES, ids=[f"{name}-{degree}" for name, degree in CASES])
def test_a_ranks_files_hold_what_sglang_would_load(folder: Path, tmp_path: Path, name: str, degree: Degree) -> None:
    merged = mix(folder, name)
    out = shutil.copytree(merged, tmp_path / "out")
    for rank, files in enumerate(split(out, degree)):
        with rank_of(rank, degree.tp, degree.ep):
            due = parameters(serve(merged))
        held = tensors(files)
        assert held.keys() == due.keys()
        for parameter, tensor in due.items():
            assert held[parameter].shape == tensor.shape, parameter
            same = held[parameter].to(tensor.dtype)
            assert torch.equal(bits(same), bits(tensor)), f"rank {rank}: {parameter}"


@pytest.mark.parametrize(
    ("name", "degree"), [("qwen3_moe", Degree(4, 2)), ("deepseek", Degree(2)), ("mixtral", Degree(2))]
)
def test_a_rank_serves_its_own_files(folder: Path, tmp_path: Path, name: str, degree: Degree) -> None:
    """And reads no others: the merged ones are gone."""
    out = shutil.copytree(mix(folder, name), tmp_path / "out")
    split(out, degree)
    dues = []
    for rank in range(degree.tp):
        with rank_of(rank, degree.tp, degree.ep):
            dues.append(parameters(serve(mix(folder, name))))
    split(out, layout="presplit")
    for rank, due in enumerate(dues):
        with rank_of(rank, degree.tp, degree.ep):
            held = parameters(serve(out))
        assert held.keys() == due.keys()
        assert all(torch.equal(bits(held[name]), bits(due[name])) for name in due)


def test_a_run_that_no_files_are_for_is_told_which_there_are(folder: Path, tmp_path: Path) -> None:
    out = shutil.copytree(mix(folder, "qwen3"), tmp_path / "out")
    split(out, Degree(4), ranks=[0])
    split(out, Degree(2), layout="presplit")
    with rank_of(1, 4), pytest.raises(RuntimeError) as raised:
        make(out)
    assert "this run is tp4-ep1; it has files cut for tp2-ep1, tp4-ep1" in str(raised.value)
    assert f"restore the merged files with `mixprec split {out} --layout both`" in str(raised.value)
    with rank_of(0, 4):
        make(out)


def test_files_for_layers_made_in_another_way_are_not_read(folder: Path, tmp_path: Path, caplog: Any) -> None:
    """Then the merged ones are, and the log says why; without them the server stops."""
    out = shutil.copytree(mix(folder, "qwen3"), tmp_path / "out")
    split(out, Degree(2))
    due = parameters(serve(mix(folder, "qwen3")))
    with rank_of(0, 2):
        model, config = make(out)
    (name, parameter), *_ = model.named_parameters()
    parameter.data = parameter.data[:-1]
    reason = f"{name} is "
    with rank_of(0, 2), pytest.raises(Exception, match="size"):
        load(model, config)  # SGLang's own loader, which does not fit either
    assert reason in caplog.text and due
    with rank_of(0, 2):
        model, config = make(out)
        split(out, layout="presplit")
        next(model.parameters()).data = parameter.data
        with pytest.raises(RuntimeError, match=r"are not for this run \(.* in SGLang\)"):
            load(model, config)


def test_a_rank_reads_its_own_bytes_once(folder: Path, tmp_path: Path) -> None:
    """As the kernel counts what this process reads, page cache included."""
    out = shutil.copytree(mix(folder, "qwen3_moe"), tmp_path / "out")
    split(out, Degree(2))
    for rank in range(2):
        with rank_of(rank, 2):
            model, config = make(out)
            before = read_so_far()
            load(model, config)
            read = read_so_far() - before
        listed = read_manifest(out)["presplit"][Degree(2).folder(rank)]["bytes"]
        assert listed <= read <= 1.02 * listed


def read_so_far() -> int:
    return int(Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])


def parameters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.data for n, p in model.named_parameters() if p.numel() and "sort_indices" not in n}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8) if tensor.dim() else tensor
