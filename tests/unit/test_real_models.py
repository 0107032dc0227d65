"""The recipes of this repository, planned against checkpoints with the real names and shapes, and no weights."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import pytest
from support.hollow import write_hollow

from mixprec_build.recipe.recipe import load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"

# What the repositories of the hub hold that the recipes name.
HUB: Mapping[str, tuple[str, str]] = {
    "Qwen/Qwen3-235B-A22B": ("Qwen3-235B-A22B", "bf16"),
    "Qwen/Qwen3-235B-A22B-FP8": ("Qwen3-235B-A22B", "fp8_block"),
    "Qwen/Qwen3-235B-A22B-GPTQ-Int4": ("Qwen3-235B-A22B", "gptq_int4"),
    "nvidia/Qwen3-235B-A22B-NVFP4": ("Qwen3-235B-A22B", "nvfp4"),
    "Qwen/Qwen3-30B-A3B": ("Qwen3-30B-A3B", "bf16"),
    "Qwen/Qwen3-30B-A3B-FP8": ("Qwen3-30B-A3B", "fp8_block"),
    "Qwen/Qwen3-30B-A3B-GPTQ-Int4": ("Qwen3-30B-A3B", "gptq_int4"),
    "Qwen/Qwen3-30B-A3B-Instruct-2507": ("Qwen3-30B-A3B", "bf16"),
    "Qwen/Qwen3-30B-A3B-Instruct-2507-FP8": ("Qwen3-30B-A3B", "fp8_block"),
    "Intel/Qwen3-30B-A3B-Instruct-2507-int4-AutoRound": ("Qwen3-30B-A3B", "auto_round_int4"),
    "meta-llama/Llama-3.3-70B-Instruct": ("Llama-3.3-70B-Instruct", "bf16"),
    "RedHatAI/Llama-3.3-70B-Instruct-FP8-dynamic": ("Llama-3.3-70B-Instruct", "fp8_channel"),
    "shuyuej/Llama-3.3-70B-Instruct-GPTQ": ("Llama-3.3-70B-Instruct", "gptq_int4"),
    "deepseek-ai/DeepSeek-V3": ("DeepSeek-V3", "fp8_block"),
    "unsloth/DeepSeek-V3-bf16": ("DeepSeek-V3", "bf16"),
    "OPEA/DeepSeek-V3-int4-sym-gptq-inc": ("DeepSeek-V3", "gptq_int4"),
    "deepseek-ai/DeepSeek-V3.1": ("DeepSeek-V3.1", "fp8_block"),
    "unsloth/DeepSeek-V3.1-BF16": ("DeepSeek-V3.1", "bf16"),
    "Intel/DeepSeek-V3.1-int4-mixed-AutoRound": ("DeepSeek-V3.1", "auto_round_int4"),
    "deepseek-ai/DeepSeek-R1-0528": ("DeepSeek-V3", "fp8_block"),
    "unsloth/DeepSeek-R1-0528-BF16": ("DeepSeek-V3", "bf16"),
    "amd/DeepSeek-R1-0528-MXFP4": ("DeepSeek-V3", "mxfp4"),
    "deepseek-ai/DeepSeek-V4-Flash": ("DeepSeek-V4-Flash", "mxfp4"),
    "sgl-project/DeepSeek-V4-Flash-FP8": ("DeepSeek-V4-Flash", "fp8_block"),
    "Qwen/Qwen3.6-35B-A3B": ("Qwen3.6-35B-A3B", "bf16"),
    "Qwen/Qwen3.6-35B-A3B-FP8": ("Qwen3.6-35B-A3B", "fp8_block"),
    "Intel/Qwen3.6-35B-A3B-int4-AutoRound": ("Qwen3.6-35B-A3B", "auto_round_int4"),
    "Qwen/Qwen3-Next-80B-A3B-Instruct": ("Qwen3-Next-80B-A3B-Instruct", "bf16"),
    "Qwen/Qwen3-Next-80B-A3B-Instruct-FP8": ("Qwen3-Next-80B-A3B-Instruct", "fp8_block"),
    "Intel/Qwen3-Next-80B-A3B-Instruct-int4-mixed-AutoRound": ("Qwen3-Next-80B-A3B-Instruct", "auto_round_int4"),
    "zai-org/GLM-4.5-Air": ("GLM-4.5-Air", "bf16"),
    "zai-org/GLM-4.5-Air-FP8": ("GLM-4.5-Air", "fp8_channel"),
    "cpatonn/GLM-4.5-Air-GPTQ-4bit": ("GLM-4.5-Air", "gptq_int4"),
}

# Plans in a process of its own, so that its time and memory can be told from those of the tests. The memory is
# that of VmHWM: ru_maxrss of a new process starts with what its parent had.
PLANNER = """
import json, re, sys, time
from pathlib import Path
from mixprec_build.recipe import sources
from mixprec_build.output.build import plan_recipe
from mixprec_build.report.facts import plan_facts
from mixprec_build.report.memory import Gpus, memory_of_plan

