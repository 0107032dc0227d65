"""Serves a compiled checkpoint with SGLang on the CPU, asks it one thing over its OpenAI-compatible API, and ends.

    python recipes/demo/serve.py .demo/smollm2-mixed

What `python -m mixprec_runtime.cpu --model-path FOLDER` starts is the server that this talks to. On a GPU it is
`python -m sglang.launch_server --model-path FOLDER`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

PORT = 30017
PROMPT = "The capital of France is"


def call(path: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{PORT}{path}", data, headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        text = response.read()
    return json.loads(text) if text else None


def wait(server: subprocess.Popen[bytes], seconds: int) -> None:
    """Until the server answers."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if server.poll() is not None:
            sys.exit("the server ended; its log is in .demo/serve.log")
        try:
            call("/health")
            return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(1)
    sys.exit(f"no answer in {seconds} s; the server's log is in .demo/serve.log")


def main() -> None:
    folder = sys.argv[1]
    log = Path(".demo/serve.log")
    log.parent.mkdir(exist_ok=True)
    arguments = ["--model-path", folder, "--port", str(PORT), "--served-model-name", "demo"]
    print(f"starting SGLang on the CPU (log in {log}) ...", flush=True)
    with log.open("wb") as out:
        command = [sys.executable, "-m", "mixprec_runtime.cpu", *arguments]
        server = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
    try:
        wait(server, 300)
        body = {"model": "demo", "prompt": PROMPT, "max_tokens": 8, "temperature": 0}
        answer = call("/v1/completions", body)["choices"][0]["text"]
        memory = call("/server_info")["internal_states"][0]["mixprec"]
    finally:
        server.terminate()
        server.wait(30)
    formats = ", ".join(memory["bytes_by_format"])
    print(f"served {folder} ({formats})")
    print(f"{PROMPT}{answer}")
    if "Paris" not in answer:
        sys.exit("that is not the answer: Paris")


if __name__ == "__main__":
    main()
