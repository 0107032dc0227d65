"""A format from outside in SGLang's layers, which needs only a class for the compiler and one for the runtime."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file
from support.sglang.harness import parameters_of, rank_of, serve
from support.toy_format import GROUP, Toy, write_mix
from torch.nn import Parameter

from mixprec_build.formats.base import Format
from mixprec_build.formats.registry import with_format
from mixprec_build.output.build import plan_recipe, run_plan

pytestmark = pytest.mark.usefixtures("sglang", "registered")

REPAIRED: list[str] = []
"""The kinds that the format's repair was called for."""


@pytest.fixture
def registered(sglang: None) -> Iterator[None]:
    from mixprec_runtime.formats.registry import with_served

    REPAIRED.clear()
    with with_format(Toy), with_served(made()):
        yield


def made() -> Any:
    """The runtime's class for the format, with a config and method that SGLang lacks."""
    from sglang.srt.layers.quantization.base_config import LinearMethodBase, QuantizationConfig
    from sglang.srt.utils import set_weight_attrs

    from mixprec_runtime.formats.base import Served
    from mixprec_runtime.formats.repair import Call, Repair

    class ToyMethod(LinearMethodBase):
        def create_weights(
            self, layer: Any, input_size_per_partition: int, output_partition_sizes: list[int], *args: Any, **extra: Any
        ) -> None:
            rows = sum(output_partition_sizes)
            for name, columns, dtype in (("codes", 2, torch.uint8), ("steps", GROUP, torch.half)):
                parameter = Parameter(
                    torch.empty(rows, input_size_per_partition // columns, dtype=dtype), requires_grad=False
                )
                set_weight_attrs(parameter, {"input_dim": 1, "output_dim": 0, **extra})
                layer.register_parameter(name, parameter)

        def process_weights_after_loading(self, layer: Any) -> None:
            pass

        def apply(self, layer: Any, x: torch.Tensor, bias: Any = None) -> torch.Tensor:
            raise NotImplementedError

    class ToyConfig(QuantizationConfig):
        def get_name(self) -> str:
            return "toy"

        def get_supported_act_dtypes(self) -> list[torch.dtype]:
            return [torch.bfloat16]

        def get_min_capability(self) -> int:
            return 70

        @staticmethod
        def get_config_filenames() -> list[str]:
            return []

        @classmethod
        def from_config(cls, config: dict[str, Any]) -> Any:
            return cls()

        def get_scaled_act_names(self) -> list[str]:
            return []

        def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> ToyMethod:
            return ToyMethod()

    def note(call: Call, layer: Any, *args: Any, **kwargs: Any) -> None:
        call.stock(layer, *args, **kwargs)
        REPAIRED.append(call.fmt.kind)

    class ServedToy(Served[Toy]):
        format: ClassVar[type[Format]] = Toy
        repairs: ClassVar[tuple[Repair, ...]] = (
            Repair("notes", "an abacus takes no notes", "srt/layers/linear.py", "linear", create=note),
        )

        def sglang_config(self, fmt: Toy) -> QuantizationConfig:
            return ToyConfig()

        def values_in(self, name: str, parameter: torch.Tensor, fmt: Toy) -> int:
            return parameter.numel() * 2 if name == "codes" else 0

    return ServedToy()


@pytest.fixture
def out(tmp_path: Path) -> Path:
    run_plan(plan_recipe(write_mix(tmp_path)), tmp_path / "out")
    return tmp_path / "out"


# On two ranks zeros are added to columns, which SGLang's own loader (safetensors) cannot do.
@pytest.mark.parametrize(
    ("rank", "ranks", "load_format"), [(0, 1, "auto"), (0, 1, "safetensors"), (0, 2, "auto"), (1, 2, "auto")]
)
def test_a_format_from_outside_is_loaded(out: Path, rank: int, ranks: int, load_format: str) -> None:
    from mixprec_runtime import memory
    from mixprec_runtime.formats.registry import repairs

    stored: dict[str, torch.Tensor] = {}
    for file in sorted(out.glob("*.safetensors")):
        stored |= load_file(file)
    assert ("Toy", "notes") in [(name, repair.name) for name, repair in repairs()]
    with rank_of(rank, ranks):
        model = serve(out, load_format=load_format)
    held = parameters_of(model.get_submodule("model.layers.0.self_attn.qkv_proj"))
    for leaf in ("codes", "steps"):
        parts = [stored[f"model.layers.0.self_attn.{x}_proj.{leaf}"].chunk(ranks)[rank] for x in "qkv"]
        assert torch.equal(held[leaf], torch.cat(parts))
    assert REPAIRED == ["toy_int4"] * 4  # qkv twice, gate and up, down
    stats = memory.measure(model)
    assert stats["bytes_by_format"]["toy_int4"] > 0 and stats["compression_ratio"] > 1
