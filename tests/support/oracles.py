"""References for the tests of formats: packers of auto-gptq and auto-round, and modules described by dtypes and shapes.

auto-gptq 0.7.1 is the reference for GPTQ's layout, but ``import auto_gptq`` needs libraries of 2024. Its two packers in
plain torch do not, so their modules are imported without the packages around them. So are those of auto-round 0.16.1,
whose package needs all that quantizing takes.
"""

from __future__ import annotations

import ast
import functools
import importlib
import sys
import warnings
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from math import prod
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from mixprec_build.storage.dtypes import DTYPE_BITS, numpy_dtype
from mixprec_build.storage.header import TensorInfo
from mixprec_build.storage.module import StoredModule

Stated = tuple[str, tuple[int, ...]]
"""A dtype and a shape."""

_READ = ("F32", "F16", "BF16", "F8_E4M3", "F8_E8M0", "I32", "I64", "I8", "U8")
_SAFETENSORS_DTYPE = {numpy_dtype(dtype): dtype for dtype in _READ}


def auto_gptq_packers() -> tuple[type[Any], type[Any]]:
    """``QuantLinear`` of ``qlinear_cuda``, which uses ``g_idx``, and of ``qlinear_cuda_old``, which ignores it."""
    spec = find_spec("auto_gptq")
    if spec is None or spec.submodule_search_locations is None:
        raise ModuleNotFoundError("auto-gptq is not installed; `make setup` installs it without its requirements")
    folder = Path(spec.submodule_search_locations[0])
    for name in ("auto_gptq", "auto_gptq.nn_modules", "auto_gptq.nn_modules.qlinear"):
        namespace = ModuleType(name)
        namespace.__path__ = [str(folder.joinpath(*name.split(".")[1:]))]
        sys.modules[name] = namespace
    for kernels in ("autogptq_cuda_64", "autogptq_cuda_256"):
        # They need a CUDA runtime of 2024; None makes their import fail, which the packers handle.
        sys.modules[kernels] = None  # type: ignore[assignment]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        heeding = importlib.import_module("auto_gptq.nn_modules.qlinear.qlinear_cuda")
        old = importlib.import_module("auto_gptq.nn_modules.qlinear.qlinear_cuda_old")
    return heeding.QuantLinear, old.QuantLinear


def auto_round_packer() -> Callable[[str], Any]:
    """auto-round's own choice of the class that packs a 4-bit symmetric layer, by its word for the packing."""
    spec = find_spec("auto_round")
    if spec is None or spec.submodule_search_locations is None:
        raise ModuleNotFoundError("auto-round is not installed; `make setup` installs it without its requirements")
    folder, export = Path(spec.submodule_search_locations[0]), "auto_round.export.export_to_autoround"
    for name in ("auto_round", "auto_round.utils", "auto_round.export", export, "auto_round.export.export_to_awq"):
        namespace = ModuleType(name)
        namespace.__path__ = [str(folder.joinpath(*name.split(".")[1:]))]
        sys.modules[name] = namespace
    sys.modules["auto_round.utils"].get_packing_device = lambda device=None: "cpu"  # type: ignore[attr-defined]
    # Of the module that chooses, which imports the rest of auto-round, the function that does.
    path = folder / "export" / "export_to_autoround" / "export.py"
    choosing = "dynamic_import_quant_linear_for_packing"
    (function,) = [
        node
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name == choosing
    ]
    known: dict[str, Any] = {"functools": functools, "__package__": export, "SUPPORTED_FORMATS": ()}
    exec(compile(ast.Module([function], []), str(path), "exec"), known)
    return lambda word: known[choosing](word, 4, 128, True)


