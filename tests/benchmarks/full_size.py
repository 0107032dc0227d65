"""What a mix costs and brings at full size: Qwen3-30B-A3B's whole shape. Serving needs a GPU and SGLang.

    PYTHONPATH=tests python tests/benchmarks/full_size.py make /dev/shm/full     # 31 GB FP8, 17 GB Int4, two mixes
    PYTHONPATH=tests python tests/benchmarks/full_size.py steps /dev/shm/full    # decode at batch 1 to 512, prefill
    PYTHONPATH=tests python tests/benchmarks/full_size.py load /dev/shm/full --memory 0.3 0.4 0.85 --rate inf 16
    PYTHONPATH=tests python tests/benchmarks/full_size.py cold /dev/shm/full --disk /var/tmp/cold    # first tokens

`make` rounds random weights to block FP8 and GPTQ-Int4 (on the GPU if there is one), builds two mixes, and verifies
them: `mix`, with attention and 16 of 128 experts a layer in FP8, the others in Int4; and `experts4`, with attention in
FP8 and all experts in Int4. It needs 85 GB.

`steps` runs FP8, Int4, `experts4` and `mix` side by side on one GPU and measures them in turns: medians, spread, and
the mix's time beside what its parts predict: of each layer's experts an eighth as in FP8 and the rest as in `experts4`,
all else as in both. It prints the parts of each start as well.

`load` starts servers one after the other and runs SGLang's `bench_serving` against each: 1,024 tokens in, 256 out, all
at once (`inf`) and at rates of requests a second, at limits of memory (`--mem-fraction-static`) at which a checkpoint
of more bytes holds fewer sequences.

`cold` copies one checkpoint after the other to a disk, has the kernel forget its files, reads them alone, has it forget
them again, and starts an engine: how fast weights come in beside that reading, and what the first token waits for.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from support.engine import Served, ask
from support.page_cache import forget, seconds_to_read
from support.serving import QWEN3_MOE, Shape, write_sources

FULL = QWEN3_MOE.of(
    layers=48, hidden=2048, experts=128, expert_intermediate=768, top_k=8, heads=32, kv_heads=4, head_dim=128,
    vocab=151936,
)  # fmt: skip
TOY = QWEN3_MOE.of(experts=8)
BATCHES = (1, 8, 32, 128, 256, 512)
STEPS = 128
PROMPT = 16
PREFILL = 4096
READERS = 16
NAMES = ("fp8", "int4", "experts4", "mix")
LOAD = {"random-input-len": 1024, "random-output-len": 256, "num-prompts": 256}
Rates = Mapping[str, float]
"""``"decode 32"`` or ``"prefill 4096"`` -> tokens a second."""


def eighth(shape: Shape) -> int:
    """The number of experts of a layer that the mix has in FP8."""
    return max(1, shape.experts // 8)


def make(folder: Path, shape: Shape) -> dict[str, Path]:
    """Writes sources and mixes; returns the folder of each of :data:`NAMES`."""
    started = time.perf_counter()
    sources = write_sources(folder / "sources", shape, ["fp8_block", "gptq_int4"])
    print(f"sources: {time.perf_counter() - started:.1f} s", flush=True)
    found = {"fp8": sources["fp8_block"], "int4": sources["gptq_int4"]}
    experts = "model.layers.*.mlp.experts"
    lines = {
        "experts4": [f"  {experts}.*: int4"],
        "mix": [f"  {experts}.*: int4", f"  {experts}.{{0..{eighth(shape) - 1}}}.*: fp8"],
    }
    for path in found.values():
        write_tokenizer(path, shape.vocab)
    for name, weights in lines.items():
        recipe = folder / f"{name}.yaml"
        text = [f"model: {found['fp8']}", "sources:", *(f"  {source}: {path}" for source, path in found.items())]
        recipe.write_text("\n".join([*text, "default: fp8", "weights:", *weights]) + "\n")
    for name in lines:
        out = folder / name
        for arguments in (("build", folder / f"{name}.yaml", "-o", out, "--force"), ("verify", out)):
            started = time.perf_counter()
            subprocess.run([sys.executable, "-m", "mixprec_build", *map(str, arguments), "--quiet"], check=True)
            print(f"{arguments[0]} {name}: {time.perf_counter() - started:.1f} s", flush=True)
        found[name] = out
    for name, path in found.items():
        print(f"{name}: {sum(f.stat().st_size for f in path.glob('*.safetensors')) / 1e9:.2f} GB", flush=True)
    return found


def write_tokenizer(folder: Path, vocab: int) -> None:
    """A tokenizer of ``vocab`` words, ``t0`` and so on: ``bench_serving`` asks for one."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(WordLevel({f"t{i}": i for i in range(vocab)}, unk_token="t0"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="t1", eos_token="t2", unk_token="t0", pad_token="t2"
    ).save_pretrained(folder)


