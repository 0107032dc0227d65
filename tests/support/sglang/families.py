"""Tiny checkpoints of model families in BF16, FP8 and Int4, and the parameters of SGLang's own class for them."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from math import prod
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import save_file

from support import formats
from support.families import STACKED, TINY, StackedRelease, Tensor, TinyModel, tensors_of
from support.family_parts import EXPERTS
from support.mistral_large import LARGE_TENSORS, own_name
from support.serving import VARIANTS
from support.sglang.harness import tensors_of as stored_tensors

__all__ = [
    "dense_parameters",
    "dequantized",
    "family_mix",
    "heads_asked_for",
    "is_made",
    "random_values",
    "skip_unless_made",
    "write_family",
    "write_recipe",
]

Tensors = dict[str, torch.Tensor]

_STORE_AUTO_ROUND, _AUTO_ROUND = VARIANTS["auto_round_int4"]
_V4_CONFIG = {**formats.fp8_config(), "fmt": "e4m3", "scale_fmt": "ue8m0"}
_QUANTIZED = {
    "fp8": (formats.fp8_block, formats.fp8_config()),
    "int4": (formats.gptq, formats.gptq_config()),
    "packed": VARIANTS["ct_int4_g32"],
    "mxfp4": VARIANTS["ct_mxfp4"],
    "v4_fp8": (partial(formats.fp8_exponents, leaf="scale"), _V4_CONFIG),
    "v4_mxfp4": (partial(formats.mxfp4, layout="deepseek"), _V4_CONFIG),
    "auto_round": (_STORE_AUTO_ROUND, {**(_AUTO_ROUND or {}), "block_name_to_quantize": "model.language_model.layers"}),
}
_OF_EXPERTS = "packed", "mxfp4"
"""Variants of which only routed experts are quantized."""
_DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32}


def random_values(tensor: Tensor) -> torch.Tensor:
    """Random values, distributed roughly as in a trained weight."""
    generator = torch.Generator().manual_seed(zlib.crc32(tensor.name.encode()))
    if tensor.dtype == "I64":  # a table of experts
        return torch.randint(EXPERTS, tensor.shape, generator=generator)
    values = torch.randn(tensor.shape, generator=generator)
    if len(tensor.shape) == 1:
        return (0.1 * values if tensor.name.endswith("bias") else 1 + values / 8).to(_DTYPES[tensor.dtype])
    return (values / prod(tensor.shape[1:]) ** 0.5).to(_DTYPES[tensor.dtype])


def write_family(
    folder: Path,
    model: TinyModel,
    *,
    head: bool = False,
    drafts: bool = False,
    values_of: Callable[[Tensor], torch.Tensor] = random_values,
) -> dict[str, Path]:
    """Writes ``folder/bf16`` with experts as in the family's releases, and the mix's other sources with separate ones.

    With ``head``, ``lm_head`` is quantized, too; with ``drafts``, layers called ``mtp``. ``values_of`` makes the values
    of each tensor.
    """
    quantized = sorted({*model.lines.values(), *(["fp8"] if head else [])} - {"bf16"})
    whole = [tensor._replace(name=model.released_name(tensor.name)) for tensor in tensors_of(model.config)]
    values = {tensor.name: values_of(tensor) for tensor in whole}
    if model.norms_add_one:
        values |= {name: value - 1 for name, value in values.items() if "norm" in name and value.ndim == 1}
    stacked = STACKED.get(model.config["architectures"][0])
    _write(folder / "bf16", values if stacked is None else _stacked(values, stacked), model.config)
    for variant in quantized:
        store, quantization = _QUANTIZED[variant]
        tensors: Tensors = {}
        left = []
        for tensor in whole:
            module = tensor.name.removesuffix(".weight")
            draft = module.startswith("mtp.") and not drafts
            # The last is InternLM2's.
            linear = tensor.linear or (head and (module.endswith("lm_head") or module == "output"))
            dense = variant != "fp8" and bool(model.dense) and module.endswith(model.dense)
            if linear and not draft and not dense and (variant not in _OF_EXPERTS or ".experts." in module):
                stored = store(values[tensor.name].float())
                tensors |= {f"{module}.{leaf}": value for leaf, value in stored.items()}
            else:
                tensors[tensor.name] = values[tensor.name]
                left.append(module)
        skipped = {"modules_to_not_convert": left} if variant == "fp8" else {}
        if variant == "fp8" and stacked is not None and len(stacked.names) == 3:
            tensors = _stacked_each(tensors)
        _write(folder / variant, tensors, _declared(model.config, {**(quantization or {}), **skipped}, variant))
    return {variant: folder / variant for variant in ("bf16", *quantized)}


def _declared(config: dict[str, Any], quantization: dict[str, Any], variant: str) -> dict[str, Any]:
    """``config.json`` with a declaration; of experts alone it is where Kimi-K2.5's and K3's releases have it."""
    if variant not in _OF_EXPERTS or "text_config" not in config:
        return {**config, "quantization_config": quantization}
    left = [
        "lm_head",
        "self_attn",
        "shared_experts",
        r"mlp\.(gate|up|gate_up|down)_proj",
        "vision_tower",
        "mm_projector",
    ]
    left = [f"re:.*{words}.*" for words in left]
    return {**config, "text_config": {**config["text_config"], "quantization_config": {**quantization, "ignore": left}}}


def _stacked(values: Tensors, release: StackedRelease) -> Tensors:
    """Stacks the experts of each layer in two tensors; in one for each tensor of a projection where it has three."""
    if len(release.names) == 3:
        return _stacked_each(values)
    out: Tensors = {}
    blocks: dict[str, dict[str, dict[int, torch.Tensor]]] = {}
    for name, value in values.items():
        block, found, rest = name.partition(".experts.")
        if not found or name.startswith("mtp."):
            out[name] = value
        else:
            number, part, _ = rest.split(".")
            blocks.setdefault(block, {}).setdefault(part, {})[int(number)] = value
    for block, numbered in blocks.items():
        parts = {part: [values[number] for number in sorted(values)] for part, values in numbered.items()}
        pairs = zip(*(parts[up] for up in release.ups), strict=True)
        joined = torch.stack([torch.cat(pair) for pair in pairs]), torch.stack(parts[release.down])
        for name, value in zip(release.names, joined, strict=True):
            out[f"{block}.{name}"] = value.transpose(1, 2) if release.transposed else value
    return out


def _stacked_each(values: Tensors) -> Tensors:
    """Stacks ``...moe.experts.<number>.up_proj.weight`` of a layer as ``...moe.up_proj.weight``, and so on."""
    out: Tensors = {}
    numbered: dict[str, dict[int, torch.Tensor]] = {}
    for name, value in values.items():
        block, found, rest = name.partition(".experts.")
        if found:
            number, _, tensor = rest.partition(".")
            numbered.setdefault(f"{block}.{tensor}", {})[int(number)] = value
        else:
            out[name] = value
    return out | {name: torch.stack([each[number] for number in sorted(each)]) for name, each in numbered.items()}


def _write(folder: Path, tensors: Tensors, config: dict[str, Any]) -> None:
    folder.mkdir(parents=True)
    save_file(
        {name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    (folder / "config.json").write_text(json.dumps(config, indent=2))


_LEAVES = (
    "qweight", "qzeros", "scales", "g_idx", "weight_scale_inv", "weight_packed", "weight_scale", "weight_shape",
    "weight_global_scale", "scale",
)  # fmt: skip


def dequantized(checkpoint: Path, folder: Path, dtype: torch.dtype = torch.bfloat16, *, stacked: bool = False) -> Path:
    """Writes a checkpoint with the dequantized weights of a compiled one.

    With ``stacked``, all experts of a layer are in one tensor ``[E, N, K]``, as transformers reads them, named as in
    the family's release.
    """
    tensors = stored_tensors(checkpoint)
    quantized = {name.rpartition(".")[0] for name in tensors if name.rpartition(".")[2] in _LEAVES}
    # Gemma-4 has scales of other kinds.
    quantized = {module for module in quantized if f"{module}.scale" not in tensors or f"{module}.weight" in tensors}
    out: Tensors = {}
    for name, value in tensors.items():
        module, _, leaf = name.rpartition(".")
        if module not in quantized or leaf == "bias":
            out[name] = value
    for module in quantized:
        parts = {leaf: tensors[f"{module}.{leaf}"] for leaf in (*_LEAVES, "weight") if f"{module}.{leaf}" in tensors}
        out[f"{module}.weight"] = formats.dequantize(parts).to(dtype)
    config = json.loads((checkpoint / "config.json").read_text())
    del config["quantization_config"]
    release = STACKED.get(config["architectures"][0])
    if release is not None and len(release.names) == 3:  # SGLang's class loads no others
        out = _stacked_each(out)
    if config["architectures"][0] in LARGE_TENSORS:  # by its stock class, which has these names only
        out = {own_name(name): value for name, value in out.items()}
    named = StackedRelease(False) if release is None else release
    if config["model_type"] != "llama4":  # the only one that transformers has transposed as well
        named = named._replace(transposed=False)
    _write(folder, _stacked(out, named) if stacked else out, config)
    return folder


def dense_parameters(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields all parameters, dequantized to float32, by their names in SGLang's unquantized model."""
    from sglang.srt.layers.linear import LinearBase
    from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead

    from mixprec_runtime.cpu import reference
    from mixprec_runtime.formats.registry import served
    from mixprec_runtime.native import format_of

    for module in list(model.modules()):
        fmt = format_of(module)
        if fmt is None or not fmt.quantized:
            continue
        linear = isinstance(module, LinearBase | ParallelLMHead)
        turn = reference._dequantize_linear if linear else reference._dequantize_experts
        if not hasattr(module, "params_dtype"):  # 0.5.15's FusedMoE does not keep it
            module.params_dtype = torch.bfloat16
        turn(module, fmt, served(fmt).as_stored)
    mixed = {path: module for path, module in model.named_modules() if hasattr(module, "up_numbers")}
    for path, module in mixed.items():
        for weight, numbers in (("w13", module.up_numbers), ("w2", module.down_numbers)):
            groups = [group for group in module.groups if group.projection in ("", weight)]
            experts = []
            for expert in range(numbers.shape[1] - 1):  # the last column is for ids of -1
                places = zip(groups, numbers[:, expert].tolist(), strict=True)
                group, number = next(place for place in places if place[1] >= 0)
                experts.append(getattr(group, f"{weight}_weight")[number].float())
            yield f"{path}.{weight}_weight", torch.stack(experts)
    for name, parameter in model.named_parameters():
        if parameter.numel() and not any(name.startswith(f"{path}.") for path in mixed):
            yield name, parameter.data.float()


