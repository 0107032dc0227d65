"""Stock SGLang on a CPU, end to end: it generates the same tokens as transformers with the same weights."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.families import TINY
from support.serving import QWEN3_MOE
from support.sglang.answers import PROMPTS, TOKENS, dequantized, generated, prompt_logprobs, transformers_tokens
from support.sglang.families import dequantized as dequantized_family
from support.sglang.families import family_mix, is_made, skip_unless_made
from support.sglang.harness import build, free_port, last_json, sources
from support.sglang.http_server import Server, write_tokenizer
from support.sglang.images import PROMPT, answer_to_image, write_image, write_processor
from support.sglang.mixes import FLOATS, FOURS, HEADS, MIXES, RELEASES, mix

import mixprec_runtime.cpu.engine
from mixprec_build.checkpoint.degree import Degree
from mixprec_build.output.split import split

# One process serves several checkpoints, since most of a start is imports.
ASK = """
import json, sys
import sglang
from mixprec_runtime.cpu.engine import ENGINE

if __name__ == "__main__":
    prompts, tokens, jobs = json.loads(sys.argv[1])
    answers = []
    for path, options in jobs:
        # The radix cache of 0.5.23 is a library that needs its own torch.
        logprobs = {"return_logprob": True, "logprob_start_len": 0} if options.pop("logprobs", False) else {}
        images = options.pop("images", [])
        settings = {**ENGINE, "dtype": "float32", "log_level": "warning", "disable_radix_cache": True, **options}
        engine = sglang.Engine(model_path=path, skip_tokenizer_init=not images, **settings)
        greedy = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
        out = engine.generate(input_ids=prompts, sampling_params=greedy, **logprobs)
        seen = [engine.generate(text, sampling_params=greedy, image_data=image) for text, image in images]
        info = engine.get_server_info()
        engine.shutdown()
        answer = {"tokens": [o["output_ids"] for o in out], "memory": info["internal_states"][0].get("mixprec")}
        answer["images"] = [o["output_ids"] for o in seen]
        if logprobs:  # of the prompts' tokens after the first
            kept = [o["meta_info"]["input_token_logprobs"][1:] for o in out]
            answer["logprobs"] = [[logprob for logprob, *_ in tokens] for tokens in kept]
        answers.append(answer)
    print(json.dumps(answers))
