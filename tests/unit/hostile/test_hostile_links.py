"""Links: inside a folder and from the hub's cache to its blobs, nowhere else."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from mixprec_build.checkpoint.manifest import MANIFEST
from mixprec_build.checkpoint.opening import open_checkpoint
from mixprec_build.errors import SourceError
from mixprec_build.output.build import plan_recipe, run_plan

from .spoil import INDEX, link, refused


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", INDEX, "quantize_config.json"])
def test_a_source_does_not_link_out_of_its_folder(mix: Path, tmp_path: Path, file: str) -> None:
    outside = tmp_path / "outside"
    shutil.copy(mix / "bf16" / "config.json", outside)
    if file == "model.safetensors":
        shutil.copy(mix / "bf16" / file, outside)
    link(mix / "bf16" / file, outside)
    with pytest.raises(SourceError) as caught:
        open_checkpoint(str(mix / "bf16"))
    message = f"{mix / 'bf16' / file}: a link to {outside}, outside of the checkpoint; put the file itself there"
    assert str(caught.value) == message


@pytest.mark.parametrize("file", ["tokenizer.json", "LICENSE", "modeling_x.py"])
def test_a_companion_does_not_link_out_of_its_folder(mix: Path, file: str) -> None:
    link(mix / "bf16" / file, "/etc/passwd")
    with pytest.raises(SourceError, match="a link to /etc/passwd, outside of the checkpoint"):
        plan_recipe(mix / "mix.yaml")


@pytest.mark.parametrize("file", [MANIFEST, "config.json", INDEX, "model-00001-of-00001.safetensors", "tokenizer.json"])
def test_a_compiled_checkpoint_does_not_link_out_of_its_folder(mix: Path, mixprec: Any, file: str) -> None:
    (mix / "out" / file).rename(mix / "away")
    link(mix / "out" / file, mix / "away")
    ended = mixprec("verify", mix / "out")
    # What nothing else rests on is a difference, beside which the others are compared.
    text = ended.err if file in ("tokenizer.json", "model-00001-of-00001.safetensors") else refused(ended)
    assert ended.code == 1 and f"out/{file}: a link to {mix / 'away'}, outside of the checkpoint" in text


def test_links_that_are_followed(mix: Path, tmp_path: Path) -> None:
    """Within a folder, and to a folder."""
    (mix / "bf16" / "sub").mkdir()
    (mix / "bf16" / "model.safetensors").rename(mix / "bf16" / "sub" / "weights")
    link(mix / "bf16" / "model.safetensors", "sub/weights")
    link(tmp_path / "alias", mix / "bf16")
    assert open_checkpoint(str(tmp_path / "alias")).tensors()


def test_links_of_the_hub_cache_are_followed(mix: Path, snapshot: Path) -> None:
    recipe = mix / "hub.yaml"
    recipe.write_text(f"model: {snapshot}\nsources: {{fp8: ./fp8}}\nweights: {{'model.layers.0.mlp.*': fp8}}\n")
    run_plan(plan_recipe(recipe), mix / "new")
    assert (mix / "new" / "tokenizer.json").read_text() == "{}"


@pytest.mark.parametrize("target", ["../../../elsewhere", "../../refs/main", "/etc/passwd"])
def test_a_snapshot_links_to_its_blobs_only(snapshot: Path, target: str) -> None:
    (snapshot.parents[2] / "elsewhere").write_text("{}")
    link(snapshot / "config.json", target)
    with pytest.raises(SourceError, match=r"config\.json: a link to .*, outside of the checkpoint"):
        open_checkpoint(str(snapshot))


def test_a_blob_that_is_a_link_itself(snapshot: Path) -> None:
    blob = snapshot / (snapshot / "config.json").readlink()
    link(blob, "/etc/passwd")
    with pytest.raises(SourceError, match="a link to /etc/passwd, outside of the checkpoint"):
        open_checkpoint(str(snapshot))
