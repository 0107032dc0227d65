"""Experts on Marlin are processed once, when all of their own parameters are filled, before other layers are read."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from support.sglang.harness import groups_of, make, parameters_of, rank_of, serve
from support.sglang.mixes import mix

from mixprec_build.checkpoint.manifest import read_manifest
from mixprec_runtime.loading import loader
from mixprec_runtime.loading.repack import Repacking
from mixprec_runtime.native import format_of

pytestmark = pytest.mark.usefixtures("sglang")


def marlin_layers(model: torch.nn.Module) -> dict[str, Any]:
    """The groups with experts that Marlin runs, by their names in the model."""
    names = {id(module): name for name, module in model.named_modules()}
    layers = (layer for module in model.modules() if hasattr(module, "groups") for layer in groups_of(module))
    found = {names[id(layer)]: layer for layer in layers}
    kinds = {name: getattr(format_of(layer), "kind", "") for name, layer in found.items()}
    return {name: layer for name, layer in found.items() if kinds[name].startswith(("gptq", "awq", "ct"))}


@pytest.mark.parametrize(("tp", "ep"), [(1, 1), (2, 2)])
def test_each_layer_is_processed_when_it_is_complete(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tp: int, ep: int
) -> None:
    checkpoint = mix(folder, "qwen3_moe_8")
    options = {"tp_size": tp, "ep_size": ep} if tp > 1 else {}
    processed: list[str] = []
    begun, fill = Event(), loader._Copies.fill

    def fill_when_begun(copies: Any, into: torch.Tensor, parameter: Any) -> None:
        if parameter.name.startswith([*held][-1]):
            assert begun.wait(60), "the first layer waits for the last one"
        fill(copies, into, parameter)

    def process(name: str, layer: Any) -> None:
        for parameter, value in due[name].items():
            if "sort_indices" not in parameter:  # made by processing
                assert torch.equal(bits(layer._parameters[parameter]), bits(value)), f"{name}.{parameter}"
        processed.append(name)
        begun.set()

    with rank_of(0, tp, ep):
        due = {name: parameters_of(layer) for name, layer in marlin_layers(serve(checkpoint, **options)).items()}
        model, _ = make(checkpoint, **options)
        held = marlin_layers(model)
        for name, layer in held.items():
            for value in parameters_of(layer).values():
                value.zero_()
            layer.quant_method.process_weights_after_loading = partial(process, name)
        share = loader.rank_share(checkpoint, read_manifest(checkpoint))
        assert share is not None
        read = share.parameters.keys()
        # As where parameters are on a GPU.
        monkeypatch.setattr(loader, "Repacking", lambda model, _: Repacking(model, read))
        monkeypatch.setattr(loader._Copies, "fill", fill_when_begun)
        loader.load(model, share, model.load_weights)
    assert len(held) > 3 and processed == [*held]
    for layer in held.values():  # as SGLang does for all modules in the end
        layer.quant_method.process_weights_after_loading(layer)
    assert processed == [*held]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)
