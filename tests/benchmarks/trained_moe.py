"""Trains a mixture of experts of Qwen3-MoE's architecture, on text that this machine has, for `frontier.py`.

    PYTHONPATH=tests python tests/benchmarks/trained_moe.py FOLDER --minutes 9                  # one run
    PYTHONPATH=tests python tests/benchmarks/trained_moe.py FOLDER --minutes 9 --steps 4000    # again, until it is done

270 million parameters: 12 layers, hidden size 768, 32 experts of 256, 4 a token, in sizes that SGLang's kernels run.
It is trained from scratch, by next-token loss and the usual load-balancing loss of the router: SmolLM2's hidden size of
576 is one that SGLang cannot serve in block FP8 or Int4, and a projection of it would have to be learned as well.

The text is of three kinds, and `--text KIND=FOLDER` adds others: `python`, sources of Python's library and of installed
packages (Python: PSF licence; packages: mostly MIT, BSD and Apache-2.0, each with its own); `native`, C, C++ and CUDA
headers among them (torch: BSD, NVIDIA's: their EULA, which the benchmark only reads); `prose`, Markdown,
reStructuredText and descriptions of packages, and /usr/share/doc (licences beside each file). Nothing of it is copied
but into FOLDER. One file of fifty, by a hash of its text, is held out. Its tokenizer is a byte-level BPE of the text.

A run ends after `--minutes` with its state in FOLDER/state.pt; the last one writes the model to FOLDER/bf16, and the
held-out tokens of each kind to FOLDER/held-KIND.npy, beside some of the trained ones, FOLDER/seen-KIND.npy. Without
`--steps` there is one run, of as many as it has time for.
"""

from __future__ import annotations

import argparse
import json
import math
import site
import sys
import sysconfig
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

SUFFIXES = {
    "python": {".py", ".pyi"},
    "native": {".h", ".hpp", ".cuh", ".cu", ".c", ".cc", ".cpp"},
    "prose": {".md", ".rst", ".txt"},
}
NAMES = {"prose": {"METADATA", "README", "copyright", "NEWS", "changelog"}}
MOST_BYTES = 400_000
"""Longer files are tables and generated code."""
HELD_OUT = 50
WINDOW = 1024
MOST_STEPS = 100_000
TIMED = 10, 40
"""Steps whose time says how many there is time for: the first ones compile."""
FULL = {
    "vocab_size": 16384, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
    "num_key_value_heads": 4, "head_dim": 64, "num_experts": 32, "num_experts_per_tok": 4,
    "moe_intermediate_size": 256,
}  # fmt: skip
TOY = {**FULL, "vocab_size": 512, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
       "num_key_value_heads": 1, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128}  # fmt: skip
Tokens = npt.NDArray[np.uint16]


def default_folders() -> list[Path]:
    """Folders whose files are text: Python's library, installed packages, documentation."""
    found = [Path(sysconfig.get_paths()["stdlib"]), *map(Path, site.getsitepackages()), Path("/usr/share/doc")]
    found += [Path(entry) for entry in sys.path if entry.endswith("-packages")]
    return [folder for folder in dict.fromkeys(found) if folder.is_dir()]


def files_of(folders: Iterable[Path], more: Mapping[str, Path]) -> Iterator[tuple[str, Path]]:
    """Yields kind and path, each file once; all files of ``more`` are of its kind."""
    seen: set[Path] = set()
    for kind, folder in [*((None, one) for one in folders), *more.items()]:
        for path in sorted(folder.rglob("*")):
            if path in seen or path.is_symlink() or not path.is_file():
                continue
            seen.add(path)
            kinds = [k for k, s in SUFFIXES.items() if path.suffix in s or path.name in NAMES.get(k, ())]
            if kind is not None or kinds:
                yield kind or kinds[0], path


def texts(folders: Iterable[Path], more: Mapping[str, Path], most: int) -> Iterator[tuple[str, str, bool]]:
    """Yields kind, text, and whether it is held out; no text twice, and up to ``most`` bytes of each kind."""
    seen, room = set[int](), dict[str, int]()
    for kind, path in files_of(folders, more):
        if room.setdefault(kind, most) <= 0 or not 200 < path.stat().st_size <= MOST_BYTES:
            continue
        data = path.read_bytes()
        number = zlib.crc32(data)
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError:
            continue
        if number not in seen:
            seen.add(number)
            room[kind] -= len(data)
            yield kind, text, number % HELD_OUT == 0


