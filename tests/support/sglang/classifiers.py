"""Classifiers and reward models, whose heads are a linear ``score`` without a bias."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from support.sglang.harness import build, change_config, change_tensors, sources
from support.sglang.mixes import MIXES

__all__ = ["classifier"]


def classifier(folder: Path, home: Path, labels: int) -> tuple[Path, torch.Tensor]:
    """Compiles a Qwen3 that scores ``labels`` classes, with block FP8 in its attention; returns it and its head.

    ``folder`` has the sources of models, ``home`` gets those of the classifier.
    """
    shape = MIXES["qwen3"][0]
    score = torch.randn(labels, shape.hidden, generator=torch.Generator().manual_seed(0)).bfloat16()

    def classify(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["lm_head.weight"]
        tensors["score.weight"] = score

    names = {"id2label": {number: f"label {number}" for number in range(labels)}, "num_labels": labels}
    paths = {}
    for variant, source in sources(folder, shape, ("bf16", "fp8_block")).items():
        paths[variant] = Path(shutil.copytree(source, home / variant))
        change_tensors(paths[variant], classify)
        change_config(paths[variant], {"architectures": ["Qwen3ForSequenceClassification"], **names})
    return build(paths, {"model.layers.*.self_attn.*": "fp8_block"}, home / "out"), score
