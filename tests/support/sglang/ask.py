"""Serves a checkpoint with stock SGLang and prints its answers as JSON on the last line.

    export PYTHONPATH=tests
    python -m support.sglang.ask MODEL '{"dtype": "bfloat16", "logits": true, "engine": {"tp_size": 2}}'

Answers are greedy tokens and their logprobs for fixed prompts, and memory; on demand the same after weights and cache
were released and resumed (``sleep``), the distribution at every position of the prompts, what texts lose (``texts``: a
file with a JSON list of their tokens), and tokens a second, once for each line on standard input. Nothing here mentions
mixprec: SGLang finds its plugin, or serves without it.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from support.sglang.configs import register_configs

# Not in main: the processes that an engine starts import this module, too.
register_configs()

QUIET = {
    "attention_backend": "triton",
    "sampling_backend": "pytorch",
    "grammar_backend": "none",
    "skip_tokenizer_init": True,
    "log_level": "warning",
    "disable_radix_cache": True,
    "random_seed": 0,
}
# Arguments of engines that compile, for decoding and for prefill.
COMPILED = {
    # SGLang 0.5.17 compiles no Qwen3-MoE, of any format, whose KV cache is in BF16: Dynamo fails at an assertion of
    # its rotary embedding's (layers/rotary_embedding/base.py:244).
    "torch.compile": {"enable_torch_compile": True, "torch_compile_max_bs": 1, "kv_cache_dtype": "fp8_e4m3"},
    "piecewise": {"cuda_graph_backend_prefill": "tc_piecewise"},
}


def prompts(vocab: int, count: int, length: int) -> list[list[int]]:
    draw = random.Random(0)
    return [[draw.randrange(3, vocab) for _ in range(length)] for _ in range(count)]


def answer(engine: Any, ids: list[list[int]], new_tokens: int) -> dict[str, Any]:
    """Answers prompts one by one: results depend on the batch, and how concurrent requests are batched on timing."""
    greedy = {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}
    out = [engine.generate(input_ids=prompt, sampling_params=greedy, return_logprob=True) for prompt in ids]
    return {
        "tokens": [o["output_ids"] for o in out],
        "logprobs": [[entry[0] for entry in o["meta_info"]["output_token_logprobs"]] for o in out],
        # Tokens a step; None without drafts.
        "accepted": [o["meta_info"].get("spec_accept_length") for o in out],
    }


def read(engine: Any, text: list[int], **more: Any) -> dict[str, Any]:
    """``meta_info`` of a text with the logprobs of its tokens, and what ``more`` asks for."""
    found: dict[str, Any] = engine.generate(
        input_ids=text,
        sampling_params={"temperature": 0, "max_new_tokens": 1},
        return_logprob=True,
        logprob_start_len=0,
        **more,
    )["meta_info"]
    return found


def distributions(engine: Any, ids: list[list[int]], vocab: int) -> list[list[list[float]]]:
    """Log probabilities ``[prompt][position][token]``, at the positions after the first token."""
    rows = []
    for prompt in ids:
        positions = []
        for top in read(engine, prompt, top_logprobs_num=vocab)["input_top_logprobs"][1:]:
            row = [0.0] * vocab
            for logprob, token, _ in top:
                row[token] = logprob
            positions.append(row)
        rows.append(positions)
    return rows


def losses(engine: Any, texts: list[list[int]]) -> list[float]:
    """Nats a token of each text, after its first token."""
    each = [read(engine, text)["input_token_logprobs"][1:] for text in texts]
    return [-statistics.fmean(logprob for logprob, *_ in tokens) for tokens in each]


def speed(engine: Any, vocab: int, batches: Sequence[int] = (1, 16, 128), steps: int = 256) -> dict[str, float]:
    """Tokens a second: decoding ``steps`` tokens at batch sizes, and prefill of one prompt of 4,096 tokens."""

    def run(ids: list[list[int]], new_tokens: int) -> float:
        started = time.perf_counter()
        greedy = {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}
        engine.generate(input_ids=ids, sampling_params=greedy)
        return time.perf_counter() - started

    rates = {}
    for batch in batches:
        ids = prompts(vocab, batch, 16)
        rates[f"decode {batch}"] = batch * steps / (run(ids, steps + 8) - run(ids, 8))
    rates["prefill 4096"] = 4096 / statistics.median(run(prompts(vocab, 1, 4096), 1) for _ in range(5))
    return rates


def recorded(engine: Any, ids: list[list[int]]) -> list[list[int]]:
    """The counts of SGLang's own recorder, ``[layer][expert]``, for one token after each prompt."""
    import torch

    engine.start_expert_distribution_record()
    for prompt in ids:
        engine.generate(input_ids=prompt, sampling_params={"temperature": 0, "max_new_tokens": 1})
    engine.stop_expert_distribution_record()
    engine.dump_expert_distribution_record()
    home = Path(os.environ["SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR"])
    deadline = time.monotonic() + 60
    while not (files := list(home.glob("*.pt"))) and time.monotonic() < deadline:
        time.sleep(0.5)
    time.sleep(1)
    counts: list[list[int]] = torch.load(files[0], weights_only=True)["logical_count"].sum(0).tolist()
    return counts


def main() -> None:
    import sglang

    path, options = sys.argv[1], json.loads(sys.argv[2]) if len(sys.argv) > 2 else {}
    config = json.loads(Path(path, "config.json").read_text())
    vocab = config.get("text_config", config)["vocab_size"]
    started = time.perf_counter()
    engine = sglang.Engine(
        model_path=path, dtype=options.get("dtype", "auto"), **{**QUIET, **options.get("engine", {})}
    )
    result: dict[str, Any] = {"start_s": time.perf_counter() - started}
    ids = options.get("ids") or prompts(vocab, options.get("prompts", 32), 24)
    if options.get("answer", True):
        result |= answer(engine, ids, options.get("new_tokens", 64))
    if options.get("sleep"):
        engine.release_memory_occupation()
        engine.resume_memory_occupation()
        engine.flush_cache()
        result["awake"] = answer(engine, ids, options.get("new_tokens", 64))
    if options.get("logits"):
        result["distributions"] = distributions(engine, prompts(vocab, 4, 64), vocab)
    if options.get("texts"):
        result["losses"] = losses(engine, json.loads(Path(options["texts"]).read_text()))
    if options.get("record"):
        result["recorded"] = recorded(engine, ids)
    if options.get("speed"):
        # A line on standard input starts a measurement, so that two engines are measured in turns.
        asked = {key: options[key] for key in ("batches", "steps") if key in options}
        speed(engine, vocab, **asked)
        print("ready", flush=True)
        for _ in sys.stdin:
            print("measured", json.dumps(speed(engine, vocab, **asked)), flush=True)
    info = engine.get_server_info()["internal_states"][0]
    result["memory"] = info.get("mixprec")
    result["activity"] = info.get("mixprec_expert_activity")
    result["weight_gb"] = info["memory_usage"].get("weight")
    result["startup"] = info.get("startup_time")
    engine.shutdown()
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
