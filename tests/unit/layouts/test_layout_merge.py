"""Merged files from ranks' files, byte for byte, and the commands that make them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from support.files import tree
from support.run import call
from support.serving import write_sources

from mixprec_build.checkpoint.degree import Degree
from mixprec_build.checkpoint.manifest import read_manifest
from mixprec_build.errors import RecipeError, SourceError
from mixprec_build.output.build import plan_recipe, run_plan
from mixprec_build.output.split import split
from mixprec_build.output.verify import verify
from mixprec_build.ranks.merged import open_compiled
from mixprec_build.report.doctor import examine

from .compiled import MODELS, SMALL, built


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
    checkpoint, opened = open_compiled(out, read_manifest(out)), open_compiled(merged, read_manifest(merged))
    assert checkpoint.tensors().keys() == opened.tensors().keys()
    for tensor in opened.tensors().values():
        values, stored = checkpoint.read(tensor), opened.read(tensor)
        assert (values.dtype, values.shape, values.tobytes()) == (stored.dtype, stored.shape, stored.tobytes())
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
    # A card names the files that a build wrote.
    without_card = ("--no-card", "--allow", "unservable")
    assert call("build", recipe, "-o", out, *without_card) == 0
    assert "in files cut for ranks only" in capsys.readouterr().out
    later = merged.parent / "later"
    assert call("build", merged.parent / "out.yaml", "-o", later, *without_card) == 0
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
