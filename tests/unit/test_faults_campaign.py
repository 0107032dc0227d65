"""Every file-system call of a build and of a split fails in turn, or is the last; bits flip while files are at rest.

Without ``MIXPREC_FAULTS=all`` (``make faults``) only some of them do.
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
from support.files import tree
from support.llama import write_recipe, write_sources
from support.run import environment

from mixprec_build.checkpoint.degree import Degree
from mixprec_build.errors import MixprecError
from mixprec_build.output.build import plan_recipe, run_plan
from mixprec_build.output.split import split
from mixprec_build.output.verify import verify

ALL = os.environ.get("MIXPREC_FAULTS") == "all"
MIX = {"model.layers.0.mlp.*": "fp8", "model.layers.1.mlp.*": "int4"}

# The nth call of a run fails with an error, once, or is the last before a kill. Prints each run's exit code, or the
# number of calls where none was to fail.
DRIVER = """
import json, os, signal, sys, threading
from pathlib import Path
from mixprec_build.checkpoint.degree import Degree
from mixprec_build.errors import MixprecError
from mixprec_build.output.build import plan_recipe, run_plan
from mixprec_build.output.split import split

recipe, what, error, runs = sys.argv[1:5]
NAMES = ("open", "pwrite", "pread", "preadv", "posix_fallocate", "fsync", "rename", "mkdir", "unlink", "rmdir",
         "ftruncate", "scandir", "statvfs", "stat")
plan = plan_recipe(Path(recipe))
for nth, out in json.loads(runs):
    child = os.fork()
    if child:
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        continue
    calls, lock = 0, threading.Lock()

    def failing(name):
        real = getattr(os, name)
        def call(*arguments, **options):
            global calls
            with lock:
                calls += 1
                due = calls == nth
            if due and error == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if due:
                raise OSError(int(error), os.strerror(int(error)))
            return real(*arguments, **options)
        setattr(os, name, call)

    for name in NAMES:
        failing(name)
    code = 0
    try:
        if what == "split":
            split(Path(out), Degree(2), layout="presplit", jobs=1)
        else:
            run_plan(plan, Path(out), force=True, jobs=1)
    except MixprecError as refusal:
        code = refusal.exit_code
    if not nth:
        print(calls)
    sys.stdout.flush()
    os._exit(code)
"""


@pytest.fixture(scope="module")
def mix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mix")
    write_sources(folder)
    return write_recipe(folder / "mix.yaml", MIX)


@pytest.fixture(scope="module")
def built(mix: Path) -> Path:
    run_plan(plan_recipe(mix), mix.parent / "built")
    return mix.parent / "built"


def drive(recipe: Path, what: str, error: str, runs: list[tuple[int, Path]]) -> list[int]:
    command = [sys.executable, "-c", DRIVER, str(recipe), what, error, json.dumps(runs, default=str)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=3000, env=environment())
    assert ended.returncode == 0 and "Traceback" not in ended.stderr, ended.stderr
    return [int(line) for line in ended.stdout.split()]


@pytest.mark.parametrize("error", ["28", "5", "kill"], ids=["ENOSPC", "EIO", "kill"])
@pytest.mark.parametrize("what", ["build", "split"])
def test_any_call_of_the_file_system_fails(mix: Path, built: Path, tmp_path: Path, what: str, error: str) -> None:
    """The output is the one before or the one after, and the same command finishes it and leaves nothing else."""
    before = tree(built)
    count, _ = drive(mix, what, error, [(0, Path(shutil.copytree(built, tmp_path / "0" / "out")))])
    due = tree(tmp_path / "0" / "out")
    numbers = range(1, count + 1, 1 if ALL else max(1, count // 25))
    runs = [(n, Path(shutil.copytree(built, tmp_path / str(n) / "out"))) for n in numbers]
    codes = drive(mix, what, error, runs)
    assert set(codes) <= ({0, -9} if error == "kill" else {0, 1, 2, 3}) and len(codes) == len(runs)
    for (nth, out), code in zip(runs, codes, strict=True):
        there = tree(out) if out.exists() else None
        if what == "build":
            assert there in (before, due) or (code == -9 and there is None), nth
        if what == "build":
            run_plan(plan_recipe(mix), out, force=True)
        else:
            split(out, Degree(2), layout="presplit")
        assert tree(out) == due and [path.name for path in out.parent.iterdir()] == ["out"], nth
        assert verify(out).differences == (), nth
        shutil.rmtree(out.parent)


@pytest.mark.parametrize("layout", ["both", "presplit"])
def test_any_flipped_bit_is_found(built: Path, tmp_path: Path, layout: str) -> None:
    out = Path(shutil.copytree(built, tmp_path / "out"))
    split(out, Degree(2), layout=layout)
    rng = random.Random(0)
    files = [path for path in sorted(out.rglob("*")) if path.is_file()]
    for _ in range(600 if ALL else 50):
        path = rng.choice(files)
        data = path.read_bytes()
        changed = bytearray(data)
        changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(changed)
        try:
            assert verify(out).differences, path
        except MixprecError as error:
            assert error.exit_code == 1, path
        path.write_bytes(data)
    assert verify(out).differences == ()