def modelopt_nvfp4(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], np.ndarray[Any, Any]]:
    """A weight ``[N, K]`` as ModelOpt stores it in NVFP4, without scales of inputs, and what it dequantizes that to.

    ``NVFP4QTensor`` is ModelOpt's own file; its package wants GPU tools, of which three small sums over blocks are
    written here.
    """
    spec = find_spec("modelopt")
    if spec is None or spec.submodule_search_locations is None:
        raise ModuleNotFoundError("nvidia-modelopt is not installed; `make setup` installs it without its requirements")
    folder = Path(spec.submodule_search_locations[0]) / "torch" / "quantization"
    sums = ModuleType("modelopt.torch.quantization.utils")
    sums.__path__ = [str(folder / "utils")]
    sums.__dict__.update(
        reduce_amax=lambda tensor: tensor.abs().amax(),
        reduce_block_amax=lambda tensor, block_sizes: tensor.abs().unflatten(-1, (-1, block_sizes[-1])).amax(-1),
        reduce_block_padding=lambda tensor, block_sizes: tensor,
        fsdp2_aware_weight_update=None,
        patch_fsdp_mp_dtypes=None,
    )
    backends = ModuleType("modelopt.torch.quantization.backends.utils")
    backends.__dict__["fp4_compatible"] = lambda: False
    replaced = {sums.__name__: sums, backends.__name__: backends}
    for name in ("modelopt", "modelopt.torch", "modelopt.torch.quantization", "modelopt.torch.quantization.qtensor"):
        namespace = ModuleType(name)
        namespace.__path__ = [str(Path(spec.submodule_search_locations[0]).joinpath(*name.split(".")[1:]))]
        replaced[name] = namespace
    with patch.dict(sys.modules, replaced):
        qtensor = importlib.import_module("modelopt.torch.quantization.qtensor.nvfp4_tensor").NVFP4QTensor
    packed, scale, scale_2 = qtensor.quantize(weight.clone(), 16)
    tensors = {"weight": packed._quantized_data, "weight_scale": scale, "weight_scale_2": scale_2}
    back = packed.dequantize(torch.float32, scale=scale, double_scale=scale_2, block_sizes={-1: 16})
    return tensors, back.numpy()


def modelopt_int4(values: torch.Tensor) -> torch.Tensor:
    """Integers ``[N, K]`` from -8 to 7 as ModelOpt packs them, two outputs a byte: U8 ``[N / 2, K]``."""
    spec = find_spec("modelopt")
    if spec is None or spec.submodule_search_locations is None:
        raise ModuleNotFoundError("nvidia-modelopt is not installed; `make setup` installs it without its requirements")
    # Of the module, which imports the rest of ModelOpt, the functions that pack.
    path = Path(spec.submodule_search_locations[0]) / "torch" / "export" / "quant_utils.py"
    named = ("pack_int4_in_uint8", "_validate_int4_block_size")
    functions = [
        node
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name in named
    ]
    known: dict[str, Any] = {"torch": torch}
    exec(compile(ast.Module(functions, []), str(path), "exec"), known)
    block = values.shape[1]
    packed: torch.Tensor = known["pack_int4_in_uint8"](values, torch.ones(len(values), 1), block)
    return packed


