"""Runs layers of experts on one input again and again, and prints how many answers differ from the first.

``python -m support.sglang.repeated '["awq_int4", "fp8_block+gptq_int4"]'`` prints ``{layer: [answers that differ, worst
error]}``: errors are relative, against float64. Run it with ``tests/gpu/repeatable`` first on ``PYTHONPATH``: without
it, the order of additions is chance.
"""

from __future__ import annotations

import json
import sys

import torch

from support.sglang import layers

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, LAUNCHES = 1024, 512, 32, 8, 300
TOKENS = (1, 8, 24, 64, 256)


def measure(kinds: list[str]) -> tuple[int, float]:
    layer, dense = layers.make_layer(
        [(kind, EXPERTS // len(kinds)) for kind in kinds], hidden=HIDDEN, intermediate=INTERMEDIATE
    )
    differing = torch.zeros((), dtype=torch.int64, device="cuda")
    worst = 0.0
    for tokens in TOKENS:
        x = torch.randn(tokens, HIDDEN, device="cuda", dtype=torch.bfloat16)
        ids = torch.rand(tokens, EXPERTS, device="cuda").argsort(1)[:, :TOP_K].to(torch.int32)
        weights = torch.rand(tokens, TOP_K, device="cuda").softmax(-1)
        first = layers.run(layer, x, ids, weights).clone()
        due = layers.reference(x, ids, weights, dense)
        worst = max(worst, ((first.double() - due).norm() / due.norm()).item())
        for _ in range(LAUNCHES):
            differing += (layers.run(layer, x, ids, weights) != first).any()
    return int(differing), worst


if __name__ == "__main__":
    layers.start_sglang(port=29533)  # the test that starts this may have the usual one
    print(json.dumps({name: measure(name.split("+")) for name in json.loads(sys.argv[1])}))
