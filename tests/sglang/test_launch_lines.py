"""Flags of public launch lines, on the CPU engine."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.adapters import ATTENTION, write_adapter
from support.sglang.answers import (
    PROMPTS,
    TOKENS,
    dequantized,
    generated,
    last_hidden_states,
    reference,
    write_dequantized,
)
from support.sglang.classifiers import classifier
from support.sglang.families import dequantized as dequantized_checkpoint
from support.sglang.http_server import Server, options, words, write_tokenizer
from support.sglang.mixes import MIXES, mix

GREEDY = {"temperature": 0, "max_new_tokens": TOKENS, "ignore_eos": True}
MOE = "qwen3_moe"
"""A mix with experts of several formats in a layer, and attention in FP8."""
CHUNK = 4
"""The number of tokens that a step takes at most, of prompts and for answers."""


# Servers side by side on one machine


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("launch-lines")


@pytest.fixture(scope="module")
def added(home: Path) -> dict[str, torch.Tensor]:
    return write_adapter(home / "adapter", MIXES[MOE][0])


@pytest.fixture(scope="module")
def rewarding(folder: Path, home: Path) -> Path:
    return classifier(folder, home / "rewarding", labels=1)[0]


@pytest.fixture(scope="module")
def servers(folder: Path, home: Path, added: Any, rewarding: Path) -> Iterator[dict[str, Server]]:
    checkpoint = Path(shutil.copytree(mix(folder, MOE), home / "served"))
    write_tokenizer(checkpoint, MIXES[MOE][0].vocab)
    flags = ["--enable-lora", "--lora-paths", f"one={home / 'adapter'}", "--lora-target-modules", *ATTENTION]
    flags += ["--lora-backend", "torch_native", "--enable-return-hidden-states", "--grammar-backend", "outlines"]
    flags += ["--disable-outlines-disk-cache", "--chunked-prefill-size", str(CHUNK), "--enable-mixed-chunk"]
    variables = {"SGLANG_EXTERNAL_MODEL_PACKAGE": "support.sglang.unpinned"}
    # SGLang takes memory that another server fills meanwhile for its own weights', and starts only with some left.
    flags += (memory := ["--mem-fraction-static", "0.5"])
    without_text = [*memory, "--skip-tokenizer-init"]
    decoding = ["--disaggregation-mode", "decode", "--disaggregation-transfer-backend", "fake"]
    if (backup := "--disaggregation-decode-retraction-backup") in options():
        decoding += [backup, "cpu_tensor"]  # 0.5.23's default takes memory that a GPU can read
    started = {
        "text": Server(checkpoint, home / "text.log", *flags, **variables),
        "embeddings": Server(mix(folder, "qwen3"), home / "embeddings.log", "--is-embedding", *without_text),
        "rewards": Server(rewarding, home / "rewards.log", *without_text),
        "decode": Server(mix(folder, "qwen3"), home / "decode.log", *decoding, *without_text),
    }
    try:
        for server in started.values():
            server.wait()
        yield started
    finally:
        for server in started.values():  # all at once, since each takes seconds
            server.process.terminate()
        for server in started.values():
            server.stop()


@pytest.fixture(scope="module")
def server(servers: dict[str, Server]) -> Server:
    return servers["text"]


@pytest.fixture(scope="module")
def dense(folder: Path, home: Path) -> Path:
    """The dequantized weights of :data:`MOE`, for transformers."""
    (home / "dense").mkdir()
    write_dequantized(mix(folder, MOE), dequantized(folder, MOE), home / "dense")
    return home / "dense"


@pytest.fixture(scope="module")
def plain(dense: Path) -> list[list[int]]:
    """Transformers' tokens for these."""
    return generated(dense)


def test_the_http_server_answers_as_transformers(server: Server, plain: list[list[int]]) -> None:
    texts = words(MIXES[MOE][0].vocab)
    for prompt, tokens in zip(PROMPTS, plain, strict=True):
        body = {"model": "any", "prompt": " ".join(texts[token] for token in prompt), "max_tokens": TOKENS}
        answer = server.ask("/v1/completions", {**body, "temperature": 0, "ignore_eos": True})
        assert answer["choices"][0]["text"].split() == [texts[token] for token in tokens]
    memory = server.ask("/server_info")["internal_states"][0]["mixprec"]
    assert memory["weight_mb"] > 0
    assert "NO GPU" in server.log()


def test_adapters_for_attention_beside_mixed_experts(
    server: Server, added: dict[str, torch.Tensor], folder: Path, plain: list[list[int]], tmp_path: Path
) -> None:
    """A batch of requests with and without the adapter; the former as transformers with the sum of the weights."""
    weights = dict(dequantized(folder, MOE))
    for name, change in added.items():
        weights[name] = weights[name] + change
    write_dequantized(mix(folder, MOE), weights, tmp_path)
    adapted = generated(tmp_path)
    assert all(a != b for a, b in zip(adapted, plain, strict=True)), "the adapter changes nothing"
    body = {"input_ids": PROMPTS, "sampling_params": GREEDY, "lora_path": ["one", None, "one"]}
    answers = [answer["output_ids"] for answer in server.ask("/generate", body)]
    assert answers == [adapted[0], plain[1], adapted[2]]


# Requests


