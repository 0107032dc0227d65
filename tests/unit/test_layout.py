"""A checkpoint of its ranks' files alone: whole, checked, and merged again byte for byte."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from support.cut_models import LINES, MOE, SIZES
from support.files import tree
from support.manifest import rewrite_manifest, sealed
from support.run import call, run_python
from support.serving import DEEPSEEK, LLAMA, MIXTRAL, Shape, write_sources

from mixprec_build.checkpoint.degree import Degree
from mixprec_build.checkpoint.manifest import (
    CHECKSUM,
    checksum_of,
    read_manifest,
)
from mixprec_build.errors import (
    InterruptedBuildError,
    MixprecError,
    OutputError,
    RecipeError,
    SourceError,
    SplitError,
    VerifyError,
    WriteError,
)
from mixprec_build.output.build import plan_recipe, run_plan
from mixprec_build.output.split import split
from mixprec_build.output.verify import verify
from mixprec_build.ranks.files import open_rank, read_rank
from mixprec_build.report.doctor import examine

SMALL = LLAMA.of(layers=3, hidden=128, intermediate=256, heads=2, kv_heads=2, head_dim=64, vocab=4096)


def compile_(folder: Path, shape: Shape, lines: dict[str, str], *, name: str = "out", output: str = "") -> Path:
    home, variants = folder / "sources", sorted({"bf16", *lines.values()})
    write_sources(home, shape, variants, skip=["*.kv_b_proj"])
    text = [f"model: {home / 'bf16'}", "sources:", *(f"  from_{v}: {home / v}" for v in variants)]
    text += ["default: from_bf16"]
    text += ["weights:", *(f"  '{pattern}': from_{variant}" for pattern, variant in lines.items()), output]
    recipe = folder / f"{name}.yaml"
    recipe.write_text("\n".join(text))
    run_plan(plan_recipe(recipe, allow_unservable=True), folder / name)
    return folder / name


DENSE = LLAMA.of(**SIZES, layers=5, vocab=100)
DENSE_LINES = {
    f"model.layers.{layer}.{part}": variant
    for layer, variants in enumerate(
        [
            ("fp8_block", "fp8_channel", "fp8_tensor", "gptq_int8"),
            ("gptq_int4_act", "gptq_int4", "gptq_int4_g64", "awq_int4"),
            ("ct_int4", "ct_int4_act", "ct_int4_asym", "ct_int4_g32"),
            ("ct_fp8_block", "ct_fp8_weight", "ct_int8", "int8_channel"),
            ("int8_block", "gptq_int4_act", "bf16", "fp8_block"),
        ]
    )
    for part, variant in zip(
        ("self_attn.{q,k,v}_proj", "self_attn.o_proj", "mlp.{gate,up}_proj", "mlp.down_proj"), variants, strict=True
    )
}
MOE_LINES = {
    **LINES,
    "model.layers.1.mlp.experts.{0,2}.*": "awq_int4",
    "model.layers.1.mlp.experts.3.*": "ct_int4",
    "model.layers.1.mlp.experts.4.*": "ct_int8",
    "model.layers.1.mlp.experts.5.*": "ct_fp8_block",
    "model.layers.1.mlp.experts.7.*": "int8_channel",
    "model.layers.1.mlp.experts.{4,6}.down_proj": "fp8_block",
}
# 384 columns for two ranks, and two key-value heads for four: zeros are added, heads repeated.
MODELS = {
    "dense": (DENSE, DENSE_LINES, [Degree(2), Degree(4)]),
    "moe": (MOE, MOE_LINES, [Degree(4, 2), Degree(2, 1, 2)]),
    "mixtral": (
        MIXTRAL.of(**{**SIZES, "expert_intermediate": 512}, layers=1, vocab=100),
        {"*.experts.*": "gptq_int4_act", "*.experts.{0,5}.*": "fp8_tensor"},
        [Degree(2, 2), Degree(1)],
    ),
    "deepseek": (
        DEEPSEEK.of(**SIZES, layers=2, vocab=100),
        {"*.q_b_proj": "fp8_channel", "*.o_proj": "fp8_block", "*.experts.*": "gptq_int4"},
        [Degree(2), Degree(4, 4)],
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("layout")


def built(folder: Path, name: str) -> Path:
    home = folder / name
    if not home.exists():
        home.mkdir()
        shape, lines, _ = MODELS[name]
        compile_(home, shape, lines, output="output: {shard_size: 2MiB}")
    return home / "out"


@pytest.mark.parametrize("name", MODELS)
def test_what_is_merged_again_is_what_was_built(folder: Path, tmp_path: Path, name: str) -> None:
    merged = built(folder, name)
    first, second = MODELS[name][2]
    due = tree(merged)
    both = Path(shutil.copytree(merged, tmp_path / "both"))
    for degree in (first, second):
        split(both, degree)
    cut = tree(both / "presplit")

    out = Path(shutil.copytree(merged, tmp_path / "out"))
    split(out, first, layout="presplit")
    assert not list(out.glob("*.safetensors")) and len(list(merged.glob("*.safetensors"))) > 1
    result = verify(out)
    assert result.differences == () and result.leftovers == () and result.bit_for_bit > 0

    split(out, second, layout="presplit")
    without_rest = {path: data for path, data in tree(out / "presplit").items() if not path.startswith("rest")}
    assert without_rest == cut
    assert verify(out).differences == ()

    again = Path(shutil.copytree(out, tmp_path / "again"))
    split(again, layout="both")
    assert tree(again) == tree(both)
    split(out, second, layout="merged")
    assert tree(out) == due


def test_what_no_rank_holds_is_kept(tmp_path: Path) -> None:
    """A tied ``lm_head`` that is stored all the same, and the parts of which SGLang keeps one."""
    home = tmp_path / "sources"
    write_sources(home, SMALL, ["bf16", "gptq_int4"])
    for path in home.glob("*/config.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "tie_word_embeddings": True}))
        (weights,) = path.parent.glob("*.safetensors")
        tensors = load_file(weights)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, weights, metadata={"format": "pt"})
    recipe = tmp_path / "recipe.yaml"
    lines = [f"model: {home / 'bf16'}", "sources:", f"  int4: {home / 'gptq_int4'}"]
    recipe.write_text("\n".join([*lines, "weights: {'*.{q,k,v,gate,up,down}_proj': int4}"]))
    out = tmp_path / "out"
    run_plan(plan_recipe(recipe), out)
    due = tree(out)
    split(out, Degree(2), layout="presplit")
    kept = json.loads((out / "presplit/rest/index.json").read_text())["parameters"]
    left = ("q_proj", "k_proj", "gate_proj")
    assert kept.keys() == {"lm_head.weight", "header model-00001-of-00001.safetensors"} | {
        name for name in kept if name.endswith(tuple(f"{part}.g_idx" for part in left))
    }
    assert len(kept) == 2 + len(left) * SMALL.layers
    assert verify(out).differences == ()
    split(out, layout="merged")
    assert tree(out) == due


def test_linked_files_come_back_with_their_own_headers(tmp_path: Path) -> None:
    """With ``--link`` a merged file is a source's, whatever its header says and in whatever order."""
    (source,) = write_sources(tmp_path / "sources", SMALL, ["bf16"]).values()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {source}\n")
    out = tmp_path / "out"
    run_plan(plan_recipe(recipe, link=True), out, link=True)
    due, theirs = tree(out), tree(source)
    split(out, Degree(2), layout="presplit")
    split(out, layout="merged")
    assert tree(out) == due and tree(source) == theirs
    assert {data for name, data in due.items() if name.endswith("safetensors")} <= set(theirs.values())


