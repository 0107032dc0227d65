"""Replaces sgl_kernel, whose library needs a CUDA driver to load, in processes of SGLang without a GPU.

SGLang's CPU engine imports names of it that it never calls. This file's folder is first on PYTHONPATH, which spawned
workers inherit.
"""

import sys
import types
from typing import Any


def _stand_in() -> types.ModuleType:
    module = types.ModuleType("sgl_kernel")
    module.__path__ = []
    module.__version__ = "0.0.0"  # type: ignore[attr-defined]

    def missing(*_: Any, **__: Any) -> None:
        raise RuntimeError("sgl_kernel needs a GPU, and this process runs without one")

    def lookup(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return missing

    module.__getattr__ = lookup  # type: ignore[method-assign]
    return module


sys.modules["sgl_kernel"] = _stand_in()
