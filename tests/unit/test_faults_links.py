"""Links in folders that are mixprec's own or were given to it: nothing is written, removed or read through one."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support.files import tree
from support.llama import write_recipe, write_sources

from mixprec_build.checkpoint.degree import Degree
from mixprec_build.checkpoint.manifest import read_manifest
from mixprec_build.errors import MixprecError, OutputError, SourceError, VerifyError
from mixprec_build.output.build import plan_recipe, run_plan
from mixprec_build.output.leftovers import leftovers, unknown_entries
from mixprec_build.output.split import split
from mixprec_build.output.verify import verify
from mixprec_build.storage.disk import inside
from mixprec_build.storage.owned import Entry, OwnedFolder

MIX = {"model.layers.0.mlp.*": "fp8", "model.layers.1.mlp.*": "int4"}


@pytest.fixture(scope="module")
def mix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mix")
    write_sources(folder)
    return write_recipe(folder / "mix.yaml", MIX)


@pytest.fixture(scope="module")
def cut(mix: Path) -> Path:
    """A checkpoint with merged files and those of two ranks."""
    out = mix.parent / "cut"
    run_plan(plan_recipe(mix), out)
    split(out, Degree(2))
    return out


@pytest.fixture
def out(cut: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(cut, tmp_path / "models" / "out"))


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A folder of the user's, with hidden entries at two depths."""
    for name in (".ssh/id", ".bashrc", ".config/app/x", "docs/a", "docs/.b"):
        (tmp_path / "home" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "home" / name).write_text(name)
    return tmp_path / "home"


# Folders of ranks that are links


COMMANDS: dict[str, Callable[[Path], object]] = {
    "split": lambda out: split(out, Degree(1)),
    "split --layout presplit": lambda out: split(out, Degree(2), layout="presplit"),
    "split --layout merged": lambda out: split(out, layout="merged"),
    "split --layout both": lambda out: split(out, layout="both"),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", ["presplit", "presplit/tp2-ep1", "presplit/tp2-ep1/rank-0-of-2"])
def test_no_command_changes_anything_through_a_link(out: Path, home: Path, name: str, command: str) -> None:
    """Whatever a link of the checkpoint points to, a folder of the user's or one of another checkpoint."""
    other = shutil.copytree(out, out.with_name("other"))
    for target in (home, other / name):
        if (out / name).is_symlink():
            (out / name).unlink()
        else:
            shutil.rmtree(out / name)
        (out / name).symlink_to(os.path.relpath(target, (out / name).parent))
        before = tree(home), tree(other)
        try:
            COMMANDS[command](out)
        except MixprecError as error:
            assert "link" in str(error)
        else:  # what it has to do needs no look behind the link
            assert (out / name).is_symlink()
        assert (tree(home), tree(other)) == before


@pytest.mark.parametrize("name", ["presplit", "presplit/tp2-ep1", "presplit/tp2-ep1/rank-0-of-2"])
def test_verify_names_a_folder_that_is_a_link(out: Path, tmp_path: Path, name: str) -> None:
    (out / name).rename(tmp_path / "elsewhere")
    (out / name).symlink_to(tmp_path / "elsewhere")
    assert any(name in difference for difference in verify(out).differences)


@pytest.mark.parametrize("name", ["presplit/rest", "presplit/tp2-ep1"])
def test_a_checkpoint_of_ranks_is_not_read_through_a_link(out: Path, tmp_path: Path, name: str) -> None:
    split(out, Degree(2), layout="presplit")
    (out / name).rename(tmp_path / "elsewhere")
    (out / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(VerifyError, match="a folder of its name is a link"):
        verify(out)


def test_a_link_in_a_rank_folder_is_no_file_of_it(out: Path, home: Path) -> None:
    (out / "presplit/tp2-ep1/rank-0-of-2/model-00009-of-00009.safetensors").symlink_to(home / ".bashrc")
    assert unknown_entries(out, read_manifest(out)) == ["presplit/tp2-ep1/rank-0-of-2/model-00009-of-00009.safetensors"]
    split(out, layout="merged")
    assert (home / ".bashrc").read_text() == ".bashrc"


# Files of the user's


@pytest.mark.parametrize(
    "name", ["presplit/tp2-ep1/rank-0-of-2/my-notes.txt", "presplit/.git/HEAD", "presplit/.gitattributes"]
)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_split_leaves_the_files_of_others(out: Path, name: str, command: str) -> None:
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).write_text("mine")
    COMMANDS[command](out)
    assert (out / name).read_text() == "mine"
    there = name.removesuffix("/HEAD")
    assert any(there in difference for difference in verify(out).differences)
    assert there not in leftovers(out, read_manifest(out))


@pytest.mark.parametrize(
    "name",
    [
        "presplit/tp2-ep1/rank-0-of-2/my-notes.txt",
        "presplit/tp2-ep1/rank-0-of-2/model-00007-of-00007.safetensors",
        "presplit/tp2-ep1/.DS_Store",
        "presplit/.git/HEAD",
        "presplit/.gitattributes",
        ".gitattributes",
    ],
)
def test_a_build_replaces_no_folder_with_files_of_others(mix: Path, out: Path, name: str) -> None:
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).write_text("mine")
    with pytest.raises(OutputError, match="holds files that mixprec did not write"):
        run_plan(plan_recipe(mix), out, force=True)
    assert (out / name).read_text() == "mine"


