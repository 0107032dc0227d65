"""``mixprec doctor``: checks that this machine can serve, or serve one checkpoint, before a long launch fails.

Works without SGLang and without a GPU, and then reports that they are missing.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.declaration import METHOD, Declaration
from ..checkpoint.manifest import Manifest, read_manifest
from ..checkpoint.mistral_layout import PARAMS, taken_for_own
from ..errors import MixprecError
from ..families.base import Family
from ..families.parts import Role
from ..families.unserved import why_unserved
from ..formats.base import Format, Kind
from ..formats.registry import kinds
from ..planning.rules import half_only
from ..ranks.merged import smallest_complete_degree
from ..ranks.on_disk import open_on_disk
from ..storage.garbage import no_garbage_collection
from ..text import as_word, some
from ..versions import INSTALL, __version__, untested, version_problem

__all__ = ["Finding", "examine"]


GROUP = "sglang.srt.plugins"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report. ``status`` is ``ok``, ``warn`` (something to know) or ``fail`` (will not serve)."""

    status: str
    subject: str
    text: str


@dataclass(frozen=True, slots=True)
class Gpu:
    """``capability`` is ten times the compute capability: 90 for Hopper."""

    name: str
    capability: int


def examine(out: Path | None = None, *, kernels: bool = False) -> list[Finding]:
    """Checks all that serving needs; with ``out``, also that this GPU can serve that compiled checkpoint.

    ``kernels``: also compares SGLang's kernels with float64 arithmetic on weights of ``out``.
    """
    gpu, missing = _find_gpu()
    findings = [*_versions(), *_plugin(), *_contact()]
    if gpu is None:
        text = f"{missing}: kernels of quantized formats need one, and so does --kernels"
        findings.append(Finding("warn", "GPU", f"{text}; `python -m mixprec_runtime.cpu` serves slowly, for a try"))
    else:
        findings.append(Finding("ok", "GPU", f"{gpu.name}, compute capability {gpu.capability / 10}"))
    findings += _formats(gpu) if out is None else _checkpoint(out, gpu)
    if kernels and out is not None and all(finding.status != "fail" for finding in findings):
        findings += _kernels(out)
    return findings


def _versions() -> Iterator[Finding]:
    yield Finding("ok", "mixprec", f"{__version__}, Python {platform.python_version()}")
    for package in ("torch", "transformers"):
        version = _version(package)
        yield Finding("ok" if version else "warn", package, version or "not installed")
    sglang = _version("sglang")
    if sglang is None:
        yield Finding("fail", "SGLang", f"not installed; {INSTALL}")
    else:
        problem = version_problem(sglang)
        newer = untested(sglang)
        if problem:
            yield Finding("fail", "SGLang", problem)
        else:
            yield Finding("warn", "SGLang", newer) if newer else Finding("ok", "SGLang", sglang)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _plugin() -> Iterator[Finding]:
    points = [point for point in importlib.metadata.entry_points(group=GROUP) if point.name == METHOD]
    allowed = os.environ.get("SGLANG_PLUGINS")
    if not points:
        yield Finding("fail", "plugin", f"no entry point {METHOD} in {GROUP}: install mixprec beside SGLang with pip")
    elif allowed is not None and METHOD not in [name.strip() for name in allowed.split(",")]:
        yield Finding("fail", "plugin", f"SGLANG_PLUGINS={allowed} leaves it out: add {METHOD}, or unset it")
    else:
        yield Finding("ok", "plugin", f"SGLang sees {points[0].value}")


def _contact() -> Iterator[Finding]:
    """Compares the installed SGLang with the names that the plugin uses, in another process."""
    if _version("sglang") is None:
        return
    asked = _ask()
    if "missing" in asked:
        yield Finding("warn", "SGLang's names", f"could not be compared: {asked['missing']}")
        return
    for problem in asked["problems"]:
        yield Finding("fail", "SGLang's names", problem)
    if not asked["problems"]:
        text = f"all {asked['names']} names and {asked['flags']} arguments are as the plugin uses them"
        yield Finding("ok", "SGLang's names", text)
    by_format: dict[str, list[str]] = {}
    for repair in asked["repairs"]:
        by_format.setdefault(repair["format"], []).append(repair["name"])
    for name, repairs in by_format.items():
        yield Finding("ok", f"repairs: {name}", "; ".join(repairs))


