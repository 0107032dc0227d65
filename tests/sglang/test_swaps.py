"""`recipes/swaps.py --engine sglang`: swaps put into a server of stock SGLang, beside the same in transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.serving import LLAMA, QWEN3_MOE, Shape
from support.sglang.harness import last_json, run_python, sources

RECIPE = Path(__file__).parents[2] / "recipes" / "swaps.py"
CODE = """
import json, runpy, sys
import sglang, torch
from transformers import AutoModelForCausalLM
from mixprec_build.checkpoint.typed import open_source
from mixprec_runtime.cpu.engine import ENGINE

def main():
    script = runpy.run_path(sys.argv[1])
    bf16, int4 = (open_source(path) for path in sys.argv[2:4])
    ids = torch.randint(3, 512, (48,), generator=torch.Generator().manual_seed(0))
    engine = sglang.Engine(
        model_path=sys.argv[2], skip_tokenizer_init=True, disable_radix_cache=True, log_level="warning",
        dtype="bfloat16", **ENGINE,
    )
    served = script["InSGLang"](engine, [ids], 512)
    model = AutoModelForCausalLM.from_pretrained(sys.argv[2], dtype=torch.float32).eval()
    exact = script["InTransformers"](model, bf16.facts.family, [ids])
    found = []
    try:
        for runs in (served, exact):
            runs.keep_reference()
        for names in json.loads(sys.argv[4]):
            pair = []
            for runs, dtype in ((served, torch.bfloat16), (exact, torch.float32)):
                runs.put({name: torch.from_numpy(int4.dequantize(name)).to(dtype) for name in names})
                pair.append(runs.loss(names))
                runs.put({name: torch.from_numpy(bf16.dequantize(name)).to(dtype) for name in names})
            found.append([*pair, served.loss(names)])
    finally:
        served.close()
    print(json.dumps(found))

if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize("shape", [LLAMA, QWEN3_MOE], ids=["llama", "qwen3_moe"])
def test_swaps_in_sglang_lose_what_they_lose_in_transformers(tmp_path: Path, shape: Shape) -> None:
    paths = sources(tmp_path, shape, ["bf16", "gptq_int4"])
    attention = [f"model.layers.0.self_attn.{part}_proj" for part in "qkv"]
    mlp = [f"model.layers.1.mlp.{part}_proj" for part in ("gate", "up")]
    experts = [
        f"model.layers.1.mlp.experts.{e}.{part}_proj" for e in range(shape.experts) for part in ("gate", "up", "down")
    ]
    (tmp_path / "code.py").write_text(CODE)  # SGLang's workers import the main module anew
    starter = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    arguments = [str(RECIPE), str(paths["bf16"]), str(paths["gptq_int4"]), json.dumps([attention, experts or mlp])]
    found = last_json(run_python(starter, str(tmp_path / "code.py"), *arguments))
    for served, exact, left in found:
        assert left == 0  # what was swapped is put back, and answers repeat
        assert served == pytest.approx(exact, rel=0.3)
