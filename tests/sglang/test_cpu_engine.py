"""Stock SGLang on a CPU, end to end: it generates the same tokens as transformers with the same weights."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from support.families import TINY
from support.formats import dequantize
from support.serving import QWEN3_MOE
from support.sglang.families import dequantized as dequantized_family
from support.sglang.families import family_mix
from support.sglang.harness import build, free_port, last_json, sources
from support.sglang.mixes import HEADS, MIXES, RELEASES, Expected, mix

import mixprec_runtime.cpu.engine
from mixprec_build.checkpoint.degree import Degree
from mixprec_build.output.split import split

PROMPTS = [[1, 2, 3, 4, 5, 6, 7, 8], [9, 10, 11], [400, 30, 2, 77, 5]]
TOKENS = 12

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
        settings = {**ENGINE, "dtype": "float32", "log_level": "warning", "disable_radix_cache": True, **options}
        engine = sglang.Engine(model_path=path, skip_tokenizer_init=True, **settings)
        greedy = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
        out = engine.generate(input_ids=prompts, sampling_params=greedy)
        info = engine.get_server_info()
        engine.shutdown()
        answers.append({"tokens": [o["output_ids"] for o in out], "memory": info["internal_states"][0].get("mixprec")})
    print(json.dumps(answers))
"""


def ask(folder: Path, jobs: list[tuple[Path, dict[str, Any]]], ranks: int = 1) -> list[dict[str, Any]]:
    # A file, since spawned workers import the main module again.
    script = folder / "ask.py"
    script.write_text(ASK)
    command = [sys.executable, "-W", "ignore", str(script), json.dumps([PROMPTS, TOKENS, jobs], default=str)]
    environment = mixprec_runtime.cpu.engine.environment(ranks)
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    answers: list[dict[str, Any]] = last_json(done)
    return answers


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, dict[str, Any]]:
    """The answers of engines of one rank, by the name of the mix."""
    names = ["llama", "qwen3_moe", "split_experts"]
    return dict(zip(names, ask(folder, [(mix(folder, name), {}) for name in names]), strict=True))


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "split_experts"])
def test_the_engine_answers_as_transformers(alone: Any, folder: Path, tmp_path: Path, name: str) -> None:
    assert alone[name]["tokens"] == transformers_tokens(folder, name, tmp_path)


@pytest.mark.parametrize("name", RELEASES)
def test_auto_round_beside_fp8_answers_as_transformers(folder: Path, tmp_path: Path, name: str) -> None:
    """Experts in Int4 of AutoRound, attention in FP8 as vendors release it, the rest in BF16."""
    (answer,) = ask(folder, [(mix(folder, name), {})])
    assert answer["tokens"] == transformers_tokens(folder, name, tmp_path)


def test_gated_delta_nets_answer_as_transformers(folder: Path, tmp_path: Path) -> None:
    """Qwen3.5, dense and with AutoRound's experts beside the vendor's FP8 attention; two ranks answer as one."""
    mixes = {name: family_mix(folder, name) for name in ("qwen3_5", "qwen3_5_moe_auto_round")}
    # With images, SGLang wants the files of an image processor, which the tiny models lack.
    options = {**TINY["qwen3_5"].options, "enable_multimodal": False}
    answers = ask(folder, [(path, options) for path in mixes.values()])
    due = {
        name: generated(dequantized_family(path, tmp_path / name, torch.float32, stacked=True))
        for name, path in mixes.items()
    }
    assert [answer["tokens"] for answer in answers] == [*due.values()]
    (two,) = ask(folder, [(mixes["qwen3_5_moe_auto_round"], {**options, "tp_size": 2})], ranks=2)
    assert two["tokens"] == due["qwen3_5_moe_auto_round"]


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


def transformers_tokens(folder: Path, name: str, scratch: Path) -> list[list[int]]:
    from safetensors.torch import save_file

    config = json.loads((mix(folder, name) / "config.json").read_text())
    del config["quantization_config"]
    (scratch / "config.json").write_text(json.dumps({**config, "torch_dtype": "float32"}))
    save_file(dequantized(folder, name), scratch / "model.safetensors", metadata={"format": "pt"})
    return generated(scratch)


def generated(checkpoint: Path) -> list[list[int]]:
    """The tokens of transformers, in float32."""
    import transformers

    (architecture,) = json.loads((checkpoint / "config.json").read_text())["architectures"]
    model = getattr(transformers, architecture).from_pretrained(checkpoint, dtype=torch.float32)
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
    expected = Expected(folder, {**MIXES, **RELEASES, **HEADS}[name])
    out = {}
    for module, tensors in expected.modules().items():
        for leaf in ("bias", "e_score_correction_bias"):
            if leaf in tensors:
                out[f"{module}.{leaf}"] = tensors.pop(leaf).float()
        if tensors:
            out[f"{module}.weight"] = dequantize(tensors).contiguous()
    return out


# Over HTTP


def word(token: int) -> str:
    """A word of letters only, since some tokenizers of transformers split numbers."""
    return "".join(chr(ord("a") + digit) for digit in (token // 26, token % 26))


def write_tokenizer(checkpoint: Path, vocab: int) -> None:
    """A tokenizer with a word for each token."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({word(token): token for token in range(vocab)}, unk_token=word(0)))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(checkpoint / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": word(2), "unk_token": word(0)}
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(settings))


class Server:
    """``python -m mixprec_runtime.cpu``."""

    def __init__(self, checkpoint: Path, log: Path, *flags: str):
        self.port, self._log = free_port(), log
        command = [sys.executable, "-W", "ignore", "-m", "mixprec_runtime.cpu", "--model-path", str(checkpoint)]
        command += ["--port", str(self.port), "--dtype", "float32", *flags]
        with log.open("w") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)

    def ask(self, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", data, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            text = answer.read()
            return json.loads(text) if text else None

    def wait(self, seconds: float = 300) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            assert self.process.poll() is None, self.log()
            try:
                self.ask("/health")
                return
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.5)
        raise AssertionError(self.log())

    def log(self) -> str:
        return self._log.read_text()

    def stop(self) -> None:
        if self.process.poll() is None:
            # The process group is that of the server and its workers.
            os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(30)


@pytest.fixture
def server(folder: Path, tmp_path: Path) -> Iterator[Server]:
    checkpoint = mix(folder, "llama")
    write_tokenizer(checkpoint, MIXES["llama"][0].vocab)
    server = Server(checkpoint, tmp_path / "log")
    try:
        yield server
    finally:
        server.stop()


def test_the_http_server_answers_as_transformers(server: Server, folder: Path, tmp_path: Path) -> None:
    server.wait()
    expected = transformers_tokens(folder, "llama", tmp_path)
    for prompt, tokens in zip(PROMPTS, expected, strict=True):
        body = {"model": "any", "prompt": " ".join(map(word, prompt)), "max_tokens": TOKENS, "temperature": 0}
        answer = server.ask("/v1/completions", {**body, "ignore_eos": True})
        assert answer["choices"][0]["text"].split() == [word(token) for token in tokens]
    memory = server.ask("/server_info")["internal_states"][0]["mixprec"]
    assert memory["weight_mb"] > 0
    assert "NO GPU" in server.log()


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