def _find_gpu() -> tuple[Gpu | None, str]:
    """The GPU, or the reason why there is none. Asks torch in another process, since importing it may fail."""
    command = [sys.executable, "-m", "mixprec_runtime.gpu"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        found = json.loads(ended.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        last = (ended.stderr.strip().splitlines() or [f"exit code {ended.returncode}"])[-1]
        return None, f"torch does not start: {last}"
    return (None, str(found["missing"])) if "missing" in found else (Gpu(found["name"], found["capability"]), "")


def _formats(gpu: Gpu | None) -> Iterator[Finding]:
    for name, kind in kinds():
        if kind.kernels:
            unfit = _unfit(kind, gpu)
            text = f"{kind.kernels}: {unfit}" if unfit else f"{kind.kernels}, {_needs(kind)}"
            yield Finding("warn" if unfit else "ok", name, text)


def _needs(kind: Kind) -> str:
    return f"compute capability {kind.least / 10} " + (f"to {kind.most / 10}" if kind.most else "and up")


def _unfit(kind: Kind, gpu: Gpu | None) -> str:
    """The reason why a GPU has no kernel for a format; empty if there is none."""
    if gpu is None or not kind.kernels or kind.least <= gpu.capability <= (kind.most or gpu.capability):
        return ""
    return f"needs {_needs(kind)}, this GPU has {gpu.capability / 10}"


def _checkpoint(out: Path, gpu: Gpu | None) -> Iterator[Finding]:
    if not out.is_dir():
        yield Finding("fail", str(out), "no such folder")
        return
    try:
        with no_garbage_collection():
            checkpoint = open_on_disk(str(out)).checkpoint
        if checkpoint.quantization.get("quant_method") != METHOD:
            yield Finding("fail", str(out), "was not built by mixprec: SGLang serves it as what it is")
            return
        manifest = read_manifest(out)
        declaration = Declaration.from_json(checkpoint.quantization)
        formats = declaration.formats_of(manifest.modules)
        options = f" {smallest_complete_degree(out, manifest.ranks).options}" if manifest.rest is not None else ""
    except MixprecError as error:
        yield Finding("fail", str(out), str(error))
        return
    counts = Counter(formats.values())
    problems = [*_differences(checkpoint, manifest), *_not_served(checkpoint, manifest, counts, gpu)]
    problems += _unfit_experts(formats, gpu, checkpoint.facts.family)
    unserved = why_unserved(checkpoint.facts)
    if unserved is not None and unserved not in manifest.unservable:
        problems.append(Finding("fail", "model class", unserved))
    if (words := taken_for_own(str(out))) is not None:
        text = f"SGLang takes a path with {words} in it for one of Mistral's own layout, and stops without {PARAMS}"
        problems.append(Finding("fail", "path", f"{text}; move the folder, or serve it by a path without them"))
    if gpu is None:
        yield from _gpu_needed(formats, checkpoint.facts.family)
    if not problems:
        stored = {name: (formats[name], module) for name, module in checkpoint.modules.items() if name in formats}
        problems = [Finding("warn", "dtype", remark) for remark in half_only(stored, checkpoint.facts)]
    yield from problems
    if unserved is None:
        yield from _model_class(out)
    if not problems:
        modules = ", ".join(f"{count:,} {fmt.kind}" for fmt, count in counts.most_common())
        yield Finding(
            "ok", str(out), f"{modules}; serve: python -m sglang.launch_server --model-path {as_word(out)}{options}"
        )


def _model_class(out: Path) -> Iterator[Finding]:
    """Asks SGLang's class for the model about the checkpoint, in another process and without weights."""
    if _version("sglang") is None:
        return
    asked = _ask(out)
    if "missing" in asked:
        yield Finding("warn", "model class", f"could not be asked what it makes of this checkpoint: {asked['missing']}")
        return
    for serious, text in asked["disagreements"]:
        yield Finding("fail" if serious else "warn", "model class", text)
    if not asked["disagreements"]:
        rules = "this family" if asked["checked"] else "models that mixprec has no family for"
        classes = asked["model"] + (f", with {asked['drafts']} for its draft layers," if asked.get("drafts") else "")
        text = f"{classes} takes all {asked['tensors']:,} tensors, unquantized, as the rules for {rules} say"
        yield Finding("ok", "model class", text)


def _kernels(out: Path) -> Iterator[Finding]:
    """Runs SGLang's kernels on a few weights of the checkpoint, in another process."""
    asked = _last_json("mixprec_runtime.canary", str(out))
    if isinstance(asked, dict):
        yield Finding("warn", "kernels", f"could not be compared: {asked['missing']}")
        return
    for right, text in asked:
        yield Finding("ok" if right else "fail", "kernels", text)


def _ask(out: Path | None = None) -> dict[str, Any]:
    found: dict[str, Any] = _last_json("mixprec_runtime.asking", *([] if out is None else [str(out)]))
    return found


def _last_json(module: str, *arguments: str) -> Any:
    """The JSON on the last line that a module of the runtime prints; ``{"missing": why}`` if it prints none."""
    command = [sys.executable, "-m", module, *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        return json.loads(ended.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        last = (ended.stderr.strip().splitlines() or [f"exit code {ended.returncode}"])[-1]
        return {"missing": last[:300]}


def _differences(checkpoint: Checkpoint, manifest: Manifest) -> Iterator[Finding]:
    """Reports tensors whose headers differ from the manifest; ``mixprec verify`` compares their bytes."""
    declared = manifest.tensors()
    stored = checkpoint.tensors()
    changed = [
        name
        for name, entry in declared.items()
        if (info := stored.get(name)) is None or (info.dtype, info.shape) != (entry.dtype, entry.shape)
    ]
    changed += stored.keys() - declared.keys()
    if changed:
        yield Finding("fail", "tensors", f"not as they were built: {some(changed)}; build the checkpoint again")


def _gpu_needed(formats: Mapping[str, Format], family: Family) -> Iterator[Finding]:
    """For each quantized kind of the checkpoint, the GPUs that have its kernels."""
    of_experts = {fmt.kind for fmt in _formats_of_experts(formats, family)}
    counts = Counter(fmt.kind for fmt in formats.values() if fmt.quantized)
    for name, count in counts.most_common():
        kind = next(fmt.kinds[name] for fmt in formats.values() if fmt.kind == name)
        if kind.kernels:
            later = kind.experts_least if name in of_experts and kind.experts_least > kind.least else 0
            experts = f", for experts {later / 10}" if later else ""
            yield Finding("warn", name, f"{count:,} modules need a GPU for {kind.kernels}: {_needs(kind)}{experts}")


def _formats_of_experts(formats: Mapping[str, Format], family: Family) -> set[Format]:
    return {fmt for name, fmt in formats.items() if family.role_by_name(name) is Role.EXPERT}


def _unfit_experts(formats: Mapping[str, Format], gpu: Gpu | None, family: Family) -> Iterator[Finding]:
    least = {(fmt.name, fmt.kinds[fmt.kind].experts_least) for fmt in _formats_of_experts(formats, family)}
    for name, need in sorted(least):
        if gpu is not None and gpu.capability < need:
            text = f"experts need compute capability {need / 10}, this GPU has {gpu.capability / 10}"
            yield Finding("fail", name, text)


def _not_served(
    checkpoint: Checkpoint, manifest: Manifest, counts: Mapping[Format, int], gpu: Gpu | None
) -> Iterator[Finding]:
    for problem in manifest.unservable:
        yield Finding("fail", "unservable", problem)
    for fmt, count in counts.items():
        if unfit := _unfit(fmt.kinds[fmt.kind], gpu):
            yield Finding("fail", fmt.kind, f"{count:,} modules: {unfit}")
    if checkpoint.facts.dtype == "float32" and any(fmt.quantized for fmt in counts):
        yield Finding("warn", "dtype", "config.json says float32: start SGLang with --dtype bfloat16 or half")
