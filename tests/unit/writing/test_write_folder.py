"""The output folder: new, empty, replaced under --force, or refused."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from support.files import tree

from mixprec_build.errors import OutputError
from mixprec_build.output.verify import verify

from .steps import MANIFEST, Patch, build, listing, refused


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
