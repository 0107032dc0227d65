"""What all unit tests need of their process."""

from __future__ import annotations

import signal

import pytest


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> None:
    """A suite in the background (``make test &``, ``nohup``) is started with Ctrl-C ignored, and hands that on to the
    commands that it interrupts."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
