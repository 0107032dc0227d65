"""The counter of expert activity: in layers, compared with SGLang's own recorder, and in the real engine."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.sglang.harness import last_json, run_python
from support.sglang.mixes import MIXES, mix

import mixprec_runtime.cpu.engine
from mixprec_build.suggesting.activity import read_activity

PROMPTS = [[1, 2, 3, 4, 5, 6, 7, 8], [9, 10, 11], [400, 30, 2, 77, 5]]
TOKENS = 6
SEEN = sum(map(len, PROMPTS)) + len(PROMPTS) * (TOKENS - 1)  # the last token of an answer is not run

ASK = """
import json, sys
import sglang
import torch

# SGLang's own recorder asks for these on any device.
torch.cpu.is_current_stream_capturing = lambda: False
torch.cpu.empty_cache = lambda: None

from mixprec_runtime.cpu.engine import ENGINE

if __name__ == "__main__":
    path, prompts, tokens, options = json.loads(sys.argv[1])
    settings = {**ENGINE, "dtype": "float32", "log_level": "info", "disable_radix_cache": True, **options}
    engine = sglang.Engine(model_path=path, skip_tokenizer_init=True, **settings)
    greedy = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}

    def ask():
        return [o["output_ids"] for o in engine.generate(input_ids=prompts, sampling_params=greedy)]

    def state():
        return engine.get_server_info()["internal_states"][0].get("mixprec_expert_activity")

    out = {"tokens": ask(), "first": state()}
    if out["first"]:
        engine.stop_expert_distribution_record()
        ask()
        out["paused"] = state()
        engine.start_expert_distribution_record()
        out["started"] = state()
        ask()
        engine.dump_expert_distribution_record()
        out["dumped"] = state()
    engine.shutdown()
    print(json.dumps(out))
"""


def ask(folder: Path, name: str, ranks: int = 1, count: bool = True, **options: Any) -> dict[str, Any]:
    script = folder / "activity.py"
    script.write_text(ASK)
    environment = mixprec_runtime.cpu.engine.environment(ranks)
    if count:
        environment |= {"MIXPREC_EXPERT_ACTIVITY": "1", "MIXPREC_EXPERT_ACTIVITY_FILE": str(folder / f"{name}.json")}
        environment["SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR"] = str(folder / "dumps")
    command = [
        sys.executable,
        "-W",
        "ignore",
        str(script),
        json.dumps([str(mix(folder, name)), PROMPTS, TOKENS, options]),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    answer: dict[str, Any] = last_json(done)
    return answer


@pytest.fixture(scope="module")
def served(folder: Path) -> dict[str, Any]:
    return ask(
        folder, "qwen3_moe", expert_distribution_recorder_mode="stat", expert_distribution_recorder_buffer_size=-1
    )


def test_every_token_counts_once_for_each_of_its_experts(served: dict[str, Any]) -> None:
    shape = MIXES["qwen3_moe"][0]
    first = served["first"]
    assert first["recording"]
    assert first["routed_tokens"] == {str(layer): SEEN for layer in range(shape.layers)}
    for counts in first["counts"].values():
        assert len(counts) == shape.experts
        assert sum(counts) == SEEN * shape.top_k


def test_requests_of_sglang_control_it(served: dict[str, Any], folder: Path) -> None:
    first = served["first"]
    assert served["paused"] == {**first, "recording": False}
    assert served["started"]["recording"] and not any(map(sum, served["started"]["counts"].values()))
    assert not any(map(sum, served["dumped"]["counts"].values()))
    # The dump has the third round of prompts only, which is like the first.
    dumped = read_activity([folder / "qwen3_moe.json"])
    assert {str(layer): counts.tolist() for layer, counts in dumped.counts.items()} == first["counts"]
    assert {str(layer): tokens for layer, tokens in dumped.tokens.items()} == first["routed_tokens"]
    data = json.loads((folder / "qwen3_moe.json").read_text())
    entry = data["expert_stats"]["layer_0_expert_1"]
    assert entry.keys() >= {
        "layer_id",
        "expert_id",
        "activation_count",
        "last_activation_time",
        "total_tokens_processed",
    }
    assert data["top_experts"][0]["activation_count"] == max(map(max, first["counts"].values()))


def test_sglangs_recorder_counts_the_same(served: dict[str, Any], folder: Path) -> None:
    """SGLang's own dump of the same round, read by `mixprec experts`."""
    (dump,) = (folder / "dumps").glob("expert_distribution_recorder_*.pt")
    theirs, ours = read_activity([dump]), read_activity([folder / "qwen3_moe.json"])
    assert {layer: counts.tolist() for layer, counts in theirs.counts.items()} == {
        layer: counts.tolist() for layer, counts in ours.counts.items()
    }


