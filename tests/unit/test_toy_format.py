"""A format from outside: one class, and ``with_format`` around what is to know it.

It goes through every command here, and nothing of the packages is touched. The section "Add a format" of
``mixprec_build/README.md`` follows ``tests/support/toy_format.py``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.run import invoke
from support.toy_format import GROUP, Toy, write_mix, write_toy

from mixprec_build.checkpoint.typed import open_source
from mixprec_build.errors import RecipeError
from mixprec_build.formats.base import FormatError, Kind
from mixprec_build.formats.registry import FORMATS, kinds, kinds_of_word, with_format
from mixprec_build.output.build import plan_recipe, run_plan


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    with with_format(Toy):
        yield
    assert Toy not in FORMATS and not kinds_of_word("toy")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_mix(tmp_path)


def run(*arguments: object) -> str:
    done = invoke(*arguments)
    assert done.exit_code == 0, done.output + repr(done.exception)
    return done.stdout


def test_a_format_from_outside_goes_through_every_command(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (stored,) = (fmt for fmt in open_source(str(tmp_path / "toy")).distinct_formats if fmt.quantized)
    assert stored == Toy(GROUP)

    planned = json.loads(run("plan", recipe, "--json"))
    assert {entry["kind"]: entry["modules"] for entry in planned["formats"]}["toy_int4"] == 9

    run("build", recipe, "-o", out, "--quiet")
    built = {name: t for file in sorted(out.glob("*.safetensors")) for name, t in load_file(file).items()}
    source = load_file(tmp_path / "toy" / "model.safetensors")
    mine = [name for name in built if name.endswith((".codes", ".steps"))]
    assert len(mine) == 18 and all(torch.equal(built[name], source[name]) for name in mine)

    compared = json.loads(run("verify", out, "--against", "bf16", "--json"))
    assert compared["bit_for_bit"] == len(built) and not compared["differences"]
    errors = [error["relative"] for error in compared["errors"] if error["format"] == "toy_int4"]
    assert len(errors) == 9 and all(0.02 < error < 0.2 for error in errors)

    inspected = json.loads(run("inspect", out, "--json"))
    assert {entry["kind"] for entry in inspected["formats"]} == {"bf16", "toy_int4"} and not inspected["unread"]
    assert "toy_int4" in run("inspect", out)


def test_a_format_from_outside_is_cut_for_two_ranks(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_plan(plan_recipe(recipe), out)
    run("split", out, "--tp", 2)
    whole = {name: t for file in sorted(out.glob("*.safetensors")) for name, t in load_file(file).items()}
    prefix = "model.layers.1.mlp"
    for rank in (0, 1):
        held = {}
        for file in sorted((out / f"presplit/tp2-ep1/rank-{rank}-of-2").glob("*.safetensors")):
            held |= load_file(file)
        query = whole["model.layers.0.self_attn.q_proj.codes"].chunk(2)[rank]
        assert torch.equal(held["model.layers.0.self_attn.qkv_proj.codes"][: len(query)], query)
        # 64 columns each, in tiles of 48 outputs and 32 inputs: 96 and 32, and zeros.
        first, end = 96 * rank, min(96 * (rank + 1), 128)
        down = held[f"{prefix}.down_proj.codes"]
        assert torch.equal(down[:, : (end - first) // 2], whole[f"{prefix}.down_proj.codes"][:, first // 2 : end // 2])
        assert down.shape == (128, 48) and bool((down[:, (end - first) // 2 :] == 0x88).all())
        assert held[f"{prefix}.gate_up_proj.steps"].shape == (192, 4)
    assert not json.loads(run("verify", out, "--json"))["differences"]


def test_a_format_from_outside_is_listed_with_its_kernels_and_words() -> None:
    assert kinds_of_word("toy") == {"toy_int4"} and "toy_int4" in kinds_of_word("int4")
    assert dict(kinds())["toy_int4"].bits == 4
    found = {row["subject"]: row["text"] for row in json.loads(invoke("doctor", "--json").stdout)}
    assert found["toy_int4"] == "abacus, compute capability 7.0 and up"


def test_what_a_format_from_outside_refuses_is_refused(recipe: Path, tmp_path: Path) -> None:
    write_toy(tmp_path / "bf16", tmp_path / "wrong", group="many")
    errors = {str(fmt) for fmt in open_source(str(tmp_path / "wrong")).formats.values() if isinstance(fmt, FormatError)}
    assert errors == {"toy_int4 in groups of 'many'"}
    text = recipe.read_text().replace("hand_made: ./toy", "hand_made: ./bf16")
    recipe.write_text(text)
    with pytest.raises(RecipeError, match="no source holds `toy`"):
        plan_recipe(recipe)


def test_formats_from_outside_go_as_they_came() -> None:
    class Other(Toy):
        kinds = {"other": Kind(4)}  # noqa: RUF012

    with with_format(Other):
        assert kinds_of_word("other") == {"other"} and kinds_of_word("toy")
    assert not kinds_of_word("other") and kinds_of_word("toy")
