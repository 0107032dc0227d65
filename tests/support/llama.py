"""A Llama of two layers in three formats, which transformers can load and which is written in milliseconds.

    sources = write_sources(tmp_path)         # tmp_path/{bf16,fp8,int4}
    recipe = write_recipe(tmp_path / "mix.yaml")

FP8 and Int4 are rounded from the BF16 weights, so that errors can be compared. Written with torch and the safetensors
library, without the code under test.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from support import formats

__all__ = ["COMPANIONS", "CONFIG", "LEFT_BEHIND", "LINEARS", "write_recipe", "write_sources", "write_tiny"]

Tensors = dict[str, torch.Tensor]

HIDDEN = 128  # the smallest size that Marlin and FP8 blocks allow
VOCAB = 64
LINEARS = tuple(f"self_attn.{x}_proj" for x in "qkvo") + tuple(f"mlp.{x}_proj" for x in ("gate", "up", "down"))

CONFIG: Mapping[str, object] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-05,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "an_unknown_key": {"kept": ["as", "it", "is", "é", 1e-05]},
}

# Files that a build copies; bytes that no JSON writer would produce.
COMPANIONS: Mapping[str, bytes] = {
    "tokenizer.json": b'{"version" :  "1.0", "text": "\xe2\x96\x81"}',
    "tokenizer_config.json": b'{"chat_template": null}\r\n',
    "tokenizer.model": bytes(range(256)),
    "merges.txt": b"a b\n",
    "chat_template.jinja": b"{{ messages }}",
    "generation_config.json": b'{"do_sample": true}',
    "modeling_tiny.py": b"raise SystemExit  # never run\n",
    "LICENSE": b"as you like\n",
}

CARD = b"---\nlicense: mit\ntags: [tiny]\n---\n# The source\n"
"""The ``README.md`` of the BF16 checkpoint, which a build keeps below its own."""

# Files that a build must not copy: they describe files that the output lacks, or run code when loaded.
LEFT_BEHIND: Mapping[str, bytes] = {
    "quantize_config.json": b'{"bits": 3}',
    "quant_config.json": b'{"w_bit": 3}',
    "hf_quant_config.json": b'{"producer": {}}',
    "pytorch_model.bin": b"\x80\x04.",
    "pytorch_model.bin.index.json": b'{"weight_map": {}}',
    "training_args.bin": b"\x80\x04.",
    ".gitattributes": b"*.bin\n",
}

_QUANTIZATION = {"fp8": formats.fp8_config(), "int4": formats.gptq_config(group_size=64)}


def write_sources(folder: Path, **changes: Any) -> dict[str, Path]:
    """Writes ``folder/{bf16,fp8,int4}``; ``changes`` are arguments of :func:`write_tiny`."""
    return {variant: write_tiny(folder / variant, variant, **changes) for variant in ("bf16", "fp8", "int4")}


def write_tiny(folder: Path, variant: str = "bf16", *, shards: int = 2, seed: int = 0, experts: int = 0) -> Path:
    """Writes a checkpoint: ``bf16``, ``fp8`` (128 x 128 blocks) or ``int4`` (GPTQ, groups of 64).

    With ``experts``, the last layer has a router and so many experts instead of an MLP.
    """
    folder.mkdir(parents=True)
    config = dict(CONFIG)
    if variant in _QUANTIZATION:
        config["quantization_config"] = dict(_QUANTIZATION[variant])
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    # Declarations of other methods beside that of a quantized source would be noted.
    for name, data in {**COMPANIONS, **({**LEFT_BEHIND, "README.md": CARD} if variant == "bf16" else {})}.items():
        (folder / name).write_bytes(data)
    tensors = _tensors(variant, seed, experts)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        mine = names[len(names) * i // shards : len(names) * (i + 1) // shards]
        save_file({name: tensors[name] for name in mine}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(mine, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    return folder


def write_recipe(
    path: Path,
    weights: Mapping[str, str] | None = None,
    *,
    sources: Iterable[str] = ("bf16", "fp8", "int4"),
    shard_size: str | None = "1MiB",
) -> Path:
    """Writes a recipe beside the sources: attention in FP8, MLPs in Int4, the rest in BF16."""
    if weights is None:
        weights = {"model.layers.*.self_attn.*": "fp8", "model.layers.*.mlp.*": "int4"}
    lines = ["model: ./bf16", "default: bf16", "sources:", *(f"  {name}: ./{name}" for name in sources)]
    if weights:
        lines += ["weights:", *(f'  "{pattern}": {source}' for pattern, source in weights.items())]
    if shard_size is not None:
        lines.append(f"output: {{shard_size: {shard_size}}}")
    path.write_text("\n".join(lines) + "\n")
    return path


def _tensors(variant: str, seed: int, experts: int) -> Tensors:
    random = torch.Generator().manual_seed(seed)

    def weight(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=random) * 0.05).bfloat16()

    dense = torch.float16 if variant == "int4" else torch.bfloat16
    out: Tensors = {"model.embed_tokens.weight": weight(VOCAB, HIDDEN).to(dense)}
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            out[f"{prefix}{norm}.weight"] = (1 + weight(HIDDEN)).to(dense)
        linears = list(LINEARS)
        if experts and layer:
            out[f"{prefix}mlp.gate.weight"] = weight(experts, HIDDEN).to(dense)
            linears[4:] = [linear.replace(".", f".experts.{i}.") for i in range(experts) for linear in LINEARS[4:]]
        for linear in linears:
            out |= _linear(f"{prefix}{linear}", weight(HIDDEN, HIDDEN), variant)
    out["model.norm.weight"] = (1 + weight(HIDDEN)).to(dense)
    out["lm_head.weight"] = weight(VOCAB, HIDDEN).to(dense)
    return out


def _linear(name: str, weight: torch.Tensor, variant: str) -> Tensors:
    if variant == "bf16":
        return {f"{name}.weight": weight}
    packer = formats.fp8_block if variant == "fp8" else partial(formats.gptq, group_size=64)
    return {f"{name}.{leaf}": tensor for leaf, tensor in packer(weight.float()).items()}