# The commands


def test_a_build_of_ranks_files_alone(folder: Path, capsys: Any) -> None:
    merged = built(folder, "deepseek")
    text = (merged.parent / "out.yaml").read_text().replace("{shard_size: 2MiB}", "{shard_size: 2MiB, tp: [2, 4], %s}")
    recipe, out = merged.parent / "presplit.yaml", merged.parent / "presplit"
    recipe.write_text(text % "layout: presplit")
    assert call("plan", recipe, "--allow", "unservable") == 0
    assert "the build needs space for both" in capsys.readouterr().out
    assert call("build", recipe, "-o", out, "--allow", "unservable") == 0
    assert "in files cut for ranks only" in capsys.readouterr().out
    later = Path(shutil.copytree(merged, merged.parent / "later"))
    split(later, Degree(4), shard_size=2 << 20)
    split(later, Degree(2), layout="presplit", shard_size=2 << 20)
    assert tree(later) == tree(out)

    recipe.write_text(text.replace(", %s", ""))
    for layout in ("presplit", "merged", "both"):
        options = ("--layout", layout, "--force", "--quiet", "--allow", "unservable")
        assert call("build", recipe, "-o", out, *options) == 0
        assert read_manifest(out).layout == layout
        assert not verify(out).differences
        assert bool(list(out.glob("*.safetensors"))) == (layout != "presplit")
        assert (out / "presplit").exists() == (layout != "merged")
    before = tree(out)
    assert call("split", out, "--layout", "presplit") == 0
    assert f"{out}: files cut for ranks only" in capsys.readouterr().out
    assert call("split", out, "--tp", 2) == 0
    assert tree(out) == before


