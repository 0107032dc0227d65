"""A case: a recipe that is refused, of sources of which something is broken, and what the message must say."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support.write import DEEPSEEK, LLAMA, QWEN3_MOE, Config, Tensors, Tiny

Edit = Callable[[Tensors, Config], None]


@dataclass(frozen=True)
class Spec:
    """A source: what ``write_tiny`` is called with. ``options`` are pairs, so that equal ones are written once."""

    model: Tiny
    variant: str
    edit: Edit | None = None
    options: tuple[tuple[str, Any], ...] = ()


def spec(model: Tiny, variant: str, edit: Edit | None = None, **options: Any) -> Spec:
    return Spec(model, variant, edit, tuple(options.items()))


def sized(model: Tiny, **sizes: int) -> Tiny:
    return dataclasses.replace(model, **sizes)


# What is broken in a source


def drop(*suffixes: str) -> Edit:
    def edit(tensors: Tensors, _: Config) -> None:
        for name in [name for name in tensors if any(suffix in name for suffix in suffixes)]:
            del tensors[name]

    return edit


def configure(**values: object) -> Edit:
    return lambda _, config: config.update(values)


def other_zeros(tensors: Tensors, _: Config) -> None:
    tensors["model.layers.1.mlp.up_proj.qzeros"][0, 0] = 0x66666666


def as_v2(tensors: Tensors, config: Config) -> None:
    """Zero points as they are: not for exllama, which would add one."""
    for name in tensors:
        if name.endswith(".qzeros"):
            tensors[name][:] = 0x88888888 - (1 << 32)
    config["quantization_config"]["checkpoint_format"] = "gptq_v2"


def backwards(*names: str) -> Edit:
    """Another order of inputs, as from a quantizer that ordered each linear for itself."""

    def edit(tensors: Tensors, _: Config) -> None:
        for name in names:
            tensors[f"{name}.g_idx"] = tensors[f"{name}.g_idx"][::-1].copy()

    return edit


def nonzero_bias(tensors: Tensors, _: Config) -> None:
    tensors["model.layers.0.mlp.down_proj.bias"][0] = 0.5


# Cases


@dataclass(frozen=True)
class Case:
    """A recipe that is refused. The first of ``sources`` is the model and the default."""

    sources: Mapping[str, Spec]
    weights: tuple[str, ...]
    says: tuple[str, ...]
    """Parts of the message."""
    clash: tuple[int, ...] = (0,)
    """The lines of ``weights`` that the message must quote."""
    about: tuple[str, ...] = ()
    """Sources whose line in the recipe the message must give."""
    hard: bool = False
    """Whether it stays refused under ``--allow unservable``."""
    fixes: int = 1
    """How often fixes must be applied until the plan passes; 0 where none is proposed."""
    options: Mapping[str, object] = field(default_factory=dict)

    def recipe(self, folders: Mapping[str, Path]) -> str:
        names = list(self.sources)
        lines = [f"model: {folders[names[0]]}", "sources:", *(f"  {name}: {folders[name]}" for name in names)]
        lines += ["weights:" if self.weights else "weights: {}", *(f"  {_quoted(line)}" for line in self.weights)]
        return "\n".join(lines) + "\n"

    def line_of(self, weight: int) -> int:
        return len(self.sources) + 4 + weight


def _quoted(line: str) -> str:
    pattern, _, source = line.rpartition(": ")
    return f'"{pattern}": {source}' if pattern[0] in "*{" else line


def llama(*variants: str) -> dict[str, Spec]:
    return _common(LLAMA, variants)


def moe(*variants: str) -> dict[str, Spec]:
    return _common(QWEN3_MOE, variants)


def deepseek(*variants: str) -> dict[str, Spec]:
    return _common(DEEPSEEK, variants)


def _common(model: Tiny, variants: tuple[str, ...]) -> dict[str, Spec]:
    by_name = {
        "bf16": spec(model, "bf16"),
        "fp8": spec(model, "fp8_block", skip=("*.kv_b_proj",)),
        "int4": spec(model, "gptq_int4"),
    }
    return {name: by_name[name] for name in variants}


ATTENTION = "model.layers.0.self_attn"


def llama_of(variant: str, edit: Edit | None = None, sizes: Mapping[str, int] | None = None, **options: Any) -> Any:
    """A Llama of other sizes in BF16 and in ``variant``, whose source is called `quant`."""
    model = sized(LLAMA, **(sizes or {}))
    return {"bf16": spec(model, "bf16"), "quant": spec(model, variant, edit, **options)}


def moe_of(variant: str, edit: Edit | None = None, sizes: Mapping[str, int] | None = None, **options: Any) -> Any:
    model = sized(QWEN3_MOE, **(sizes or {}))
    return {"bf16": spec(model, "bf16"), "quant": spec(model, variant, edit, **options)}
