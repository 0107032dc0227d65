"""The counter of expert activity on a GPU: in CUDA graphs that are filled up, in compiled code, and in neither."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("sglang.srt")
if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from support.run import environment  # noqa: E402
from support.serving import QWEN3_MOE, write_sources  # noqa: E402
from support.sglang.ask import COMPILED  # noqa: E402

pytestmark = pytest.mark.gpu

MOE = QWEN3_MOE.of(
    hidden=1024, layers=3, heads=16, kv_heads=8, head_dim=128, vocab=1024, experts=32, top_k=8, expert_intermediate=512
)
PROMPTS, NEW = 4, 9


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("activity")
    sources = write_sources(folder, MOE, ["bf16", "fp8_block"])
    lines = [f"model: {sources['bf16']}", "sources:", *(f"  {name}: {path}" for name, path in sources.items())]
    lines += ["default: bf16", "weights:", "  'model.layers.{0,1}.mlp.experts.{0..15}.*': fp8_block"]
    (folder / "mix.yaml").write_text("\n".join(lines))
    command = [sys.executable, "-m", "mixprec_build", "build", folder / "mix.yaml", "-o", folder / "mix"]
    subprocess.run(command, check=True)
    return folder / "mix"


def ask(checkpoint: Path, **engine: Any) -> dict[str, Any]:
    options = {"prompts": PROMPTS, "new_tokens": NEW, "engine": {"mem_fraction_static": 0.3, **engine}}
    # Else a finished request runs one step more, whose token nobody gets.
    options["engine"]["disable_overlap_schedule"] = True  # type: ignore[index]
    command = [sys.executable, "-m", "support.sglang.ask", str(checkpoint), json.dumps(options)]
    counted = environment(MIXPREC_EXPERT_ACTIVITY="1")
    done = subprocess.run(command, capture_output=True, text=True, timeout=550, env=counted)
    assert done.returncode == 0, done.stderr[-4000:]
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def test_graphs_count_what_their_tokens_chose(mixed: Path) -> None:
    # Prompts of 24 tokens one by one; graphs of 8 rows of which one is a token; the last token is not run.
    seen = PROMPTS * (24 + NEW - 1)
    alone = {"cuda_graph_bs_decode": [1], "cuda_graph_max_bs_decode": 1}
    answers = [
        ask(mixed, cuda_graph_bs_decode=[8], cuda_graph_max_bs_decode=8, nccl_port=23100),
        ask(mixed, disable_cuda_graph=True, nccl_port=23140),
        ask(mixed, **alone, **COMPILED["piecewise"], nccl_port=23180),
        ask(mixed, **alone, **COMPILED["torch.compile"], nccl_port=23220),
    ]
    for answer in answers:
        assert answer["activity"]["routed_tokens"] == {str(layer): seen for layer in range(MOE.layers)}
        assert {sum(counts) for counts in answer["activity"]["counts"].values()} == {seen * MOE.top_k}
    if answers[0]["tokens"] == answers[1]["tokens"]:
        assert answers[0]["activity"]["counts"] == answers[1]["activity"]["counts"]