def test_a_folder_in_the_place_of_a_file_is_somebody_elses(mix: Path, out: Path) -> None:
    (out / "tokenizer.json").unlink()
    (out / "tokenizer.json").mkdir()
    (out / "tokenizer.json/thesis.tex").write_text("mine")
    with pytest.raises(OutputError, match=r"holds files that mixprec did not write \(tokenizer\.json\)"):
        run_plan(plan_recipe(mix), out, force=True)


def test_ranks_are_not_written_over_the_files_of_others(out: Path) -> None:
    part = out / "presplit/tp1-ep1/.rank-0-of-1.part"
    part.mkdir(parents=True)
    (part / "notes").write_text("mine")
    with pytest.raises(OutputError, match=rf"{part}: holds files that mixprec did not write; move it away"):
        split(out, Degree(1))
    assert (part / "notes").read_text() == "mine"


# Sources


def hub_cache(mix: Path, folder: Path) -> Path:
    """A source in the shape of the hub's cache; the folder of its files' links."""
    snapshot = folder / "models--evil--m" / "snapshots" / "abc"
    shutil.copytree(mix.parent / "bf16", snapshot)
    return snapshot


@pytest.mark.parametrize("linked", ["blobs", "snapshots"])
def test_a_cache_whose_folders_are_links_reads_nothing_else(mix: Path, home: Path, tmp_path: Path, linked: str) -> None:
    snapshot = hub_cache(mix, tmp_path)
    repository = snapshot.parents[1]
    if linked == "blobs":
        (repository / "blobs").symlink_to("../home/.ssh")
        (snapshot / "vocab.txt").symlink_to("../../blobs/id")
    else:
        (repository / "snapshots").rename(repository / "other")
        (repository / "snapshots").symlink_to("other")
        (snapshot / "vocab.txt").symlink_to("../../blobs/id")
        (repository / "blobs").symlink_to("../home/.ssh")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"model: {snapshot}\nsources: {{bf16: {snapshot}}}\n")
    with pytest.raises(SourceError, match=r"vocab\.txt: a link to .*/home/\.ssh/id, outside of the checkpoint"):
        run_plan(plan_recipe(recipe), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_links_of_a_cache_are_followed(mix: Path, tmp_path: Path) -> None:
    snapshot = hub_cache(mix, tmp_path)
    blobs = snapshot.parents[1] / "blobs"
    blobs.mkdir()
    for path in list(snapshot.iterdir()):
        path.rename(blobs / path.name)
        path.symlink_to(Path("../../blobs") / path.name)
    (tmp_path / "model").symlink_to(snapshot)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"model: {snapshot}\nsources: {{bf16: {tmp_path / 'model'}}}\n")
    run_plan(plan_recipe(recipe), tmp_path / "out")
    assert not verify(tmp_path / "out").differences


def test_a_file_below_a_folder_that_is_a_link_is_not_inside(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/file").write_text("")
    (tmp_path / "b").symlink_to("a")
    assert inside(tmp_path, "a/file") == tmp_path / "a/file"
    with pytest.raises(SourceError, match="a folder of its name is a link"):
        inside(tmp_path, "b/file")


# The folder that is owned


def test_an_owned_folder_is_left_by_no_name(tmp_path: Path) -> None:
    (tmp_path / "own/in").mkdir(parents=True)
    (tmp_path / "file").write_text("mine")
    with OwnedFolder.open(tmp_path / "own") as owned:
        for name in ("../file", "in/../../file", str(tmp_path / "file")):
            for act in (owned.unlink, owned.stat, owned.create, owned.make_folder):
                with pytest.raises(OutputError, match="is no name below it"):
                    act(name)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_link_that_appears_between_two_steps_is_not_followed(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder that is being emptied is replaced by a link to the user's, after it was looked at."""
    (tmp_path / "own/part").mkdir(parents=True)
    for number in range(3):
        (tmp_path / f"own/part/{number}").write_text("")
    before, real = tree(home), os.unlink

    def replacing(*arguments: object, **options: object) -> None:
        real(*arguments, **options)  # type: ignore[arg-type]
        if not (tmp_path / "own/part").is_symlink():
            (tmp_path / "own/part").rename(tmp_path / "own/old")
            (tmp_path / "own/part").symlink_to(home)

    monkeypatch.setattr(os, "unlink", replacing)
    with OwnedFolder.open(tmp_path / "own") as owned, pytest.raises(OutputError, match="own/part: is a link"):
        owned.remove("part", lambda entry: True)
    assert tree(home) == before


def test_errors_of_an_owned_folder_have_the_whole_path(tmp_path: Path) -> None:
    with OwnedFolder.open(tmp_path) as owned:
        with pytest.raises(FileNotFoundError) as caught:
            owned.unlink("a/b")
        assert caught.value.filename == f"{tmp_path}/a" and caught.value.errno == errno.ENOENT
        assert owned.stat("a/b") is None and owned.entries("a") == []
        os.mkfifo(tmp_path / "pipe")
        assert [entry.kind for entry in owned.entries()] == ["a FIFO"]
        assert Entry("x", 0).kind == "no regular file"