"""


def ask(folder: Path, jobs: list[tuple[Path, dict[str, Any]]], ranks: int = 1, stages: int = 1) -> list[dict[str, Any]]:
    # A file, since spawned workers import the main module again.
    script = folder / "ask.py"
    script.write_text(ASK)
    command = [sys.executable, "-W", "ignore", str(script), json.dumps([PROMPTS, TOKENS, jobs], default=str)]
    environment = mixprec_runtime.cpu.engine.environment(ranks, stages)
    # An engine takes 10 to 20 s on two free cores, and a few times as long on busy ones.
    timeout = max(600, 180 * len(jobs))
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)
    answers: list[dict[str, Any]] = last_json(done)
    return answers


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, dict[str, Any]]:
    """The answers of engines of one rank, by the name of the mix."""
    names = ["llama", "qwen2", "qwen3_moe", "split_experts"]
    return dict(zip(names, ask(folder, [(mix(folder, name), {}) for name in names]), strict=True))


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3_moe", "split_experts"])
def test_the_engine_answers_as_transformers(alone: Any, folder: Path, tmp_path: Path, name: str) -> None:
    assert alone[name]["tokens"] == transformers_tokens(folder, name, tmp_path)


@pytest.mark.parametrize("name", [*RELEASES, *FLOATS, *FOURS])
def test_experts_beside_fp8_answer_as_transformers(folder: Path, tmp_path: Path, name: str) -> None:
    """Experts in Int4 of AutoRound, MXFP4, NVFP4 or W4AFP8, attention in FP8 as vendors release it, the rest BF16."""
    (answer,) = ask(folder, [(mix(folder, name), {})])
    assert answer["tokens"] == transformers_tokens(folder, name, tmp_path)


def test_gated_delta_nets_answer_as_transformers(folder: Path, tmp_path: Path) -> None:
    """Qwen3-Next and Qwen3.5, with AutoRound's experts beside the vendor's FP8 in one; two ranks answer as one.

    Qwen3.5 also to an image, in a request of its own.
    """
    mixes = {name: family_mix(folder, name) for name in ("qwen3_5", "qwen3_next", "qwen3_5_moe_auto_round")}
    mixes["qwen3_5"] = Path(shutil.copytree(mixes["qwen3_5"], tmp_path / "images"))
    processor, image = write_processor(mixes["qwen3_5"]), write_image(tmp_path / "image.png")
    options = TINY["qwen3_5"].options
    seeing = {**options, "images": [(PROMPT, tmp_path / "image.png")]}
    # Without images, SGLang wants no files of an image processor.
    options = {**options, "enable_multimodal": False}
    jobs = [(path, seeing if name == "qwen3_5" else options) for name, path in mixes.items()]
    answers = ask(folder, jobs)
    due = {
        name: generated(dequantized_family(path, tmp_path / name, torch.float32, stacked=True))
        for name, path in mixes.items()
    }
    assert [answer["tokens"] for answer in answers] == [*due.values()]
    assert answers[0]["images"] == [answer_to_image(tmp_path / "qwen3_5", processor, image)]
    (two,) = ask(folder, [(mixes["qwen3_5_moe_auto_round"], {**options, "tp_size": 2})], ranks=2)
    assert two["tokens"] == due["qwen3_5_moe_auto_round"]


FAMILIES = (
    "glm4_moe", "olmoe", "granite", "granitemoe", "gemma3", "gemma3_images", "phi3", "cohere2", "ernie4_5", "mistral3",
    "apertus", "phimoe", "llama4",
)  # fmt: skip
HEADS_IN_FP8 = ("olmoe", "granite", "granitemoe", "phi3", "ernie4_5", "mistral3", "phimoe", "llama4")
"""Families whose ``lm_head`` is quantized here; Granite scales its logits besides, Phi-3.5-MoE adds a bias."""


@pytest.fixture(scope="module")
def families(folder: Path) -> dict[str, dict[str, Any]]:
    """The answers of one engine for each of :data:`FAMILIES`, with logprobs of the prompts."""
    # Without images, SGLang wants no files of an image processor.
    more = {"logprobs": True, "enable_multimodal": False}
    names = list(filter(is_made, FAMILIES))
    jobs = [(mix_of_family(folder, name), {**TINY[name].options, **more}) for name in names]
    return dict(zip(names, ask(folder, jobs), strict=True))


def mix_of_family(folder: Path, name: str) -> Path:
    return family_mix(folder, name, head=name in HEADS_IN_FP8)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_answers_as_transformers(families: Any, folder: Path, tmp_path: Path, name: str) -> None:
    """Logprobs of the prompts as well: with tied embeddings, a tiny model repeats a token."""
    skip_unless_made(name)
    # transformers stacks Mixtral's w1, w3 and w2 of single experts itself.
    stacked = name != "phimoe" and any(".experts." in pattern for pattern in TINY[name].lines)
    dense = dequantized_family(mix_of_family(folder, name), tmp_path / "dense", torch.float32, stacked=stacked)
    assert families[name]["tokens"] == generated(dense)
    for held, due in zip(families[name]["logprobs"], prompt_logprobs(dense), strict=True):
        assert held == pytest.approx(due, abs=1e-3)


def test_quantized_heads_answer_as_transformers(folder: Path, tmp_path: Path) -> None:
    """Logits come from the method of a linear, on one rank and on two that share the vocabulary."""
    due = {name: transformers_tokens(folder, name, tmp_path) for name in HEADS}
    for answer, name in zip(ask(folder, [(mix(folder, name), {}) for name in HEADS]), HEADS, strict=True):
        assert answer["tokens"] == due[name], name
    (two,) = ask(folder, [(mix(folder, "head_in_fp8"), {"tp_size": 2})], ranks=2)
    assert two["tokens"] == due["head_in_fp8"]


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "split_experts"])
def test_server_info_tells_what_the_weights_weigh(alone: Any, folder: Path, name: str) -> None:
    memory = alone[name]["memory"]
    # The reference of a CPU keeps dequantized weights, in the model's dtype.
    dense = sum(tensor.numel() * 4 for tensor in dequantized(folder, name).values())
    assert memory["weight_mb"] * 2**20 == pytest.approx(dense, rel=0.01)
    assert memory["bytes_by_layer"].keys() == {*map(str, range(MIXES[name][0].layers)), "other"}


@pytest.mark.parametrize(("name", "experts"), [("qwen3_moe", 1), ("mixtral", 2)])
def test_two_ranks_answer_as_transformers(folder: Path, tmp_path: Path, name: str, experts: int) -> None:
    (answer,) = ask(folder, [(mix(folder, name), {"tp_size": 2, "ep_size": experts})], ranks=2)
    assert answer["tokens"] == transformers_tokens(folder, name, tmp_path)


def test_two_pipeline_stages_answer_as_transformers(folder: Path, tmp_path: Path) -> None:
    (answer,) = ask(folder, [(mix(folder, "split_experts"), {"pp_size": 2})], stages=2)
    assert answer["tokens"] == transformers_tokens(folder, "split_experts", tmp_path)


@pytest.mark.parametrize(("name", "experts"), [("split_experts", 1), ("mixtral", 2)])
def test_two_ranks_answer_from_their_own_files(folder: Path, tmp_path: Path, name: str, experts: int) -> None:
    """The answers are those from the merged files, which are removed."""
    out = Path(shutil.copytree(mix(folder, name), tmp_path / "out"))
    split(out, Degree(2, experts), layout="presplit")
    options = {"tp_size": 2, "ep_size": experts}
    merged, own = ask(folder, [(mix(folder, name), options), (out, options)], ranks=2)
    assert own["tokens"] == merged["tokens"]


def test_ranks_whose_shares_are_filled_up_answer_as_one(folder: Path, tmp_path: Path) -> None:
    """192 columns a rank are one and a half blocks, which SGLang refuses; 256 of them, 64 zero, serve."""
    sizes = {"hidden": 256, "intermediate": 384, "expert_intermediate": 384, "heads": 4, "kv_heads": 2, "head_dim": 128}
    lines = {"model.layers.*.mlp.experts.*": "fp8_block", "model.layers.0.mlp.experts.{1,2,5}.*": "gptq_int4"}
    out = build(sources(tmp_path, QWEN3_MOE.of(**sizes)), lines, tmp_path / "out")
    (one,) = ask(folder, [(out, {})])
    split(out, Degree(2))
    (two,) = ask(folder, [(out, {"tp_size": 2})], ranks=2)
    assert two["tokens"] == one["tokens"]


def test_more_tokenizer_workers_are_refused(folder: Path, tmp_path: Path) -> None:
    checkpoint = mix(folder, "llama")
    write_tokenizer(checkpoint, MIXES["llama"][0].vocab)
    server = Server(checkpoint, tmp_path / "log", "--tokenizer-worker-num", "2")
    try:
        server.process.wait(300)
    finally:
        server.stop()
    assert server.process.returncode != 0
    assert "--tokenizer-worker-num above 1 starts processes that load no plugins; leave it out" in server.log()


def test_two_nodes_need_only_the_files_of_their_ranks(folder: Path, tmp_path: Path) -> None:
    """Each node has a folder of its own, without merged files."""
    meeting = f"127.0.0.1:{free_port()}"
    nodes = []
    for node in range(2):
        out = Path(shutil.copytree(mix(folder, "split_experts"), tmp_path / f"node-{node}"))
        split(out, Degree(2), ranks=[node])
        for file in out.glob("*.safetensors"):
            file.unlink()
        flags = ["--tp-size", "2", "--nnodes", "2", "--node-rank", str(node), "--dist-init-addr", meeting]
        nodes.append(Server(out, tmp_path / f"{node}.log", *flags, "--skip-tokenizer-init", "--disable-radix-cache"))
    try:
        nodes[0].wait()
        greedy = {"temperature": 0, "max_new_tokens": TOKENS, "ignore_eos": True}
        asked = [{"input_ids": prompt, "sampling_params": greedy} for prompt in PROMPTS]
        answers = [nodes[0].ask("/generate", body)["output_ids"] for body in asked]
    finally:
        for server in nodes:
            server.stop()
    assert answers == transformers_tokens(folder, "split_experts", tmp_path)
    said = nodes[0].log()
    assert len(re.findall(r"mixprec \S+ serves", said)) == 1
    assert not re.search(r"Detected \w+ checkpoint|not fully optimized", said)
