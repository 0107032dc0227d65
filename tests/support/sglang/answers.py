"""The answers of transformers, in float32, with a checkpoint's dequantized weights."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from support.formats import dequantize
from support.sglang.mixes import ALL, Expected, mix

__all__ = [
    "PROMPTS", "TOKENS", "dequantized", "generated", "last_hidden_states", "prompt_logprobs", "reference",
    "transformers_tokens", "write_dequantized",
]  # fmt: skip

PROMPTS = [[1, 2, 3, 4, 5, 6, 7, 8], [9, 10, 11], [400, 30, 2, 77, 5]]
TOKENS = 12


def transformers_tokens(folder: Path, name: str, scratch: Path) -> list[list[int]]:
    """The tokens for a mix's dequantized weights, which are written to ``scratch``."""
    write_dequantized(mix(folder, name), dequantized(folder, name), scratch)
    return generated(scratch)


def write_dequantized(checkpoint: Path, weights: dict[str, torch.Tensor], scratch: Path) -> None:
    """Writes ``weights``, with the configuration of a compiled checkpoint, for transformers."""
    config = json.loads((checkpoint / "config.json").read_text())
    del config["quantization_config"]
    (scratch / "config.json").write_text(json.dumps({**config, "torch_dtype": "float32"}))
    save_file(weights, scratch / "model.safetensors", metadata={"format": "pt"})


def reference(checkpoint: Path) -> Any:
    """The model of transformers, in float32 but for parameters that SGLang has in BF16."""
    import transformers

    (architecture,) = json.loads((checkpoint / "config.json").read_text())["architectures"]
    # Of ERNIE, whose class SGLang and the release spell otherwise, transformers knows the type.
    named = getattr(transformers, architecture, transformers.AutoModelForCausalLM)
    model = named.from_pretrained(checkpoint, dtype=torch.float32)
    for module in model.modules():
        if type(module).__name__ == "XIELUActivation":
            # SGLang has these parameters in BF16, and rounds what it computes of them, in a model of any dtype
            # (`XIELU` in layers/activation.py).
            module.to(torch.bfloat16)
    return model


def prompt_logprobs(checkpoint: Path) -> list[list[float]]:
    """The logprobs that transformers has for the tokens of each prompt after the first."""
    model, found = reference(checkpoint), []
    for prompt in PROMPTS:
        ids = torch.tensor(prompt)
        with torch.no_grad():
            logprobs = model(ids[None]).logits[0, :-1].log_softmax(-1)
        found.append(logprobs.gather(1, ids[1:, None])[:, 0].tolist())
    return found


def last_hidden_states(checkpoint: Path) -> list[torch.Tensor]:
    """What the decoder makes of each prompt, ``[tokens, hidden]``, after its last norm."""
    model = reference(checkpoint)
    with torch.no_grad():
        return [model.model(torch.tensor([prompt])).last_hidden_state[0] for prompt in PROMPTS]


def generated(checkpoint: Path) -> list[list[int]]:
    """The tokens of transformers, in float32."""
    model = reference(checkpoint)
    answers = []
    for prompt in PROMPTS:
        out = model.generate(
            torch.tensor([prompt]), max_new_tokens=TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        answers.append(out[0, len(prompt) :].tolist())
    return answers


@cache
def dequantized(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """The dequantized weights of a mix, in float32."""
    expected = Expected(folder, ALL[name])
    out = {}
    for module, tensors in expected.modules().items():
        for leaf in ("bias", "e_score_correction_bias"):
            if leaf in tensors:
                out[f"{module}.{leaf}"] = tensors.pop(leaf).float()
        if tensors:
            out[f"{module}.weight"] = dequantize(tensors).contiguous()
    return out
