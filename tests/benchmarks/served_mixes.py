"""Serves mixes of `frontier.py` with stock SGLang: perplexity of held-out text, from packed weights, by its logprobs.

    PYTHONPATH=tests python tests/benchmarks/served_mixes.py FOLDER --only 'all *' 'suggested, relative' 'layer-uniform'

Each mix is built by mixprec and served by an engine of its own, `--together` at a time on one GPU. Beside each
perplexity stands that of the same mix with dequantized weights in transformers, as `frontier.py` measured it, and the
mean difference of their losses, nats a token, with the 95 % of 1,000 bootstrap samples of windows.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from support.bootstrap import interval
from support.engine import ask

import mixprec_build as mp

ENGINE = {"mem_fraction_static": 0.05, "max_total_tokens": 8192, "disable_cuda_graph": True, "max_running_requests": 1}


def build(folder: Path, number: int, mix: Mapping[str, str]) -> Path:
    """Compiles one mix of module -> source; returns the checkpoint."""
    sources = {name: str((folder / name).resolve()) for name in sorted({"bf16", *mix.values()})}
    recipe = folder / "served" / f"{number}.yaml"
    recipe.parent.mkdir(exist_ok=True)
    text = {"model": sources["bf16"], "sources": sources, "default": "bf16", "weights": dict(mix)}
    recipe.write_text(yaml.safe_dump(text, sort_keys=False))
    return mp.build(recipe, recipe.with_suffix(""), force=True, card=False).parent


def losses(checkpoint: Path, texts: Path, engine: Mapping[str, Any]) -> list[float]:
    """Nats a token of each text, in an engine of its own."""
    options = {"dtype": "bfloat16", "answer": False, "texts": str(texts), "engine": dict(engine)}
    found: list[float] = ask(checkpoint, options)["losses"]
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="+", default=["*"], help="patterns of the names of mixes")
    parser.add_argument("--together", type=int, default=6, help="engines at a time")
    parser.add_argument("--engine", type=json.loads, default=ENGINE, help="arguments of sglang.Engine, as JSON")
    args = parser.parse_args(arguments)
    kept = json.loads((args.folder / "mixes.json").read_text())
    mixes = [mix for mix in kept["mixes"] if any(fnmatchcase(mix["name"], pattern) for pattern in args.only)]
    if not mixes:
        sys.exit(f"{args.folder / 'mixes.json'} has no mix of these names: {', '.join(args.only)}")
    texts, kinds = [], {of: len(windows) for of, windows in mixes[0]["losses"].items()}
    for of, count in kinds.items():
        tokens = np.load(args.folder / f"held-{of}.npy").astype(int)[: count * kept["window"]]
        texts += [part.tolist() for part in np.split(tokens, range(kept["window"], len(tokens), kept["window"]))]
    path = args.folder / "held.json"
    path.write_text(json.dumps(texts))
    checkpoints = [build(args.folder, number, mix["mix"]) for number, mix in enumerate(mixes)]
    print("| MB | mix | " + " | ".join(f"{of}: perplexity served | dequantized | difference" for of in kinds) + " |")
    print("|---" * (2 + 3 * len(kinds)) + "|")
    with ThreadPoolExecutor(args.together) as pool:
        served = pool.map(lambda checkpoint: losses(checkpoint, path, args.engine), checkpoints)
        for mix, found in zip(mixes, served, strict=True):
            cells, left = [], iter(found)
            for of in kinds:
                exact = np.array(mix["losses"][of])
                mine = np.array([next(left) for _ in exact])
                mean, low, high = interval(mine - exact)
                cells.append(f"{math.exp(mine.mean()):.3f} | {math.exp(exact.mean()):.3f}")
                cells.append(f"{mean:.3g} ({low:.3g} to {high:.3g})")
            print(f"| {mix['megabytes']} | {mix['name']} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
