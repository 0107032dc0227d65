"""These tests need SGLang; a GPU they do not need."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.run import environment

# Not "sglang" alone: this folder's name, too, is one that Python can import.
if importlib.util.find_spec("sglang.srt") is None:
    collect_ignore_glob = ["*.py"]
else:
    # Its subprocesses import what the tests import.
    os.environ |= environment()
    os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where checkpoints are built that several tests read."""
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="session")
def sglang() -> Iterator[None]:
    """SGLang with its plugins, in this process."""
    from support.sglang import harness

    harness.start()
    yield
    for name in [name for name in sys.modules if name.startswith("vllm")]:
        del sys.modules[name]