def start(path: Path, port: int, batches: Sequence[int]) -> Served:
    engine = {
        "cuda_graph_max_bs_decode": max(batches),
        "cuda_graph_bs_decode": sorted({*batches}),
        "cuda_graph_max_bs_prefill": PREFILL,
        "cuda_graph_bs_prefill": [PREFILL],
        "mem_fraction_static": 0.9,
        "max_total_tokens": max(8192, max(batches) * (PROMPT + STEPS + 16)),
        "max_running_requests": max(batches),
        "sleep_on_idle": True,
        "nccl_port": port,
    }
    options = {"dtype": dtype_of(path.name), "answer": False, "speed": True, "engine": engine}
    found = Served(path, {**options, "batches": [*batches], "steps": STEPS})
    found.wait()
    return found


def dtype_of(name: str) -> str:
    """Stock SGLang runs GPTQ's experts in FP16 only."""
    return "half" if name == "gptq_int4" else "bfloat16"


def predicted(fp8: float, experts4: float, share: float) -> float:
    """Tokens a second of a mix, by the times of its parts: ``share`` of the experts in FP8."""
    return 1 / (share / fp8 + (1 - share) / experts4)


def step_table(measured: Mapping[str, Sequence[Rates]], share: float) -> list[str]:
    """A row for each checkpoint: medians, and least and greatest; then the mix's time over the predicted one.

    Predicted and measured are of the same turn, so that what disturbs a turn disturbs both.
    """
    columns = [*next(iter(measured.values()))[0]]
    rows = ["| tokens/s | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, turns in measured.items():
        cells = []
        for column in columns:
            values = sorted(turn[column] for turn in turns)
            cells.append(f"{statistics.median(values):,.0f} ({values[0]:,.0f} to {values[-1]:,.0f})")
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    if {"fp8", "experts4", "mix"} <= measured.keys():
        cells = []
        for column in columns:
            ratios = sorted(
                predicted(fp8[column], experts4[column], share) / mix[column]
                for fp8, experts4, mix in zip(measured["fp8"], measured["experts4"], measured["mix"], strict=True)
            )
            cells.append(f"{statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})")
        rows.append("| mix's time / predicted | " + " | ".join(cells) + " |")
    return rows


def steps(folders: Mapping[str, Path], batches: Sequence[int], turns: int, share: float) -> None:
    with ThreadPoolExecutor(len(folders)) as pool:
        ports = range(22000, 23000, 20)
        started = pool.map(lambda path, port: start(path, port, batches), folders.values(), ports)
        served = dict(zip(folders, started, strict=True))
    measured: dict[str, list[Rates]] = {name: [] for name in served}
    for number in range(turns):
        for name in list(served)[:: -1 if number % 2 else 1]:
            measured[name].append(served[name].turn())
        print(f"turn {number + 1} of {turns}", flush=True)
        if number + 1 < turns:
            print("\n".join(step_table(measured, share)), flush=True)  # a run that is cut off has these
    print("\n".join(step_table(measured, share)), flush=True)
    for name, one in served.items():
        result = one.end()
        print(
            f"{name}: start {result['start_s']:.1f} s, of it {result['startup']}; {result['weight_gb']} GB", flush=True
        )


def load(folders: Mapping[str, Path], memory: Sequence[float], rates: Sequence[str], port: int, turns: int) -> None:
    """Prints a row for each limit of memory, checkpoint and rate."""
    print("| memory | checkpoint | rate | tokens/s out | total | TTFT, median ms | TPOT, median ms | started in |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for limit in memory:
        for name, path in folders.items():
            command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(path), "--port", str(port)]
            command += ["--mem-fraction-static", str(limit), "--dtype", dtype_of(path.name), "--disable-radix-cache"]
            command += ["--attention-backend", "triton", "--sampling-backend", "pytorch", "--grammar-backend", "none"]
            # Of the prompts' lengths only: all sizes take minutes.
            command += ["--cuda-graph-bs-prefill", "1024", "2048"]
            log = path.parent / f"{name}-{limit}.log"
            with log.open("w") as file:
                server = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
            try:
                took = wait_for(server, f"http://127.0.0.1:{port}/health_generate", 300)
                if took is None:
                    print(f"| {limit} | {name} | did not start: {log} | | | | | |", flush=True)
                    continue
                for rate in rates:
                    found = [bench(path, port, rate, log.with_suffix(f".{rate}.jsonl")) for _ in range(turns)]
                    print(load_row(limit, name, rate, found, took), flush=True)
            finally:
                end(server)


def cold(folders: Mapping[str, Path], disk: Path, turns: int) -> None:
    """Prints a row for each checkpoint and turn: seconds of each part of a start from files that are not in memory."""
    disk.mkdir(parents=True, exist_ok=True)
    rows = "checkpoint | GB | read alone | GB/s | weights loaded | share of that speed | start | parts"
    print(f"| {rows} |\n" + "|---" * 8 + "|", flush=True)
    for name, path in folders.items():
        copy = disk / path.name
        shutil.copytree(path, copy, dirs_exist_ok=True)
        nbytes = sum(file.stat().st_size for file in copy.glob("*.safetensors"))
        for turn in range(turns):
            forget(copy)
            alone = seconds_to_read(copy, READERS)
            forget(copy)
            engine = {"cuda_graph_bs_decode": [1], "cuda_graph_bs_prefill": [64], "nccl_port": 22800 + 20 * turn}
            options = {"dtype": dtype_of(path.name), "prompts": 1, "new_tokens": 1, "engine": engine}
            found = ask(copy, options)
            loaded = found["startup"]["load_weight"]
            print(
                f"| {name} | {nbytes / 1e9:.1f} | {alone:.1f} s | {nbytes / alone / 1e9:.2f} | {loaded:.1f} s | "
                f"{alone / loaded:.2f} | {found['start_s']:.1f} s | {found['startup']} |",
                flush=True,
            )
        shutil.rmtree(copy)


def end(server: subprocess.Popen[Any]) -> None:
    """Ends a server that was started in a session of its own, with its workers."""
    import signal

    os.killpg(server.pid, signal.SIGTERM)
    try:
        server.wait(20)
    except subprocess.TimeoutExpired:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def wait_for(server: subprocess.Popen[Any], url: str, most: float) -> float | None:
    """Seconds until ``url`` answers; None where the server ended, or not within ``most``."""
    started = time.monotonic()
    while time.monotonic() - started < most and server.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=30) as answer:
                if answer.status == 200:
                    return time.monotonic() - started
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.5)
    return None


