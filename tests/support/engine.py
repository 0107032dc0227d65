"""An engine of SGLang's in a process of its own, for benchmarks that run several side by side and measure in turns."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["Served", "ask"]


def ask(path: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """What one engine answers, in a process of its own. ``options`` are those of ``support.sglang.ask``."""
    command = [sys.executable, "-m", "support.sglang.ask", str(path), json.dumps(options)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{path}: the engine ended; its log is above")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


class Served:
    """One engine, which measures when a line is written to it. ``options`` are those of ``support.sglang.ask``."""

    def __init__(self, path: Path, options: Mapping[str, Any], environment: Mapping[str, str] | None = None):
        command = [sys.executable, "-m", "support.sglang.ask", str(path), json.dumps(options)]
        own = {**os.environ, **(environment or {})}
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=own)
        self._path = path

    def _line(self, wanted: str) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(wanted):
                return line
        sys.exit(f"{self._path}: the engine ended; its log is above")

    def wait(self) -> None:
        self._line("ready")

    def turn(self) -> dict[str, float]:
        """Tokens a second."""
        assert self._process.stdin is not None
        self._process.stdin.write("again\n")
        self._process.stdin.flush()
        rates: dict[str, float] = json.loads(self._line("measured").partition(" ")[2])
        return rates

    def end(self) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.close()
        answer: dict[str, Any] = json.loads(self._line("{"))
        self._process.wait()
        return answer
