"""Asks checkpoints of any format a question and measures their perplexity, through transformers on a CPU.

Weights are dequantized by mixprec to float32, so formats are compared by what they store and nothing else:
activations stay float32 here, while serving engines quantize them, too, where a format says so.

    python recipes/demo/evaluate.py .demo/sources/smollm2-bf16 .demo/smollm2-mixed
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from mixprec_build.checkpoint.typed import Source, open_source

QUESTION = "The capital of France is"
TEXT = Path(__file__).with_name("text") / "evaluation.txt"


def load(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Source]:
    """The model in float32 with dequantized weights, and its tokenizer."""
    source = open_source(str(folder))
    config = AutoConfig.from_pretrained(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # transformers is given plain weights
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    weights = {f"{name}.weight": torch.from_numpy(source.dequantize(name)) for name in source.checkpoint.modules}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    if set(missing) - tied or unexpected:
        raise SystemExit(f"{folder}: missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    return model.eval(), AutoTokenizer.from_pretrained(folder), source


@torch.inference_mode()
def answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, question: str, tokens: int = 8) -> str:
    """The greedy continuation of ``question``."""
    inputs = tokenizer(question, return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return str(tokenizer.decode(out[0, inputs.input_ids.shape[1] :], skip_special_tokens=True))


@torch.inference_mode()
def perplexity(model: PreTrainedModel, ids: torch.Tensor, window: int) -> float:
    """exp of the mean negative log-likelihood per token over disjoint windows of ``ids`` ``[tokens]``."""
    total, count = 0.0, 0
    for chunk in ids.split(window):
        if len(chunk) < 2:
            continue
        logits = model(chunk[None]).logits[0, :-1]
        total += torch.nn.functional.cross_entropy(logits, chunk[1:], reduction="sum").item()
        count += len(chunk) - 1
    return math.exp(total / count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--tokens", type=int, default=4096, help="how much of the evaluation text to use")
    parser.add_argument("--window", type=int, default=1024)
    args = parser.parse_args()
    table = Table("checkpoint", "formats", "MB", "perplexity", f"“{QUESTION}”", title_justify="left")
    started = time.monotonic()
    for folder in args.folders:
        model, tokenizer, source = load(folder)
        ids = tokenizer(TEXT.read_text(), return_tensors="pt").input_ids[0, : args.tokens]
        nbytes = sum(shard.size for shard in source.checkpoint.shards.values())
        kinds = ", ".join(sorted({fmt.kind for name in source.formats if (fmt := source.format_of(name))}))
        row = (f"{nbytes / 1e6:.1f}", f"{perplexity(model, ids, args.window):.3f}", answer(model, tokenizer, QUESTION))
        table.add_row(folder.name, kinds, *map(repr_line, row))
    Console(width=140).print(table)
    print(f"{args.tokens} tokens of {TEXT.name} in windows of {args.window}; {time.monotonic() - started:.0f} s")


def repr_line(text: str) -> str:
    """One line of a table, whatever the model said."""
    return text.replace("\n", "⏎").strip()


if __name__ == "__main__":
    main()
