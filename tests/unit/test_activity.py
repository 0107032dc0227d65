"""`mixprec experts`: what it reads, adds up and draws."""

from __future__ import annotations

import json
import os
import re
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from support.run import invoke

from mixprec_build.errors import OutputError, StatsError
from mixprec_build.report.figures import draw_heatmap, show_heatmap
from mixprec_build.suggesting.activity import Activity, activity_facts, balance_of, gini, read_activity

COUNTS = {1: [5, 0, 20, 15], 3: [1, 1, 1, 37]}


def write_stats(path: Path, counts: dict[int, list[int]], tokens: dict[int, int] | None = None) -> Path:
    experts = {
        f"layer_{layer}_expert_{e}": {
            "layer_id": layer,
            "expert_id": e,
            "activation_count": count,
            "last_activation_time": 1.5,
            "total_tokens_processed": count,
        }
        for layer, row in counts.items()
        for e, count in enumerate(row)
    }
    layers = {str(layer): {"routed_tokens": n} for layer, n in (tokens or {}).items()}
    path.write_text(json.dumps({"expert_stats": experts, "layer_stats": layers, "top_experts": []}))
    return path


def lists(activity: Activity) -> dict[int, list[int]]:
    return {layer: counts.tolist() for layer, counts in activity.counts.items()}


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=40).filter(any))
def test_gini_is_the_mean_difference(values: list[int]) -> None:
    counts = np.array(values)
    differences = np.abs(counts[:, None] - counts[None, :]).mean()
    assert gini(counts) == pytest.approx(differences / (2 * counts.mean()), abs=1e-12)


def test_balance() -> None:
    even, one = balance_of(np.full(20, 7)), balance_of(np.array([0] * 19 + [9]))
    assert (even.variation, even.gini, even.top_coverage, even.unused) == (0, pytest.approx(0), 0.1, 0)
    assert (one.variation, one.gini, one.top_coverage, one.unused) == (pytest.approx(19**0.5), 0.95, 1.0, 19)


def test_files_are_added_up(tmp_path: Path) -> None:
    a = write_stats(tmp_path / "a.json", COUNTS, {1: 20, 3: 20})
    b = write_stats(tmp_path / "b.json", {1: [1, 1], 4: [2]}, {4: 2})
    merged = read_activity([a, b])
    assert lists(merged) == {1: [6, 1, 20, 15], 3: [1, 1, 1, 37], 4: [2]}
    assert merged.tokens == {3: 20, 4: 2}  # the second file does not say how many layer 1 saw


def test_a_batch_counts_by_its_tokens(tmp_path: Path) -> None:
    path = write_stats(tmp_path / "a.json", {0: [3, 4]})
    data = json.loads(path.read_text())
    data["expert_stats"]["layer_0_expert_0"]["total_tokens_processed"] = 96
    path.write_text(json.dumps(data))
    assert lists(read_activity([path])) == {0: [96, 4]}


@pytest.mark.parametrize(("tokens", "times", "count"), [(9, 3, 9), (0, 3, 3), (9, None, 9), (None, 3, 3), (0, None, 0)])
def test_either_count_is_enough(tmp_path: Path, tokens: int | None, times: int | None, count: int) -> None:
    given = {"total_tokens_processed": tokens, "activation_count": times}
    entry = {"layer_id": 0, "expert_id": 1} | {key: value for key, value in given.items() if value is not None}
    other = {"layer_id": 0, "expert_id": 0, "activation_count": 1}
    (tmp_path / "a.json").write_text(json.dumps({"expert_stats": {"a": other, "b": entry}}))
    assert lists(read_activity([tmp_path / "a.json"])) == {0: [1, count]}