folders = json.loads(sys.argv[2])
open_checkpoint = sources.open_checkpoint
sources.open_checkpoint = lambda location, **_: open_checkpoint(folders[location])
plan = plan_recipe(Path(sys.argv[1]))
facts = plan_facts(plan)
peak = re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())
found = {"facts": facts, "cpu_seconds": time.process_time(), "peak_bytes": int(peak[1]) * 1024}
found["memory"] = [memory_of_plan(plan, Gpus(tp, 80 * 10**9), 32768) for tp in (1, 2, 4, 8)]
print(json.dumps(found))
"""


class Planned(Protocol):
    def __call__(self, recipe: str) -> Mapping[str, Any]: ...


@pytest.fixture(scope="module")
def hollow(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a hub id, written once."""
    root = tmp_path_factory.mktemp("hollow")

    def folder(location: str) -> Path:
        assert location in HUB, f"say in HUB what {location} holds"
        model, variant = HUB[location]
        path = root / model / variant
        return path if path.exists() else write_hollow(path, model, variant)

    return folder


@pytest.fixture(scope="module")
def planned(hollow: Callable[[str], Path]) -> Planned:
    """What planning a recipe gave, and what it took."""
    results: dict[str, Mapping[str, Any]] = {}

    def plan(name: str) -> Mapping[str, Any]:
        if name not in results:
            path = RECIPES / name
            recipe = load_recipe(path)
            folders = {ref.location: str(hollow(ref.location)) for ref in (recipe.model, *recipe.sources.values())}
            command = [sys.executable, "-W", "error", "-c", PLANNER, str(path), json.dumps(folders)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, done.stderr
            results[name] = json.loads(done.stdout)
        return results[name]

    return plan


# For each recipe: layer -> projection -> format -> how many

Row = dict[str, dict[str, int]]


def _all(fmt: str, *names: str) -> Row:
    return {name: {fmt: 1} for name in names}


ATTENTION = tuple(f"self_attn.{name}_proj" for name in "qkvo")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def qwen3_235b(layer: int) -> Row:
    if layer <= 3 or layer >= 90:
        experts = {"fp8_block": 128}
    else:
        experts = {"fp8_block": 16, "gptq_int4": 112} if layer <= 11 else {"gptq_int4": 128}
    return _all("fp8_block", *ATTENTION) | {"experts": experts}


def qwen3_235b_nvfp4(layer: int) -> Row:
    return _all("fp8_block", *ATTENTION) | {"experts": {"fp8_block" if layer <= 3 or layer >= 90 else "nvfp4": 128}}


def qwen3_30b(layer: int) -> Row:
    return _all("fp8_block", *ATTENTION) | {"experts": {"fp8_block" if layer in (0, 1, 46, 47) else "gptq_int4": 128}}


def qwen3_30b_autoround(layer: int) -> Row:
    return _all("fp8_block", *ATTENTION) | {"experts": {"gptq_int4": 128}}


def llama_70b(layer: int) -> Row:
    gate_up = "gptq_int4" if 2 <= layer <= 77 else "fp8_channel"
    return _all("fp8_channel", *ATTENTION, "mlp.down_proj") | _all(gate_up, "mlp.gate_proj", "mlp.up_proj")


def deepseek_v3(layer: int) -> Row:
    latent = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj")
    row = _all("fp8_block", *(f"self_attn.{name}" for name in latent)) | _all("bf16", "self_attn.kv_b_proj")
    if layer == 61:
        row |= _all("bf16", "eh_proj", "embed_tokens", "shared_head.head")
    if layer < 3:
        return row | _all("fp8_block", *MLP)
    row |= _all("fp8_block", *(name.replace("mlp.", "mlp.shared_experts.") for name in MLP))
    return row | {"experts": {"gptq_int4" if 4 <= layer <= 59 else "fp8_block": 256}}


def deepseek_r1_mxfp4(layer: int) -> Row:
    row = deepseek_v3(layer)
    return row | ({"experts": {"mxfp4": 256}} if 4 <= layer <= 59 else {})


V4 = tuple(f"attn.{name}" for name in ("wq_a", "wq_b", "wkv", "wo_a", "wo_b"))
V4_SHARED = tuple(f"ffn.shared_experts.{name}" for name in ("w1", "w2", "w3"))


def deepseek_v4(layer: int) -> Row:
    """From layer 2 on keys are compressed; in every other layer an indexer chooses among them."""
    row = _all("fp8_block", *V4, *V4_SHARED)
    row |= {"experts": {"mxfp4": 240, "fp8_block": 16} if layer >= 3 else {"mxfp4": 256}}
    if layer >= 2:
        row |= _all("bf16", "attn.compressor.wkv", "attn.compressor.wgate")
    if layer >= 2 and layer % 2 == 0:
        row |= _all("fp8_block", "attn.indexer.wq_b")
        unquantized = ("weights_proj", "compressor.wkv", "compressor.wgate")
        row |= _all("bf16", *(f"attn.indexer.{name}" for name in unquantized))
    return row


def deepseek_v4_draft() -> Row:
    return _all("fp8_block", *V4, *V4_SHARED, "e_proj", "h_proj") | {"experts": {"fp8_block": 256}}


def delta_net(layer: int, *joined: str) -> Row:
    """Three layers of four; ``joined`` are its first projections."""
    if layer % 4 == 3:
        return _all("fp8_block", *ATTENTION)
    return _all("fp8_block", *(f"linear_attn.{name}" for name in (*joined, "out_proj")))


SHARED = tuple(name.replace("mlp.", "mlp.shared_expert.") for name in MLP)


def qwen3_6_35b(layer: int) -> Row:
    row = delta_net(layer, "in_proj_qkv", "in_proj_z") | _all("fp8_block", *SHARED)
    if layer % 4 < 3:
        row |= _all("bf16", "linear_attn.in_proj_a", "linear_attn.in_proj_b")
    return row | {"experts": {"fp8_block" if layer in (0, 39) else "gptq_int4": 256}}


def qwen3_6_35b_mtp(layer: int) -> Row:
    return qwen3_6_35b(layer) | {"experts": {"gptq_int4": 256}}


def qwen3_6_draft() -> Row:
    return _all("bf16", *ATTENTION, *SHARED, "fc") | {"experts": {"bf16": 256}}


def qwen3_next(layer: int) -> Row:
    row = delta_net(layer, "in_proj_qkvz") | _all("fp8_block", *SHARED)
    if layer % 4 < 3:
        row |= _all("bf16", "linear_attn.in_proj_ba")
    return row | {"experts": {"gptq_int4": 512}}


def glm_4_5_air(layer: int) -> Row:
    if layer == 46:
        row = _all("bf16", *ATTENTION, "eh_proj", "embed_tokens", "shared_head.head")
    else:
        row = _all("fp8_channel", *ATTENTION)
    if layer == 0:
        return row | _all("fp8_channel", *MLP)
    row |= _all("bf16", *(name.replace("mlp.", "mlp.shared_experts.") for name in MLP))
    return row | {"experts": {"bf16" if layer == 46 else "gptq_int4": 128}}


LAYERS: Mapping[str, tuple[int, Callable[[int], Row]]] = {
    "qwen3-235b-a22b.yaml": (94, qwen3_235b),
    "qwen3-235b-a22b-nvfp4.yaml": (94, qwen3_235b_nvfp4),
    "qwen3-30b-a3b.yaml": (48, qwen3_30b),
    "qwen3-30b-a3b-autoround.yaml": (48, qwen3_30b_autoround),
    "llama-3.3-70b.yaml": (80, llama_70b),
    "deepseek-v3.yaml": (61, deepseek_v3),
    "deepseek-v3.1.yaml": (61, deepseek_v3),
    "deepseek-r1-0528-mxfp4.yaml": (61, deepseek_r1_mxfp4),
    "deepseek-v4-flash.yaml": (43, deepseek_v4),
    "qwen3.6-35b-a3b.yaml": (40, qwen3_6_35b),
    "qwen3.6-35b-a3b-mtp.yaml": (40, qwen3_6_35b_mtp),
    "qwen3-next-80b-a3b.yaml": (48, qwen3_next),
    "glm-4.5-air.yaml": (46, glm_4_5_air),
}

DRAFTS: Mapping[str, tuple[str, Row]] = {
    "deepseek-v3.yaml": ("model.layers.61", deepseek_v3(61)),
    "deepseek-v3.1.yaml": ("model.layers.61", deepseek_v3(61)),
    "deepseek-r1-0528-mxfp4.yaml": ("model.layers.61", deepseek_v3(61)),
    "deepseek-v4-flash.yaml": ("mtp.0", deepseek_v4_draft()),
    "glm-4.5-air.yaml": ("model.layers.46", glm_4_5_air(46)),
    "qwen3.6-35b-a3b.yaml": ("mtp.layers.0", qwen3_6_draft()),
    "qwen3.6-35b-a3b-mtp.yaml": ("mtp.layers.0", qwen3_6_draft()),
    "qwen3-next-80b-a3b.yaml": ("mtp.layers.0", qwen3_6_draft() | {"experts": {"bf16": 512}}),
}

BIG = {
    "qwen3-235b-a22b.yaml", "qwen3-235b-a22b-nvfp4.yaml", "deepseek-v3.yaml", "deepseek-v3.1.yaml",
    "deepseek-r1-0528-mxfp4.yaml", "deepseek-v4-flash.yaml",
    "qwen3-next-80b-a3b.yaml",
}  # fmt: skip
EACH = [pytest.param(name, marks=[pytest.mark.slow] if name in BIG else []) for name in LAYERS]


def test_every_recipe_is_here() -> None:
    assert {path.name for path in RECIPES.glob("*.yaml")} == LAYERS.keys()


@pytest.mark.parametrize("name", EACH)
def test_every_line_does_what_it_says(planned: Planned, name: str) -> None:
    facts = planned(name)["facts"]
    assert facts["notes"] == facts["unservable"] == []
    assert all(rule["won"] for rule in facts["rules"])
    count, expected = LAYERS[name]
    assert {row["layer"]: row["projections"] for row in facts["layers"]} == {n: expected(n) for n in range(count)}
    drafts = facts["mtp"]
    assert (drafts and (*drafts["layers"], drafts["projections"])) == DRAFTS.get(name)
    assert facts["warnings"] == []


@pytest.mark.parametrize("name", EACH)
def test_it_is_as_large_as_it_says(planned: Planned, hollow: Callable[[str], Path], name: str) -> None:
    """`# Bytes   138 GB of weights, against 470 GB in BF16, ...`: each number to its last digit. Not all have BF16."""
    recipe = load_recipe(RECIPES / name)
    stated = re.search(
        r"# Bytes +([\d.]+) GB of weights, against (?:([\d.]+) GB in BF16, )?([\d.]+) GB in FP8 and "
        r"([\d.]+) GB in (?:(?:GPTQ|AutoRound)-Int4|NVFP4|MXFP4)",
        (RECIPES / name).read_text(),
    )
    assert stated
    assert (stated[2] is None) is ("bf16" not in recipe.sources)
    nbytes = [planned(name)["facts"]["bytes"]]
    (small,) = {"int4", "nvfp4", "mxfp4"} & recipe.sources.keys()
    for source in (source for source in ("bf16", "fp8", small) if source in recipe.sources):
        index = hollow(recipe.sources[source].location) / "model.safetensors.index.json"
        nbytes.append(json.loads(index.read_text())["metadata"]["total_size"])
    for text, exact in zip(filter(None, stated.groups()), nbytes, strict=True):
        digits = len(text.partition(".")[2])
        assert text == f"{exact / 1e9:.{digits}f}"


def gallery(name: str, columns: int) -> list[str]:
    """The cells of a recipe in that table of the gallery that has so many columns."""
    page = (RECIPES / "README.md").read_text(encoding="utf-8").split("## The gallery")[1].split("## The demo")[0]
    rows = [line.strip("|").split("|") for line in page.splitlines() if line.startswith(f"| `{name}` |")]
    (row,) = [row for row in rows if len(row) == columns]
    return [cell.strip() for cell in row]


def needed(memory: Mapping[str, Any]) -> str:
    """The cell of the gallery: gigabytes of a rank's weights, and the number of sequences beside them."""
    weights = f"{memory['weight_bytes'] / 1e9:.1f} GB"
    if memory["fits"]:
        return f"{weights}, {memory['sequences']}"
    if memory["fits"] is None:
        return f"{weights}, not known"
    return f"{weights}, {memory['tokens'] // 1000}k tokens" if memory["tokens"] else f"{weights}, none"


@pytest.mark.parametrize("name", EACH)
def test_the_gallery_says_what_the_command_says(planned: Planned, name: str) -> None:
    """`mixprec plan RECIPE --gpus 1x80GB --context 32768`, for 1, 2, 4 and 8 GPUs."""
    facts, memory = planned(name)["facts"], planned(name)["memory"]
    _, _, nbytes, bits, of_bf16, _ = gallery(name, 6)
    expected = (facts["bytes"] / 1e9, facts["bits_per_weight"], 2 * facts["parameters"] / 1e9)
    for text, exact in zip((nbytes, bits, of_bf16), expected, strict=True):
        digits = len(text.partition(".")[2].removesuffix(" GB"))
        assert text.removesuffix(" GB") == f"{exact:.{digits}f}"
    assert gallery(name, 7)[1:5] == [needed(at) for at in memory]
    _, *_, least, launch = gallery(name, 7)
    fitting = next(at for at in memory if at["fits"] is not False)
    assert least == str(fitting["gpus"])
    stated = (RECIPES / name).read_text()
    fused = " --disable-shared-experts-fusion" if "Serve with --disable-shared-experts-fusion" in stated else ""
    ranks = f" --tp {fitting['gpus']}" if fitting["gpus"] > 1 else ""
    assert launch == (f"`{(ranks + fused).strip()}`" if ranks or fused else "none")


@pytest.mark.parametrize("name", EACH)
def test_every_byte_of_its_sources_is_accounted_for(planned: Planned, hollow: Callable[[str], Path], name: str) -> None:
    facts = planned(name)["facts"]
    for source in facts["sources"]:
        index = hollow(load_recipe(RECIPES / name).sources[source["name"]].location) / "model.safetensors.index.json"
        left_out = sum(account["nbytes"] for account in facts["left_out"] if account["source"] == source["name"])
        assert source["bytes"] + left_out == json.loads(index.read_text())["metadata"]["total_size"]
    # 5 GB a file, and the headers are small.
    assert facts["bytes"] / 5e9 <= facts["shards"] <= facts["bytes"] / 5e9 * 1.1 + 1
    assert facts["bytes"] < facts["file_bytes"] < facts["bytes"] + 30_000_000


@pytest.mark.slow
def test_235_billion_parameters_are_planned_on_a_laptop(planned: Planned) -> None:
    """Three checkpoints, 36,945 modules, 125 to 470 GB each: processor time and memory of the whole process."""
    result = planned("qwen3-235b-a22b.yaml")
    assert result["facts"]["modules"] == 94 * (128 * 3 + 9) + 3
    assert result["cpu_seconds"] < 15
    assert result["peak_bytes"] < 1.5 * 2**30
