"""Engines that tests start: one that ends or hangs is a failure with the end of its log, and leaves nothing running."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest
from support.run import answer_of

ENGINE = """#!/bin/sh
sleep 60 &
echo "$!" > "{home}/worker"
echo "the scheduler says why" >&2
{end}
"""


def engine(home: Path, end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has a script take the place of the engine's process; it starts another process, and then does ``end``."""
    script = home / "engine"
    script.write_text(ENGINE.format(home=home, end=end))
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"  # ended, and not yet waited for


def ended_worker(home: Path) -> bool:
    pid = int((home / "worker").read_text())
    deadline = time.monotonic() + 10
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not is_running(pid)


@pytest.mark.parametrize(
    ("end", "timeout", "why"), [("exit 3", 30, "ended with 3"), ("sleep 60", 1, "gave no answer in 1 s")]
)
def test_an_engine_without_an_answer_fails_with_the_end_of_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str, timeout: float, why: str
) -> None:
    engine(tmp_path, end, monkeypatch)
    with pytest.raises(AssertionError) as failed:
        answer_of(tmp_path / "model", {}, timeout=timeout)
    assert why in str(failed.value) and "the scheduler says why" in str(failed.value)
    assert ended_worker(tmp_path)


def test_an_answer_is_the_last_line_and_ends_all_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine(tmp_path, 'echo "a log"; echo "{\\"device\\": \\"$CUDA_VISIBLE_DEVICES\\"}"', monkeypatch)
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    assert answer_of(tmp_path / "model", {}, variables={"CUDA_VISIBLE_DEVICES": "1"}) == {"device": "1"}
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == before
    assert ended_worker(tmp_path)
