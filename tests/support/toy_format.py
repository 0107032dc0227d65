"""A storage format that another package might add, and checkpoints in it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from safetensors.torch import load_file, save_file

from mixprec_build.formats.base import Axes, Axis, Format, FormatError, Kind, check_tensor, only_leaves, shape_text
from mixprec_build.formats.quantization import Quantization
from mixprec_build.storage.module import StoredModule

from .llama import LINEARS, write_tiny

__all__ = ["GROUP", "Toy", "write_mix", "write_toy"]


GROUP = 32


@dataclass(frozen=True, slots=True)
class Toy(Format):
    """Int4: ``codes U8 [N, K/2]`` with two values in a byte, the first in the lower bits, offset by 8; and scales
    ``steps F16 [N, K/group]``."""

    name: ClassVar[str] = "Toy"
    kinds: ClassVar[Mapping[str, Kind]] = {"toy_int4": Kind(4, words=("toy", "int4"), kernels="abacus", least=70)}
    leaves: ClassVar[frozenset[str]] = frozenset({"codes", "steps", "bias"})
    methods: ClassVar[Mapping[str, Set[str] | None]] = {"toy": {"group"}}

    group: int

    @property
    def values_leaf(self) -> str:
        return "codes"

    @property
    def kind(self) -> str:
        return "toy_int4"

    @classmethod
    def recognise(cls, module: StoredModule, quantization: Quantization) -> Toy | None:
        if "codes" not in module.tensors:
            return None
        found = quantization.derive(_declared)
        found.check(module)
        return found

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Toy:
        return cls(int(data["group"]))

    def to_json(self) -> dict[str, object]:
        return {"kind": self.kind, "group": self.group}

    def check(self, module: StoredModule) -> None:
        only_leaves(module, self.leaves, self.kind)
        if not {"codes", "steps"} <= module.tensors.keys() or len(module.tensors["codes"].shape) != 2:
            raise FormatError("toy_int4 needs codes with two dimensions, and steps")
        n, k = self.shape(module)
        check_tensor(module, "codes", ["U8"], (n, k // 2), "")
        check_tensor(module, "steps", ["F16"], (n, k // self.group), f"beside {shape_text('codes', module)}")

    def shape(self, module: StoredModule) -> tuple[int, ...]:
        n, half = module.tensors["codes"].shape
        return n, 2 * half

    def axes(self, leaf: str) -> Axes:
        inputs = {"codes": Axis(1, 2), "steps": Axis(1, self.group)}
        return Axes(n=Axis(0), k=inputs.get(leaf))

    def tile(self, *, experts: bool) -> tuple[int, int]:
        return 48, self.group  # 48 does not divide a rank's 64 columns, so zeros are added

    def filler(self, leaf: str) -> int:
        return 0x88 if leaf == "codes" else 0

    def fits_untiled(self, outputs: Sequence[int], inputs: int) -> bool:
        return inputs % self.group == 0

    def linear_limits(self, parts: Sequence[StoredModule]) -> list[str]:
        return ["an abacus has no room for more than 4096 inputs"] if self.shape(parts[0])[1] > 4096 else []

    def dequantize(self, tensors: Mapping[str, npt.NDArray[Any]]) -> npt.NDArray[np.float32]:
        codes = tensors["codes"]
        values = np.stack([codes & 15, codes >> 4], axis=-1).reshape(len(codes), -1).astype(np.float32) - 8
        return values * tensors["steps"].astype(np.float32).repeat(self.group, axis=1)


def _declared(quantization: Quantization) -> Toy:
    group = quantization.get("group")
    if type(group) is not int or group < 2:
        raise FormatError(f"toy_int4 in groups of {group!r}")
    return Toy(group)


def write_mix(folder: Path) -> Path:
    """Writes ``folder/{bf16,toy}`` and a recipe that mixes them."""
    write_tiny(folder / "bf16")
    write_toy(folder / "bf16", folder / "toy")
    path = folder / "mix.yaml"
    path.write_text(
        "model: ./bf16\nsources:\n  bf16: ./bf16\n  hand_made: ./toy\ndefault: bf16\nweights:\n"
        "  '*.self_attn.{q,k,v}_proj': toy\n  'model.layers.1.mlp.*': toy_int4\n"
    )
    return path


def write_toy(dense: Path, folder: Path, group: object = GROUP) -> None:
    """Writes a checkpoint with the linears of ``dense`` rounded to nearest, the rest unchanged."""
    folder.mkdir()
    config = json.loads((dense / "config.json").read_text())
    quantization = {"quant_method": "toy", "group": group}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    tensors = {}
    for file in sorted(dense.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            module = name.removesuffix(".weight")
            if not module.endswith(LINEARS):
                tensors[name] = tensor
                continue
            groups = tensor.float().reshape(len(tensor), -1, GROUP)
            steps = (groups.abs().amax(-1) / 7).half()
            codes = ((groups / steps[..., None].float()).round().clamp(-8, 7) + 8).byte().reshape(len(tensor), -1)
            tensors |= {f"{module}.codes": codes[:, ::2] | codes[:, 1::2] << 4, f"{module}.steps": steps}
    save_file(tensors, folder / "model.safetensors")