def test_a_flushed_cache_is_computed_again(server: Server, plain: list[list[int]]) -> None:
    """The radix cache, with prompts in chunks beside answers of other requests."""
    body = {"input_ids": PROMPTS, "sampling_params": GREEDY}
    server.flush()
    first, second = (server.ask("/generate", body) for _ in range(2))
    server.flush()
    third = server.ask("/generate", body)
    for answers, cached in ((first, 0), (second, len(PROMPTS[0]) - 1), (third, 0)):
        assert [answer["output_ids"] for answer in answers] == plain
        assert answers[0]["meta_info"]["cached_tokens"] == cached


def test_hidden_states_are_those_of_transformers(server: Server, dense: Path) -> None:
    """Of a prompt's last chunk, as SGLang has it: shorter by one while the batch holds an answer just finished."""
    server.flush()
    for prompt, due in zip(PROMPTS, last_hidden_states(dense), strict=True):
        body = {"input_ids": prompt, "sampling_params": {**GREEDY, "max_new_tokens": 2}, "return_hidden_states": True}
        rows, step = server.ask("/generate", body)["meta_info"]["hidden_states"]
        assert 1 <= len(rows) <= CHUNK and len(step) == due.shape[1]
        assert torch.allclose(torch.tensor(rows), due[-len(rows) :], atol=1e-3)


def test_an_answer_has_the_structure_that_is_asked_for(server: Server) -> None:
    schema = {
        "type": "object",
        "properties": {"mixed": {"type": "boolean"}, "format": {"enum": ["fp8", "int4"]}},
        "required": ["mixed", "format"],
        "additionalProperties": False,
    }
    how = {"temperature": 0, "max_new_tokens": 100, "json_schema": json.dumps(schema)}
    answer = server.ask("/generate", {"input_ids": PROMPTS[0], "sampling_params": how})
    assert answer["meta_info"]["finish_reason"]["type"] == "stop"
    found = json.loads(answer["text"].replace(" ", ""))
    assert found.keys() == {"mixed", "format"}
    assert found["mixed"] in (True, False) and found["format"] in ("fp8", "int4")


def test_memory_is_released_and_resumed(server: Server, plain: list[list[int]]) -> None:
    """Without a memory saver, which needs a GPU, SGLang keeps the weights and drops the cache."""
    body = {"input_ids": PROMPTS, "sampling_params": GREEDY}
    server.ask("/release_memory_occupation", {})
    server.ask("/resume_memory_occupation", {})
    answers = server.ask("/generate", body)
    assert [answer["output_ids"] for answer in answers] == plain
    assert answers[0]["meta_info"]["cached_tokens"] == 0


def test_embeddings_are_those_of_transformers(servers: dict[str, Server], folder: Path, tmp_path: Path) -> None:
    """The last hidden state, of length 1."""
    due = last_hidden_states(dequantized_checkpoint(mix(folder, "qwen3"), tmp_path / "dense", torch.float32))
    answers = servers["embeddings"].ask("/encode", {"input_ids": PROMPTS})
    for answer, hidden in zip(answers, due, strict=True):
        assert torch.allclose(torch.tensor(answer["embedding"]), hidden[-1] / hidden[-1].norm(), atol=1e-5)


def test_rewards_are_those_of_transformers(servers: dict[str, Server], rewarding: Path, tmp_path: Path) -> None:
    model = reference(dequantized_checkpoint(rewarding, tmp_path / "dense", torch.float32))
    answers = servers["rewards"].ask("/classify", {"input_ids": PROMPTS})
    for answer, prompt in zip(answers, PROMPTS, strict=True):
        with torch.no_grad():
            due = model(torch.tensor([prompt])).logits[0]
        assert torch.allclose(torch.tensor(answer["embedding"]), due, atol=1e-4)


def test_a_decode_server_answers_from_a_cache_that_it_is_given(servers: dict[str, Server]) -> None:
    """From an empty one here: the transfer that needs no network card brings nothing."""
    fake = {"bootstrap_host": "2.2.2.2", "bootstrap_room": 0}
    answer = servers["decode"].ask("/generate", {"input_ids": PROMPTS[0], "sampling_params": GREEDY, **fake})
    assert len(answer["output_ids"]) == TOKENS
    weights = [servers[name].ask("/server_info")["internal_states"][0]["mixprec"] for name in ("decode", "embeddings")]
    assert weights[0] == weights[1]


# The end


@pytest.mark.parametrize("name", ["text", "embeddings", "rewards", "decode"])
def test_a_server_is_healthy(servers: dict[str, Server], name: str) -> None:
    """By a request of its own."""
    servers[name].ask("/health_generate")


def test_a_server_answers_before_it_ends_and_leaves_nothing(servers: dict[str, Server]) -> None:
    """It is told by SIGTERM, as containers are; the others go on."""
    server = servers["text"]
    parts = server.stream({"input_ids": PROMPTS[0], "sampling_params": {**GREEDY, "max_new_tokens": 24}})
    next(parts)
    server.process.terminate()
    *_, last = parts
    assert len(last["output_ids"]) == 24
    server.process.wait(60)
    end = time.monotonic() + 10
    while (left := server.processes()) and time.monotonic() < end:
        time.sleep(0.5)
    assert left == []
    servers["embeddings"].ask("/health_generate")
