"""`mixprec doctor`, in an environment that may have no SGLang and no GPU: what is there is told by the tests."""

from __future__ import annotations

import importlib.metadata
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.llama import write_recipe, write_sources
from support.run import invoke
from support.write import LLAMA, QWEN3_MOE, write_tiny

from mixprec_build.output.build import plan_recipe, run_plan
from mixprec_build.report import doctor
from mixprec_build.versions import version_problem


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang 0.5.17 with the plugin, and a Hopper GPU."""
    give(monkeypatch)


REPAIR = {"format": "GPTQ", "name": "scales of experts", "source": "https://x", "issues": ["https://y"]}


def give(monkeypatch: pytest.MonkeyPatch, *, sglang: str | None = "0.5.17", capability: int = 90) -> None:
    monkeypatch.setattr(doctor, "_version", lambda package: sglang if package == "sglang" else "1.0")
    points = [SimpleNamespace(name="mixprec", value="mixprec_runtime.plugin:register")]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: points if group == doctor.GROUP else [])
    monkeypatch.setattr(doctor, "_find_gpu", lambda: (doctor.Gpu("a GPU", capability), ""))
    asked = {"version": sglang, "names": 2, "flags": 1, "problems": [], "repairs": [dict(REPAIR)]}
    really = doctor._ask
    monkeypatch.setattr(doctor, "_ask", lambda out=None: asked if out is None else really(out))
    monkeypatch.delenv("SGLANG_PLUGINS", raising=False)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    write_sources(tmp_path)
    run_plan(plan_recipe(write_recipe(tmp_path / "mix.yaml")), tmp_path / "out")
    return tmp_path / "out"


def failures(out: Path | None = None) -> list[tuple[str, str]]:
    return [(f.subject, f.text) for f in doctor.examine(out) if f.status == "fail"]


def test_a_machine_that_can_serve_a_checkpoint_that_can_be_served(machine: None, out: Path) -> None:
    assert failures(out) == []
    last = doctor.examine(out)[-1]
    assert last.status == "ok" and f"--model-path {out}" in last.text


@pytest.mark.parametrize("version", ["0.5.15", "0.5.14"])
def test_a_sglang_that_does_not_fit_is_told(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    give(monkeypatch, sglang=version)
    ((subject, text),) = failures()
    assert (
        subject == "SGLang"
        and f"this is SGLang {version}" in text
        and "0.5.15.post1 and newer, tested up to 0.5.23" in text
    )


def test_a_newer_sglang_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    give(monkeypatch, sglang="0.6.0")
    assert failures() == []
    (text,) = [f.text for f in doctor.examine() if f.status == "warn" and f.subject == "SGLang"]
    assert "SGLang 0.6.0 is newer than 0.5.23" in text and "doctor --kernels" in text


def test_names_that_sglang_lacks_are_told(machine: None, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {(f.status, f.subject): f.text for f in doctor.examine()}
    assert found["ok", "SGLang's names"] == "all 2 names and 1 arguments are as the plugin uses them"
    assert found["ok", "repairs: GPTQ"] == "scales of experts"
    problems = ["sglang.srt.utils.is_cpu is missing (any checkpoint that mixprec built)"]
    monkeypatch.setattr(doctor, "_ask", lambda out=None: {"problems": problems, "repairs": [], "names": 2, "flags": 1})
    assert failures() == [("SGLang's names", problems[0])]
    monkeypatch.setattr(doctor, "_ask", lambda out=None: {"missing": "ImportError: no CUDA"})
    (text,) = [f.text for f in doctor.examine() if f.subject == "SGLang's names"]
    assert text == "could not be compared: ImportError: no CUDA"


def test_kernels_are_compared_on_a_checkpoint_that_can_be_served(
    machine: None, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, ...]] = []
    answers: object = [[True, "linear in fp8_block: fine"], [False, "experts in awq_int4: 3 of 50 differ"]]
    really = doctor._last_json

    def last_json(module: str, *arguments: str) -> object:
        asked.append((module, *arguments))
        return answers if module == "mixprec_runtime.canary" else really(module, *arguments)

    monkeypatch.setattr(doctor, "_last_json", last_json)
    found = [(f.status, f.text) for f in doctor.examine(out, kernels=True) if f.subject == "kernels"]
    assert found == [("ok", "linear in fp8_block: fine"), ("fail", "experts in awq_int4: 3 of 50 differ")]
    assert ("mixprec_runtime.canary", str(out)) in asked
    assert not any(f.subject == "kernels" for f in doctor.examine(out))
    answers = {"missing": "torch finds no GPU"}
    (finding,) = [f for f in doctor.examine(out, kernels=True) if f.subject == "kernels"]
    assert (finding.status, finding.text) == ("warn", "could not be compared: torch finds no GPU")
    asked.clear()
    doctor.examine(out.parent / "bf16", kernels=True)
    assert not any(module == "mixprec_runtime.canary" for module, *_ in asked), "a checkpoint that cannot be served"


def test_kernels_need_a_checkpoint() -> None:
    refused = invoke("doctor", "--kernels")
    assert refused.exit_code == 2
    assert "name its folder" in " ".join(refused.output.replace("│", " ").split())


@pytest.mark.parametrize("version", ["0.5.15.post1", "0.5.17", "0.5.18.post2", "0.5.23", "0.6.0"])
def test_the_sglangs_that_fit(version: str) -> None:
    assert version_problem(version) is None


def test_what_is_missing_is_told_with_the_command_that_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    give(monkeypatch, sglang=None)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [])
    found = dict(failures())
    assert found.keys() == {"SGLang", "plugin"}
    assert "pip install 'sglang>=0.5.15.post1,<=0.5.23'" in found["SGLang"]


def test_a_list_of_plugins_without_this_one_is_told(machine: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_PLUGINS", "other, another")
    ((subject, text),) = failures()
    assert subject == "plugin" and "SGLANG_PLUGINS=other, another leaves it out" in text


def test_a_gpu_that_is_too_old_for_a_format_of_the_checkpoint_is_told(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    give(monkeypatch, capability=75)
    assert {subject for subject, _ in failures(out)} == {"fp8_block", "gptq_int4"}
    assert failures() == []  # by itself that is no failure


def test_a_gpu_without_a_kernel_for_fp8_experts_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, variant in (("bf16", "bf16"), ("fp8", "fp8_block")):
        write_tiny(tmp_path / name, QWEN3_MOE, variant)
    recipe = tmp_path / "mix.yaml"
    recipe.write_text(f"model: {tmp_path}/bf16\nsources: {{fp8: {tmp_path}/fp8}}\nweights: {{'*.experts.*': fp8}}\n")
    run_plan(plan_recipe(recipe), tmp_path / "out")
    give(monkeypatch, capability=86)
    assert failures(tmp_path / "out") == [("FP8", "experts need compute capability 8.9, this GPU has 8.6")]
    give(monkeypatch, capability=89)
    assert failures(tmp_path / "out") == []
    monkeypatch.setattr(doctor, "_find_gpu", lambda: (None, "torch finds none"))
    told = {f.subject: (f.status, f.text) for f in doctor.examine(tmp_path / "out")}
    experts = "Triton for experts: compute capability 8.0 and up, for experts 8.9"
    status, text = told["fp8_block"]
    assert status == "warn" and text.startswith("24 modules need a GPU for block FP8") and text.endswith(experts)
    assert "torch finds none: kernels of quantized formats need one, and so does --kernels" in told["GPU"][1]
    assert "bf16" not in told and failures(tmp_path / "out") == []


def test_a_gpu_that_is_too_new_for_a_format_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    give(monkeypatch, capability=100)
    (finding,) = [finding for finding in doctor.examine(None) if finding.subject == "int8_channel"]
    assert finding.status == "warn" and "needs compute capability 7.5 to 9.0, this GPU has 10.0" in finding.text


@pytest.mark.parametrize(
    ("kind", "capabilities"),
    [
        ("nvfp4", [80, 86, 89, 90]),
        ("ct_nvfp4", [80, 86, 89, 90]),
        ("w4afp8", [90]),
        ("fp8_block", [80, 86, 89, 90, 100]),
    ],
)
def test_the_gpus_of_a_format(kind: str, capabilities: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    fit = []
    for capability in (75, 80, 86, 89, 90, 100):
        give(monkeypatch, capability=capability)
        (finding,) = [finding for finding in doctor.examine(None) if finding.subject == kind]
        fit += [capability] if finding.status == "ok" else []
    assert fit == capabilities


def test_a_checkpoint_that_was_changed_is_told(machine: None, out: Path) -> None:
    manifest = out / "mixprec_manifest.json"
    manifest.write_text(manifest.read_text().replace("F8_E4M3", "F8_E5M2"))
    ((_, text),) = failures(out)
    assert "was changed after it was written" in text


def test_another_format_in_the_files_than_was_built_is_told(machine: None, out: Path) -> None:
    (shard,) = out.glob("*.safetensors")
    data = shard.read_bytes()
    shard.write_bytes(data.replace(b'"dtype":"BF16"', b'"dtype":"F16" ', 1))
    ((subject, text),) = failures(out)
    assert subject == "tensors" and "not as they were built" in text


@pytest.mark.usefixtures("older_sglang")
def test_what_needs_fp16_activations_is_told(machine: None, tmp_path: Path) -> None:
    narrow = replace(LLAMA, intermediate=160)
    write_tiny(tmp_path / "bf16", narrow, "bf16")
    write_tiny(tmp_path / "int4", narrow, "gptq_int4", group_size=32)
    recipe = tmp_path / "mix.yaml"
    recipe.write_text(f"model: {tmp_path}/bf16\nsources: {{int4: {tmp_path}/int4}}\nweights: {{'*.mlp.*': int4}}\n")
    run_plan(plan_recipe(recipe), tmp_path / "out")
    assert failures(tmp_path / "out") == []
    (told,) = [f.text for f in doctor.examine(tmp_path / "out") if f.subject == "dtype"]
    assert "down_proj (gptq_int4): its 160 inputs" in told and "--dtype half" in told


def test_a_plain_checkpoint_is_not_for_the_plugin(machine: None, out: Path) -> None:
    ((_, text),) = failures(out.parent / "bf16")
    assert "was not built by mixprec" in text


def test_the_command_exits_with_1_where_something_fails(machine: None, out: Path) -> None:
    fine = invoke("doctor", str(out), "--json")
    assert fine.exit_code == 0 and {f["status"] for f in json.loads(fine.stdout)} <= {"ok", "warn"}
    broken = invoke("doctor", str(out.parent / "bf16"))
    assert broken.exit_code == 1 and "fail" in broken.stdout
