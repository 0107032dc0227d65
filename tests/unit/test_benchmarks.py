"""Benchmarks of whole models, at toy size and up to where they need a GPU."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_full_size_makes_sources_and_mixes_that_verify(tmp_path: Path) -> None:
    full = runpy.run_path(str(BENCHMARKS / "full_size.py"))
    folders = full["make"](tmp_path, full["TOY"])  # which verifies what it builds
    assert [*folders] == [*full["NAMES"]]

    def kinds(name: str, part: str) -> list[str]:
        modules = json.loads((folders[name] / "mixprec_manifest.json").read_text())["modules"]
        return sorted({module["format"] for key, module in modules.items() if part in key})

    assert kinds("mix", "self_attn.q_proj") == kinds("experts4", "self_attn.q_proj") == ["fp8_block"]
    assert kinds("mix", ".experts.0.") == ["fp8_block"]
    assert kinds("mix", ".experts.1.") == kinds("experts4", ".experts.") == ["gptq_int4"]
    assert (folders["mix"] / "tokenizer.json").exists()


def test_a_mix_at_the_time_of_its_parts_has_the_ratio_one() -> None:
    full = runpy.run_path(str(BENCHMARKS / "full_size.py"))
    fp8, four = {"decode 1": 200.0, "prefill 4096": 4000.0}, {"decode 1": 250.0, "prefill 4096": 3000.0}
    mix = {key: full["predicted"](fp8[key], four[key], 1 / 8) for key in fp8}
    assert 1 / mix["decode 1"] == pytest.approx(1 / 8 / 200 + 7 / 8 / 250)
    slow = {key: value / 2 for key, value in mix.items()}
    rows = full["step_table"]({"fp8": [fp8] * 3, "experts4": [four] * 3, "mix": [mix, slow, mix]}, 1 / 8)
    assert rows[-1].startswith("| mix's time / predicted | 1.000 (1.000 to 2.000) |")
    assert rows[2].startswith("| fp8 | 200 (200 to 200) | 4,000")
    found = [
        {"output_throughput": n, "total_throughput": 5 * n, "median_ttft_ms": 90.0, "median_tpot_ms": 7.25}
        for n in (1000.0, 3000.0, 2000.0)
    ]
    expected = "| 0.4 | mix | inf | 2,000 (1,000 to 3,000) | 10,000 | 90 | 7.2 | 31 s |"
    assert full["load_row"](0.4, "mix", "inf", found, 31.4) == expected


def test_a_server_that_ends_is_not_waited_for() -> None:
    import subprocess

    full = runpy.run_path(str(BENCHMARKS / "full_size.py"))
    server = subprocess.Popen([sys.executable, "-c", "pass"], start_new_session=True)
    server.wait()
    assert full["wait_for"](server, "http://127.0.0.1:9/", 60) is None
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    full["end"](sleeper)
    assert sleeper.poll() is not None


def test_a_moe_is_trained_over_two_runs_and_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    script = runpy.run_path(str(BENCHMARKS / "trained_moe.py"))
    text = tmp_path / "text"
    text.mkdir()
    for number in range(120):
        (text / f"{number}.md").write_text(f"{number} " + "one two three four five six seven eight nine ten. " * 8)
    arguments = [str(tmp_path / "out"), "--toy", "--only-text", "--text", f"words={text}", "--steps", "16"]
    arguments += ["--batch", "4", "--parts", "2", "--window", "32", "--rate", "5e-3"]
    script["main"]([*arguments, "--minutes", "0"])
    state = torch.load(tmp_path / "out" / "state.pt", weights_only=True)
    assert state["step"] == 0
    script["main"]([*arguments, "--minutes", "9"])
    assert torch.load(tmp_path / "out" / "state.pt", weights_only=True)["step"] == 16
    losses = [float(line.split()[-4]) for line in capsys.readouterr().out.splitlines() if "held out:" in line]
    assert losses[1] < losses[0] - 1, losses
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "bf16", dtype=torch.float32)
    assert model.config.architectures == ["Qwen3MoeForCausalLM"]
    ids = AutoTokenizer.from_pretrained(tmp_path / "out" / "bf16")("one two three", return_tensors="pt").input_ids
    with torch.no_grad():
        assert model(ids, labels=ids).loss < 3
    from mixprec_build.checkpoint.typed import open_source

    names = open_source(str(tmp_path / "out" / "bf16")).checkpoint.modules
    assert "model.layers.1.mlp.experts.7.down_proj" in names

    one_run = [word for word in arguments if word not in ("--steps", "16")]
    script["main"].__globals__["TIMED"] = 1, 4
    script["main"]([*one_run, "--minutes", "0.1"])
    out = capsys.readouterr().out
    steps = int(out.partition("s a step: ")[2].split()[0])
    assert steps >= 4 and f"{tmp_path / 'out' / 'bf16'}: written" in out


def test_the_frontier_of_a_small_moe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import numpy as np
    import torch
    from support import formats

    monkeypatch.syspath_prepend(str(BENCHMARKS.parents[1] / "recipes"))
    frontier = runpy.run_path(str(BENCHMARKS / "frontier.py"))
    generator = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(128, 256, generator=generator), torch.randn(500, 256, generator=generator)
    inputs[:, 1::2] = inputs[:, ::2] + inputs[:, 1::2] / 4  # correlated, as GPTQ needs to win
    chosen = frontier["gptq"](weight, inputs.t() @ inputs)
    nearest = formats.dequantize(formats.gptq(weight))
    errors = [float(((w - weight) @ inputs.t()).square().sum()) for w in (chosen, nearest)]
    assert errors[0] < 0.8 * errors[1]
    stored = formats.dequantize(frontier["stored_int4"](chosen, weight))
    assert torch.allclose(stored, chosen, rtol=1e-6, atol=1e-8)
    mean, low, high = frontier["interval"](np.arange(100.0))
    assert (mean, low > 40, high < 60) == (49.5, True, True)

    training = runpy.run_path(str(BENCHMARKS / "trained_moe.py"))
    model = training["Training"](training["TOY"], 1, 1e-3).model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.ndim > 1 else 1)  # so that layers count
    model.to(torch.bfloat16).save_pretrained(tmp_path / "bf16")
    (tmp_path / "kinds.json").write_text('["a", "b"]')
    for name in ("seen-a", "seen-b", "held-a", "held-b"):
        np.save(tmp_path / f"{name}.npy", np.random.default_rng(len(name)).integers(512, size=128).astype(np.uint16))
    arguments = ["--budgets", "1", "--window", "32", "--windows", "2", "--seeds", "1"]
    frontier["main"]([str(tmp_path), *arguments])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    shown = [row.split(" | ")[1] for row in rows[1:]]
    assert shown[:3] == ["all bf16", "all fp8", "all int4"]
    expected = {
        "suggested, relative-output",
        "suggested, weight",
        "suggested, relative-output, no traffic",
        "frequency only",
        "random, seed 0",
    }
    assert expected <= {*shown}
    kl = {name: float(row.split(" | ")[3].split()[0]) for name, row in zip(shown, rows[1:], strict=True)}
    assert kl["all bf16"] == 0 < kl["all fp8"] < kl["all int4"]
    assert all(0 < kl[name] < 2 * kl["all int4"] for name in shown if name != "all bf16")
    default = "suggested, relative-output"
    more = {name: row.split(" | ")[4] for name, row in zip(shown, rows[1:], strict=True)}
    assert more["all int4"] == more[default] == ""
    assert float(more["random, seed 0"].split()[0]) == pytest.approx(kl["random, seed 0"] - kl[default], rel=0.05)

    parts = {"self_attn.{q,k,v}_proj": 0.3, "self_attn.o_proj": 0.1, "mlp.experts.*": 0.2}
    swaps = [
        {"modules": [f"model.layers.{layer}.{part}"], "source": source, "loss": loss * share}
        for layer in range(2)
        for part, loss in parts.items()
        for source, share in (("int4", 1), ("fp8", 0.1))
    ]
    (tmp_path / "swaps.json").write_text(json.dumps({"swaps": swaps}))
    frontier["main"]([str(tmp_path), *arguments, "--swaps", str(tmp_path / "swaps.json")])
    kept = json.loads((tmp_path / "mixes.json").read_text())["mixes"]
    assert kept[3]["name"] == "suggested, measured" and len(kept) == len(shown) + 1
    assert 0 < sum(kept[3]["kl"]["a"]) < 2 * sum(kept[2]["kl"]["a"])
    fits = [line for line in capsys.readouterr().out.splitlines() if ": r of a " in line]
    assert fits[0].startswith("suggested, measured: r of a ") and len(fits) == 6
