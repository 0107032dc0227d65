"""``mixprec doctor --kernels`` on SGLang's kernels: all are right, in under a minute."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("sglang.srt")
if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from support.sglang.mixes import mix  # noqa: E402

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "deepseek", "mxfp4"])
def test_kernels_are_right(tmp_path: Path, name: str) -> None:
    checkpoint, began = mix(tmp_path, name), time.monotonic()
    command = [sys.executable, "-m", "mixprec_build", "doctor", "--kernels", str(checkpoint)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    print(ended.stdout, ended.stderr[-2000:])
    assert ended.returncode == 0 and "of the norm off float64" in ended.stdout
    assert time.monotonic() - began < 120  # two starts of SGLang included


def test_a_server_runs_the_canary(tmp_path: Path) -> None:
    code = (
        "import sys, sglang; engine = sglang.Engine(model_path=sys.argv[1], skip_tokenizer_init=True, "
        "log_level='info', attention_backend='triton', sampling_backend='pytorch', grammar_backend='none', "
        "disable_cuda_graph=True, mem_fraction_static=0.2); engine.shutdown()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(mix(tmp_path, "qwen3_moe"))],
        capture_output=True, text=True, timeout=400, env={**os.environ, "MIXPREC_CANARY": "1"},
    )  # fmt: skip
    said = done.stdout + done.stderr
    print(said[-4000:])
    assert "products of SGLang's kernels are right" in said
