"""Fixtures of tests that need SGLang, but no GPU."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.run import environment

# Not "sglang" alone, by which Python could import this folder.
if importlib.util.find_spec("sglang.srt") is None:
    collect_ignore_glob = ["*.py"]
else:
    # For subprocesses of the tests.
    os.environ |= environment()
    os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of checkpoints that several tests read."""
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="session")
def sglang() -> Iterator[None]:
    """SGLang with its plugins, in this process."""
    from support.sglang import harness

    harness.start()
    yield
    for name in [name for name in sys.modules if name.startswith("vllm")]:
        del sys.modules[name]
