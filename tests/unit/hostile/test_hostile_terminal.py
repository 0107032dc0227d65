"""What a terminal shows: names from files command nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mixprec_build.checkpoint.manifest import CHECKSUM, MANIFEST
from mixprec_build.storage.header import build_header
from mixprec_build.text import printable

from .spoil import change

COMMANDS = {
    "escape": "\x1b[2J",
    "C1": "\x9b2J",
    "bell": "\a",
    "turned": "\u202e",
    "line": "\nserve it with: rm",
    "half": "\ud800",
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_a_terminal_is_not_commanded(mix: Path, mixprec: Any, command: str) -> None:
    bad = f"a{command}b"
    change(mix / "out" / "config.json", lambda c: c.update(model_type=bad))
    change(
        mix / "out" / MANIFEST,
        lambda m: (
            m.update(unservable=[bad], sources={bad: {"location": bad, "path": None, "commit": bad}}),
            m["files"].update({bad: {"bytes": 0, CHECKSUM: ""}}),
        ),
    )
    ended = mixprec("inspect", mix / "out")
    assert ended.code == 0 and ended.out.count(printable(bad)) >= 3
    assert all(line.isprintable() for line in ended.out.split("\n")) and ended.out.count("\nserve it with: ") == 0
    ended = mixprec("verify", mix / "out")
    assert ended.code == 1 and f"differs: {printable(bad)}: missing" in ended.err
    assert all(line.isprintable() for line in (ended.out + ended.err).split("\n"))


def test_a_folder_name_is_no_command(mix: Path, mixprec: Any) -> None:
    folder = mix / "out; rm -rf $(pwd)"
    (mix / "out").rename(folder)
    assert f"--model-path '{folder}' --quantization" in mixprec("inspect", folder).out


def test_markup_and_emoji_are_shown_as_they_are(mix: Path, mixprec: Any) -> None:
    folder = mix / "[red]x[b] :smile:"
    (mix / "bf16").rename(folder)
    (mix / "mix.yaml").write_text(
        f"model: '{folder}'\nsources: {{a: '{folder}', fp8: ./fp8}}\nweights: {{'model.layers.0.mlp.*': fp8}}\n"
    )
    ended = mixprec("plan", mix / "mix.yaml")
    assert ended.code == 0 and "[red]x[b] :smile:" in ended.out.replace("\n", "")


def test_a_layer_map_of_thousands_is_left_out(tmp_path: Path, mixprec: Any) -> None:
    (tmp_path / "config.json").write_text("{}")
    names = [(f"model.{i}.a{i}.weight", "U8", (1, 1), 1) for i in range(2000)]
    (tmp_path / "model.safetensors").write_bytes(build_header(names) + bytes(2000))
    assert mixprec("inspect", tmp_path).code == 0
