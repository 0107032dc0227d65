"""The jobs of ``recipes/cluster``, run as a scheduler would: their commands make what one build or split does."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.files import tree
from support.llama import write_recipe, write_sources
from support.run import Run
from support.serving import LLAMA
from support.serving import write_sources as write_model

CLUSTER = Path(__file__).parents[2] / "recipes/cluster"
RECORDER = """#!/bin/sh
printf '%s\\n' "$@" > "$RECORD"
"""


@pytest.fixture
def data(tmp_path: Path, mixprec: Run) -> Path:
    """A folder with a recipe of several files, and with `plain`, built from it by one command."""
    write_sources(tmp_path, experts=16)
    write_recipe(tmp_path / "mix.yaml", {"model.layers.0.mlp.*": "fp8"})
    assert mixprec("build", tmp_path / "mix.yaml", "-o", tmp_path / "plain").code == 0
    assert len([*(tmp_path / "plain").glob("*.safetensors")]) > 1
    return tmp_path


def recorded(data: Path, command: list[str], variables: Mapping[str, str]) -> list[str] | None:
    """The arguments with which a job's command calls `mixprec`; None where it ends well without a call."""
    bin_folder, record = data / "bin", data / "record"
    bin_folder.mkdir(exist_ok=True)
    (bin_folder / "mixprec").write_text(RECORDER)
    (bin_folder / "mixprec").chmod(0o755)
    record.unlink(missing_ok=True)
    given = {"PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}", "RECORD": str(record), **variables}
    ended = subprocess.run(command, env=given, cwd=data, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0 and not ended.stderr
    return record.read_text().splitlines() if record.exists() else None


def test_the_slurm_array_job(data: Path, mixprec: Run) -> None:
    script = CLUSTER / "build.slurm"
    text = script.read_text()
    last = re.search(r"--array=1-(\d+) build", text)
    parts = re.search(r"(?m)^parts=(\d+)", text)
    assert last is not None and parts is not None and last[1] == parts[1]
    command = ["bash", str(script), str(data / "mix.yaml"), str(data / "out")]
    for task in range(1, int(parts[1]) + 1):
        arguments = recorded(data, command, {"SLURM_ARRAY_TASK_ID": str(task), "SLURM_ARRAY_TASK_COUNT": "1"})
        assert arguments is not None and mixprec(*arguments).code == 0
    arguments = recorded(data, command, {})
    assert arguments is not None and mixprec(*arguments).code == 0
    assert tree(data / "out") == tree(data / "plain")


def job(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A Kubernetes Job's specification, and that of its one container."""
    parsed = yaml.safe_load((CLUSTER / name).read_text())
    assert (parsed["apiVersion"], parsed["kind"]) == ("batch/v1", "Job")
    pod = parsed["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    return parsed["spec"], container


def in_a_pod(data: Path, container: Mapping[str, Any], index: int | None = None) -> list[str] | None:
    """As :func:`recorded`, for a container whose volume is ``data``."""
    variables = {one["name"]: one["value"].replace("/data", str(data)) for one in container["env"]}
    if index is not None:
        variables["JOB_COMPLETION_INDEX"] = str(index)
    command = [*container["command"], *container["args"]]
    # Kubernetes replaces $(NAME) itself, for names that it knows.
    command = [re.sub(r"\$\(([^)]*)\)", lambda found: variables.get(found[1], found[0]), word) for word in command]
    return recorded(data, command, variables)


def test_the_kubernetes_jobs(data: Path, mixprec: Run) -> None:
    spec, container = job("parts-job.yaml")
    assert spec["completionMode"] == "Indexed" and spec["template"]["spec"]["restartPolicy"] == "Never"
    for index in range(spec["completions"]):
        arguments = in_a_pod(data, container, index)
        assert arguments is not None and mixprec(*arguments).code == 0
    assert arguments[-1] == f"{spec['completions']}/{spec['completions']}"
    _, container = job("finish-job.yaml")
    arguments = in_a_pod(data, container)
    assert arguments is not None and mixprec(*arguments).code == 0
    assert tree(data / "out") == tree(data / "plain")
    assert in_a_pod(data, container) is None  # started again after that


# Ranks of a finished checkpoint


@pytest.fixture
def finished(tmp_path: Path, mixprec: Run) -> Path:
    """A folder with a checkpoint `out`, and with `plain`, cut for eight ranks by one command."""
    shape = LLAMA.of(layers=1, hidden=512, intermediate=1024, heads=8, kv_heads=8, head_dim=64, vocab=256)
    (source,) = write_model(tmp_path / "sources", shape, ["bf16"]).values()
    (tmp_path / "mix.yaml").write_text(f"model: {source}\n")
    assert mixprec("build", tmp_path / "mix.yaml", "-o", tmp_path / "out").code == 0
    shutil.copytree(tmp_path / "out", tmp_path / "plain")
    assert mixprec("split", tmp_path / "plain", "--tp", 8).code == 0
    return tmp_path


def test_the_slurm_array_job_of_ranks(finished: Path, mixprec: Run) -> None:
    script = CLUSTER / "split.slurm"
    array = re.search(r"--array=0-(\d+) split", script.read_text())
    assert array is not None
    command = ["bash", str(script), str(finished / "out")]
    for task in range(int(array[1]) + 1):
        arguments = recorded(finished, command, {"SLURM_ARRAY_TASK_ID": str(task)})
        assert arguments is not None and mixprec(*arguments).code == 0
    arguments = recorded(finished, command, {})
    assert arguments is not None and "--finish" in arguments and mixprec(*arguments).code == 0
    assert tree(finished / "out") == tree(finished / "plain")


def test_the_kubernetes_job_of_ranks(finished: Path, mixprec: Run) -> None:
    spec, container = job("ranks-job.yaml")
    assert spec["completionMode"] == "Indexed" and spec["template"]["spec"]["restartPolicy"] == "Never"
    for index in range(spec["completions"]):
        arguments = in_a_pod(finished, container, index)
        assert arguments is not None and mixprec(*arguments).code == 0
    finish = re.search(r"(?m)^# +mixprec (split .* --finish)$", (CLUSTER / "ranks-job.yaml").read_text())
    assert finish is not None and mixprec(*finish[1].replace("/data", str(finished)).split()).code == 0
    assert tree(finished / "out") == tree(finished / "plain")