@contextmanager
def heads_asked_for() -> Iterator[list[str]]:
    """Yields the names, filled in as models are made, by which SGLang's classes ask how their heads are stored."""
    from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead

    from mixprec_runtime.config import MixPrecConfig

    asked: list[str] = []
    method = MixPrecConfig.get_quant_method

    def get_quant_method(config: MixPrecConfig, layer: torch.nn.Module, prefix: str) -> Any:
        if isinstance(layer, ParallelLMHead):
            asked.append(prefix)
        return method(config, layer, prefix)

    with patch.object(MixPrecConfig, "get_quant_method", get_quant_method):
        yield asked


def is_made(name: str) -> bool:
    """Whether the installed SGLang can make the tiny model ``name`` here."""
    import sglang.version

    return name not in _NOT_MADE.get(sglang.version.__version__, ())


_NOT_MADE = {
    "0.5.15.post1": ("minimax_m3", "minimax_m3_images", "kimi_k3"),  # their classes came with 0.5.16 and 0.5.17
    # their configs and encoders are transformers' there, of another version than these tests have
    "0.5.23": ("mistral3", "gemma4_images", "mistral_large_3_images"),
}


def skip_unless_made(name: str) -> None:
    """Skips a test where the installed SGLang cannot make the tiny model ``name``."""
    if not is_made(name):
        pytest.skip("this SGLang cannot make the class here")