def stated(tensors: Mapping[str, Stated], name: str = "model.layers.0.mlp.down_proj") -> StoredModule:
    """A module with the dtypes and shapes of a header, without data."""
    infos = {}
    for leaf, (dtype, shape) in tensors.items():
        full = f"{name}.{leaf}" if leaf else name
        infos[leaf] = TensorInfo(full, dtype, shape, "model.safetensors", 0, prod(shape) * DTYPE_BITS[dtype] // 8)
    return StoredModule(name, infos)


def stated_of(arrays: Mapping[str, np.ndarray[Any, Any]], name: str = "model.layers.0.mlp.down_proj") -> StoredModule:
    """A module with the dtypes and shapes of these arrays."""
    return stated({leaf: (_SAFETENSORS_DTYPE[array.dtype], array.shape) for leaf, array in arrays.items()}, name)


def gptq(n: int, k: int, *, bits: int = 4, group_size: int = 128, **changed: Stated | None) -> dict[str, Stated]:
    """The tensors of a GPTQ linear; ``changed`` replaces, adds or (None) removes tensors."""
    pack, groups = 32 // bits, 1 if group_size == -1 else -(-k // group_size)
    tensors: dict[str, Stated | None] = {
        "qweight": ("I32", (k // pack, n)),
        "qzeros": ("I32", (groups, n // pack)),
        "scales": ("F16", (groups, n)),
        "g_idx": ("I32", (k,)),
    }
    return {leaf: tensor for leaf, tensor in (tensors | changed).items() if tensor is not None}


def awq(n: int, k: int, *, group_size: int = 128, **changed: Stated | None) -> dict[str, Stated]:
    """The tensors of an AWQ linear; ``changed`` as for :func:`gptq`."""
    groups = 1 if group_size == -1 else -(-k // group_size)
    tensors: dict[str, Stated | None] = {
        "qweight": ("I32", (k, n // 8)),
        "qzeros": ("I32", (groups, n // 8)),
        "scales": ("F16", (groups, n)),
    }
    return {leaf: tensor for leaf, tensor in (tensors | changed).items() if tensor is not None}


def awq_words(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Packs 4-bit values ``[R, C]`` into words ``[R, C / 8]``, one value at a time as AutoAWQ's packer."""
    rows, columns = values.shape
    words = np.zeros((rows, columns // 8), np.int64)
    for row in range(rows):
        for column in range(columns // 8):
            for place, output in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
                words[row, column] |= int(values[row, 8 * column + output]) << (4 * place)
    return words.astype(np.uint32).view(np.int32)


def packed(n: int, k: int, *, bits: int = 4, group_size: int = 128, **changed: Stated | None) -> dict[str, Stated]:
    """The tensors of a linear in compressed-tensors' packed format; ``changed`` as for :func:`gptq`."""
    tensors: dict[str, Stated | None] = {
        "weight_packed": ("I32", (n, k * bits // 32)),
        "weight_scale": ("BF16", (n, 1 if group_size == -1 else -(-k // group_size))),
        "weight_shape": ("I64", (2,)),
    }
    return {leaf: tensor for leaf, tensor in (tensors | changed).items() if tensor is not None}


def config_group(*targets: str, kind: str = "int", activations: dict[str, Any] | None = None, **weights: Any) -> Any:
    """A config group of compressed-tensors; ``weights`` are its ``QuantizationArgs``."""
    args = {"num_bits": 4, "type": kind, "symmetric": True, "dynamic": False, "strategy": "group", **weights}
    return {"targets": list(targets) or ["Linear"], "weights": args, "input_activations": activations}


def compressed(format_: str = "pack-quantized", *groups: Any, **changed: Any) -> dict[str, Any]:
    """``quantization_config`` of compressed-tensors."""
    return {
        "quant_method": "compressed-tensors",
        "format": format_,
        "config_groups": {f"group_{i}": group for i, group in enumerate(groups or [config_group(group_size=128)])},
        "ignore": ["lm_head"],
        **changed,
    }


def fp8(n: int, k: int, scale: tuple[int, ...], **changed: Stated | None) -> dict[str, Stated]:
    """The tensors of an FP8 linear with ``weight_scale`` of this shape; ``changed`` as for :func:`gptq`."""
    tensors: dict[str, Stated | None] = {"weight": ("F8_E4M3", (n, k)), "weight_scale": ("F32", scale)}
    return {leaf: tensor for leaf, tensor in (tensors | changed).items() if tensor is not None}


def fp8_block(n: int, k: int, block: tuple[int, int] = (128, 128), **changed: Stated | None) -> dict[str, Stated]:
    """The tensors of an FP8 linear in blocks; ``changed`` as for :func:`gptq`."""
    grid: Stated = ("F32", (-(-n // block[0]), -(-k // block[1])))
    return fp8(n, k, (), **{"weight_scale": None, "weight_scale_inv": grid, **changed})


def nvfp4(n: int, k: int, **changed: Stated | None) -> dict[str, Stated]:
    """The tensors of a linear in ModelOpt's NVFP4; ``changed`` as for :func:`gptq`."""
    tensors: dict[str, Stated | None] = {
        "weight": ("U8", (n, k // 2)),
        "weight_scale": ("F8_E4M3", (n, k // 16)),
        "weight_scale_2": ("F32", ()),
        "input_scale": ("F32", ()),
    }
    return {leaf: tensor for leaf, tensor in (tensors | changed).items() if tensor is not None}


def mxfp4(n: int, k: int, **changed: Stated | None) -> dict[str, Stated]:
    """The tensors of a linear in Quark's MXFP4; ``changed`` as for :func:`gptq`."""
    tensors: dict[str, Stated | None] = {"weight": ("U8", (n, k // 2)), "weight_scale": ("U8", (n, k // 32))}
    return {leaf: tensor for leaf, tensor in (tensors | changed).items() if tensor is not None}
