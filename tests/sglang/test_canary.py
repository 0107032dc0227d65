"""The canary: which products it takes, and that it sees wrong kernels and racing ones, by the reference on a CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.sglang.harness import last_json, run_python
from support.sglang.mixes import mix

from mixprec_build.families.registry import find_family
from mixprec_build.formats.awq import Awq
from mixprec_build.formats.base import Format
from mixprec_build.formats.dense import Dense
from mixprec_build.formats.fp8 import Fp8
from mixprec_build.formats.gptq import Gptq

RESULTS = """
import json, sys
from pathlib import Path
from mixprec_runtime.asking import machine
from mixprec_runtime.canary import check, product
product.LAUNCHES = 3
machine.prepare()
wrong = sys.argv[2:]
if "dequantized" in wrong:
    really = product._dequantized
    product._dequantized = lambda fmt, tensors: really(fmt, tensors) * 1.1
if "racing" in wrong:
    import torch
    def racing(made):
        def on(x):
            run, due = made.on(x)
            calls = []
            def often():
                calls.append(1)
                return run() * (1.01 if len(calls) == 3 else 1)
            return often, due
        return product._Made(made.inputs, on)
    linear = product._linear
    product._linear = lambda *args: racing(linear(*args))
found = list(check.results(Path(sys.argv[1])))
print(json.dumps([[r.what, r.error, r.limit, r.differing, r.right, check.sentence(r)] for r in found]))
"""

BF16, FP8, GPTQ, AWQ = Dense("BF16"), Fp8("block", "dynamic", (128, 128)), Gptq(4, 128, True, False, "gptq"), Awq(128)


def test_one_product_for_each_format_and_each_way_of_mixing_experts() -> None:
    from mixprec_runtime.canary.choice import Experts, Linear, choose

    formats: dict[str, Format] = {"model.embed_tokens": BF16, "lm_head": GPTQ}
    for layer in range(4):
        formats |= {f"model.layers.{layer}.self_attn.{part}": FP8 for part in ("q_proj", "o_proj")}
        formats[f"model.layers.{layer}.mlp.gate"] = BF16
        for expert in range(8):
            ups, downs = (GPTQ, AWQ) if layer == 2 and expert == 5 else (FP8, FP8) if expert < 4 else (BF16, BF16)
            if layer == 3:
                ups = downs = BF16
            name = f"model.layers.{layer}.mlp.experts.{expert}"
            formats |= {f"{name}.gate_proj": ups, f"{name}.up_proj": ups, f"{name}.down_proj": downs}
    family = find_family("qwen3_moe")
    assert family is not None
    cases = list(choose(formats, family))
    linears = [case for case in cases if isinstance(case, Linear)]
    experts = [case for case in cases if isinstance(case, Experts)]
    assert [(case.name, case.fmt) for case in linears] == [("lm_head", GPTQ), ("model.layers.0.self_attn.q_proj", FP8)]
    assert [case.layer for case in experts] == ["model.layers.0.mlp.experts", "model.layers.2.mlp.experts"]
    first, apart = experts
    assert first.formats == ((FP8, FP8),) * 2 + ((BF16, BF16),) * 2
    assert first.parts[2][2] == "model.layers.0.mlp.experts.4.down_proj"
    assert apart.formats == (*first.formats, (GPTQ, AWQ))
    assert "fp8_block + bf16 + gptq_int4/awq_int4" in apart.text


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "deepseek"])
def test_the_reference_is_right_in_every_format(folder: Path, name: str) -> None:
    found = last_json(run_python(RESULTS, str(mix(folder, name))))
    assert [what for what, *_, right, _ in found if not right] == []
    assert all(0 <= error < limit for _, error, limit, *_ in found)
    kinds = json.dumps([what for what, *_ in found])
    for kind in {"llama": ("fp8_channel", "gptq_int8", "int8_block"), "qwen3_moe": (" + ",), "deepseek": ("experts",)}[
        name
    ]:
        assert kind in kinds, kinds


def test_wrong_and_racing_kernels_are_seen(folder: Path) -> None:
    checkpoint = str(mix(folder, "llama"))
    wrong = last_json(run_python(RESULTS, checkpoint, "dequantized"))
    assert wrong and not any(right for *_, right, _ in wrong)
    assert all("e-02 of the norm off float64" in text for *_, text in wrong)
    racing = last_json(run_python(RESULTS, checkpoint, "racing"))
    assert all(differing == 2 and not right for *_, differing, right, _ in racing)
    assert all("2 of 6 launches on the same input differ" in text for *_, text in racing)


def test_launches_are_repeated_without_atomic_additions(sglang: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.layers.moe.fused_moe_triton import fused_marlin_moe

    from mixprec_runtime.canary import product

    calls: list[tuple[object, ...]] = []
    name = "moe_wna16_marlin_gemm"  # which SGLang imports on a GPU only
    gemm = lambda *args, **kwargs: calls.append((args, kwargs))  # noqa: E731
    monkeypatch.setattr(fused_marlin_moe, name, gemm, raising=False)
    with product._without_atomic_additions():
        getattr(fused_marlin_moe, name)(1, size_m=2, use_atomic_add=True)
    assert calls == [((1,), {"size_m": 2, "use_atomic_add": False})]
    assert getattr(fused_marlin_moe, name) is gemm
