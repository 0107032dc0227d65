"""Runs the command line in this process, or Python in a new one.

    code = call("split", out, "--tp", 2)
    ended = run_python("-m", "mixprec_build", "verify", str(out))

Tests that read the output use the fixture ``mixprec`` of ``tests/unit/conftest.py``, which returns :class:`Ended`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import IO, Any, NamedTuple
from unittest.mock import patch

from typer.testing import CliRunner

__all__ = [
    "ENGINES_AT_ONCE",
    "Ended",
    "Run",
    "answer_of",
    "at_most",
    "call",
    "cpu_seconds",
    "environment",
    "invoke",
    "run_python",
]


ENGINES_AT_ONCE = max(4, (os.cpu_count() or 0) // 2)
"""Engines of SGLang that start side by side: their starts take cores, not the GPU."""


class Ended(NamedTuple):
    """The exit code and output of a command."""

    code: object
    out: str
    err: str


Run = Callable[..., Ended]
"""The type of the fixture ``mixprec``, which runs the command with its arguments."""


def call(*arguments: object) -> object:
    """Runs the command in this process, as its console script does; returns the exit code."""
    # Not at the top: the fuzzer imports the compiler itself, instrumented.
    from mixprec_build.cli.app import main

    with patch.object(sys, "argv", ["mixprec", *map(str, arguments)]):
        try:
            main()
        except SystemExit as ended:
            return ended.code or 0
    return 0


def invoke(*arguments: object, **variables: str) -> Any:
    """Runs the command with typer's runner; returns exit code, output and the exception that ``main`` would print.

    ``variables`` are environment variables for the run.
    """
    from mixprec_build.cli.app import app

    return CliRunner().invoke(app, [str(argument) for argument in arguments], env=variables)


def environment(*folders: Path, **variables: str) -> dict[str, str]:
    """This process's environment, with ``folders`` and the folder of this package first in PYTHONPATH."""
    paths = [*map(str, folders), str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, **variables, "PYTHONPATH": os.pathsep.join(paths)}


def answer_of(
    path: Path,
    options: Mapping[str, Any],
    *folders: Path,
    timeout: float = 550,
    variables: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """What an engine of SGLang's answers in a process of its own.

    Args:
        path: a checkpoint.
        options: those of ``support.sglang.ask``.
        folders: those of :func:`environment`, and ``variables`` as well.
        timeout: seconds, after which the engine is ended with all its processes.

    Raises:
        AssertionError: it ended without an answer or too late; with the end of its log.
    """
    command = [sys.executable, "-m", "support.sglang.ask", str(path), json.dumps(options)]
    # Files, not pipes: processes of an engine may live on with the other end of a pipe.
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+", errors="replace") as log:
        engine = subprocess.Popen(
            command, stdout=out, stderr=log, env=environment(*folders, **(variables or {})), start_new_session=True
        )
        try:
            ended = f"ended with {engine.wait(timeout)}"
        except subprocess.TimeoutExpired:
            ended = f"gave no answer in {timeout:.0f} s"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(engine.pid, signal.SIGKILL)
            code = engine.wait()
        lines, messages = (_all_of(file) for file in (out, log))
    assert not code, f"{' '.join(command)}\n{ended}\n{lines[-1500:]}\n{messages[-6000:]}"
    answer: dict[str, Any] = json.loads(lines.splitlines()[-1])
    return answer


def _all_of(file: IO[str]) -> str:
    file.seek(0)
    return file.read()


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Raises TimeoutError in the main thread once the context has lasted so long."""

    def late(signum: int, frame: FrameType | None) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def run_python(
    *arguments: str, cwd: Path | None = None, under: Sequence[str] = (), timeout: float = 60
) -> subprocess.CompletedProcess[str]:
    """Runs a new interpreter without access to the hub; ``under`` is a command that starts it."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "error"}
    command = [*under, sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment, cwd=cwd)


def cpu_seconds(*arguments: str, bytecode: Path) -> float:
    """User and system time of a new interpreter, in seconds. It keeps its bytecode in the folder `bytecode`, whatever
    the environment says: without it a command is measured by the length of its source."""
    environ = {**os.environ, "PYTHONPYCACHEPREFIX": str(bytecode), "PYTHONDONTWRITEBYTECODE": ""}
    before = os.times()
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True, env=environ)
    after = os.times()
    return after.children_user - before.children_user + after.children_system - before.children_system
