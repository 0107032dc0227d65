"""Every file-system call of a build, its parts and a split fails in turn, or is the last; two commands meet; bits flip.

``MIXPREC_FAULTS=all`` (``make faults``) takes more errors, more pairs and more bits.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.llama import write_recipe, write_sources
from support.run import environment

from mixprec_build.checkpoint.degree import Degree
from mixprec_build.errors import MixprecError
from mixprec_build.output.build import plan_recipe, run_plan
from mixprec_build.output.split import split
from mixprec_build.output.verify import verify
from mixprec_build.planning.companions import CARD

ALL = os.environ.get("MIXPREC_FAULTS") == "all"
MIX = {"model.layers.0.mlp.*": "fp8", "model.layers.1.mlp.*": "int4"}


@pytest.fixture(scope="module")
def mix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mix")
    write_sources(folder)
    return write_recipe(folder / "mix.yaml", MIX)


@pytest.fixture(scope="module")
def built(mix: Path) -> Path:
    run_plan(plan_recipe(mix), mix.parent / "built")
    return mix.parent / "built"


def campaign(mix: Path, built: Path, folder: Path, what: str, how: str, count: int = 1) -> dict[str, dict[str, int]]:
    """How often each ending came, for each error of ``how`` or the command that came between."""
    arguments = [mix, built, folder, what, how, count]
    command = [sys.executable, "-m", "support.campaign", *map(str, arguments)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=6000, env=environment())
    assert ended.returncode == 0 and "Traceback" not in ended.stderr, ended.stderr
    calls, *results = ended.stdout.splitlines()
    made, changes = map(int, calls.split())
    few = what == "part"
    assert made > (250 if few else 500) and (changes > (20 if few else 50)) is (what != "verify")
    found = dict(map(json.loads, results))
    if "EIO" in found:
        assert sum(found["EIO"].values()) == -(-made // count)
    if "kill" in found:
        assert found["kill"] == {"-9": -(-changes // count)}
    return found


WRITES = "ENOSPC,EDQUOT,EACCES,ESTALE,kill" if ALL else "ENOSPC,kill"


@pytest.mark.parametrize(
    ("what", "how"),
    [
        ("build", "EIO"),
        ("split", "EIO"),
        ("verify", "EIO"),
        ("build", WRITES),
        ("split", WRITES),
        ("part", f"EIO,{WRITES}"),
        ("finish", WRITES if ALL else "kill"),
        ("finish", "EIO"),
    ],
)
def test_any_call_of_the_file_system_fails(mix: Path, built: Path, tmp_path: Path, what: str, how: str) -> None:
    """The output is the one before or the one after, and the same command finishes it and leaves nothing else."""
    step = 1 if ALL or what != "finish" else 12 if how == "EIO" else 3
    found = campaign(mix, built, tmp_path, what, how, step)
    for error in {*how.split(",")} - {"kill"}:
        assert sum(count for code, count in found[error].items() if code != "0") > (20 if what == "part" else 30)


@pytest.mark.parametrize(
    ("what", "other"),
    [("build", "split"), ("split", "build"), ("build", "build"), ("split", "split"), ("build", "verify"),
     ("split", "verify"), ("verify", "split"), ("verify", "build")],
)  # fmt: skip
def test_a_command_meets_another_that_was_stopped(
    mix: Path, built: Path, tmp_path: Path, what: str, other: str
) -> None:
    """One waits at a call, the other one runs, the first goes on: each is right or refuses, and none is harmed."""
    points = 50 if ALL else 4
    found = campaign(mix, built, tmp_path, what, other, points)
    assert sum(found[other].values()) == points


@pytest.mark.parametrize("layout", ["merged", "both", "presplit"])
def test_any_flipped_bit_is_found(built: Path, tmp_path: Path, layout: str) -> None:
    out = Path(shutil.copytree(built, tmp_path / "out"))
    if layout != "merged":
        split(out, Degree(2), layout=layout)
    rng = random.Random(0)
    files = [path for path in sorted(out.rglob("*")) if path.is_file()]
    for _ in range(600 if ALL else 40):
        path = rng.choice(files)
        data = path.read_bytes()
        changed = bytearray(data)
        changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(changed)
        try:
            found = verify(out)
            assert found.differences or (path.name, found.card) == (CARD, "edited"), path
        except MixprecError as error:
            assert error.exit_code == 1, path
        path.write_bytes(data)
    assert verify(out).differences == ()