def test_inspect_and_verify_of_ranks_files_alone(folder: Path, tmp_path: Path, capsys: Any) -> None:
    merged = built(folder, "moe")
    out = Path(shutil.copytree(merged, tmp_path / "out"))
    split(out, Degree(4, 2), layout="presplit")
    facts = []
    for path in (merged, out):
        assert call("inspect", path, "--json") == 0
        facts.append(json.loads(capsys.readouterr().out))
    different = {key for key in facts[0] if facts[0][key] != facts[1][key]}
    assert different == {"location", "serve", "layout", "presplit", "manifest_checksum"}
    assert facts[1]["serve"].endswith("--tp 4 --ep-size 2")
    assert any(finding.text.endswith("--tp 4 --ep-size 2") for finding in examine(out) if finding.status == "ok")
    assert call("inspect", out) == 0
    assert f"merged files: none; restore them: mixprec split {out} --layout both" in capsys.readouterr().out
    errors = []
    for path in (merged, out):
        assert call("verify", path, "--against", "from_bf16", "--json") == 0
        errors.append(json.loads(capsys.readouterr().out)["errors"])
    assert errors[0] == errors[1] and errors[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("output: {layout: presplit}", "18: layout presplit: which ranks are files to be cut for?"),
        ("output:\n  layout: both", "19: layout both: which ranks are files to be cut for?"),
        ("output: {layout: merged, tp: 2}", "18: layout merged: no files are cut with it; leave out `tp`"),
        ("output: {layout: split, tp: 2}", "18: layout must be one of merged, presplit, both"),
    ],
)
def test_layouts_that_cannot_be(tmp_path: Path, text: str, message: str) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: a/b\n" + "\n" * 16 + text)
    with pytest.raises(RecipeError) as raised:
        plan_recipe(recipe)
    assert message in str(raised.value)
    recipe.write_text("model: a/b\n")
    with pytest.raises(RecipeError, match="--layout presplit: which ranks are files to be cut for"):
        plan_recipe(recipe, layout="presplit")


def test_a_source_must_have_merged_files(out: Path, tmp_path: Path) -> None:
    split(out, Degree(2), layout="presplit")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {out}\n")
    with pytest.raises(SourceError, match=f"restore the merged ones with `mixprec split {out} --layout both`"):
        plan_recipe(recipe)
    split(out, layout="both")
    plan_recipe(recipe)


def test_a_split_says_for_how_many_ranks(out: Path, capsys: Any) -> None:
    assert call("split", out) == 2
    assert call("split", out, "--layout", "both", "--ranks", "0") == 2
    assert "how many ranks are there?" in capsys.readouterr().err
    assert call("split", out, "--layout", "presplit") == 1
    assert "files of all ranks of one degree are there, and there are none: give --tp" in capsys.readouterr().err


# Steps that fail


class Killed(BaseException):
    """No handler of errors sees it."""


@pytest.fixture(scope="module")
def small(folder: Path) -> Path:
    home = folder / "small"
    home.mkdir()
    (source,) = write_sources(home / "sources", SMALL, ["bf16"]).values()
    (home / "recipe.yaml").write_text(f"model: {source}\noutput: {{shard_size: 1MiB}}\n")
    run_plan(plan_recipe(home / "recipe.yaml"), home / "out")
    assert len(list((home / "out").glob("*.safetensors"))) == 3
    return home / "out"


@pytest.fixture
def out(small: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small, tmp_path / "out"))


