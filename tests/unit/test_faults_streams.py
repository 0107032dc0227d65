"""Standard streams that are closed, full or no longer read, and text that would command a terminal."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from support.llama import write_recipe, write_sources

MIXPREC = shlex.join([sys.executable, "-m", "mixprec_build"])


@pytest.fixture(scope="module")
def mix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mix")
    write_sources(folder)
    ended = shell(f"{MIXPREC} build {write_recipe(folder / 'mix.yaml')} -q -o {folder / 'out'}")
    assert ended.returncode == 0, ended.stderr
    return folder


def shell(command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)


CLOSED = {"stdin": "<&-", "stdout": ">&-", "stderr": "2>&-", "all": "<&- >&- 2>&-"}


@pytest.mark.parametrize("closed", CLOSED.values(), ids=CLOSED)
def test_commands_work_with_closed_streams(mix: Path, tmp_path: Path, closed: str) -> None:
    for command in (
        f"plan {mix / 'mix.yaml'}",
        f"build {mix / 'mix.yaml'} -o {tmp_path / 'out'}",
        f"verify {tmp_path / 'out'}",
        f"split {tmp_path / 'out'} --tp 1",
        f"inspect --json {tmp_path / 'out'}",
    ):
        ended = shell(f"{MIXPREC} {command} {closed}")
        assert ended.returncode == 0 and "Traceback" not in ended.stderr, (command, ended.stderr)
    damaged = tmp_path / "out" / "tokenizer.json"
    damaged.write_bytes(damaged.read_bytes()[::-1])
    assert shell(f"{MIXPREC} verify {tmp_path / 'out'} {closed}").returncode == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("command", ["verify", "inspect", "inspect --json"])
def test_a_full_output_is_no_difference(mix: Path, command: str) -> None:
    ended = shell(f"{MIXPREC} {command} {mix / 'out'} > /dev/full")
    assert ended.returncode == 3
    assert ended.stderr.splitlines()[-1].startswith("mixprec: standard output: No space left on device")
    assert "Traceback" not in ended.stderr
    assert shell(f"{MIXPREC} {command} {mix / 'out'} > /dev/full 2> /dev/full").returncode == 3
    assert shell(f"{MIXPREC} {command} {mix / 'out'} 2> /dev/full").returncode == 0


@pytest.mark.parametrize("command", ["plan {}/mix.yaml", "inspect {}/out --json", "verify -q {}/out", "--help"])
def test_a_reader_that_goes_away_is_no_error(mix: Path, command: str) -> None:
    ended = shell(f"{MIXPREC} {command.format(mix)} | head -c 1 > /dev/null; exec true < /dev/null")
    assert ended.stderr == ""
    assert shell(f"set -o pipefail; {MIXPREC} {command.format(mix)} | true").stderr == ""


CHARACTERS = {"C1": "\x9b31m", "escape": "\x1b[2J", "bidi": "\u202e", "isolate": "\u2066", "tag": "\U000e0041"}


@pytest.mark.parametrize("character", CHARACTERS.values(), ids=CHARACTERS)
def test_json_commands_no_terminal_and_says_the_same(mix: Path, tmp_path: Path, character: str) -> None:
    """Also where the text is a path that the user named."""
    folder = tmp_path / f"a{character}é"
    write_sources(folder)
    config = json.loads((folder / "bf16/config.json").read_bytes())
    (folder / "bf16/config.json").write_text(json.dumps({**config, "model_type": f"llama{character}é"}))
    command = [sys.executable, "-m", "mixprec_build", "inspect", str(folder / "bf16"), "--json"]
    ended = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONUTF8": "1"})
    assert all(c.isprintable() or c == "\n" for c in ended.stdout) and "é" in ended.stdout
    assert json.loads(ended.stdout)["model_type"] == f"llama{character}é"
    recipe = write_recipe(mix / "again.yaml")
    for arguments in (("build", recipe, "-o", folder / "out"), ("split", folder / "out", "--tp", "1")):
        ended = subprocess.run(
            [sys.executable, "-m", "mixprec_build", *map(str, arguments)], capture_output=True, text=True
        )
        assert ended.returncode == 0 and str(folder / "out").replace(character, "") not in ended.stdout
        assert all(c.isprintable() or c == "\n" for c in ended.stdout + ended.stderr), ended
