"""Does `mixprec suggest` choose well? Its mixes beside others of the same bytes, on real weights.

    PYTHONPATH=tests:recipes/demo python tests/benchmarks/suggest.py .demo/suggest  # make demo has made .demo/sources

Two models: SmolLM2-135M of the demo (BF16, FP8, GPTQ-Int4), and a mixture of experts made of it: each MLP's 1536
neurons are parted into experts by k-means over which tokens they are active on, and a linear router, fitted to the
norms of the experts' outputs, takes the top 18 of 24 (MoEfication, Zhang et al., 2022; nothing is trained). Its experts
are rounded to FP8 with a scale a channel and to Int4 in groups of 64.

Activity and moments are counted on calibration.txt; perplexity, and KL(BF16 ‖ mix) of the next token, are measured on
2,048 tokens of evaluation.txt, by another author, with dequantized weights in float32. All mixes but the suggested
ones are filled up from Int4 with FP8 until the suggested one's bytes are spent. Int4 of this narrow a model is nothing
that SGLang's kernels run: this compares choices, not servers.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from evaluate import load
from safetensors.torch import save_file
from support.serving import quantize
from transformers import AutoTokenizer

from mixprec_build.recipe.recipe import load_recipe
from mixprec_build.recipe.sources import open_sources
from mixprec_build.suggesting.activity import Activity, balance_of
from mixprec_build.suggesting.allocate import Suggestion, suggest
from mixprec_build.suggesting.choices import Group, Request
from mixprec_build.suggesting.distortion import DistortionCache, Moments
from mixprec_build.suggesting.objective import Objective
from mixprec_build.suggesting.swaps import read_swaps

TEXTS = Path(__file__).parents[2] / "recipes" / "demo" / "text"
WINDOW, CALIBRATION, EVALUATION = 512, 4096, 2048
EXPERTS, TOP_K = 24, 18
SEEDS = 5
Mix = Mapping[str, str]
"""Module -> source."""


class Experts(torch.nn.Module):
    """An MLP whose neurons are parted into experts: ``[T, H] -> [T, H]``. Without a router all of them run."""

    def __init__(self, mlp: torch.nn.Module):
        super().__init__()
        self.mlp, self.router = mlp, None
        self.inputs: list[torch.Tensor] = []
        self.neurons: list[torch.Tensor] = []
        self.routed: list[torch.Tensor] = []
        self.watched = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        neurons = torch.nn.functional.silu(self.mlp.gate_proj(x)) * self.mlp.up_proj(x)
        if self.router is not None:
            top = (x @ self.router.t()).topk(TOP_K, -1).indices
            mask = torch.zeros(*x.shape[:-1], EXPERTS).scatter_(-1, top, 1.0)
            neurons = (neurons.unflatten(-1, (EXPERTS, -1)) * mask[..., None]).flatten(-2)
            if self.watched:
                self.routed.append(mask.flatten(0, -2))
        if self.watched:
            self.inputs.append(x.flatten(0, -2))
            self.neurons.append(neurons.flatten(0, -2))
        return self.mlp.down_proj(neurons)

    def part(self, seed: int) -> None:
        """Orders neurons by expert and fits the router, from what was watched."""
        x, neurons = torch.cat(self.inputs), torch.cat(self.neurons)
        down = self.mlp.down_proj.weight
        active = neurons.abs() * down.norm(dim=0)
        generator = torch.Generator().manual_seed(seed)
        # A neuron's tokens, projected to 64 dimensions.
        points = (active / active.norm(dim=0).clamp(min=1e-9)).t() @ torch.randn(len(x), 64, generator=generator)
        order = balanced_kmeans(points - points.mean(0), EXPERTS, generator).argsort(stable=True)
        self.mlp.gate_proj.weight.copy_(self.mlp.gate_proj.weight[order].clone())
        self.mlp.up_proj.weight.copy_(self.mlp.up_proj.weight[order].clone())
        down.copy_(down[:, order].clone())
        by_expert = neurons[:, order].unflatten(1, (EXPERTS, -1))
        columns = down.unflatten(1, (EXPERTS, -1))
        norms = torch.stack([(by_expert[:, e] @ columns[:, e].t()).norm(dim=1) for e in range(EXPERTS)], 1)
        gram = x.t() @ x
        ridge = 1e-2 * gram.diagonal().mean() * torch.eye(len(gram))
        self.router = torch.linalg.solve(gram + ridge, x.t() @ (norms - norms.mean(1, keepdim=True))).t().contiguous()

    def forget(self) -> None:
        self.inputs, self.neurons, self.routed, self.watched = [], [], [], False


def balanced_kmeans(points: torch.Tensor, clusters: int, generator: torch.Generator) -> torch.Tensor:
    """Points ``[N, D]`` -> cluster ``[N]``, as many points in each: nearest pairs first, while there is room."""
    centers = points[torch.randperm(len(points), generator=generator)[:clusters]]
    for _ in range(5):
        found, room = [-1] * len(points), [len(points) // clusters] * clusters
        for pair in torch.cdist(points, centers).flatten().argsort().tolist():
            point, cluster = divmod(pair, clusters)
            if found[point] < 0 and room[cluster]:
                found[point] = cluster
                room[cluster] -= 1
        assigned = torch.tensor(found)
        centers = torch.stack([points[assigned == c].mean(0) for c in range(clusters)])
    return assigned


class Judge:
    """A model in float32 whose weights can be exchanged, and what BF16 says to the evaluation text."""

    def __init__(self, model: torch.nn.Module, ids: torch.Tensor, put: Callable[[Mix], None], reference: Mix):
        self._model, self._windows, self._put = model, ids.split(WINDOW), put
        put(reference)
        self._exact = self._logprobs()

    def _logprobs(self) -> list[torch.Tensor]:
        return [torch.log_softmax(self._model(w[None]).logits[0], -1) for w in self._windows]

    def judge(self, mix: Mix) -> tuple[float, float]:
        """Perplexity, and the mean KL divergence from BF16 in nats a token."""
        self._put(mix)
        nll, kl, count = 0.0, 0.0, 0
        for window, mine, exact in zip(self._windows, self._logprobs(), self._exact, strict=True):
            nll -= mine[:-1].gather(1, window[1:, None]).sum().item()
            kl += (exact.exp() * (exact - mine)).sum().item()
            count += len(window) - 1
        return math.exp(nll / count), kl / sum(map(len, self._windows))


def filled(groups: Iterable[Group], order: Iterable[str], room: int) -> Mix:
    """Int4 everywhere, and FP8 for the first groups in ``order`` that still fit."""
    options = {group.name: {option.source: option.nbytes for option in group.options} for group in groups}
    members = {group.name: group.members for group in groups}
    free = {name for name, one in options.items() if {"fp8", "int4"} <= one.keys()}
    room -= sum(one["int4"] if name in free else min(one.values()) for name, one in options.items())
    mix = {m: "int4" for name in free for m in members[name]}
    for name in filter(free.__contains__, order):
        more = options[name]["fp8"] - options[name]["int4"]
        if more <= room:
            room -= more
            mix |= dict.fromkeys(members[name], "fp8")
    return mix


def picked(suggestion: Suggestion) -> Mix:
    return {member: option.source for group, option in suggestion.picked() for member in group.members}


def compare(
    base: Path, judge: Judge, budgets: list[int], orders: Callable[[list[Group]], dict[str, list[str]]], **known: object
) -> None:
    recipe = load_recipe(base)
    sources = open_sources(recipe)

    def show(name: str, found: tuple[float, float], note: str = "") -> None:
        print(f"| {name} | {found[0]:.3f} | {found[1]:.4f} | {note} |", flush=True)

    with DistortionCache(base.with_suffix(".jsonl")) as cache:
        for budget in budgets:
            print(f"\n| {budget / 1e6:.0f} MB | perplexity | KL | |\n|---|---|---|---|")
            for objective in Objective:
                if objective is Objective.MEASURED and "swaps" not in known:
                    continue
                request = Request(budget, objective, allow_unservable=True, **known)  # type: ignore[arg-type]
                suggestion = suggest(recipe, sources, request, cache)
                counts = Counter(option.source for _, option in suggestion.picked())
                note = ", ".join(f"{n} {source}" for source, n in counts.most_common())
                show(f"suggested, {objective.value}", judge.judge(picked(suggestion)), note)
            groups = list(suggestion.groups)
            for name, order in orders(groups).items():
                show(name, judge.judge(filled(groups, order, suggestion.solution.cost)))
            results = []
            for seed in range(SEEDS):
                order = [group.name for group in groups]
                np.random.default_rng(seed).shuffle(order)
                results.append(judge.judge(filled(groups, order, suggestion.solution.cost)))
            means = statistics.mean(p for p, _ in results), statistics.mean(k for _, k in results)
            show(f"random, mean of {SEEDS}", means, f"perplexity {min(results)[0]:.3f} to {max(results)[0]:.3f}")


def write_base(path: Path, sources: Mapping[str, Path]) -> Path:
    lines = [f"model: {sources['bf16']}", "sources:", *(f"  {name}: {folder}" for name, folder in sources.items())]
    path.write_text("\n".join(lines) + "\n")
    return path


def layer(group: str) -> int:
    return int(group.split(".")[2])


# The dense model


def dense(
    out: Path,
    folders: Mapping[str, Path],
    calibration: torch.Tensor,
    evaluation: torch.Tensor,
    swaps: Path | None,
    budgets: list[int],
) -> None:
    model, _, _ = load(folders["bf16"])
    moments: dict[str, torch.Tensor] = {}

    def watch(name: str) -> Callable[..., None]:
        def add(_: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
            moments[name] = moments.get(name, torch.zeros(())) + inputs[0].flatten(0, -2).square().sum(0)

        return add

    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    hooks = [linear.register_forward_pre_hook(watch(name)) for name, linear in linears.items()]
    for window in calibration.split(WINDOW):
        model(window[None])
    for hook in hooks:
        hook.remove()
    save_file({n: (m / len(calibration)).contiguous() for n, m in moments.items()}, out / "dense.safetensors")
    base = write_base(out / "dense.yaml", folders)
    opened = open_sources(load_recipe(base)).by_name
    weights = {s: {n: torch.from_numpy(opened[s].dequantize(n)) for n in linears} for s in opened}

    def put(mix: Mix) -> None:
        for name, source in mix.items():
            linears[name].weight.copy_(weights[source][name])

    judge = Judge(model, evaluation, put, dict.fromkeys(linears, "bf16"))
    for source in folders:
        print(f"all {source}: perplexity {judge.judge(dict.fromkeys(linears, source))[0]:.3f}")
    columns = ["self_attn.qkv_proj", "self_attn.o_proj", "mlp.down_proj", "mlp.gate_up_proj"]

    def orders(groups: list[Group]) -> dict[str, list[str]]:
        names = [group.name for group in groups]
        return {
            "layer-uniform (q/k/v, o, down, gate/up)": sorted(
                names, key=lambda n: (columns.index(n.split(".", 3)[3]), layer(n))
            ),
            "layer-uniform (gate/up, down, o, q/k/v)": sorted(
                names, key=lambda n: (-columns.index(n.split(".", 3)[3]), layer(n))
            ),
            "first layers": sorted(names, key=layer),
        }

    known: dict[str, object] = {"moments": Moments(out / "dense.safetensors")}
    if swaps is not None:
        known["swaps"] = read_swaps(swaps)
    compare(base, judge, budgets, orders, **known)


# The mixture of experts


def moe(out: Path, bf16: Path, calibration: torch.Tensor, evaluation: torch.Tensor) -> None:
    model, _, _ = load(bf16)
    layers = [Experts(block.mlp) for block in model.model.layers]
    for block, experts in zip(model.model.layers, layers, strict=True):
        block.mlp = experts
        experts.watched = True
    for window in calibration.split(WINDOW):
        model(window[None])
    for seed, experts in enumerate(layers):
        experts.part(seed)
        experts.forget()
        experts.watched = True
    for window in calibration.split(WINDOW):
        model(window[None])
    counts, moments = {}, {}
    for i, experts in enumerate(layers):
        mask, x, neurons = torch.cat(experts.routed), torch.cat(experts.inputs), torch.cat(experts.neurons)
        experts.forget()
        counts[i] = mask.sum(0).long().numpy()
        by_expert = neurons.square().sum(0).unflatten(0, (EXPERTS, -1))
        for e in range(EXPERTS):
            tokens, prefix = max(1, int(counts[i][e])), f"model.layers.{i}.mlp.experts.{e}"
            seen = (mask[:, e] @ x.square() / tokens).contiguous()
            moments |= {f"{prefix}.gate_proj": seen, f"{prefix}.up_proj": seen.clone()}
            moments[f"{prefix}.down_proj"] = (by_expert[e] / tokens).contiguous()
    save_file(moments, out / "moe.safetensors")
    balance = [balance_of(one) for one in counts.values()]
    print(
        f"activity: Gini {statistics.mean(b.gini for b in balance):.3f}, "
        f"coefficient of variation {statistics.mean(b.variation for b in balance):.3f}"
    )
    folders, weights = write_moe(out, model, layers)
    names = list(weights["bf16"])

    def put(mix: Mix) -> None:
        for i, experts in enumerate(layers):
            for part in ("gate_proj", "up_proj", "down_proj"):
                parts = [f"model.layers.{i}.mlp.experts.{e}.{part}" for e in range(EXPERTS)]
                joined = torch.cat([weights[mix[name]][name] for name in parts], 1 if part == "down_proj" else 0)
                getattr(experts.mlp, part).weight.copy_(joined)

    judge = Judge(model, evaluation, put, dict.fromkeys(names, "bf16"))
    for source in folders:
        print(f"all {source}: perplexity {judge.judge(dict.fromkeys(names, source))[0]:.3f}")
    activity = Activity(counts, {})

    def orders(groups: list[Group]) -> dict[str, list[str]]:
        experts = [group.name for group in groups if group.column == "experts"]

        def number(group: str) -> int:
            return int(group.rpartition(".")[2])

        return {
            "frequency only": sorted(experts, key=lambda n: -int(counts[layer(n)][number(n)])),
            "layer-uniform (as many in each layer)": sorted(experts, key=lambda n: (number(n), layer(n))),
            "first layers": sorted(experts, key=layer),
        }

    base = write_base(out / "moe.yaml", folders)
    small, large = (sum(f.stat().st_size for f in folders[s].glob("*.safetensors")) for s in ("int4", "fp8"))
    budgets = [int(small + share * (large - small)) for share in (0.25, 0.5)]
    compare(base, judge, budgets, orders, activity=activity, moments=Moments(out / "moe.safetensors"))


def write_moe(
    out: Path, model: torch.nn.Module, layers: list[Experts]
) -> tuple[dict[str, Path], dict[str, dict[str, torch.Tensor]]]:
    """The checkpoints ``out/moe-{bf16,fp8,int4}`` with names of Qwen3-MoE, and the experts' dequantized weights."""
    variants = {"bf16": "bf16", "fp8": "fp8_channel", "int4": "gptq_int4_g64"}
    linears: dict[str, torch.Tensor] = {}
    for i, experts in enumerate(layers):
        for part in ("gate_proj", "up_proj", "down_proj"):
            chunks = getattr(experts.mlp, part).weight.chunk(EXPERTS, 1 if part == "down_proj" else 0)
            linears |= {
                f"model.layers.{i}.mlp.experts.{e}.{part}": chunk.contiguous() for e, chunk in enumerate(chunks)
            }
    others = {
        name: value.to(torch.bfloat16).contiguous()
        for name, value in model.state_dict().items()
        if ".mlp." not in name and name != "lm_head.weight"
    }
    others |= {f"model.layers.{i}.mlp.gate.weight": e.router.to(torch.bfloat16) for i, e in enumerate(layers)}  # type: ignore[union-attr]
    text = {key: getattr(model.config, key) for key in ("hidden_size", "num_hidden_layers", "vocab_size")}
    config = {"model_type": "qwen3_moe", "num_experts": EXPERTS, "num_experts_per_tok": TOP_K, **text}
    config |= {"tie_word_embeddings": True, "architectures": ["Qwen3MoeForCausalLM"]}
    folders, weights = {}, {}
    for source, variant in variants.items():
        folder = folders[source] = out / f"moe-{source}"
        folder.mkdir(exist_ok=True)
        stored, weights[source] = dict(others), {}
        for name, weight in linears.items():
            tensors, dequantized = quantize(weight, variant)
            weights[source][name] = dequantized.float()
            stored |= {f"{name}.{leaf}": tensor.contiguous() for leaf, tensor in tensors.items()}
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
        quantization = {
            "fp8": {"quantization_config": {"quant_method": "compressed-tensors", "format": "float-quantized"}},
            "int4": {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": True}},
        }
        (folder / "config.json").write_text(json.dumps({**config, **quantization.get(source, {})}))
    return folders, weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="a folder for what is made")
    parser.add_argument("--sources", type=Path, default=Path(".demo/sources"), help="what `make demo` has made")
    parser.add_argument("--only", choices=["dense", "moe"])
    parser.add_argument("--swaps", type=Path, help="what recipes/swaps.py measured of the dense model's sources")
    parser.add_argument("--budgets", type=float, nargs="+", default=[125, 140], help="of the dense model, megabytes")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    args.out.mkdir(parents=True, exist_ok=True)
    names = {"bf16": "smollm2-bf16", "fp8": "smollm2-fp8", "int4": "smollm2-gptq-int4"}
    folders = {source: (args.sources / name).resolve() for source, name in names.items()}
    tokenizer = AutoTokenizer.from_pretrained(folders["bf16"])

    def ids(file: str, tokens: int) -> torch.Tensor:
        found: torch.Tensor = tokenizer((TEXTS / file).read_text(), return_tensors="pt").input_ids[0, :tokens]
        return found

    calibration, evaluation = ids("calibration.txt", CALIBRATION), ids("evaluation.txt", EVALUATION)
    if args.only != "moe":
        print("# SmolLM2-135M")
        dense(args.out, folders, calibration, evaluation, args.swaps, [round(mb * 1e6) for mb in args.budgets])
    if args.only != "dense":
        print(f"\n# SmolLM2-135M as {EXPERTS} experts, top {TOP_K}")
        moe(args.out, folders["bf16"], calibration, evaluation)


if __name__ == "__main__":
    main()
