"""Runs these tests with other versions of SGLang, unpacked in the folders of MIXPREC_SGLANG_VERSIONS.

    pip download --no-deps sglang==0.5.15.post1 && unzip -d site *.whl
    MIXPREC_SGLANG_VERSIONS=$PWD/site python -m pytest tests/sglang/test_versions.py

With the versions of MIXPREC_SGLANG_BETWEEN, only the tests of contact and of a server's start run.

SGLang's dependencies are those of the environment of these tests.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import mixprec_runtime.cpu.engine
from mixprec_build.versions import version_problem

HERE = Path(__file__).parent
SITES, BETWEEN = (
    [Path(site) for site in os.environ.get(name, "").split(os.pathsep) if site]
    for name in ("MIXPREC_SGLANG_VERSIONS", "MIXPREC_SGLANG_BETWEEN")
)
# These start engines, which would take minutes with each version.
LEFT_OUT = {"test_versions.py", "test_cpu_engine.py", "test_launch_lines.py", "test_activity.py"}


@pytest.mark.skipif(not SITES, reason="MIXPREC_SGLANG_VERSIONS is not set")
@pytest.mark.parametrize("site", SITES, ids=[str(number) for number in range(len(SITES))] or None)
def test_another_sglang_passes_the_tests(site: Path) -> None:
    passes(site, [str(path) for path in sorted(HERE.glob("test_*.py")) if path.name not in LEFT_OUT])


@pytest.mark.skipif(not BETWEEN, reason="MIXPREC_SGLANG_BETWEEN is not set")
@pytest.mark.parametrize("site", BETWEEN, ids=[site.name for site in BETWEEN] or None)
def test_a_sglang_between_has_every_name_and_starts(site: Path) -> None:
    # Copies of modules are edited with the ends of the window, and the version between them.
    files = [str(HERE / name) for name in ("test_contact.py", "test_repairs_due.py", "test_launch.py")]
    passes(site, [*files, "-k", "not moved_or_changed"])


def passes(site: Path, arguments: list[str]) -> None:
    environment = mixprec_runtime.cpu.engine.environment()
    del environment["SGLANG_USE_CPU_ENGINE"]
    environment["PYTHONPATH"] = os.pathsep.join([str(site), environment["PYTHONPATH"]])
    asked = subprocess.run(
        [sys.executable, "-c", "import sglang, sglang.version as v; print(sglang.__path__[0], v.__version__)"],
        capture_output=True, text=True, check=True, env=environment,
    )  # fmt: skip
    where, version = asked.stdout.split()
    assert Path(where).parent == site
    assert version_problem(version) is None
    command = [sys.executable, "-m", "pytest", "-o", "filterwarnings=default", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3000, env=environment, cwd=HERE.parents[1])
    print(version, done.stdout.splitlines()[-1])
    assert done.returncode == 0, done.stdout[-8000:]
