"""What all unit tests need of their process, and the command line for them."""

from __future__ import annotations

import signal

import pytest
from support.run import Ended, Run, call


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> None:
    """A suite in the background (``make test &``, ``nohup``) is started with Ctrl-C ignored, and hands that on to the
    commands that it interrupts."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def mixprec(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command in this process, away from the hub, as its console script would."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run(*arguments: object) -> Ended:
        capsys.readouterr()
        code = call(*arguments)
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return Ended(code, out, err)

    return run


@pytest.fixture
def older_sglang(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang 0.5.17 beside mixprec, which has kernels that later releases have not."""
    monkeypatch.setattr("mixprec_build.planning.planner.beside", lambda: "0.5.17")
