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
    ranks = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    ranks.add_argument("--tensor-parallel-size", "--tp-size", "--tp", type=int, default=1, dest="tp")
    os.execve(sys.executable, command, environment(ranks.parse_known_args()[0].tp))


if __name__ == "__main__":
    main()
