"""Inspecting: what is told of a checkpoint, compiled or not, as facts and as text."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from support import write as checkpoints
from support.files import folder_tensors
from support.llama import write_recipe, write_sources, write_tiny
from support.run import invoke
from support.write import LLAMA

from mixprec_build.checkpoint.typed import open_source
from mixprec_build.errors import VerifyError
from mixprec_build.output.build import plan_recipe, run_plan
from mixprec_build.report.facts import inspect_facts
from mixprec_build.report.tables import show_inspect
from mixprec_build.text import human

MANIFEST = "mixprec_manifest.json"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three sources with a MoE layer, and a mix of them whose experts differ, ``out``."""
    folder = tmp_path_factory.mktemp("moe")
    write_sources(folder, experts=4)
    weights = {
        "model.layers.*.self_attn.*": "fp8",
        "model.layers.*.mlp.experts.*": "int4",
        "model.layers.*.mlp.experts.2.*": "fp8",
    }
    run_plan(plan_recipe(write_recipe(folder / "mix.yaml", weights)), folder / "out")
    weights = {"model.layers.*.mlp.experts.*": "fp8", "model.layers.*.mlp.experts.{1,3}.down_proj": "int4"}
    run_plan(plan_recipe(write_recipe(folder / "parted.yaml", weights)), folder / "parted")
    return folder


def facts_of(folder: Path) -> dict[str, Any]:
    facts = inspect_facts(open_source(str(folder)), folder)
    assert json.loads(json.dumps(facts)) == facts, "plain data"
    return facts


def shown(facts: dict[str, Any]) -> str:
    stream = io.StringIO()
    show_inspect(facts, Console(file=stream, width=160))
    return stream.getvalue()


LAYER_MAPS = {
    "bf16": """
┏━━━━━━━━┳━━━━━━━━━━━━━━━━━━━━━━━━━┳━━━━━━━━━━━━━━━━━━━━━━━━━━┳━━━━━━━━━┓
┃ layers ┃ mlp.{down,gate,up}_proj ┃ self_attn.{k,o,q,v}_proj ┃ experts ┃
┡━━━━━━━━╇━━━━━━━━━━━━━━━━━━━━━━━━━╇━━━━━━━━━━━━━━━━━━━━━━━━━━╇━━━━━━━━━┩
│ 0      │ bf16                    │ bf16                     │         │
│ 1      │                         │ bf16                     │ bf16 x4 │
└────────┴─────────────────────────┴──────────────────────────┴─────────┘
""",
    "fp8": """
┏━━━━━━━━┳━━━━━━━━━━━━━━━━━━━━━━━━━┳━━━━━━━━━━━━━━━━━━━━━━━━━━┳━━━━━━━━━━━━━━┓
┃ layers ┃ mlp.{down,gate,up}_proj ┃ self_attn.{k,o,q,v}_proj ┃ experts      ┃
┡━━━━━━━━╇━━━━━━━━━━━━━━━━━━━━━━━━━╇━━━━━━━━━━━━━━━━━━━━━━━━━━╇━━━━━━━━━━━━━━┩
│ 0      │ fp8_block               │ fp8_block                │              │
│ 1      │                         │ fp8_block                │ fp8_block x4 │
└────────┴─────────────────────────┴──────────────────────────┴──────────────┘
""",
    "int4": """
┏━━━━━━━━┳━━━━━━━━━━━━━━━━━━━━━━━━━┳━━━━━━━━━━━━━━━━━━━━━━━━━━┳━━━━━━━━━━━━━━┓
┃ layers ┃ mlp.{down,gate,up}_proj ┃ self_attn.{k,o,q,v}_proj ┃ experts      ┃
┡━━━━━━━━╇━━━━━━━━━━━━━━━━━━━━━━━━━╇━━━━━━━━━━━━━━━━━━━━━━━━━━╇━━━━━━━━━━━━━━┩
│ 0      │ gptq_int4               │ gptq_int4                │              │
│ 1      │                         │ gptq_int4                │ gptq_int4 x4 │
└────────┴─────────────────────────┴──────────────────────────┴──────────────┘
""",
    "parted": """
┏━━━━━━━━┳━━━━━━━━━━━━━━━━━━━━━━━━━┳━━━━━━━━━━━━━━━━━━━━━━━━━━┳━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━┓
┃ layers ┃ mlp.{down,gate,up}_proj ┃ self_attn.{k,o,q,v}_proj ┃ experts                                     ┃
┡━━━━━━━━╇━━━━━━━━━━━━━━━━━━━━━━━━━╇━━━━━━━━━━━━━━━━━━━━━━━━━━╇━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━┩
│ 0      │ bf16                    │ bf16                     │                                             │
│ 1      │                         │ bf16                     │ fp8_block x2, fp8_block (down gptq_int4) x2 │
└────────┴─────────────────────────┴──────────────────────────┴─────────────────────────────────────────────┘
""",
    "out": """
┏━━━━━━━━┳━━━━━━━━━━━━━━━━━━━━━━━━━┳━━━━━━━━━━━━━━━━━━━━━━━━━━┳━━━━━━━━━━━━━━━━━━━━━━━━━━━━┓
┃ layers ┃ mlp.{down,gate,up}_proj ┃ self_attn.{k,o,q,v}_proj ┃ experts                    ┃
┡━━━━━━━━╇━━━━━━━━━━━━━━━━━━━━━━━━━╇━━━━━━━━━━━━━━━━━━━━━━━━━━╇━━━━━━━━━━━━━━━━━━━━━━━━━━━━┩
│ 0      │ bf16                    │ fp8_block                │                            │
│ 1      │                         │ fp8_block                │ gptq_int4 x3, fp8_block x1 │
└────────┴─────────────────────────┴──────────────────────────┴────────────────────────────┘
""",
}