def test_two_ranks_count_once(served: dict[str, Any], folder: Path) -> None:
    found = ask(folder, "mixtral", ranks=2, tp_size=2, ep_size=2)
    shape = MIXES["mixtral"][0]
    assert {sum(counts) for counts in found["first"]["counts"].values()} == {SEEN * shape.top_k}
    assert found["dumped"]["recording"]


def test_off_it_counts_nothing_and_answers_alike(served: dict[str, Any], folder: Path) -> None:
    off = ask(folder, "qwen3_moe", count=False)
    assert off["first"] is None
    assert off["tokens"] == served["tokens"]


# The counter


@pytest.mark.usefixtures("sglang")
def test_rows_that_fill_up_and_ids_of_others_do_not_count() -> None:
    from mixprec_runtime.activity.counter import ExpertCounter

    random = torch.Generator().manual_seed(0)
    counter = ExpertCounter({3: 8, 5: 4}, torch.device("cpu"))
    expected: dict[int, Counter[int]] = {3: Counter(), 5: Counter()}
    tokens = Counter[int]()
    for rows in (7, 16, 0, 1):
        counter.begin(rows)
        for layer, experts in ((3, 8), (5, 4)):
            ids = torch.randint(-1, experts + 2, (16, 3), generator=random)  # -1, and fused shared experts
            counter.add(layer, ids.to(torch.int32))
            for row in ids[:rows].tolist():
                chosen = [e for e in row if 0 <= e < experts]
                expected[layer].update(chosen)
                tokens[layer] += 0 <= row[0] < experts
    counter.recording = False
    counter.begin(16)
    counter.add(3, torch.zeros(16, 3, dtype=torch.int32))
    found = counter.read()
    for layer, experts in ((3, 8), (5, 4)):
        assert found[layer] == ([expected[layer][e] for e in range(experts)], tokens[layer])
    counter.reset()
    assert counter.read() == {3: ([0] * 8, 0), 5: ([0] * 4, 0)}


@pytest.mark.usefixtures("sglang")
def test_replicas_write_files_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mixprec_runtime.activity import hooks as activity
    from mixprec_runtime.activity.tracker import ExpertActivationTracker

    monkeypatch.setenv(activity.FILE, str(tmp_path / "activity.json"))
    monkeypatch.setattr(activity, "tracker", ExpertActivationTracker())
    for dp, pp in ((None, 0), (0, 0), (1, 0), (2, 1)):
        scheduler = SimpleNamespace(ps=SimpleNamespace(dp_rank=dp, pp_rank=pp))
        activity._dump(activity._replica(scheduler))
    assert {path.name for path in tmp_path.iterdir()} == {"activity.json", "activity-dp1.json", "activity-dp2-pp1.json"}


@pytest.mark.usefixtures("sglang")
def test_a_file_that_cannot_be_written_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from mixprec_runtime.activity import hooks as activity
    from mixprec_runtime.activity.tracker import ExpertActivationTracker

    (tmp_path / "file").write_text("")
    monkeypatch.setenv(activity.FILE, str(tmp_path / "file" / "activity.json"))
    tracker = ExpertActivationTracker()
    monkeypatch.setattr(activity, "tracker", tracker)
    tracker.record_expert_activation(0, 1)
    activity._dump("")
    assert "cannot write expert activity to" in caplog.text
    assert tracker.snapshot()["expert_stats"].keys() == {"layer_0_expert_1"}


