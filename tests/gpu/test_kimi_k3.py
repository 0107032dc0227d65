"""Kimi-K3's release in small, with experts in MXFP4, compiled, against the release in stock SGLang on Marlin: tokens
and logprobs."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("sglang.srt")
if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from support.image_families import KIMI_K3_WIDE  # noqa: E402
from support.run import answer_of  # noqa: E402
from support.sglang.families import write_family  # noqa: E402

pytestmark = pytest.mark.gpu

HERE = Path(__file__).parent
# Of a logprob, in nats: twenty times what was seen once. Those of the first tokens of a text are 0.1 to 1.2 apart.
NOISE = 0.005
ENGINE = {
    **KIMI_K3_WIDE.options, "enable_multimodal": False, "mem_fraction_static": 0.3, "max_total_tokens": 8192,
    "max_mamba_cache_size": 32, "max_running_requests": 4, "cuda_graph_max_bs_decode": 1, "cuda_graph_bs_decode": [1],
    "cuda_graph_max_bs_prefill": 32, "cuda_graph_bs_prefill": [32],
}  # fmt: skip


def ask(path: Path, port: int, **engine: Any) -> dict[str, Any]:
    options = {"dtype": "bfloat16", "logits": True, "engine": {**ENGINE, "nccl_port": port, **engine}}
    return answer_of(path, options, HERE / "repeatable")


def test_it_answers_as_natively_on_marlin(tmp_path: Path) -> None:
    """But for rounding: SGLang tunes kernels of linear attention anew in each server, and another choice adds up in
    another order. Layers of experts alone are equal to the bit (test_experts.py).

    With logprobs that are off by at most ``NOISE``, greedy tokens can differ only where the two largest are that near;
    what follows is another text.
    """
    release, out = write_family(tmp_path, KIMI_K3_WIDE)["mxfp4"], tmp_path / "compiled"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {release}\n")
    subprocess.run([sys.executable, "-m", "mixprec_build", "build", recipe, "-o", out], check=True)
    with ThreadPoolExecutor(2) as pool:
        both = pool.submit(ask, out, 27000), pool.submit(ask, release, 27020, moe_runner_backend="marlin")
    found, due = (future.result() for future in both)
    apart, alike, total = [], 0, 0
    for ours, theirs, p, q in zip(found["tokens"], due["tokens"], found["logprobs"], due["logprobs"], strict=True):
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(ours, theirs, strict=True)))
        apart += [abs(a - b) for a, b in zip(p[: same + 1], q[: same + 1], strict=True)]
        alike, total = alike + same, total + len(ours)
    exact = sum(p == q for p, q in zip(found["logprobs"], due["logprobs"], strict=True))
    print(f"\n{exact} of {len(found['tokens'])} prompts to the bit; {alike} of {total} tokens before one that differs")
    print(f"logprobs up to there at most {max(apart):.1e} apart; memory: {found['memory']}")
    assert max(apart) < NOISE
    assert alike > 0.9 * total