def bench(path: Path, port: int, rate: str, out: Path) -> dict[str, Any]:
    """One run of ``bench_serving``: the last line that it appends to ``out``."""
    command = [sys.executable, "-m", "sglang.bench_serving", "--backend", "sglang", "--port", str(port)]
    command += ["--dataset-name", "random-ids", "--random-range-ratio", "1", "--tokenize-prompt", "--model", str(path)]
    command += ["--request-rate", rate, "--output-file", str(out), "--disable-tqdm", "--seed", "1"]
    for flag, value in LOAD.items():
        command += [f"--{flag}", str(value)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    result: dict[str, Any] = json.loads(out.read_text().splitlines()[-1])
    return result


def load_row(limit: float, name: str, rate: str, found: Sequence[Mapping[str, Any]], started: float) -> str:
    """Medians of a checkpoint's runs; with several, the least and the greatest of tokens/s out."""
    middle = {
        key: statistics.median(one[key] for one in found)
        for key in ("output_throughput", "total_throughput", "median_ttft_ms", "median_tpot_ms")
    }
    out = [one["output_throughput"] for one in found]
    spread = f" ({min(out):,.0f} to {max(out):,.0f})" if len(out) > 1 else ""
    return (
        f"| {limit} | {name} | {rate} | {middle['output_throughput']:,.0f}{spread} | "
        f"{middle['total_throughput']:,.0f} | {middle['median_ttft_ms']:,.0f} | {middle['median_tpot_ms']:.1f} | "
        f"{started:.0f} s |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["make", "steps", "load", "cold"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--toy", action="store_true", help="two small layers, for a test without a GPU")
    parser.add_argument("--layers", type=int, help="fewer layers")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES)
    parser.add_argument("--turns", type=int, help="5 for steps, 1 for load and cold")
    parser.add_argument("--memory", nargs="+", type=float, default=[0.85], help="--mem-fraction-static")
    parser.add_argument("--rate", nargs="+", default=["inf"], help="requests a second")
    parser.add_argument("--disk", type=Path, default=Path("/var/tmp/cold"), help="a folder on a disk, for cold")
    parser.add_argument("--port", type=int, default=30000)
    args = parser.parse_args()
    shape = TOY if args.toy else FULL
    if args.layers is not None:
        shape = shape.of(layers=args.layers)
    places = {"fp8": "sources/fp8_block", "int4": "sources/gptq_int4"}
    folders = {name: args.folder / places.get(name, name) for name in args.only}
    if args.what == "make":
        make(args.folder, shape)
    elif args.what == "steps":
        steps(folders, args.batches, args.turns or 5, eighth(shape) / shape.experts)
    elif args.what == "load":
        load(folders, args.memory, args.rate, args.port, args.turns or 1)
    else:
        cold(folders, args.disk, args.turns or 1)


if __name__ == "__main__":
    main()
