"""Each loaded parameter equals the sources' tensors bit for bit, with mixprec's loader and SGLang's own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from support.sglang.harness import groups_of, parameters_of, rank_of, serve
from support.sglang.mixes import ALL, FLOATS, MIXES, Expected, mix

pytestmark = pytest.mark.usefixtures("sglang")

RANKS = [(0, 1, 1), (0, 2, 1), (1, 2, 1), (0, 4, 1), (1, 4, 1), (2, 4, 1), (3, 4, 1)]
EXPERT_RANKS = [(0, 2, 2), (1, 2, 2), (1, 4, 2), (2, 4, 2)]


@pytest.mark.parametrize(("rank", "tp", "ep"), RANKS + EXPERT_RANKS)
@pytest.mark.parametrize("name", [*MIXES, *FLOATS])
def test_every_parameter_holds_the_bytes_of_its_sources(folder: Path, name: str, rank: int, tp: int, ep: int) -> None:
    expected = Expected(folder, ALL[name], rank, tp, ep)
    if ep > 1 and not expected.shape.experts:
        pytest.skip("no experts")
    with rank_of(rank, tp, ep):
        check(serve(mix(folder, name)), expected)
        check(serve(mix(folder, name), load_format="safetensors"), expected)


def test_deepseek_v2_is_loaded_as_v3(folder: Path, tmp_path: Path) -> None:
    checkpoint = shutil.copytree(mix(folder, "deepseek"), tmp_path / "v2")
    path = checkpoint / "config.json"
    config = json.loads(path.read_text()) | {"architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2"}
    path.write_text(json.dumps(config))
    model = serve(checkpoint)
    assert type(model).__name__ == "DeepseekV2ForCausalLM"
    check(model, Expected(folder, MIXES["deepseek"]))


def check(model: torch.nn.Module, expected: Expected) -> None:
    from sglang.srt.layers.linear import LinearBase

    for path, module in model.named_modules():
        if isinstance(module, LinearBase):
            same(path, module, expected.linear(path))
        elif path.endswith(".experts"):
            for layer, (_, ups, downs) in zip(groups_of(module), expected.groups(path), strict=True):
                same(path, layer, expected.experts(path, ups, downs))
        elif ".groups." not in path:
            same(path, module, {leaf: expected.plain(f"{path}.{leaf}") for leaf in parameters_of(module)})


def same(path: str, layer: torch.nn.Module, expected: dict[str, torch.Tensor]) -> None:
    held = {name: tensor for name, tensor in parameters_of(layer).items() if "sort_indices" not in name}
    assert held.keys() == expected.keys(), path
    for name, tensor in expected.items():
        # Scales of GPTQ are FP16 in the files, and rounded once, to the model's dtype.
        assert torch.equal(bits(held[name]), bits(tensor.to(held[name].dtype))), f"{path}.{name}"


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8) if tensor.dim() else tensor
