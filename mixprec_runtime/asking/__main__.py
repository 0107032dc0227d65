"""``python -m mixprec_runtime.asking [OUT]``: compares SGLang with mixprec, or its class with a compiled checkpoint.

Runs in a separate process, for ``mixprec doctor``. Prints JSON: what :func:`.installed.examine` returns; with ``OUT``,
``{"model", "drafts", "tensors", "checked", "disagreements"}``, first the classes of the model and of its draft layers,
last a list of ``[serious, text]``; or ``{"missing": why}``.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from mixprec_build.checkpoint.manifest import Manifest, read_manifest
from mixprec_build.errors import MixprecError
from mixprec_build.families.draft_class import Draft
from mixprec_build.ranks.on_disk import open_on_disk

__all__ = ["examine", "main"]


def _tensors(manifest: Manifest) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Yields name, dtype and shape of the tensors that the model has unquantized."""
    for name, module in manifest.modules.items():
        quantized = manifest.formats[module.format].quantized
        if quantized:
            yield f"{name}.weight", "BF16", tuple(module.shape)
        for tensor, entry in module.tensors.items():
            if not quantized or tensor == f"{name}.bias":
                yield tensor, entry.dtype, entry.shape


def examine(out: Path) -> dict[str, object]:
    """Returns what :func:`main` prints. Raises :class:`MixprecError` for a damaged checkpoint."""
    from . import machine
    from .answer import ask
    from .comparison import Module, compare

    manifest = read_manifest(out)
    facts = open_on_disk(str(out)).facts
    if facts.names_family and facts.family.needs_own_loader:
        raise MixprecError("mixprec's loader fills it, which needs no such answer")
    tensors = list(_tensors(manifest))
    names: dict[str, list[str]] = {name: [] for name in manifest.modules}
    for tensor, _, _ in tensors:
        module, _, leaf = tensor.rpartition(".")
        if tensor in names:  # a bare parameter, whose parent may be a module: DeepSeek-V4's gate.tid2eid
            names[tensor].append("")
        else:
            names[module].append(leaf)
    modules = {
        name: Module(tuple(entry.shape), tuple(names[name]), manifest.formats[entry.format].quantized)
        for name, entry in manifest.modules.items()
    }
    machine.prepare()
    draft, drafts = Draft.of(facts), None
    with TemporaryDirectory() as folder:
        answer = ask(machine.model_config(facts.config, Path(folder)), tensors)
        differences = compare(answer, facts, modules)
        if draft is not None and any(map(draft.expects, modules)):
            drafts = ask(machine.model_config(facts.config, Path(folder), draft=True), tensors)
            # Without drafts, the model can still be served.
            differences += [found._replace(serious=False) for found in compare(drafts, facts, modules)]
    return {
        "model": answer.model,
        "drafts": None if drafts is None else drafts.model,
        "tensors": len(tensors),
        "checked": facts.names_family and facts.family.checked,
        "disagreements": differences,
    }


def main() -> None:
    """Prints the result on the last line; SGLang may print lines before it."""
    from . import installed
    from .machine import restart_without_gpu

    if any(importlib.util.find_spec(name) is None for name in ("torch", "sglang")):
        print(json.dumps({"missing": "SGLang is not installed here"}))
        return
    restart_without_gpu(sys.argv[1:])
    try:
        found = examine(Path(sys.argv[1])) if len(sys.argv) > 1 else installed.examine()
    except MixprecError as error:
        found = {"missing": str(error)}
    except Exception as error:  # SGLang raises many types, also for models without a class
        found = {"missing": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