@pytest.fixture
def stop(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """``stop(n)``: whatever renames or removes is stopped at the n-th time; ``stop(0)``: no more."""
    real = {name: getattr(os, name) for name in ("rename", "unlink", "rmdir")}
    left = 0

    def set_to(n: int) -> None:
        nonlocal left
        left = n

    def wrap(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                raise Killed
            return real[name](*args, **kwargs)

        return call

    for name in real:
        monkeypatch.setattr(os, name, wrap(name))
    yield set_to


@pytest.mark.parametrize(
    ("before", "change"),
    [
        ([], (Degree(2), "presplit")),
        ([(Degree(2), "presplit")], (None, "both")),
        ([(Degree(2), "presplit")], (Degree(1), "presplit")),
        ([(Degree(2), "presplit")], (Degree(1), "both")),
        ([(Degree(2), "presplit")], (None, "merged")),
        ([(Degree(1), "both"), (Degree(2), "both")], (None, "presplit")),
        ([(Degree(2), "both")], (None, "merged")),
    ],
)
def test_a_change_that_is_stopped_anywhere_can_be_repeated(
    out: Path, tmp_path: Path, stop: Any, before: list[Any], change: Any
) -> None:
    for degree, layout in before:
        split(out, degree, layout=layout)
    degree, layout = change
    due = Path(shutil.copytree(out, tmp_path / "due"))
    split(due, degree, layout=layout, jobs=1)
    expected, steps = tree(due), 0
    while True:
        steps += 1
        one = Path(shutil.copytree(out, tmp_path / "one"))
        stop(steps)
        try:
            split(one, degree, layout=layout, jobs=1)
        except Killed:
            stop(0)
            assert verify(one).differences == (), f"step {steps}"
            split(one, degree, layout=layout)
            assert tree(one) == expected, f"step {steps}"
            shutil.rmtree(one)
        else:
            stop(0)
            break
    assert steps >= 3 and tree(one) == expected
    assert verify(one).leftovers == ()


def test_a_build_that_is_stopped_anywhere_is_whole_or_not_there(small: Path, tmp_path: Path, stop: Any) -> None:
    recipe = tmp_path / "recipe.yaml"
    text = (small.parent / "recipe.yaml").read_text()
    recipe.write_text(text.replace("1MiB", "1MiB, tp: [2, 1], layout: presplit"))
    plan, out = plan_recipe(recipe), tmp_path / "out"
    run_plan(plan, tmp_path / "due", jobs=1)
    expected, steps = tree(tmp_path / "due"), 0
    while True:
        steps += 1
        stop(steps)
        try:
            run_plan(plan, out, jobs=1)
        except Killed:
            stop(0)
            if out.exists():  # stopped while the stage was removed
                assert tree(out) == expected
            else:
                run_plan(plan, out, jobs=1)
            assert tree(out) == expected, f"step {steps}"
            assert [path.name for path in tmp_path.glob(".out*")] in ([], [".out.mixprec"])
            shutil.rmtree(out)
            shutil.rmtree(tmp_path / ".out.mixprec", ignore_errors=True)
        else:
            stop(0)
            break
    assert steps > 10 and not list(tmp_path.glob(".out*"))


def test_a_build_whose_cut_fails_goes_on_from_its_files(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text((small.parent / "recipe.yaml").read_text().replace("1MiB", "1MiB, tp: 2, layout: presplit"))
    plan, out = plan_recipe(recipe), tmp_path / "out"
    monkeypatch.setattr("mixprec_build.ranks.assemble.pwrite_all", full)
    with pytest.raises(WriteError, match="3 of 3 files are finished and kept"):
        run_plan(plan, out)
    monkeypatch.undo()
    assert not out.exists()
    run_plan(plan, out)
    assert not verify(out).differences and read_manifest(out).layout == "presplit"


def full(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_what_was_left_behind_is_named(out: Path, stop: Any, capsys: Any) -> None:
    stop(9)  # two ranks, two manifests (an unlink and a rename each) and the rest take seven
    with pytest.raises(Killed):
        split(out, Degree(2), layout="presplit", jobs=1)
    stop(0)
    assert verify(out).leftovers == ("model-00002-of-00003.safetensors", "model-00003-of-00003.safetensors")
    assert call("verify", out) == 0
    assert "left behind by a `mixprec split` that was stopped: model-00002" in capsys.readouterr().out
    # Merged files that are there are taken for what they are, not written anew.
    kept = (out / "model-00003-of-00003.safetensors").stat().st_ino
    split(out, layout="both")
    assert (out / "model-00003-of-00003.safetensors").stat().st_ino == kept
    assert verify(out).leftovers == ()


def test_a_disk_that_is_full_loses_nothing(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split(out, Degree(2), layout="presplit")
    before = tree(out)
    monkeypatch.setattr("mixprec_build.ranks.assemble.pwrite_all", full)
    with pytest.raises(WriteError, match="free some space"):
        split(out, layout="both")
    monkeypatch.undo()
    assert verify(out).differences == ()
    split(out, Degree(2), layout="presplit")
    assert tree(out) == before


def test_space_is_asked_for_first(small: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr("mixprec_build.output.split.check_space", lambda _, need: asked.append(need))
    split(out, Degree(2), layout="presplit")
    split(out, Degree(1))
    merged = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    (ranks,) = (json.loads(path.read_text()) for path in out.glob("presplit/tp1-ep1/*/index.json"))
    cut = sum(entry["bytes"] for entry in ranks["files"].values())
    assert asked[-1] > merged and asked[-1] - merged <= cut

    # A build has both for a while.
    recipe = small.parent / "space.yaml"
    recipe.write_text((small.parent / "recipe.yaml").read_text().replace("1MiB", "1MiB, tp: 1, layout: presplit"))
    monkeypatch.setattr("mixprec_build.output.copier.check_space", lambda _, need: asked.append(need))
    asked.clear()
    plan = plan_recipe(recipe)
    run_plan(plan, out.with_name("built"))
    assert asked[0] == merged + sum(plan.presplit.values())


# Trust


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


# Builds and splits of one folder


def rebuild(recipe: Path, out: Path) -> subprocess.CompletedProcess[str]:
    return run_python("-m", "mixprec_build", "build", str(recipe), "-o", str(out), "--force", "--quiet")


@pytest.mark.parametrize("layout", ["both", "presplit"])
def test_a_build_does_not_replace_what_is_being_cut(small: Path, out: Path, layout: str) -> None:
    recipe = out.with_name("recipe.yaml")
    recipe.write_text((small.parent / "recipe.yaml").read_text().replace("1MiB", "2MiB"))
    ended = []

    def watch(_: Any, __: int) -> Any:
        ended.append(rebuild(recipe, out))
        return lambda _: None

    split(out, Degree(2), layout=layout, watch=watch)
    assert ended[0].returncode == 2
    why = f"{out}: another `mixprec split` or build is writing there; wait for it; 2 of 2 files are finished and kept"
    assert why in ended[0].stderr
    assert not verify(out).differences and read_manifest(out).layout == layout
    assert rebuild(recipe, out).returncode == 0
    assert not verify(out).differences and len(list(out.glob("*.safetensors"))) == 2


@pytest.mark.parametrize(
    ("before", "change"),
    [
        (None, (Degree(2), "both")),
        (None, (Degree(2), "presplit")),
        ("presplit", (None, "both")),
        ("presplit", (Degree(1), "presplit")),
        ("presplit", (None, "merged")),
        ("both", (None, "merged")),
        ("both", (None, "presplit")),
    ],
)
def test_a_split_does_not_go_on_in_another_checkpoint(
    small: Path, out: Path, before: str | None, change: tuple[Degree | None, str]
) -> None:
    """That somebody put under its name meanwhile."""
    if before is not None:
        split(out, Degree(2), layout=before)
    degree, layout = change

    def watch(_: Any, __: int) -> Any:
        out.rename(out.with_name("before"))
        shutil.copytree(small, out)
        return lambda _: None

    with pytest.raises(OutputError, match=f"{out}: was replaced meanwhile; what is there now was left as it is"):
        split(out, degree, layout=layout, watch=watch)
    assert tree(out) == tree(small)
    assert not verify(out.with_name("before")).differences


def test_a_build_replaces_what_a_stopped_split_left(small: Path, out: Path, stop: Any) -> None:
    plan, before, steps = plan_recipe(small.parent / "recipe.yaml"), tree(small), 0
    while True:
        steps += 1
        stop(steps)
        try:
            split(out, Degree(2), layout="presplit", jobs=1)
        except Killed:
            stop(0)
            run_plan(plan, out, force=True)
            assert tree(out) == before, f"step {steps}"
        else:
            stop(0)
            break
    assert steps > 7


def test_a_build_replaces_no_stranger_in_a_folder_of_ranks(small: Path, out: Path) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(InterruptedBuildError):
        split(out, Degree(2), watch=lambda *_: interrupt)
    assert [path.name for path in out.glob("presplit/*")] == ["tp2-ep1"] and not read_manifest(out).ranks
    plan = plan_recipe(small.parent / "recipe.yaml")
    (out / "presplit/thesis.tex").write_text("...")
    with pytest.raises(OutputError, match=r"files that mixprec did not write \(presplit/thesis\.tex\)"):
        run_plan(plan, out, force=True)
    (out / "presplit/thesis.tex").unlink()
    run_plan(plan, out, force=True)
    assert tree(out) == tree(small)
    (out / "presplit").write_text("...")
    with pytest.raises(OutputError, match=r"files that mixprec did not write \(presplit\)"):
        run_plan(plan, out, force=True)


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
