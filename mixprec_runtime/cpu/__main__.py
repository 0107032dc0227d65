"""``python -m mixprec_runtime.cpu``: see :mod:`mixprec_runtime.cpu.engine`."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys

from mixprec_build.versions import INSTALL

from .engine import ENGINE, environment

__all__ = ["main"]


def main() -> None:
    if importlib.util.find_spec("sglang") is None:
        sys.exit(f"SGLang is not installed here; {INSTALL}")
    arguments = []
    for name, value in ENGINE.items():
        flag = f"--{name.replace('_', '-')}"
        arguments += [flag] if value is True else [flag, str(value)]
    command = [sys.executable, "-m", "sglang.launch_server", *arguments, *sys.argv[1:]]
    sizes = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    sizes.add_argument("--tensor-parallel-size", "--tp-size", "--tp", type=int, default=1, dest="tp")
    sizes.add_argument("--pipeline-parallel-size", "--pp-size", type=int, default=1, dest="pp")
    asked, _ = sizes.parse_known_args()
    os.execve(sys.executable, command, environment(asked.tp, asked.pp))


if __name__ == "__main__":
    main()