def test_a_small_file_takes_no_memory(tmp_path: Path) -> None:
    """Layers that count one expert of a high id each: refused, or little more than the arrays."""
    for layers in (15, 40):
        found = {str(i): {"layer_id": i, "expert_id": 65535, "activation_count": i + 1} for i in range(layers)}
        (tmp_path / f"{layers}.json").write_text(json.dumps({"expert_stats": found}))
    tracemalloc.start()
    try:
        facts = activity_facts(read_activity([tmp_path / "15.json"]), 3)
        with pytest.raises(StatsError, match=r"2,621,440 experts in all layers, .* at most 1,048,576 are read"):
            read_activity([tmp_path / "40.json"])
        assert tracemalloc.get_traced_memory()[1] < 80 << 20
    finally:
        tracemalloc.stop()
    assert facts["top_experts"][0] == {"layer": 14, "expert": 65535, "activations": 15, "share": 15 / 120}
    assert facts["experts"] == 15 << 16


@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=5), min_size=1, max_size=4), st.integers(0, 30))
def test_the_busiest_are_in_order(rows: list[list[int]], top: int) -> None:
    rows = [*rows, [1]]
    facts = activity_facts(Activity({3 * i: np.array(row) for i, row in enumerate(rows)}, {}), top)
    every = [(-count, 3 * i, e) for i, row in enumerate(rows) for e, count in enumerate(row)]
    listed = [(-entry["activations"], entry["layer"], entry["expert"]) for entry in facts["top_experts"]]
    assert listed == sorted(every)[:top]


def test_sglangs_dumps(tmp_path: Path) -> None:
    """Of mode stat, per_pass with two copies of an expert, and per_token; layer 0 is dense."""
    logical = torch.tensor([[0, 0, 0, 0], COUNTS[1], [0, 0, 0, 0], COUNTS[3]], dtype=torch.int32)
    torch.save({"rank": 0, "logical_count": torch.stack([logical, logical])}, tmp_path / "stat.pt")
    assert lists(read_activity([tmp_path / "stat.pt"])) == {n: [2 * c for c in row] for n, row in COUNTS.items()}

    places = torch.tensor([[0, 1, 2, 3, 0]]).repeat(4, 1)  # a fifth place holds expert 0 again
    physical = torch.cat([logical, torch.zeros(4, 1, dtype=torch.int32)], 1)
    physical[1, 0], physical[1, 4] = 2, 3
    records = [{"forward_pass_id": 1, "global_physical_count": physical}]
    torch.save({"records": records, "last_physical_to_logical_map": places}, tmp_path / "pass.pt")
    assert lists(read_activity([tmp_path / "pass.pt"])) == COUNTS

    ids = torch.full((4, 6, 2), -1)
    ids[1, :2] = torch.tensor([[4, 2], [0, 3]])
    torch.save({"records": [{"topk_ids_of_layer": ids}], "last_physical_to_logical_map": places}, tmp_path / "token.pt")
    assert lists(read_activity([tmp_path / "token.pt"])) == {1: [2, 0, 1, 1]}


class Stranger:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("/tmp/mixprec-was-run"),))


