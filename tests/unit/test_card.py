"""The model card, ``README.md``: its front matter, what it shows, and what becomes of one that people edit."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.llama import write_recipe, write_sources
from support.run import call, invoke

import mixprec_build as mp
from mixprec_build.errors import OutputError, SourceError, WriteError
from mixprec_build.output import publish
from mixprec_build.output.front_matter import merged_front_matter

OURS = {"base_model": "org/model", "library_name": "sglang", "tags": ["mixprec"]}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("secret-place")
    write_sources(folder)
    return folder


@pytest.fixture
def mix(sources: Path, tmp_path: Path) -> Path:
    return write_recipe(Path(shutil.copytree(sources, tmp_path / "alice")) / "mix.yaml")


def front_of(text: str) -> dict[str, Any]:
    start, front, _ = text.split("---\n", 2)
    assert start == ""
    loaded: dict[str, Any] = yaml.safe_load(front)
    return loaded


def card_of(out: Path) -> str:
    return (out / "README.md").read_text(encoding="utf-8")


def test_the_card_of_a_build(mix: Path, tmp_path: Path) -> None:
    mp.build(mix, tmp_path / "out")
    text = card_of(tmp_path / "out")
    # The model is a local folder: nobody knows which one on the hub it is.
    assert front_of(text) == {
        "library_name": "sglang",
        "tags": ["mixprec", "mixed-precision", "sglang", "fp8_block", "gptq_int4", "tiny"],
        "license": "mit",
    }
    assert text.endswith("# The source\n") and "license: mit" not in text.split("---\n", 2)[2]
    plan = mp.plan(mix)
    for name in ("bf16", "fp8_block", "gptq_int4"):
        modules = sum(module.format.kind == name for module in plan.modules.values())
        assert f"| `{name}` | {modules} | " in text
    recipe = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert recipe["weights"] == {"model.layers.*.self_attn.*": "fp8", "model.layers.*.mlp.*": "int4"}
    assert recipe["sources"] == {name: f"./{name}" for name in ("bf16", "fp8", "int4")}
    assert "python -m sglang.launch_server --model-path FOLDER\n" in text and "mixprec verify FOLDER" in text
    manifest = json.loads((tmp_path / "out" / "mixprec_manifest.json").read_text())
    for name, line in manifest["files"].items():
        if "xxh3_128" in line and name != "README.md":
            assert f"| `{name}` | {line['bytes']:,} | {line['xxh3_128']} |" in text
    assert manifest["files"]["README.md"]["bytes"] == (tmp_path / "out" / "README.md").stat().st_size


def test_the_card_says_nothing_of_the_builders_machine(mix: Path, tmp_path: Path) -> None:
    mp.build(mix, tmp_path / "out")
    text = card_of(tmp_path / "out")
    for secret in (str(tmp_path), "alice", "secret-place", os.uname().nodename, str(Path.home())):
        assert len(secret) < 3 or secret not in text, secret


def test_unservable_mixes_have_no_command_and_still_no_paths(mix: Path, tmp_path: Path) -> None:
    recipe = write_recipe(mix, {"model.layers.0.self_attn.q_proj": "fp8"})
    mp.build(recipe, tmp_path / "out", allow_unservable=True)
    text = card_of(tmp_path / "out")
    assert "launch_server" not in text and "`fused_formats`: `model.layers.0.self_attn" in text
    assert str(tmp_path) not in text


def test_equal_builds_have_equal_cards(mix: Path, tmp_path: Path) -> None:
    """Wherever the sources lie."""
    mp.build(mix, tmp_path / "a", jobs=1)
    elsewhere = Path(shutil.copytree(mix.parent, tmp_path / "bob")) / "mix.yaml"
    mp.build(elsewhere, tmp_path / "b", jobs=4)
    assert card_of(tmp_path / "a") == card_of(tmp_path / "b")


def test_without_a_card(mix: Path, tmp_path: Path) -> None:
    assert call("build", mix, "-o", tmp_path / "out", "--no-card") == 0
    assert not (tmp_path / "out" / "README.md").exists()
    assert mp.verify(tmp_path / "out").card is None
    (tmp_path / "out" / "README.md").write_text("mine")
    found = mp.verify(tmp_path / "out")
    assert found.differences == () and found.beside == ("README.md",)
    with pytest.raises(OutputError, match=r"holds files that mixprec did not write \(README.md\)"):
        mp.build(mix, tmp_path / "out", force=True)
    assert (tmp_path / "out" / "README.md").read_text() == "mine"


def test_a_card_may_be_edited(mix: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    mp.build(mix, out)
    assert mp.verify(out).card is None
    (out / "README.md").write_text(card_of(out) + "\nMy own words.\n")
    found = mp.verify(out)
    assert found.differences == () and found.card == "edited"
    ended = invoke("verify", out)
    assert ended.exit_code == 0 and "README.md, the model card: edited since the build" in ended.output
    assert json.loads(invoke("verify", out, "--json").output)["card"] == "edited"
    with pytest.raises(OutputError, match=r"\(README.md, edited since\)"):
        mp.build(mix, out, force=True)
    assert card_of(out).endswith("My own words.\n")
    (out / "README.md").unlink()
    found = mp.verify(out)
    assert found.differences == () and found.card == "removed"
    mp.build(mix, out, force=True)
    assert mp.verify(out) == mp.verify(out) and mp.verify(out).card is None


@pytest.mark.parametrize("kind", ["fifo", "folder", "link", "dangling"])
def test_what_is_no_file_in_the_place_of_a_card(mix: Path, tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    mp.build(mix, out)
    card = out / "README.md"
    card.unlink()
    if kind == "fifo":
        os.mkfifo(card)
    elif kind == "folder":
        card.mkdir()
    else:
        card.symlink_to(mix if kind == "link" else tmp_path / "nothing")
    (difference,) = mp.verify(out).differences
    assert "README.md" in difference
    with pytest.raises(OutputError, match="README"):
        mp.build(mix, out, force=True)


def test_a_build_over_an_older_one(mix: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    mp.build(mix, out)
    mp.build(mix, out, force=True, card=False)
    assert not (out / "README.md").exists() and mp.verify(out).differences == ()
    mp.build(mix, out, force=True)
    assert (out / "README.md").exists() and mp.verify(out).differences == ()
    assert {path.name for path in tmp_path.iterdir()} == {"out", "alice"}


@pytest.mark.parametrize("card", [True, False])
def test_a_build_that_stopped_behind_its_card(
    mix: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, card: bool
) -> None:
    """The same build goes on; one without a card leaves none behind."""

    def stop(*_: object) -> None:
        raise WriteError("stopped")

    with monkeypatch.context() as patch, pytest.raises(WriteError):
        patch.setattr(publish, "dump_manifest", stop)
        mp.build(mix, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    mp.build(mix, tmp_path / "out", card=card)
    assert (tmp_path / "out" / "README.md").exists() is card
    assert mp.verify(tmp_path / "out").differences == ()


def test_files_of_ranks_leave_the_card_alone(mix: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    mp.build(mix, out)
    before = card_of(out)
    for layout in ("presplit", "both"):
        assert call("split", out, "--tp", 1, "--layout", layout) == 0
        assert card_of(out) == before and mp.verify(out).differences == ()


def test_a_card_of_files_for_ranks_names_them(mix: Path, tmp_path: Path) -> None:
    mix.write_text(mix.read_text().replace("output: {", "output: {tp: 1, layout: presplit, "))
    mp.build(mix, tmp_path / "out")
    assert "--model-path FOLDER --tp 1\n" in card_of(tmp_path / "out")
    assert "`model-00001" not in card_of(tmp_path / "out")


def test_the_models_card_is_bounded(mix: Path) -> None:
    with (mix.parent / "bf16" / "README.md").open("wb") as file:
        file.truncate((4 << 20) + 1)
    with pytest.raises(SourceError, match=r"bf16/README.md: 4194305 bytes; at most 4194304 are read"):
        mp.plan(mix)


def test_hostile_names(mix: Path, tmp_path: Path) -> None:
    """A type of model that would end a block of code, a table or YAML; patterns cannot."""
    config = mix.parent / "bf16" / "config.json"
    hostile = "x`|</script>\n---\n# y"
    config.write_text(json.dumps({**json.loads(config.read_text()), "model_type": hostile}))
    mp.build(mix, tmp_path / "out", allow_unservable=True)
    text = card_of(tmp_path / "out")
    assert front_of(text)["license"] == "mit"
    assert "\n# y" not in text and "`` x`\\|</script>\\n---\\n# y ``" in text
    for line in text.splitlines():
        if line.startswith("| `"):
            assert line.replace("\\|", "").count("|") in (4, 5, 6)


KEPT = "pipeline_tag: text-generation\nlanguage:\n- en\n# why\nwidget:\n  - text: |\n      a\n      b\n"


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_keys_of_the_models_card_are_kept_as_they_are_written(end: str) -> None:
    front = f"---\nbase_model: other/one\nlibrary_name: transformers\n{KEPT}tags: [a, mixprec, 'b c']\n---\n# Title\n"
    front, body = merged_front_matter(OURS, front.replace("\n", end), ("library_name",))
    assert front_of(front) == {
        **OURS,
        "tags": ["mixprec", "a", "b c"],
        "pipeline_tag": "text-generation",
        "language": ["en"],
        "widget": [{"text": "a\nb\n"}],
    }
    assert KEPT in front and body == f"# Title{end}"


NOT_YAML = [
    "a: [",
    "a: &x 1\nb: *x",
    "a: !!python/object/apply:os.system ['true']",
    "{a: 1, b: 2}",
    "- a\n- b",
    "word",
    "a: 1\na: 2",
    "a: |\n  ```\n  b: `c`\nd: [",
    "? [x, y]\n: z",
    "a: \x85b: 1\u2028c: 2",
    "%YAML 1.1",
    "a: " + "[" * 200,
    "\ud800: 1",
    "",
]


@pytest.mark.parametrize("front", NOT_YAML)
def test_a_front_matter_that_is_not_plain_stays_below(front: str) -> None:
    text = f"---\n{front}\n---\nthe text\n"
    made, body = merged_front_matter(OURS, text, ())
    assert front_of(made) == OURS
    assert body.endswith("the text\n") and (not front or front.splitlines()[0] in body)


@pytest.mark.parametrize(
    "text", ["", "# no front matter", "---\nnever: ends\n", "--- \n", "----\na: 1\n----\n", "\ufeff# bom"]
)
def test_a_card_without_a_front_matter(text: str) -> None:
    made, body = merged_front_matter(OURS, text, ())
    assert front_of(made) == OURS and body == text.removeprefix("\ufeff")


@pytest.mark.parametrize(
    "word", ["yes", "1e3", "null", "a: b", "- x", "#c", "'", '"', "\n---\n", "é\u2028", "\ud800", "*"]
)
def test_our_values_are_read_as_words(word: str) -> None:
    made, _ = merged_front_matter({"base_model": word, "tags": [word]}, "", ())
    found = front_of(made)
    expected = word.encode(errors="backslashreplace").decode()
    assert found["base_model"] in (word, expected) and len(found["tags"]) == 1