INTERPRETED = """
import json, torch
from mixprec_runtime.activity.counter import ExpertCounter

class Kernel(ExpertCounter):
    _add = ExpertCounter._launch

random = torch.Generator().manual_seed(0)
plain, one_by_one, together = (kind({3: 8, 5: 4}, torch.device("cpu")) for kind in (ExpertCounter, Kernel, Kernel))
for rows, wide, layers in ((7, 3, (3, 5)), (130, 8, (3, 5)), (0, 3, (3, 5)), (1, 1, (5,)), (300, 8, (3, 5))):
    ids = {n: torch.randint(-1, n + 4, (max(rows, 1) + 9, wide), generator=random).int() for n in layers}
    if rows == 7:
        ids = {n: i.t().contiguous().t() for n, i in ids.items()}
    for counter in (plain, one_by_one, together):
        counter.begin(rows)
    for layer in layers:
        plain.add(layer, ids[layer])
        one_by_one.add(layer, ids[layer])
    with together.together():
        for layer in layers:
            together.add(layer, ids[layer])
print(json.dumps([plain.read(), one_by_one.read(), together.read()]))
"""


def test_the_kernel_counts_as_torch() -> None:
    """Runs the kernel in Triton's interpreter, without a GPU."""
    plain, *kernels = last_json(run_python(INTERPRETED, TRITON_INTERPRET="1"))
    assert kernels == [plain, plain]
    assert all(sum(counts) and tokens for counts, tokens in plain.values())


@pytest.mark.usefixtures("sglang")
def test_kernels_that_choose_for_themselves_are_refused() -> None:
    from mixprec_runtime.activity.counter import ExpertCounter
    from mixprec_runtime.activity.hooks import _counted

    counter = ExpertCounter({0: 4}, torch.device("cpu"))
    forward = _counted(SimpleNamespace(layer_id=0), lambda *_: None, counter)
    with pytest.raises(RuntimeError, match="chosen inside a kernel and cannot be counted"):
        forward(torch.zeros(1, 2), SimpleNamespace(router_logits=None))


@pytest.mark.usefixtures("sglang")
def test_the_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    from mixprec_runtime.activity.hooks import SWITCH, enabled

    for value, expected in (("1", True), ("true", True), ("0", False), ("", False), ("off", False)):
        monkeypatch.setenv(SWITCH, value)
        assert enabled() is expected
    monkeypatch.setenv(SWITCH, "perhaps")
    with pytest.raises(RuntimeError, match="MIXPREC_EXPERT_ACTIVITY='perhaps': write 1 or 0"):
        enabled()


# The tracker


@pytest.mark.usefixtures("sglang")
def test_the_tracker(tmp_path: Path) -> None:
    from mixprec_runtime.activity.counter import ExpertCounter
    from mixprec_runtime.activity.tracker import ExpertActivationTracker

    tracker = ExpertActivationTracker(max_history=2)
    tracker.record_expert_activation(0, 1, tokens_processed=5, request_id="a")
    tracker.record_expert_activation(0, 1, 2)
    tracker.record_expert_activation(2, 0)
    for request in "abc":
        tracker.record_request(request, 10, 5)
    entry = tracker.get_expert_stats(0, 1)
    assert entry.pop("last_activation_time") > 0
    assert entry == {"layer_id": 0, "expert_id": 1, "activation_count": 2, "total_tokens_processed": 7}
    assert tracker.get_expert_stats(9, 9) == {}
    assert tracker.get_expert_stats().keys() == {"layer_0_expert_1", "layer_2_expert_0"}
    counter = ExpertCounter({2: 3}, torch.device("cpu"))
    counter.add(2, torch.tensor([[0, 2], [0, 1]]))
    tracker.attach(counter)
    assert tracker.get_expert_stats(2, 0)["activation_count"] == 3
    assert [(e["layer_id"], e["expert_id"]) for e in tracker.get_top_experts(2)] == [(2, 0), (0, 1)]
    stats = tracker.get_layer_stats()
    assert stats[0]["total_tokens"] == 7 and "routed_tokens" not in stats[0]
    assert (stats[2]["total_experts"], stats[2]["total_activations"], stats[2]["routed_tokens"]) == (3, 5, 2)
    tracker.export_stats(tmp_path / "deep" / "stats.json")
    data = json.loads((tmp_path / "deep" / "stats.json").read_text())
    assert [request["request_id"] for request in data["requests"]] == ["b", "c"]
    read = read_activity([tmp_path / "deep" / "stats.json"])
    assert {layer: counts.tolist() for layer, counts in read.counts.items()} == {0: [0, 7], 2: [3, 1, 1]}
    tracker.reset_stats()
    assert not any(entry["activation_count"] for entry in tracker.get_expert_stats().values())
    assert tracker.snapshot()["requests"] == []
