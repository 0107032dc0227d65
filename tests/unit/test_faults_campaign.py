"""Every file-system call of a build or split, or of one on many machines, fails in turn or is the last; commands meet.

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


def campaign(
    mix: Path, built: Path, folder: Path, what: str, how: str, count: int = 1, *options: str
) -> dict[str, dict[str, int]]:
    """How often each ending came, for each error of ``how`` or the command that came between."""
    arguments = [mix, built, folder, what, how, count, *options]
    command = [sys.executable, "-m", "support.campaign", *map(str, arguments)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=6000, env=environment())
    assert ended.returncode == 0 and "Traceback" not in ended.stderr, ended.stderr
    calls, *results = ended.stdout.splitlines()
    made, changes = map(int, calls.split())
    few = what in ("part", "rank", "ranks")
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
        ("rank", WRITES if ALL else "kill"),
        ("rank", "EIO"),
        ("ranks", WRITES if ALL else "kill"),
        ("ranks", "EIO"),
    ],
)
def test_any_call_of_the_file_system_fails(mix: Path, built: Path, tmp_path: Path, what: str, how: str) -> None:
    """The output is the one before or the one after, and the same command finishes it and leaves nothing else."""
    slow = what in ("finish", "ranks") or (what, how) == ("rank", "EIO")
    step = 1 if ALL or not slow else 12 if how == "EIO" else 3
    found = campaign(mix, built, tmp_path, what, how, step)
    least = 20 if what == "part" else 10 if what in ("rank", "ranks") else 30
    for error in {*how.split(",")} - {"kill"}:
        assert sum(count for code, count in found[error].items() if code != "0") > least


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


@pytest.mark.parametrize("locks", [(), ("unlocked",)], ids=["flock", "no flock"])
@pytest.mark.parametrize(
    ("what", "other"),
    [("rank", "other"), ("rank", "rank"), ("rank", "verify"), ("rank", "split"), ("split", "rank"), ("ranks", "rank")],
)
def test_a_rank_is_cut_beside_what_was_stopped(
    mix: Path, built: Path, tmp_path: Path, what: str, other: str, locks: tuple[str, ...]
) -> None:
    """Another rank in any case; and all ranks, with their finish, are then what one split makes."""
    points = 50 if ALL else 4
    found = campaign(mix, built, tmp_path, what, other, points, *locks)
    assert sum(found[other].values()) == points
    assert (found[other].keys() == {"0 0"}) is ((what, other) == ("rank", "other"))


def test_a_rank_that_was_killed_without_locks_is_cut_again(mix: Path, built: Path, tmp_path: Path) -> None:
    campaign(mix, built, tmp_path, "rank", "kill", 1 if ALL else 4, "unlocked")


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
