"""``python -m mixprec_runtime.canary OUT``: compares SGLang's kernels on a checkpoint's weights.

Runs in a separate process, for ``mixprec doctor --kernels``. Prints JSON on its last line: a list of ``[right, text]``,
or ``{"missing": why}``.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

__all__ = ["main"]


def main() -> None:
    if any(importlib.util.find_spec(name) is None for name in ("torch", "sglang")):
        print(json.dumps({"missing": "SGLang is not installed here"}))
        return
    import torch

    if not torch.cuda.is_available():
        print(json.dumps({"missing": "torch finds no GPU, and kernels run on GPUs only"}))
        return
    from ..asking import machine
    from . import check

    machine.prepare()
    try:
        found: object = [[result.right, check.sentence(result)] for result in check.results(Path(sys.argv[1]))]
    except Exception as error:  # SGLang and kernels raise many types
        found = {"missing": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
