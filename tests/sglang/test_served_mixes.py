"""`tests/benchmarks/served_mixes.py`: perplexity in stock SGLang beside that of dequantized weights in transformers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from support.serving import QWEN3_MOE
from support.sglang.harness import run_python, sources

ROOT = Path(__file__).parents[2]
EXACT = """
import json, runpy, sys
import numpy as np, torch
from transformers import AutoModelForCausalLM
from mixprec_build.checkpoint.typed import open_source

script = runpy.run_path(sys.argv[1])
bf16, int4 = (open_source(path) for path in sys.argv[2:4])
tokens = torch.from_numpy(np.load(sys.argv[4]).astype(np.int64))
model = AutoModelForCausalLM.from_pretrained(sys.argv[2], dtype=torch.float32).eval()
runs = script["InTransformers"](model, bf16.facts.family, [])
for mix in ({}, json.loads(sys.argv[5])):
    runs.put({name: torch.from_numpy(int4.dequantize(name)) for name in mix})
    print(json.dumps([-runs.logprobs(w)[:-1].gather(1, w[1:, None]).mean().item() for w in tokens.split(48)]))
"""


def test_a_served_mix_loses_what_its_dequantized_weights_lose(tmp_path: Path) -> None:
    for name, path in sources(tmp_path / "made", QWEN3_MOE, ["bf16", "gptq_int4"]).items():
        (tmp_path / name).symlink_to(path)
    experts = [f"mlp.experts.{e}.{part}" for e in range(1, QWEN3_MOE.experts) for part in ("gate", "up", "down")]
    mix = {
        f"model.layers.{layer}.{linear}_proj": "gptq_int4"
        for layer in range(QWEN3_MOE.layers)
        for linear in (*(f"self_attn.{part}" for part in "qkvo"), *experts)
    }
    held = tmp_path / "held-words.npy"
    np.save(held, np.random.default_rng(0).integers(3, 512, size=80).astype(np.uint16))
    swaps = ROOT / "recipes" / "swaps.py"
    done = run_python(
        EXACT, *map(str, (swaps, tmp_path / "bf16", tmp_path / "gptq_int4", held)), json.dumps(mix), timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    exact, mixed = (json.loads(line) for line in done.stdout.splitlines()[-2:])
    kept = [
        {"megabytes": 1.0, "name": name, "mix": of, "losses": {"words": losses}}
        for name, of, losses in (("all bf16", {}, exact), ("mixed", mix, mixed))
    ]
    (tmp_path / "mixes.json").write_text(json.dumps({"window": 48, "mixes": kept}))
    code = (
        "import json, runpy, sys; from mixprec_runtime.cpu.engine import ENGINE; "
        "sys.argv = [*sys.argv[1:], '--engine', json.dumps(ENGINE)]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    script = ROOT / "tests" / "benchmarks" / "served_mixes.py"
    done = run_python(code, str(script), str(tmp_path), "--only", "mix*")
    assert done.returncode == 0, done.stderr[-4000:]
    (row,) = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| 1.0 ")]
    assert row[1] == "mixed"
    assert float(row[2]) == pytest.approx(float(row[3]), rel=0.01)
    assert abs(float(row[4].split()[0])) < abs(np.mean(mixed) - np.mean(exact)) / 4
