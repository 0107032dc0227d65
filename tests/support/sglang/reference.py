"""The distribution that transformers computes with a checkpoint's dequantized weights in float32, as a reference.

``PYTHONPATH=tests python -m support.sglang.reference MODEL`` prints JSON as ``ask`` does.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from mixprec_build.checkpoint.typed import open_source
from support.sglang.ask import prompts


def write_dense(checkpoint: Path, folder: Path) -> None:
    """Writes a checkpoint's dequantized weights to ``folder`` in float32."""
    source = open_source(str(checkpoint))
    tensors = {}
    for name, module in source.checkpoint.modules.items():
        weight = torch.from_numpy(source.dequantize(name).copy())
        tensors[name if "" in module.tensors else f"{name}.weight"] = weight
        if "bias" in module.tensors:
            bias = source.checkpoint.read(module.tensors["bias"])
            tensors[f"{name}.bias"] = torch.from_numpy(bias.astype("float32"))
    config = json.loads((checkpoint / "config.json").read_text())
    config.pop("quantization_config", None)
    (folder / "config.json").write_text(json.dumps({**config, "torch_dtype": "float32"}))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def round_activations(model: torch.nn.Module, checkpoint: Path) -> None:
    """Has linears of ``model`` round their input to FP8, with a scale for each token, if stored in FP8 by channels."""
    source = open_source(str(checkpoint))

    def rounded(_: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        scale = given[0].abs().amax(-1, keepdim=True).clamp(min=1e-12) / torch.finfo(torch.float8_e4m3fn).max
        return ((given[0] / scale).to(torch.float8_e4m3fn).to(given[0].dtype) * scale, *given[1:])

    for name, module in model.named_modules():
        if name in source.checkpoint.modules and source.format_of(name).kind == "fp8_channel":
            module.register_forward_pre_hook(rounded)


@torch.no_grad()
def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        write_dense(Path(sys.argv[1]), Path(folder))
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
    rows = []
    for prompt in prompts(model.config.vocab_size, 4, 64):
        logits = model(torch.tensor([prompt], device=device)).logits[0, :-1]
        rows.append(logits.log_softmax(-1).tolist())
    print(json.dumps({"distributions": rows}), flush=True)


if __name__ == "__main__":
    main()
