"""What is damaged or does not say the truth: found, named, cut again from what is whole."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.files import tree
from support.manifest import rewrite_manifest, sealed

from mixprec_build.checkpoint.degree import Degree
from mixprec_build.checkpoint.manifest import CHECKSUM, checksum_of, read_manifest
from mixprec_build.errors import MixprecError, SplitError, VerifyError
from mixprec_build.output.build import plan_recipe, run_plan
from mixprec_build.output.split import split
from mixprec_build.output.verify import verify
from mixprec_build.ranks.files import open_rank, read_rank

from .compiled import SMALL, built, compile_


def test_a_bit_that_flips_in_a_ranks_file_is_found(folder: Path, tmp_path: Path) -> None:
    """In values, zeros that were added and repeated heads, in headers and indexes: named, or refused."""
    out = Path(shutil.copytree(built(folder, "moe"), tmp_path / "out"))
    split(out, Degree(4), layout="presplit")
    draw = random.Random(0)
    for path in sorted(path for path in (out / "presplit").rglob("*") if path.is_file()):
        good = path.read_bytes()
        for _ in range(3):
            data = bytearray(good)
            at = draw.randrange(len(data))
            data[at] ^= 1 << draw.randrange(8)
            path.write_bytes(data)
            try:
                found = verify(out).differences
            except MixprecError as error:
                found = (str(error),)
            assert found and str(path.parent) in " ".join(found), f"{path} byte {at}"
        path.write_bytes(good)
    assert not verify(out).differences


def test_a_changed_value_is_named_and_not_restored(out: Path) -> None:
    split(out, Degree(2), layout="presplit")
    index = read_rank(out, read_manifest(out), Degree(2), 1)
    assert index is not None
    path = index.folder / "model-00001-of-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[open_rank(index)["lm_head.weight"].start] ^= 1
    path.write_bytes(data)
    found = verify(out).differences
    assert any(d.startswith("lm_head.weight in model-0000") for d in found), found
    assert any(d.startswith(f"lm_head.weight in {path}") for d in found), found
    with pytest.raises(VerifyError, match=r"lm_head\.weight: put together from the files of ranks it is not what was"):
        split(out, layout="both")
    assert not (out / read_manifest(out).tensors()["lm_head.weight"].file).exists()
    assert read_manifest(out).layout == "presplit"


def test_missing_ranks_are_named(out: Path) -> None:
    with pytest.raises(SplitError, match=r"of tp2-ep1 ranks 1 are missing"):
        split(out, Degree(2), layout="presplit", ranks=[0])
    assert not (out / "presplit").exists()
    split(out, Degree(2), layout="presplit")
    shutil.rmtree(out / "presplit/tp2-ep1/rank-1-of-2")
    for layout in ("both", "presplit"):
        with pytest.raises(VerifyError, match=r"rank-1-of-2/index\.json: cannot open it"):
            split(out, Degree(1), layout=layout)


def test_ranks_that_are_not_whole_keep_the_merged_files(out: Path) -> None:
    split(out, Degree(2))
    path = out / "presplit/tp2-ep1/rank-0-of-2/model-00001-of-00001.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(VerifyError, match="its bytes were changed: the merged files are kept; remove"):
        split(out, layout="presplit")
    assert len(list(out.glob("*.safetensors"))) == 3
    shutil.rmtree(path.parent)
    split(out, Degree(2), layout="presplit")
    assert path.read_bytes() == data and not verify(out).differences


def relist(out: Path, folder: str, index: Any) -> None:
    """Has the manifest vouch for an index."""
    data = json.dumps(index).encode()
    (out / folder / "index.json").write_bytes(data)

    def vouch(manifest: dict[str, Any]) -> None:
        entry = manifest["rest"] if folder == "presplit/rest" else manifest["presplit"][folder]
        entry[CHECKSUM] = checksum_of(data)

    rewrite_manifest(out, vouch)


@pytest.mark.parametrize("folder_", ["presplit/tp2-ep1/rank-0-of-2", "presplit/rest"])
@pytest.mark.parametrize("change", ["shape", "dtype", "file", "gone", "swapped"])
def test_an_index_of_other_pieces_is_refused(small: Path, out: Path, folder_: str, change: str) -> None:
    """Also one that the manifest vouches for."""
    split(out, Degree(2), layout="presplit")
    path = out / folder_ / "index.json"
    index = json.loads(path.read_text())
    name, other = list(index["parameters"])[:2]
    if change == "gone":
        del index["parameters"][name]
    elif change == "swapped":
        parameters = index["parameters"]
        parameters[name], parameters[other] = parameters[other], parameters[name]
    else:
        index["parameters"][name][change] = {
            "shape": [7, 3],
            "dtype": "F32",
            "file": "../rank-1-of-2/model.safetensors",
        }[change]
    relist(out, folder_, index)
    if change == "swapped":  # only their checksums, for they are of one shape: what is where nothing says but the cut
        assert any(f"{name} in {path.parent}" in difference for difference in verify(out).differences)
        split(out, layout="merged")
        assert tree(out) == tree(small)
        return
    for command in (verify, lambda out: split(out, layout="both")):
        with pytest.raises(MixprecError, match=folder_):
            command(out)
    assert read_manifest(out).layout == "presplit"


def test_a_manifest_of_other_layouts_is_refused(out: Path) -> None:
    split(out, Degree(2), layout="presplit")
    manifest = json.loads((out / "mixprec_manifest.json").read_text())
    entry = manifest["files"].pop("model-00001-of-00003.safetensors")
    for changes in (
        {"layout": "merged"},
        {"layout": 1},
        {"rest": None},
        {"files": {**manifest["files"], "../config.json": entry}},
        {"files": {**manifest["files"], "config.json": entry}},
    ):
        changed = {**manifest, **changes}
        (out / "mixprec_manifest.json").write_bytes(sealed(changed))
        with pytest.raises(VerifyError, match="damaged"):
            read_manifest(out)


# Ranks that are damaged


def change_index(rank: Path) -> None:
    path = rank / "index.json"
    path.write_bytes(path.read_bytes().replace(b'"BF16"', b'"F16"', 1))


def change_header(rank: Path) -> None:
    (path,) = rank.glob("*.safetensors")
    path.write_bytes(path.read_bytes().replace(b'"format":"pt"', b'"format":"qt"', 1))


def cut_short(rank: Path) -> None:
    (path,) = rank.glob("*.safetensors")
    os.truncate(path, path.stat().st_size - 1)


def change_value(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


DAMAGE = {
    "index changed": change_index,
    "index gone": lambda rank: (rank / "index.json").unlink(),
    "header changed": change_header,
    "file short": cut_short,
    "file gone": lambda rank: next(rank.glob("*.safetensors")).unlink(),
    "folder gone": shutil.rmtree,
}


@pytest.mark.parametrize("how", DAMAGE)
def test_damaged_ranks_are_cut_again(out: Path, how: str) -> None:
    """From the merged files; without them, from the ranks of another degree; without these, it is said."""
    damage, rank = DAMAGE[how], out / Degree(2).folder(1)
    split(out, Degree(2))
    due = tree(out)
    damage(rank)
    assert verify(out).differences
    with pytest.raises(SplitError, match="of tp2-ep1 ranks 1 are missing or damaged"):
        split(out, layout="presplit")
    split(out, Degree(2))
    assert tree(out) == due and not verify(out).differences

    split(out, Degree(1), layout="presplit")
    due = tree(out)
    damage(rank)
    split(out, Degree(2), layout="presplit")
    assert tree(out) == due and not verify(out).differences

    # The smaller degree is the one that merged files are put together from, where it is whole.
    damage(out / Degree(1).folder(0))
    split(out, Degree(1), layout="presplit")
    assert tree(out) == due

    damage(rank)
    damage(out / Degree(1).folder(0))
    with pytest.raises(
        VerifyError, match=r"presplit/tp.*merged files were dropped, and no degree has all its ranks: b"
    ):
        split(out, Degree(2), layout="presplit")


def test_a_changed_byte_is_mended_as_it_is_said(out: Path) -> None:
    """Remove the rank's folder, and split again."""
    split(out, Degree(2))
    split(out, Degree(1))
    due = tree(out)
    path = out / Degree(1).folder(0) / "model-00001-of-00001.safetensors"
    change_value(path)
    with pytest.raises(VerifyError, match=f"remove {path.parent} and split again for tp1-ep1"):
        split(out, layout="presplit")
    shutil.rmtree(path.parent)
    split(out, Degree(1))
    assert tree(out) == due
    split(out, layout="presplit")
    change_value(path)
    with pytest.raises(VerifyError, match="or remove its folder where all ranks of another degree are there"):
        split(out)
    shutil.rmtree(path.parent)
    split(out, Degree(1))
    assert tree(out) == due


def test_a_finished_rank_whose_header_was_changed_is_not_taken_over(out: Path) -> None:
    manifest = out / "mixprec_manifest.json"
    before = manifest.read_bytes()
    split(out, Degree(2))
    due = tree(out)
    manifest.write_bytes(before)  # as a split that was stopped leaves it
    change_header(out / Degree(2).folder(0))
    split(out, Degree(2))
    assert tree(out) == due


def test_progress_counts_what_is_cut_as_well(tmp_path: Path) -> None:
    compile_(tmp_path, SMALL, {"*.mlp.*": "fp8_block"}, output="output: {tp: [1, 2], layout: presplit}")
    plan, done = plan_recipe(tmp_path / "out.yaml"), list[int]()
    run_plan(plan, tmp_path / "again", progress=done.append)
    assert len(plan.presplit) == 2 and sum(done) == plan.written_bytes > 2 * plan.tensor_bytes