def train_tokenizer(sample: Iterable[str], vocab: int) -> Tokenizer:
    """A byte-level BPE; token 0 stands between texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(sample, trainer)
    return tokenizer


def prepare(out: Path, folders: Iterable[Path], more: Mapping[str, Path], most: int, vocab: int) -> None:
    """Writes the tokenizer and the tokens of each kind, once."""
    if (out / "kinds.json").exists():
        return
    out.mkdir(parents=True, exist_ok=True)
    everything = list(texts(folders, more, most))
    trained = [text for _, text, held in everything if not held]
    tokenizer = train_tokenizer(trained[:: max(1, len(trained) // 4000)], vocab)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", bos_token="<|end|>").save_pretrained(
        out / "bf16"
    )
    kinds = sorted({kind for kind, _, _ in everything})
    for kind in kinds:
        for held, name in ((False, "train"), (True, "held")):
            mine = [text for k, text, h in everything if k == kind and h == held]
            ids = [[*encoded.ids, 0] for encoded in tokenizer.encode_batch(mine)]
            np.save(out / f"{name}-{kind}.npy", np.array([i for row in ids for i in row], np.uint16))
        seen: Tokens = np.load(out / f"train-{kind}.npy")
        np.save(out / f"seen-{kind}.npy", seen[: 1 << 18])
        held_out: Tokens = np.load(out / f"held-{kind}.npy")
        print(f"{kind}: {len(seen):,} tokens to train on, {len(held_out):,} held out", flush=True)
    (out / "kinds.json").write_text(json.dumps(kinds))


def batch_of(kinds: Mapping[str, Tokens], size: int, window: int, step: int) -> torch.Tensor:
    """Windows of all kinds in equal shares, ``[size, window]``, the same for the same step."""
    draw = np.random.default_rng(step)
    rows = []
    for at in range(size):
        tokens = kinds[sorted(kinds)[at % len(kinds)]]
        start = int(draw.integers(max(1, len(tokens) - window)))
        rows.append(torch.from_numpy(tokens[start : start + window].astype(np.int64)))
    return torch.stack(rows)


class Training:
    """A model, and an optimizer with float32 copies of its weights; on a GPU the model itself is in BF16."""

    def __init__(self, sizes: Mapping[str, int], steps: int, rate: float):
        torch.manual_seed(0)
        cuda = torch.cuda.is_available()
        self.device = "cuda" if cuda else "cpu"
        config = Qwen3MoeConfig(
            **sizes, intermediate_size=4 * sizes["hidden_size"], norm_topk_prob=True, output_router_logits=True,
            router_aux_loss_coef=0.01, max_position_embeddings=4096, rope_theta=10000.0, tie_word_embeddings=False,
            bos_token_id=0, eos_token_id=0, decoder_sparse_step=1, mlp_only_layers=[],
        )  # fmt: skip
        self.model = Qwen3MoeForCausalLM(config).to(self.device, torch.bfloat16 if cuda else torch.float32)
        if cuda:
            self.model.set_experts_implementation("grouped_mm")
        self.masters = [p.detach().float().clone().requires_grad_() for p in self.model.parameters()]
        groups = [
            {"params": [m for m in self.masters if m.ndim > 1], "weight_decay": 0.1},
            {"params": [m for m in self.masters if m.ndim == 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=cuda)
        self.step, self.steps, self.rate = 0, steps, rate

    def train(self, ids: torch.Tensor, parts: int) -> float:
        """One step over ``ids`` ``[B, T]`` in ``parts``; returns the loss, balancing included."""
        total = 0.0
        for part in ids.to(self.device).chunk(parts):
            loss = self.model(part, labels=part, use_cache=False).loss / parts
            loss.backward()
            total += float(loss.detach())
        warm = min(1.0, (self.step + 1) / max(1, min(200, self.steps // 10)))
        cosine = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, self.step / self.steps)))
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * warm * cosine
        for master, parameter in zip(self.masters, self.model.parameters(), strict=True):
            assert parameter.grad is not None
            master.grad, parameter.grad = parameter.grad.float(), None
        torch.nn.utils.clip_grad_norm_(self.masters, 1.0)
        self.optimizer.step()
        self.put_back()
        self.step += 1
        return total

    def put_back(self) -> None:
        with torch.no_grad():
            for master, parameter in zip(self.masters, self.model.parameters(), strict=True):
                parameter.copy_(master)

    def save(self, path: Path) -> None:
        state = {"step": self.step, "masters": [m.detach() for m in self.masters]}
        unfinished = path.with_suffix(".unfinished")
        torch.save({**state, "optimizer": self.optimizer.state_dict()}, unfinished)
        unfinished.replace(path)

    def load(self, path: Path) -> None:
        state: dict[str, Any] = torch.load(path, map_location=self.device, weights_only=True)
        self.step = state["step"]
        with torch.no_grad():
            for master, saved in zip(self.masters, state["masters"], strict=True):
                master.copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])
        self.put_back()


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, tokens: Tokens, window: int, most: int) -> float:
    """Nats a token over up to ``most`` windows."""
    device, losses = next(model.parameters()).device, []
    for start in range(0, min(len(tokens) - window + 1, most * window), window):
        part = torch.from_numpy(tokens[start : start + window].astype(np.int64))[None].to(device)
        logits = model(part, use_cache=False).logits[0, :-1].float()
        losses.append(torch.nn.functional.cross_entropy(logits, part[0, 1:]).item())
    return sum(losses) / len(losses) if losses else math.nan


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--text", action="append", default=[], metavar="KIND=FOLDER", help="more text; repeatable")
    parser.add_argument("--only-text", action="store_true", help="none but that of --text")
    parser.add_argument("--most", type=int, default=80_000_000, help="bytes of each kind")
    parser.add_argument("--minutes", type=float, default=9, help="end this run after as many")
    parser.add_argument("--steps", type=int, help="in all runs; by default as many as --minutes allow one")
    parser.add_argument("--batch", type=int, default=64, help="windows a step")
    parser.add_argument("--parts", type=int, default=4, help="forward passes a step")
    parser.add_argument("--window", type=int, default=WINDOW)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--toy", action="store_true", help="two small layers")
    args = parser.parse_args(arguments)
    started, sizes = time.monotonic(), TOY if args.toy else FULL
    more = {kind: Path(folder) for kind, _, folder in (one.partition("=") for one in args.text)}
    prepare(args.out, [] if args.only_text else default_folders(), more, args.most, sizes["vocab_size"])
    names: list[str] = json.loads((args.out / "kinds.json").read_text())
    kinds = {kind: np.load(args.out / f"train-{kind}.npy", mmap_mode="r") for kind in names}
    training, state = Training(sizes, args.steps or MOST_STEPS, args.rate), args.out / "state.pt"
    if state.exists() and args.steps is not None:
        training.load(state)
    print(f"{sum(p.numel() for p in training.model.parameters()):,} parameters, step {training.step}", flush=True)
    marks, until = [time.monotonic()], started + args.minutes * 60
    while training.step < training.steps and time.monotonic() < until:
        loss = training.train(batch_of(kinds, args.batch, args.window, training.step), args.parts)
        marks.append(time.monotonic())
        if args.steps is None and len(marks) == TIMED[1]:
            each = (marks[-1] - marks[TIMED[0]]) / (TIMED[1] - 1 - TIMED[0])
            training.steps = training.step + max(0, int((until - marks[-1]) / each * 0.97))
            print(f"{each:.3f} s a step: {training.steps} steps", flush=True)
        if training.step % 50 == 0 or training.step == 1:
            print(f"step {training.step}: loss {loss:.3f}, {time.monotonic() - started:.0f} s", flush=True)
    if args.steps is not None:
        training.save(state)
    training.model.eval()
    for kind in names:
        tokens: Tokens = np.load(args.out / f"held-{kind}.npy")
        print(
            f"{kind}, held out: {held_out_loss(training.model, tokens, args.window, 64):.3f} nats a token", flush=True
        )
    if args.steps is not None and training.step < training.steps:
        print(f"{training.step} of {training.steps} steps; the same command continues")
        return
    training.model.config.output_router_logits = False
    training.model.to(torch.bfloat16).save_pretrained(args.out / "bf16")
    print(f"{args.out / 'bf16'}: written")


if __name__ == "__main__":
    main()