@pytest.mark.parametrize("name", LAYER_MAPS)
def test_the_layer_map(folder: Path, name: str) -> None:
    title, _, table = shown(facts_of(folder / name)).partition("Layer map")[2].partition("\n")
    assert title.strip() == ""
    assert f"\n{table}".startswith(LAYER_MAPS[name])


def test_equal_layers_and_projections_are_folded(tmp_path: Path) -> None:
    expected = """
┏━━━━━━━━┳━━━━━━━━━━━━━━━━━━━━━━━━━━┓
┃        ┃ mlp.{down,gate,up}_proj  ┃
┃ layers ┃ self_attn.{k,o,q,v}_proj ┃
┡━━━━━━━━╇━━━━━━━━━━━━━━━━━━━━━━━━━━┩
│ 0-1    │ fp8_block                │
└────────┴──────────────────────────┘
"""
    assert expected in shown(facts_of(write_tiny(tmp_path / "a", "fp8")))


HIDDEN = 128 * 128  # one of 23 linears: 8 of attention, 3 of the dense layer, 12 of the experts
PLAIN = 2 * 64 * 128 + 5 * 128 + 4 * 128  # embedding and head, norms, router


@pytest.mark.parametrize(
    ("name", "formats"),
    [
        ("bf16", {"bf16": (31, 23 * HIDDEN + PLAIN, 2 * (23 * HIDDEN + PLAIN))}),
        ("fp8", {"bf16": (8, PLAIN, 2 * PLAIN), "fp8_block": (23, 23 * HIDDEN, 23 * (HIDDEN + 4))}),
        ("int4", {"fp16": (8, PLAIN, 2 * PLAIN), "gptq_int4": (23, 23 * HIDDEN, 23 * (HIDDEN // 2 + 640 + 512))}),
        (
            "out",
            {
                "bf16": (11, 3 * HIDDEN + PLAIN, 2 * (3 * HIDDEN + PLAIN)),
                "fp8_block": (11, 11 * HIDDEN, 11 * (HIDDEN + 4)),
                "gptq_int4": (9, 9 * HIDDEN, 9 * (HIDDEN // 2 + 640 + 512)),
            },
        ),
    ],
)
def test_the_numbers(folder: Path, name: str, formats: dict[str, tuple[int, int, int]]) -> None:
    facts = facts_of(folder / name)
    assert {f["name"]: (f["modules"], f["parameters"], f["bytes"]) for f in facts["formats"]} == formats
    modules, parameters, nbytes = (sum(column) for column in zip(*formats.values(), strict=True))
    assert (facts["modules"], facts["parameters"], facts["bytes"]) == (modules, parameters, nbytes)
    assert nbytes == sum(len(data) for _, _, data in folder_tensors(folder / name).values())
    shards = list((folder / name).glob("*.safetensors"))
    assert facts["shards"] == len(shards) and facts["file_bytes"] == sum(path.stat().st_size for path in shards)
    assert facts["fp16_bytes"] == 2 * parameters
    assert facts["bits_per_weight"] == round(8 * nbytes / parameters, 3)
    assert facts["compression"] == round(2 * parameters / nbytes, 3)


@pytest.mark.parametrize("name", ["bf16", "fp8", "int4", "out"])
def test_the_text_says_what_the_facts_say(folder: Path, name: str) -> None:
    facts = facts_of(folder / name)
    text = shown(facts)
    assert text.startswith(f"{folder / name} (llama)\n")
    for entry in facts["formats"]:
        (row,) = (line for line in text.splitlines() if line.startswith(f"│ {entry['name']} "))
        cells = [cell.strip() for cell in row.strip("│").split("│")]
        numbers = [f"{entry['modules']:,}", f"{entry['parameters']:,}", human(entry["bytes"])]
        assert cells[:5] == [entry["name"], *numbers, f"{entry['bits_per_weight']:.2f}"]
    assert f"\n{facts['modules']:,} modules, {facts['parameters']:,} parameters in {facts['bytes']:,} bytes" in text
    assert f"{facts['compression']:.2f} times smaller than FP16" in text
    assert text.endswith(f"serve it with: {facts['serve']}\n")


def test_the_parameters_of_formats(folder: Path) -> None:
    by_name = {entry["name"]: entry for entry in facts_of(folder / "out")["formats"]}
    assert by_name["fp8_block"]["block"] == [128, 128] and by_name["fp8_block"]["activations"] == "dynamic"
    gptq = {"group_size": 64, "sym": True, "desc_act": False, "layout": "gptq"}
    assert gptq.items() <= by_name["gptq_int4"].items()
    assert "group_size 64, sym true, desc_act false, layout gptq" in shown(facts_of(folder / "out"))


def test_a_compiled_checkpoint_tells_its_sources(folder: Path) -> None:
    facts = facts_of(folder / "out")
    assert [source["name"] for source in facts["sources"]] == ["bf16", "fp8", "int4"]
    assert facts["checksum"] == "xxh3_128" and facts["unservable"] == []
    assert facts["serve"] == f"python -m sglang.launch_server --model-path {folder / 'out'} --quantization mixprec"
    text = shown(facts)
    assert f"source `fp8`: {folder / 'fp8'}\n" in text
    assert f"{facts['manifest_checksum']} of the manifest" in text
    assert facts["manifest_checksum"] in (folder / "out" / "mixprec_manifest.json").read_text().splitlines()[-2]


def test_a_plain_checkpoint_has_none(folder: Path) -> None:
    facts = facts_of(folder / "fp8")
    assert not facts.keys() & {"sources", "checksum", "unservable"}
    assert facts["serve"] == f"python -m sglang.launch_server --model-path {folder / 'fp8'}"


def test_a_compiled_checkpoint_without_its_manifest(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "out", tmp_path / "out")
    (tmp_path / "out" / MANIFEST).unlink()
    facts = facts_of(tmp_path / "out")
    assert "sources" not in facts and facts["layers"] == facts_of(folder / "out")["layers"]


@pytest.mark.parametrize("data", [b"", b"{", b"{}", b"[]", b'{"version": 1, "checksum": "xxh3_128"}'])
def test_a_compiled_checkpoint_with_a_damaged_manifest(folder: Path, tmp_path: Path, data: bytes) -> None:
    shutil.copytree(folder / "out", tmp_path / "out")
    (tmp_path / "out" / MANIFEST).write_bytes(data)
    with pytest.raises(VerifyError, match=str(tmp_path / "out" / MANIFEST)):
        facts_of(tmp_path / "out")


def test_what_sglang_cannot_serve_is_told(tmp_path: Path) -> None:
    write_sources(tmp_path)
    recipe = write_recipe(tmp_path / "mix.yaml", {"model.layers.0.self_attn.q_proj": "fp8"})
    run_plan(plan_recipe(recipe, allow_unservable=True), tmp_path / "out")
    facts = facts_of(tmp_path / "out")
    assert len(facts["unservable"]) == 1 and "must share a format" in facts["unservable"][0]
    assert "SGLang cannot serve this: model.layers.0.self_attn." in shown(facts)


def plain(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, object]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_modules_that_are_not_read_are_told_with_the_reason(tmp_path: Path) -> None:
    tensors: dict[str, torch.Tensor] = {"model.norm.weight": torch.ones(8)}
    for i in range(6):
        name = f"model.layers.{i}.mlp.up_proj"
        tensors[f"{name}.weight"] = torch.zeros(8, 4, dtype=torch.uint8)
        tensors[f"{name}.weight_scale"] = torch.ones(8, 1)
    facts = facts_of(plain(tmp_path / "fp4", tensors, {"model_type": "llama"}))
    (unread,) = facts["unread"]
    assert unread["modules"] == ["model.layers.{0..5}.mlp.up_proj"] and "4-bit float" in unread["reason"]
    assert facts["modules"] == 1
    assert "not read: model.layers.{0..5}.mlp.up_proj: stored as a 4-bit float format" in shown(facts)


@pytest.mark.parametrize("model_type", ["[/red]", "[link=http://x]", 7, None, ["list"]])
def test_a_model_type_is_shown_as_it_is(tmp_path: Path, model_type: object) -> None:
    folder = plain(tmp_path / "a", {"model.norm.weight": torch.ones(8)}, {"model_type": model_type})
    assert f"({model_type})\n" in shown(facts_of(folder))


def test_a_checkpoint_of_nothing(tmp_path: Path) -> None:
    facts = facts_of(plain(tmp_path / "a", {}, {}))
    numbers = ("modules", "parameters", "bytes", "bits_per_weight", "compression", "layers")
    assert [facts[key] for key in numbers] == [0, 0, 0, None, None, []]
    assert "0 modules, 0 parameters in 0 bytes" in shown(facts)


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (138_400_000_000, "138.4 GB"), (2_500_000_000_000, "2.50 TB")],
)
def test_human_sizes(nbytes: int, text: str) -> None:
    assert human(nbytes) == text


@pytest.mark.parametrize(
    ("line", "intermediate", "command"),
    [
        ("model.layers.0.mlp.gate_proj", 256, None),
        ("model.layers.*.mlp.*", 256, "--quantization mixprec"),
        ("model.layers.*.mlp.down_proj", 160, "--quantization mixprec --dtype half"),
    ],
)
@pytest.mark.usefixtures("older_sglang")
def test_the_command_that_serves(tmp_path: Path, line: str, intermediate: int, command: str | None) -> None:
    """With what serving needs; none for what cannot be served."""
    model = replace(LLAMA, intermediate=intermediate)
    checkpoints.write_tiny(tmp_path / "bf16", model, "bf16")
    checkpoints.write_tiny(tmp_path / "int4", model, "gptq_int4", group_size=32)
    recipe = tmp_path / "mix.yaml"
    recipe.write_text(f"model: bf16\nsources: {{bf16: bf16, int4: int4}}\nweights: {{'{line}': int4}}\n")
    run_plan(plan_recipe(recipe, allow_unservable=True), tmp_path / "out")
    shown = invoke("inspect", str(tmp_path / "out")).output
    if command is None:
        assert "SGLang cannot serve this: " in shown and "launch_server" not in shown
    else:
        assert shown.rstrip().endswith(command)
