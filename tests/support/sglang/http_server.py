"""SGLang's HTTP server on the CPU, and a tokenizer with a word for each token."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from support.sglang.harness import free_port

__all__ = ["Server", "options", "word", "words", "write_tokenizer"]

_CHARACTERS = [chr(code) for code in range(33, 127)]


def options() -> dict[str, Any]:
    """SGLang's flags -> their argparse actions."""
    parser = argparse.ArgumentParser()
    importlib.import_module("sglang.srt.server_args").ServerArgs.add_cli_args(parser)
    return dict(parser._option_string_actions)


def word(token: int) -> str:
    """A word of letters only, since some tokenizers of transformers split numbers."""
    return "".join(chr(ord("a") + digit) for digit in (token // 26, token % 26))


def words(vocab: int) -> list[str]:
    """The text of each token: a word, and for the last ones a character each, of which other texts can be made."""
    return [*map(word, range(vocab - len(_CHARACTERS))), *_CHARACTERS]


def write_tokenizer(checkpoint: Path, vocab: int) -> None:
    """Writes a tokenizer with a word for each token."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({text: token for token, text in enumerate(words(vocab))}, unk_token=word(0)))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(checkpoint / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": word(2), "unk_token": word(0)}
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(settings))


class Server:
    """``python -m mixprec_runtime.cpu``."""

    def __init__(self, checkpoint: Path, log: Path, *flags: str, **variables: str):
        self.port, self._log = free_port(), log
        command = [sys.executable, "-W", "ignore", "-m", "mixprec_runtime.cpu", "--model-path", str(checkpoint)]
        command += ["--port", str(self.port), "--dtype", "float32", *flags]
        with log.open("w") as file:
            self.process = subprocess.Popen(
                command, stdout=file, stderr=file, start_new_session=True, env={**os.environ, **variables}
            )

    def _request(self, path: str, body: Any) -> urllib.request.Request:
        data = None if body is None else json.dumps(body).encode()
        return urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, {"Content-Type": "application/json"})

    def ask(self, path: str, body: Any = None) -> Any:
        with urllib.request.urlopen(self._request(path, body), timeout=60) as answer:
            text = answer.read()
            return json.loads(text) if text else None

    def stream(self, body: dict[str, Any]) -> Iterator[Any]:
        """Yields an answer of ``/generate`` again and again, as it grows."""
        with urllib.request.urlopen(self._request("/generate", {**body, "stream": True}), timeout=60) as answer:
            for line in answer:
                text = line.decode().removeprefix("data:").strip()
                if text and text != "[DONE]":
                    yield json.loads(text)

    def wait(self, seconds: float = 300) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            assert self.process.poll() is None, self.log()
            try:
                self.ask("/health")
                return
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.5)
        raise AssertionError(self.log())

    def flush(self) -> None:
        """Has the server forget its cache; it refuses for a moment after an answer."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/flush_cache?timeout=30", b"")
        with urllib.request.urlopen(request, timeout=60) as answer:
            answer.read()

    def log(self) -> str:
        return self._log.read_text()

    def processes(self) -> list[str]:
        """The command lines of the server and its workers, as far as they run."""
        found = []
        for process in psutil.process_iter(["cmdline", "status"]):
            with contextlib.suppress(ProcessLookupError):
                if os.getpgid(process.pid) == self.process.pid and process.info["status"] != psutil.STATUS_ZOMBIE:
                    found.append(" ".join(process.info["cmdline"]))
        return found

    def stop(self) -> None:
        if self.process.poll() is None:
            # The process group is that of the server and its workers.
            os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(30)
