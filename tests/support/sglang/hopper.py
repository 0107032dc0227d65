"""Has SGLang find a GPU of the Hopper generation where there is none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from unittest.mock import patch

from sglang.srt import runtime_context

__all__ = ["hopper"]


@contextmanager
def hopper(*modules: ModuleType) -> Iterator[None]:
    """While it is open, ``modules`` find compute capability 9.0.

    They ask a function that they imported, or from 0.5.19 on the platform of the process.
    """
    with ExitStack() as stack:
        for module in modules:
            if hasattr(module, "is_sm90_supported"):
                stack.enter_context(patch.object(module, "is_sm90_supported", lambda: True))
        if hasattr(runtime_context, "override_platform"):
            stack.enter_context(runtime_context.override_platform(is_sm90=True))
        yield
