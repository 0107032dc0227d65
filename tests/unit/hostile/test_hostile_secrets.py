"""Secrets: tokens and passwords are neither kept nor echoed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.files import tree
from support.run import run_python

from mixprec_build.checkpoint.opening import open_checkpoint
from mixprec_build.errors import SourceError

from .spoil import SECRET, Patch, refused


def test_a_token_stays_where_it_is(mix: Path, monkeypatch: Patch) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    printed = []
    for line in (
        "plan mix.yaml",
        "build mix.yaml -o new",
        "inspect new",
        "verify new",
        "verify new --source fp8=org/gone",
    ):
        ended = run_python("-m", "mixprec_build", *line.split(), cwd=mix)
        printed.append(ended.stdout + ended.stderr)
    assert len(tree(mix / "new")) > 5 and "no such" not in printed[0]
    assert not any(SECRET in text for text in printed)
    assert not any(SECRET.encode() in data for data in tree(mix / "new").values())


URL = f"https://user:{SECRET}@huggingface.co/org/name"


@pytest.mark.parametrize(
    "text",
    [
        f"model: {URL}\n",
        f"model: a\nsources: {{fp8: '{URL}'}}\n",
        f"model: a\nweights: {{x: '{URL}'}}\n",
        f"model: a\ndefault: {URL}\n",
        f"mixed_precision: {{fp16_path: '{URL}'}}\n",
    ],
)
def test_a_recipe_holds_no_password(tmp_path: Path, mixprec: Any, text: str) -> None:
    (tmp_path / "mix.yaml").write_text(text)
    message = refused(mixprec("plan", tmp_path / "mix.yaml"))
    assert "a URL with a password; write org/name, and log in with `hf auth login` or HF_TOKEN" in message
    assert SECRET not in message


@pytest.mark.parametrize(
    "arguments",
    [
        ("inspect", URL),
        ("verify", URL),
        ("verify", "out", "--source", f"fp8={URL}"),
        ("verify", "out", "--against", URL),
    ],
)
def test_a_password_is_not_echoed(mix: Path, mixprec: Any, monkeypatch: Patch, arguments: tuple[str, ...]) -> None:
    monkeypatch.chdir(mix)
    ended = mixprec(*arguments)
    assert ended.code == 1 and "://***@huggingface.co" in ended.err.replace(":/*", "://*")
    assert SECRET not in ended.out + ended.err


def test_a_url_is_no_location() -> None:
    with pytest.raises(
        SourceError, match=r"^https://huggingface\.co/org/name: a URL; write a local folder or a hub id"
    ):
        open_checkpoint("https://huggingface.co/org/name")
