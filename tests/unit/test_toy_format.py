"""A format from outside: one class, and ``with_format`` around what is to know it.

It goes through every command here, and nothing of the packages is touched. The page "Add a format" of
``mixprec_build/README.md`` follows this file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.llama import LINEARS, write_tiny
from typer.testing import CliRunner

from mixprec_build.checkpoint.typed import open_source
from mixprec_build.cli.app import app
from mixprec_build.errors import RecipeError
from mixprec_build.formats.base import (
    Axes,
    Axis,
    Format,
    FormatError,
    Kind,
    check_tensor,
    only_leaves,
    shape_text,
)
from mixprec_build.formats.quantization import Quantization
from mixprec_build.formats.registry import FORMATS, kinds, kinds_of_word, with_format
from mixprec_build.output.build import plan_recipe, run_plan
from mixprec_build.recipe.recipe import load_recipe
from mixprec_build.storage.module import StoredModule


@dataclass(frozen=True, slots=True)
class Toy(Format):
    """Four bits a value, two inputs in each byte of ``codes [N, K/2]``, the first in its lower half, plus 8, with
    ``steps F16 [N, K/group]``."""

    name: ClassVar[str] = "Toy"
    kinds: ClassVar[Mapping[str, Kind]] = {"toy_int4": Kind(4, words=("toy", "int4"), kernels="abacus", least=70)}
    leaves: ClassVar[frozenset[str]] = frozenset({"codes", "steps", "bias"})
    methods: ClassVar[Mapping[str, Set[str] | None]] = {"toy": {"group"}}
    values_leaf: ClassVar[str] = "codes"

    group: int

    @property
    def kind(self) -> str:
        return "toy_int4"

    @classmethod
    def recognise(cls, module: StoredModule, quantization: Quantization) -> Toy | None:
        if "codes" not in module.tensors:
            return None
        found = quantization.derive(_declared)
        found.check(module)
        return found

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Toy:
        return cls(int(data["group"]))

    def to_json(self) -> dict[str, object]:
        return {"kind": self.kind, "group": self.group}

    def check(self, module: StoredModule) -> None:
        only_leaves(module, self.leaves, self.kind)
        if not {"codes", "steps"} <= module.tensors.keys() or len(module.tensors["codes"].shape) != 2:
            raise FormatError("toy_int4 needs codes with two dimensions, and steps")
        n, k = self.shape(module)
        check_tensor(module, "codes", ["U8"], (n, k // 2), "")
        check_tensor(module, "steps", ["F16"], (n, k // self.group), f"beside {shape_text('codes', module)}")

    def shape(self, module: StoredModule) -> tuple[int, ...]:
        n, half = module.tensors["codes"].shape
        return n, 2 * half

    def axes(self, leaf: str) -> Axes:
        inputs = {"codes": Axis(1, 2), "steps": Axis(1, self.group)}
        return Axes(n=Axis(0), k=inputs.get(leaf))

    def tile(self, *, experts: bool) -> tuple[int, int]:
        return 48, self.group  # 48 does not divide a rank's 64 columns: they are filled up

    def filler(self, leaf: str) -> int:
        return 0x88 if leaf == "codes" else 0

    def fits_untiled(self, outputs: Sequence[int], inputs: int) -> bool:
        return inputs % self.group == 0

    def linear_limits(self, parts: Sequence[StoredModule]) -> list[str]:
        return ["an abacus has no room for more than 4096 inputs"] if self.shape(parts[0])[1] > 4096 else []

    def dequantize(self, tensors: Mapping[str, npt.NDArray[Any]]) -> npt.NDArray[np.float32]:
        codes = tensors["codes"]
        values = np.stack([codes & 15, codes >> 4], axis=-1).reshape(len(codes), -1).astype(np.float32) - 8
        return values * tensors["steps"].astype(np.float32).repeat(self.group, axis=1)


def _declared(quantization: Quantization) -> Toy:
    group = quantization.get("group")
    if type(group) is not int or group < 2:
        raise FormatError(f"toy_int4 in groups of {group!r}")
    return Toy(group)


GROUP = 32


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    with with_format(Toy):
        yield
    assert Toy not in FORMATS and not kinds_of_word("toy")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    write_tiny(tmp_path / "bf16")
    write_toy(tmp_path / "bf16", tmp_path / "toy")
    path = tmp_path / "mix.yaml"
    path.write_text(
        "model: ./bf16\nsources:\n  bf16: ./bf16\n  hand_made: ./toy\ndefault: bf16\nweights:\n"
        "  '*.self_attn.{q,k,v}_proj': toy\n  'model.layers.1.mlp.*': toy_int4\n"
    )
    return path


def write_toy(dense: Path, folder: Path, group: object = GROUP) -> None:
    """The linears of a checkpoint rounded to nearest, the rest as it is."""
    folder.mkdir()
    config = json.loads((dense / "config.json").read_text())
    quantization = {"quant_method": "toy", "group": group}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    tensors = {}
    for file in sorted(dense.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            module = name.removesuffix(".weight")
            if not module.endswith(LINEARS):
                tensors[name] = tensor
                continue
            groups = tensor.float().reshape(len(tensor), -1, GROUP)
            steps = (groups.abs().amax(-1) / 7).half()
            codes = ((groups / steps[..., None].float()).round().clamp(-8, 7) + 8).byte().reshape(len(tensor), -1)
            tensors |= {f"{module}.codes": codes[:, ::2] | codes[:, 1::2] << 4, f"{module}.steps": steps}
    save_file(tensors, folder / "model.safetensors")


def run(*arguments: object) -> str:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output + repr(done.exception)
    return done.stdout


def test_a_format_from_outside_goes_through_every_command(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (stored,) = (fmt for fmt in open_source(str(tmp_path / "toy")).held if fmt.quantized)
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
    found = {row["subject"]: row["text"] for row in json.loads(CliRunner().invoke(app, ["doctor", "--json"]).stdout)}
    assert found["toy_int4"] == "abacus, compute capability 7.0 and up"


def test_what_a_format_from_outside_refuses_is_refused(recipe: Path, tmp_path: Path) -> None:
    write_toy(tmp_path / "bf16", tmp_path / "wrong", group="many")
    errors = {str(fmt) for fmt in open_source(str(tmp_path / "wrong")).formats.values() if isinstance(fmt, FormatError)}
    assert errors == {"toy_int4 in groups of 'many'"}
    text = recipe.read_text().replace("hand_made: ./toy", "hand_made: ./bf16")
    recipe.write_text(text)
    with pytest.raises(RecipeError, match="no source holds `toy`"):
        plan_recipe(recipe)


def test_no_word_of_it_is_left_afterwards(recipe: Path) -> None:
    load_recipe(recipe)
    before = Toy.kinds
    with with_format(type("Other", (Toy,), {"kinds": {"other": Kind(4)}})):
        assert kinds_of_word("other") == {"other"}
    assert not kinds_of_word("other") and Toy.kinds is before
