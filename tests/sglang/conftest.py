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


@pytest.fixture
def streams(sglang: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces the calls for a GPU that models make in their constructors."""
    import torch
    from support.sglang.harness import prepare_deepseek_v4

    class NoStream:
        """A class, since annotations of modules that are imported later join it with others."""

        def __new__(cls, *_: object, **__: object) -> None:  # type: ignore[misc]
            return None

    monkeypatch.setattr(torch.cuda, "Stream", NoStream)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_, **__: (9, 0))
    prepare_deepseek_v4(monkeypatch)
