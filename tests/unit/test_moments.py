"""`recipes/moments.py` beside the moments of a model's layers computed here, token by token."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from support.serving import LLAMA, MIXTRAL, QWEN3_MOE, Shape, write_sources
from transformers import AutoModelForCausalLM

from mixprec_build.checkpoint.typed import open_source

RECIPE = Path(__file__).parents[2] / "recipes" / "moments.py"
SIZES = {"hidden": 64, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 16, "vocab": 128}
TOKENS, WINDOW = 40, 16


@pytest.mark.parametrize(
    ("shape", "block"),
    [
        (LLAMA.of(**SIZES, intermediate=96), ""),
        (QWEN3_MOE.of(**SIZES, experts=6, top_k=2, expert_intermediate=32), "mlp"),
        (MIXTRAL.of(**SIZES, experts=6, top_k=2, expert_intermediate=32), "block_sparse_moe"),
    ],
    ids=["llama", "qwen3_moe", "mixtral"],
)
def test_moments_are_those_of_each_modules_own_tokens(tmp_path: Path, shape: Shape, block: str) -> None:
    folder = write_sources(tmp_path, shape, ["bf16"])["bf16"]
    source = open_source(str(folder))
    modules = source.checkpoint.modules
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.randint(3, 128, (TOKENS,), generator=torch.Generator().manual_seed(0))
    found = runpy.run_path(str(RECIPE))["collect"](model, modules, source.facts.family, ids, WINDOW)

    seen: dict[str, list[torch.Tensor]] = {}
    for number, layer in enumerate(model.model.layers):
        layer.self_attn.o_proj.register_forward_pre_hook(keep(seen, f"model.layers.{number}.self_attn.o_proj"))
        layer.mlp.register_forward_pre_hook(keep(seen, f"model.layers.{number}.mlp"))
    with torch.no_grad():
        for part in ids.split(WINDOW):
            model(part[None])
        due = {name: rows for name, rows in seen.items() if name.endswith("o_proj")}
        for number, layer in enumerate(model.model.layers):
            prefix = f"model.layers.{number}"
            for x in seen[f"{prefix}.mlp"]:
                if not block:
                    due.setdefault(f"{prefix}.mlp.gate_proj", []).append(x)
                    middle = layer.mlp.act_fn(layer.mlp.gate_proj(x)) * layer.mlp.up_proj(x)
                    due.setdefault(f"{prefix}.mlp.down_proj", []).append(middle)
                    continue
                gate, up, down = ("gate_proj", "up_proj", "down_proj") if block == "mlp" else ("w1", "w3", "w2")
                gates, chosen = (layer.mlp.gate.weight @ x).softmax(0).topk(shape.top_k)
                # Both models normalize the weights of the chosen.
                for g, expert in zip(gates / gates.sum(), chosen.tolist(), strict=True):
                    name = f"{prefix}.{block}.experts.{expert}"
                    joined = layer.mlp.experts.gate_up_proj[expert] @ x
                    first, second = joined.chunk(2)
                    due.setdefault(f"{name}.{gate}", []).append(g * x)
                    due.setdefault(f"{name}.{up}", []).append(g * x)
                    due.setdefault(f"{name}.{down}", []).append(g * layer.mlp.experts.act_fn(first) * second)
    for name, rows in due.items():
        expected = torch.stack(rows).double().square().mean(0)
        torch.testing.assert_close(found[name].double(), expected, rtol=1e-4, atol=1e-9, msg=name)
    linears = {name for name, m in modules.items() if "weight" in m.tensors and len(m.tensors["weight"].shape) == 2}
    assert linears - found.keys() <= {"model.embed_tokens", "lm_head", *(n for n in linears if n.endswith(".gate"))}


def keep(seen: dict[str, list[torch.Tensor]], name: str) -> Any:
    return lambda _, inputs: seen.setdefault(name, []).extend(inputs[0].reshape(-1, inputs[0].shape[-1]))
