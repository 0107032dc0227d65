"""Parameters that strict loading accepts as filled."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.usefixtures("sglang")


@pytest.mark.parametrize("fill", [True, False])
def test_a_parameter_of_one_value_may_be_filled_with_it(fill: bool) -> None:
    """default_weight_loader fills it so (Gemma-4's layer_scalar, Apertus' activations)."""
    from mixprec_build.checkpoint.manifest import TensorEntry
    from mixprec_runtime.loading.ledger import Ledger

    parameter = torch.nn.Parameter(torch.full((1,), 7.0, dtype=torch.bfloat16))
    tensor = torch.full((1,), 0.3, dtype=torch.bfloat16)
    name = "model.layers.1.layer_scalar"
    entry = TensorEntry("BF16", (1,), 2, "model.safetensors", "bf16", "")
    ledger = Ledger({f"language.{name}": entry}, [(name, parameter)])
    for _, arrived in ledger.follow([(f"language.{name}", tensor)]):
        value = arrived.item()
        if fill:
            parameter.data.fill_(value)
    assert ledger.unused(1) == []
    assert ledger.unfilled({}) == ([] if fill else [name])