def write_recipe(recipe: Path, sources: Mapping[str, Path], lines: Mapping[str, str]) -> Path:
    """A recipe with ``lines`` as ``weights:``, and ``bf16`` for all else."""
    text = [f"model: {sources['bf16']}", "default: bf16", "sources:"]
    text += [f"  {variant}: {path}" for variant, path in sources.items()]
    text += ["weights:", *(f"  '{pattern}': {source}" for pattern, source in lines.items())]
    recipe.write_text("\n".join(text))
    return recipe


def family_mix(
    folder: Path,
    name: str,
    *,
    head: bool = False,
    lines: Mapping[str, str] | None = None,
    model: TinyModel | None = None,
) -> Path:
    """The mix of a tiny model, planned, built and verified once below ``folder``; with ``head``, its head is FP8.

    ``lines`` are added to those of its recipe; ``model`` takes the place of ``TINY[name]``.
    """
    from mixprec_build.output.build import plan_recipe, run_plan
    from mixprec_build.output.verify import verify

    added = {**(lines or {}), **({"*lm_head": "fp8"} if head else {})}
    changed = f"-{zlib.crc32(repr(added).encode()):08x}" if added else ""
    out = folder / "families" / f"{name}{changed}" / "mix"
    if out.exists():
        return out
    made = model or TINY[name]
    sources = write_family(out.parent, made, head=head)
    plan = plan_recipe(write_recipe(out.with_suffix(".yaml"), sources, {**made.lines, **added}))
    assert not [note for note in plan.notes if "is not among the families checked" in note]
    run_plan(plan, out)
    assert not verify(out).differences
    return out
