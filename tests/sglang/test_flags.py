"""Flags of public launch lines, by the table of ``mixprec_runtime/README.md``."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
from packaging.version import Version
from support.sglang.harness import Changed, serve, server_args
from support.sglang.http_server import options
from support.sglang.mixes import mix

from mixprec_runtime import launch
from mixprec_runtime.contact.check import installed

pytestmark = pytest.mark.usefixtures("sglang")

# The table of the page

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "mixprec_runtime" / "README.md"
RELEASES = ("0.5.15.post1", "0.5.16", "0.5.18", "0.5.19", "0.5.20", "0.5.21", "0.5.22", "0.5.23")
STATES = ("works", "refused", "refused by SGLang", "no matter of weights")


class Row(NamedTuple):
    """A row of the table."""

    flags: tuple[str, ...]
    value: str
    """Behind the only flag of the row."""
    removed: str
    """The last release that has the flags; empty where all have them."""
    state: str
    condition: str
    by: str


def rows() -> list[Row]:
    section = PAGE.read_text().partition("## Flags of public launch lines\n")[2].partition("\n## ")[0]
    found = []
    for cell, state, by in re.findall(r"(?m)^\| (`--.*) \| (.*?) \| (.*?) ?\|$", section):
        named = re.findall(r"`(--[\w-]+) ?([^`]*)`", cell.partition(" with ")[0])
        removed = re.search(r"\(until ([\w.]+)\)", cell)
        kind, _, condition = state.partition(": ")
        kind = "works" if kind.startswith("works") else kind
        flags = tuple(flag for flag, _ in named)
        found.append(Row(flags, named[0][1], removed[1] if removed else "", kind, condition, by.replace("`", "")))
    return found


def test_the_table_has_rows_of_each_state() -> None:
    assert {row.state for row in rows()} == set(STATES)


def _has(row: Row, release: str) -> bool:
    return not row.removed or Version(release) <= Version(row.removed)


def test_every_flag_of_the_table_is_sglangs() -> None:
    known = options()
    for row in rows():
        assert [flag for flag in row.flags if (flag in known) != _has(row, installed())] == []


@pytest.mark.parametrize("release", RELEASES)
def test_other_releases_have_the_flags_too(release: str) -> None:
    """By their source. A flag that a later one lacks says so."""
    home = Path(sys.prefix, "versions", release, "sglang", "srt")
    if not home.exists():
        pytest.skip(f"SGLang {release} is not unpacked here")
    files = [home / "server_args.py", *home.glob("arg_groups/**/*.py")]
    text = "\n".join(path.read_text() for path in files)

    def has(flag: str) -> bool:
        field = flag.removeprefix("--").replace("-", "_")
        return f'"{flag}"' in text or re.search(rf"(?m)^    {field}: ", text) is not None

    for row in rows():
        assert [flag for flag in row.flags if has(flag) != _has(row, release)] == []


def test_tests_of_the_table_are_there() -> None:
    due = [row for row in rows() if row.state in ("works", "refused by SGLang")]
    for row in due:
        path, _, name = row.by.partition("::")
        assert re.search(rf"(?m)^def {name}\(", (ROOT / path).read_text()), row.by
    gpu = (ROOT / "tests" / "gpu" / "test_launch_lines.py").read_text()
    for row in due:
        if row.by.startswith("tests/gpu/test_launch_lines.py") and row.flags[0] != "--pipeline-parallel-size":
            assert all(f'"{flag.removeprefix("--").replace("-", "_")}"' in gpu for flag in row.flags), row.flags


def test_a_prefill_server_has_the_same_weights(folder: Path) -> None:
    """SGLang starts one with a library for its transfer only, so this is the model alone."""
    checkpoint = mix(folder, "qwen3")
    due, held = (
        dict(serve(checkpoint, **how).named_parameters())
        for how in ({}, {"disaggregation_mode": "prefill", "disaggregation_transfer_backend": "nixl"})
    )
    assert held.keys() == due.keys()
    assert [name for name in due if not torch.equal(held[name].view(torch.uint8), due[name].view(torch.uint8))] == []


def _deepep_problems(args: Any) -> list[str]:
    """Of a layer in Int4, where DeepGEMM is installed."""
    from sglang.srt.layers.deep_gemm_wrapper import configurer

    from mixprec_build.formats.gptq import Gptq
    from mixprec_runtime.experts import deepep

    if args.moe_a2a_backend == "none":
        return []
    with patch.object(configurer, "ENABLE_JIT_DEEPGEMM", True):
        return deepep.problems({"model.layers.0.mlp.experts": [Gptq(4, 128, True, False, "gptq")]}, "auto")


PROBLEMS: dict[str, Callable[[Any], list[str]]] = {
    "": launch.argument_problems,
    "mixed experts": lambda args: launch.mixed_problems(args, ["model.layers.0.mlp.experts"]),
    "quantized `lm_head`": lambda args: launch.quantized_head_problems(args, "fp8_channel"),
    "other experts": _deepep_problems,
    "added zeros": lambda args: launch.padded_problems(args, {"model.layers.0.mlp": (1, 2)}),
}
"""What decides, by the condition of a refusal."""


def test_what_the_table_refuses_is_refused_in_its_words() -> None:
    known = options()
    for row in rows():
        if row.state != "refused" or not _has(row, installed()):
            continue
        (flag,) = row.flags
        action = known[flag]
        value: Any = (action.type or str)(row.value) if row.value else True
        changed = {action.dest: [value] if action.nargs in ("*", "+") else value}
        if flag.startswith("--lora-"):
            changed["enable_lora"] = True
        problems = PROBLEMS[row.condition](Changed(server_args("dummy"), **changed))
        assert len(problems) == 1, row
        assert problems[0].startswith(flag) and row.by in problems[0], (row, problems)
        assert PROBLEMS[row.condition](server_args("dummy")) == []