def test_a_pickles_code_is_not_run(tmp_path: Path) -> None:
    torch.save({"logical_count": Stranger()}, tmp_path / "x.pt")
    with pytest.raises(StatsError, match="no dump of SGLang's expert distribution recorder"):
        read_activity([tmp_path / "x.pt"])
    assert not Path("/tmp/mixprec-was-run").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "no expert activity of mixprec or SGLang: JSON that cannot be read: Expecting property name"),
        ("{}", "`expert_stats` is missing"),
        ("[]", "`expert_stats` is missing"),
        ("[" * 100_000, "nested too deeply"),
        (
            '{"expert_stats": []}',
            "`expert_stats` must map names to objects with layer_id, expert_id, and total_tokens_",
        ),
        ('{"expert_stats": {"x": []}}', "`expert_stats` must map names to objects with layer_id, expert_id, and"),
        (
            '{"expert_stats": {"x": {"layer_id": 0, "expert_id": 0}}}',
            "'x' in `expert_stats`: `total_tokens_processed` is",
        ),
        ('{"expert_stats": {}, "layer_stats": []}', "`layer_stats` must map layers to objects"),
        ('{"expert_stats": {}, "layer_stats": {"0": 7}}', "`layer_stats` must map layers to objects"),
        ('{"expert_stats": {}, "layer_stats": {"a": {}}}', "`layer_stats` has 'a', the number of a layer was expected"),
        ('{"expert_stats": {"x": {"layer_id": 0}}}', "`expert_id` is missing"),
        ('{"expert_stats": {"x": {"layer_id": 0, "expert_id": 99999999999}}}', "`expert_id` is 99999999999"),
        ('{"expert_stats": {"x": {"layer_id": -1, "expert_id": 1}}}', "`layer_id` is -1, a number from 0 up"),
        ('{"expert_stats": {}}', "counts no expert at all; record while the server answers requests"),
    ],
)
def test_damaged_files(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(StatsError, match=re.escape(message)):
        read_activity([tmp_path / "x.json"])


def test_torch_is_needed_for_dumps_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_stats(tmp_path / "a.json", COUNTS)
    (tmp_path / "b.pt").write_bytes(b"")
    (tmp_path / "torch.py").write_text("raise ImportError\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    read_activity([tmp_path / "a.json"])
    with pytest.raises(StatsError, match="is read with torch; pip install torch"):
        read_activity([tmp_path / "b.pt"])


# The command and its pictures


def test_the_command(tmp_path: Path) -> None:
    path = write_stats(tmp_path / "a.json", COUNTS, {1: 20, 3: 20})
    page = tmp_path / "heat.html"
    done = invoke("experts", str(path), str(path), "--top", "2", "--heatmap", str(page), "--json")
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    assert (facts["activations"], facts["tokens"], facts["experts"]) == (160, 40, 8)
    assert [(e["layer"], e["expert"], e["activations"]) for e in facts["top_experts"]] == [(3, 3, 74), (1, 2, 40)]
    assert facts["layers"][1]["top_10_percent_coverage"] == 0.925
    assert facts["layers"][0]["unused"] == 1
    text = page.read_text()
    assert text.count("<td ") == 8 and 'title="layer 3, expert 3: 74 tokens, 3.70 of the mean"' in text
    assert "http" not in text  # nothing is fetched to show it
    shown = invoke("experts", str(path))
    assert "Load balance" in shown.output and "Heat map: a block is an expert" in shown.output


def test_blocks_in_a_terminal() -> None:
    activity = Activity({0: np.array([0, 4, 0, 0]), 1: np.array([1, 1, 1, 1]), 2: np.array([2, 2])}, {})
    console = Console(width=80, force_terminal=True, color_system="truecolor")
    with console.capture() as captured:
        show_heatmap(activity, console)
    lines = captured.get().splitlines()
    assert len(lines) == 3 and lines[1].count("▀") == 4
    assert "38;2;253;231;37" in lines[1]  # the busiest is the brightest
    wide = Activity({0: np.arange(100)}, {})
    console = Console(width=24, color_system=None, record=True)
    show_heatmap(wide, console)
    shown = console.export_text().splitlines()
    assert shown[0].endswith("a block is 7 ") and len(shown[-1]) == 7 + 15  # of 16 that fit


def test_a_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    activity = Activity({layer: np.random.default_rng(layer).integers(0, 50, 64) for layer in range(12)}, {})
    draw_heatmap(activity, tmp_path / "heat.png")
    assert (tmp_path / "heat.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    for name, message in (("heat.pdf", "pictures are written as .png"), ("none/heat.html", "there is no folder")):
        done = invoke("experts", str(tmp_path / "none.json"), "--heatmap", str(tmp_path / name))
        assert isinstance(done.exception, OutputError) and message in str(done.exception)


def test_pictures_of_other_kinds(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"pictures are written as \.png"):
        draw_heatmap(Activity({0: np.array([1])}, {}), tmp_path / "heat.gif")
