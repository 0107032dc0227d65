"""Does choosing experts win on a trained mixture of experts? Perplexity and KL against bytes, with intervals.

    PYTHONPATH=tests:recipes python tests/benchmarks/frontier.py FOLDER    # of trained_moe.py

Quantizes FOLDER/bf16 once: FP8 in blocks; Int4 by GPTQ (Frantar et al., 2022), layer after layer, in symmetric static
groups of 128, with a damping of 1 %, calibrated on seen text, an expert by the tokens that it gets; and NVFP4 rounded
to nearest. Counts experts' tokens and takes moments on one kind of seen text. Then, at six budgets between the smallest
mix and all FP8, it makes the mix that `mixprec suggest` chooses by default, those of other objectives and without
traffic, and others of the same bytes, and measures them on held-out text of that kind and of the others, with
dequantized weights in transformers. KL is that of BF16 and the mix, in nats a token. Beside it stands how much more
that is than the default's of the same budget, window by window, with 95 % of 1,000 bootstrap samples of windows. The
mixes stay in FOLDER/mixes.json, with what each window loses, for `served_mixes.py`. Last comes how well each objective
knows what a mix loses: the correlation, over all these mixes, of the logarithms of its loss and of KL.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import moments as recorder
import numpy as np
import numpy.typing as npt
import swaps as swapping
import torch
from safetensors.torch import load_file, save_file
from support import formats
from support.bootstrap import interval
from transformers import AutoModelForCausalLM

from mixprec_build.recipe.recipe import load_recipe
from mixprec_build.recipe.sources import open_sources
from mixprec_build.suggesting.activity import Activity, balance_of
from mixprec_build.suggesting.allocate import Suggestion, suggest
from mixprec_build.suggesting.choices import Group, Request
from mixprec_build.suggesting.distortion import DistortionCache, Moments
from mixprec_build.suggesting.objective import Objective

GROUP = 128
Mix = Mapping[str, str]
"""Module -> source."""
Floats = npt.NDArray[np.float64]


def gptq(weight: torch.Tensor, hessian: torch.Tensor, group: int = GROUP, damp: float = 0.01) -> torch.Tensor:
    """The weights ``[..., N, K]`` that GPTQ chooses for inputs of ``hessian`` ``[..., K, K]``, on a grid that
    :func:`support.formats.gptq` stores exactly: each group of inputs has the scale of its weights before the error of
    others was added to it, as with static groups."""
    w, h = weight.double().clone(), hessian.double().clone()
    diagonal = h.diagonal(dim1=-2, dim2=-1)
    dead = diagonal == 0
    diagonal[dead] = 1
    w.masked_fill_(dead[..., None, :], 0)
    diagonal += damp * diagonal.mean(-1, keepdim=True)
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    out = torch.empty_like(w)
    for start in range(0, w.shape[-1], group):
        stop = start + group
        scale = scales_of(weight[..., start:stop]).double()
        errors = torch.empty_like(w[..., start:stop])
        for k in range(start, stop):
            q = (w[..., k] / scale).round().clamp(-8, 7)
            out[..., k] = q * scale
            errors[..., k - start] = (w[..., k] - out[..., k]) / upper[..., k, k, None]
            w[..., k + 1 : stop] -= errors[..., k - start, None] * upper[..., k, None, k + 1 : stop]
        w[..., stop:] -= errors @ upper[..., start:stop, stop:]
    return out.float()


def scales_of(weight: torch.Tensor) -> torch.Tensor:
    """The scale of a group of inputs, ``[..., N]``, as it is stored: FP16."""
    return (weight.abs().amax(-1) / 7).clamp(min=1e-6).half().float()


def stored_int4(chosen: torch.Tensor, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensors of ``chosen``, values on the grid of ``weight``'s scales, in AutoGPTQ's layout."""
    n, k = weight.shape
    scales = torch.stack([scales_of(part) for part in weight.split(GROUP, 1)])
    codes = (chosen.t() / scales.repeat_interleave(GROUP, 0)).round().long() + 8
    tensors = formats.gptq(weight, group_size=GROUP)
    shifts = 4 * torch.arange(8, device=codes.device)
    words = (codes.view(k // 8, 8, n) << shifts[None, :, None]).sum(1)
    tensors["qweight"] = torch.where(words >= 1 << 31, words - (1 << 32), words).int()
    tensors["scales"] = scales.half()
    return tensors


class Hessians:
    """X'X of what modules multiply: a stand-in for the sums of ``recipes/moments.py``."""

    def __init__(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}

    def add(self, module: str, inputs: torch.Tensor, gates: torch.Tensor | None = None) -> None:
        """GPTQ's sums are not weighted by ``gates``."""
        rows = inputs.reshape(-1, inputs.shape[-1]).float()
        self.sums[module] = self.sums.get(module, 0) + rows.t() @ rows


def hessians_of(model: Any, names: Sequence[str], family: Any, windows: Sequence[torch.Tensor]) -> dict[str, Any]:
    """X'X ``[K, K]`` of the inputs of linears of one layer."""
    found, hooks, prefix = Hessians(), [], names[0][: names[0].index(".layers.") + 8]
    layer = prefix + names[0][len(prefix) :].partition(".")[0] + "."
    experts: dict[int, dict[str, str]] = {}
    for name in names:
        if one := family.expert_of(name):
            experts.setdefault(one[1], {})[one[2]] = name
    for name, module in model.named_modules():
        if name in names:
            hooks.append(module.register_forward_pre_hook(recorder._linear(name, found)))
        elif name.startswith(layer) and isinstance(getattr(module, "gate_up_proj", None), torch.nn.Parameter):
            hook = recorder._experts(module, experts, family, found)
            hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    hooks.append(model.get_submodule(layer.rstrip(".")).register_forward_hook(_stop))
    for some in batches(windows):
        with suppress(_LayerDone):
            model(some.to(model.device), use_cache=False)
    for hook in hooks:
        hook.remove()
    return found.sums


class _LayerDone(Exception):
    """No later layer has to run."""


def _stop(*_: Any) -> None:
    raise _LayerDone


@torch.no_grad()
def quantize(folder: Path, windows: Sequence[torch.Tensor]) -> dict[str, Path]:
    """Writes ``folder/{fp8,int4,nvfp4}`` once; returns all four checkpoints."""
    bf16, out = folder / "bf16", {name: folder / name for name in ("bf16", "fp8", "int4", "nvfp4")}
    if (out["nvfp4"] / "config.json").exists():
        return out
    family = swapping.open_sources(load_recipe(write_base(folder, {"bf16": bf16}))).model.facts.family
    model = AutoModelForCausalLM.from_pretrained(bf16, dtype=torch.float32, experts_implementation="eager").eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    put = swapping.InTransformers(model, family, [])
    tensors = {name: t for path in sorted(bf16.glob("*.safetensors")) for name, t in load_file(path).items()}
    linears = [name.removesuffix(".weight") for name in tensors if name.endswith("_proj.weight")]
    others = {name: t for name, t in tensors.items() if name.removesuffix(".weight") not in {*linears}}
    stored: dict[str, dict[str, torch.Tensor]] = {name: dict(others) for name in ("fp8", "int4", "nvfp4")}
    layers = sorted({int(name.split(".")[2]) for name in linears})
    for layer in layers:
        mine = [name for name in linears if name.startswith(f"model.layers.{layer}.")]
        found = hessians_of(model, mine, family, windows)
        weights = {name: tensors[f"{name}.weight"].float().to(model.device) for name in mine}
        # Those of one shape at once: on a GPU, single experts take as long as all of a layer.
        by_shape: dict[torch.Size, list[str]] = {}
        for name, weight in weights.items():
            by_shape.setdefault(weight.shape, []).append(name)
        rounded: dict[str, torch.Tensor] = {}
        for shape, alike in by_shape.items():
            unseen = torch.eye(shape[1], device=model.device)
            hessians = torch.stack([found.get(name, unseen) for name in alike])
            rounded |= zip(alike, gptq(torch.stack([weights[name] for name in alike]), hessians), strict=True)
        put.put(rounded)
        for name, weight in weights.items():
            chosen = rounded[name]
            for source, made in (
                ("fp8", formats.fp8_block(weight)),
                ("int4", stored_int4(chosen, weight)),
                ("nvfp4", formats.nvfp4(weight, scale=1 / 2688)),
            ):
                stored[source] |= {f"{name}.{leaf}": tensor.cpu().contiguous() for leaf, tensor in made.items()}
        print(f"layer {layer} of {len(layers)} quantized", flush=True)
    config = json.loads((bf16 / "config.json").read_text())
    declared = {"fp8": formats.fp8_config(), "int4": formats.gptq_config(), "nvfp4": formats.nvfp4_config()}
    for source, mine_stored in stored.items():
        out[source].mkdir(exist_ok=True)
        for path in bf16.glob("*token*"):
            shutil.copy(path, out[source])
        save_file(mine_stored, out[source] / "model.safetensors", metadata={"format": "pt"})
        (out[source] / "config.json").write_text(json.dumps(config | {"quantization_config": declared[source]}))
    return out


def write_base(folder: Path, sources: Mapping[str, Path]) -> Path:
    path = folder / f"base-{'-'.join(sources)}.yaml"
    lines = [f"model: {sources['bf16'].resolve()}", "sources:"]
    path.write_text("\n".join([*lines, *(f"  {name}: {one.resolve()}" for name, one in sources.items())]) + "\n")
    return path


class Judge:
    """Held-out windows, by kind of text, and how mixes differ on them from BF16."""

    def __init__(
        self, runs: Any, weights: Callable[[str, str], torch.Tensor], kinds: Mapping[str, Sequence[torch.Tensor]]
    ):
        self._runs, self._weights = runs, weights
        self._now: dict[str, str] = {}
        self._kinds = {kind: [some.to(runs.device) for some in batches(windows)] for kind, windows in kinds.items()}
        self._exact = {kind: [runs.logprobs(some) for some in each] for kind, each in self._kinds.items()}

    def judge(self, mix: Mix) -> dict[str, tuple[Floats, Floats]]:
        """Kind -> nats a token of the text, and KL from BF16, of each window."""
        changed = {name: source for name, source in mix.items() if self._now.get(name, "bf16") != source}
        self._runs.put({name: self._weights(name, source) for name, source in changed.items()})
        self._now |= changed
        out = {}
        for kind, each in self._kinds.items():
            losses, kls = [], []
            for windows, exact in zip(each, self._exact[kind], strict=True):
                mine = self._runs.logprobs(windows)
                losses += (-mine[:, :-1].gather(2, windows[:, 1:, None]).mean((1, 2))).tolist()
                kls += (exact.exp() * (exact - mine)).sum(-1).mean(1).tolist()
            out[kind] = np.array(losses), np.array(kls)
        return out


def batches(windows: Sequence[torch.Tensor], size: int = 8) -> list[torch.Tensor]:
    """Windows ``[T]``, those of one length side by side: ``[B, T]``, up to ``size`` of them."""
    return [some for _, alike in itertools.groupby(windows, len) for some in torch.stack(list(alike)).split(size)]


def filled(groups: Sequence[Group], order: Iterable[str], room: int) -> Mix:
    """The smallest source everywhere, and FP8 for the first groups in ``order`` that still fit into ``room`` bytes."""
    by_name = {group.name: group for group in groups}
    least = {group.name: min(group.options, key=lambda option: option.nbytes) for group in groups}
    mix = {member: least[group.name].source for group in groups for member in group.members}
    room -= sum(option.nbytes for option in least.values())
    for name in order:
        better = next((option for option in by_name[name].options if option.source == "fp8"), None)
        if better is not None and 0 < better.nbytes - least[name].nbytes <= room:
            room -= better.nbytes - least[name].nbytes
            mix |= dict.fromkeys(by_name[name].members, "fp8")
    return mix


def orders_of(groups: Sequence[Group], activity: Activity, seeds: int) -> dict[str, list[str]]:
    """Ways to spend bytes that know less: names of groups, in the order in which they get FP8. Attention comes first
    where a way says nothing of it."""
    attention = [group.name for group in groups if group.column != "experts"]
    experts = [group for group in groups if group.column == "experts"]

    def place(group: Group) -> tuple[int, int]:
        return group.layer or 0, int(group.name.rpartition(".")[2])

    orders = {
        "frequency only": [*attention, *(g.name for g in sorted(experts, key=lambda g: -counted(activity, *place(g))))],
        "layer-uniform": [*attention, *(g.name for g in sorted(experts, key=lambda g: place(g)[::-1]))],
        "first layers": [g.name for g in sorted(groups, key=lambda g: g.layer or 0)],
    }
    for seed in range(seeds):
        names = [group.name for group in groups]
        np.random.default_rng(seed).shuffle(names)
        orders[f"random, seed {seed}"] = names
    return orders


def counted(activity: Activity, layer: int, expert: int) -> int:
    counts = activity.counts.get(layer)
    return int(counts[expert]) if counts is not None and expert < len(counts) else 0


@torch.no_grad()
def activity_of(model: Any, windows: Sequence[torch.Tensor]) -> Activity:
    """Tokens of each expert of each layer."""
    experts, counts = model.config.num_experts, {}
    hooks = []
    for name, module in model.named_modules():
        if name.endswith(".mlp.gate"):
            layer = int(name.split(".")[2])
            counts[layer] = np.zeros(experts, np.int64)

            def add(_: Any, __: Any, out: Any, layer: int = layer) -> None:
                counts[layer] += np.bincount(out[2].flatten().cpu().numpy(), minlength=experts)

            hooks.append(module.register_forward_hook(add))
    for some in batches(windows):
        model(some.to(model.device), use_cache=False)
    for hook in hooks:
        hook.remove()
    return Activity(counts, {})


def picked(suggestion: Suggestion) -> Mix:
    return {member: option.source for group, option in suggestion.picked() for member in group.members}


def loss_of(mix: Mix, groups: Iterable[Group]) -> float:
    """What an objective, whose losses ``groups`` have, says of a mix."""
    return sum(o.loss for group in groups for o in group.options if o.source == mix[group.members[0]])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kind", help="the text that activity and moments are of; the first kind by default")
    parser.add_argument("--small", default="int4", choices=["int4", "nvfp4"], help="the source of fewest bytes")
    parser.add_argument("--swaps", type=Path, help="of recipes/swaps.py: adds the objective `measured`")
    parser.add_argument("--budgets", type=int, default=6)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=32, help="of each kind of held-out text, and to calibrate")
    parser.add_argument("--seeds", type=int, default=5, help="random mixes")
    args = parser.parse_args(arguments)
    kinds: list[str] = json.loads((args.folder / "kinds.json").read_text())
    kind = args.kind or kinds[0]

    def windows(name: str, of: str) -> list[torch.Tensor]:
        tokens = torch.from_numpy(np.load(args.folder / f"{name}-{of}.npy").astype(np.int64))
        return [part for part in tokens[: args.window * args.windows].split(args.window) if len(part) > 1]

    calibration = [window for of in kinds for window in windows("seen", of)]
    folders = quantize(args.folder, calibration)
    base = write_base(args.folder, {name: folders[name] for name in ("bf16", "fp8", args.small)})
    recipe = load_recipe(base)
    sources = open_sources(recipe)
    model = AutoModelForCausalLM.from_pretrained(
        folders["bf16"], dtype=torch.float32, experts_implementation="eager"
    ).eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    runs = swapping.InTransformers(model, sources.model.facts.family, [])
    activity = activity_of(model, windows("seen", kind))
    gini = np.mean([balance_of(counts).gini for counts in activity.counts.values()])
    print(f"activity on `{kind}`: Gini {gini:.3f}, {sum(int((c == 0).sum()) for c in activity.counts.values())} unused")
    names = [name for name, module in sources.model.modules.items() if name.endswith("_proj")]
    ids = torch.cat(windows("seen", kind))
    found = recorder.collect(model, names, sources.model.facts.family, ids, args.window)
    moments = args.folder / f"moments-{kind}.safetensors"
    save_file(dict(sorted(found.items())), moments)

    @functools.cache
    def weight(name: str, source: str) -> torch.Tensor:
        return torch.from_numpy(sources.by_name[source].dequantize(name)).to(runs.device)

    judge = Judge(runs, weight, {of: windows("held", of) for of in kinds})
    print("| MB | mix | " + " | ".join(f"{of}: perplexity | KL | more than by default (95 %)" for of in kinds) + " |")
    print("|---" * (2 + 3 * len(kinds)) + "|")

    kept: list[dict[str, Any]] = []

    def show(size: float, name: str, mix: Mix, beside: Mapping[str, Floats] | None = None) -> dict[str, Floats]:
        """Prints a row; ``beside`` and what is returned are the KL of each window."""
        results, cells = judge.judge(mix), []
        for of, (losses, kls) in results.items():
            more = "" if beside is None else "{:.2g} ({:.2g} to {:.2g})".format(*interval(kls - beside[of]))
            cells += [f"{math.exp(losses.mean()):.3f}", f"{kls.mean():.4g}", more]
        print(f"| {size:.1f} | {name} | {' | '.join(cells)} |", flush=True)
        losses_of = {of: losses.tolist() for of, (losses, _) in results.items()}
        kl_of = {of: kls.tolist() for of, (_, kls) in results.items()}
        kept.append({"megabytes": round(size, 1), "name": name, "mix": dict(mix), "losses": losses_of, "kl": kl_of})
        (args.folder / "mixes.json").write_text(json.dumps({"window": args.window, "mixes": kept}))
        return {of: kls for of, (_, kls) in results.items()}

    uniform = ("bf16", "fp8", args.small)
    sizes = {name: sum(f.stat().st_size for f in folders[name].glob("*.safetensors")) for name in uniform}
    for source, size in sizes.items():
        show(size / 1e6, f"all {source}", dict.fromkeys(names, source))
    more = {} if args.swaps is None else {"swaps": swapping_of(args.swaps)}
    # With moments, and with swaps, these are the defaults.
    first = Objective.MEASURED if more else Objective.RELATIVE_OUTPUT
    others = [one for one in Objective if one is not first and (more or one is not Objective.MEASURED)]
    ways = [(first, activity), (first, None), *((one, activity) for one in others)]
    shares = (np.arange(args.budgets) + 1) / (args.budgets + 1)
    weighed: dict[str, Sequence[Group]] = {}
    with DistortionCache(args.folder / "errors.jsonl") as cache:
        for share in shares:
            budget = int(sizes[args.small] + share * (sizes["fp8"] - sizes[args.small]))
            default: dict[str, Floats] | None = None
            for objective, traffic in ways:
                # `measured` shares out the losses of swaps by moments where there are some.
                of = Moments(moments) if objective.needs_moments or objective is Objective.MEASURED else None
                request = Request(budget, objective, traffic, of, **more, allow_unservable=True)
                suggestion = suggest(recipe, sources, request, cache)
                name = f"suggested, {objective.value}" + ("" if traffic else ", no traffic")
                weighed[name] = suggestion.groups
                found_kls = show(suggestion.nbytes / 1e6, name, picked(suggestion), default)
                default = default or found_kls
            groups, room = suggestion.groups, suggestion.solution.cost
            for name, order in orders_of(groups, activity, args.seeds).items():
                show(budget / 1e6, name, filled(groups, order, room), default)
    mixed = [one for one in kept if not one["name"].startswith("all ")]
    for name, groups in weighed.items():
        said = np.log([loss_of(one["mix"], groups) for one in mixed])
        fits = [np.corrcoef(said, np.log([np.mean(one["kl"][of]) for one in mixed]))[0, 1] for of in kinds]
        print(f"{name}: r of {', '.join(f'{of} {r:.3f}' for of, r in zip(kinds, fits, strict=True))}", flush=True)


def swapping_of(path: Path) -> Any:
    from mixprec_build.suggesting.swaps import read_swaps

    return read_swaps(path)


if __name__ == "__main__":
    main()
