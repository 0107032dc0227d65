"""What a model loses when one module at a time comes from another source: for `mixprec suggest --swaps`.

    python recipes/swaps.py BASE.yaml TEXT.txt -o swaps.json
    python recipes/swaps.py BASE.yaml TEXT.txt -o swaps.json --engine sglang --tp 4 --every 4 --sources int4

BASE.yaml is the recipe with the sources to choose from. The model runs with unquantized weights (where no source has a
module so, with those of the most bits); then one swap after another is put into it, dequantized, measured, and taken
out again. A swap is q/k/v, gate/up, another linear, or all experts of a layer, from one source. Its loss is
KL(reference ‖ swapped) of the next token, in nats a token over the text. `--together` measures random sets of swaps in
addition, so that `suggest` can say how far their losses add up.

`transformers` runs the model in this process, in float32 on a CPU; on a GPU in the dtype of its weights, whose rounding
hides losses below 10⁻⁴ or so, or with `--float32`. `sglang` runs stock SGLang with the default source,
which must be unquantized, and replaces its weights by `update_weights_from_tensor`; its KL is of the `--top` likeliest
tokens and the sum of all others, which is at most the KL of all tokens. Activations are quantized in neither.

The file is written after each swap; the same command continues. Needs torch and transformers (`pip install '.[demo]'`),
or SGLang.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
import xxhash
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from mixprec_build.families.base import Family
from mixprec_build.families.names import layer_prefix
from mixprec_build.patterns.compress import compress
from mixprec_build.recipe.recipe import load_recipe
from mixprec_build.recipe.sources import open_sources
from mixprec_build.suggesting.choices import Choices, Group, Request

Weights = Mapping[str, torch.Tensor]
"""Linear -> its weight ``[N, K]``."""


class Engine(str, Enum):
    TRANSFORMERS = "transformers"
    SGLANG = "sglang"


class InTransformers:
    """A model of transformers whose weights can be replaced."""

    def __init__(self, model: torch.nn.Module, family: Family, windows: Sequence[torch.Tensor]):
        self._model, self._family, self._windows = model, family, windows
        self.device = next(model.parameters()).device
        modules = dict(model.named_modules())
        self._linears = {name: m for name, m in modules.items() if isinstance(m, torch.nn.Linear)}
        self._experts = {
            layer_prefix(name): m
            for name, m in modules.items()
            if isinstance(getattr(m, "gate_up_proj", None), torch.nn.Parameter)
        }
        self._layers = {name: m for name, m in modules.items() if layer_prefix(f"{name}.") == f"{name}."}
        self._outputs: list[dict[str, Any]] = []
        self._exact: list[torch.Tensor] = []

    def put(self, weights: Weights) -> None:
        """Replaces weights. Raises :class:`ValueError` for a linear that the model does not have."""
        with torch.no_grad():
            for name, weight in weights.items():
                if name in self._linears:
                    self._linears[name].weight.copy_(weight)
                    continue
                found = self._family.expert_of(name)
                stacked = self._experts.get(layer_prefix(found[0])) if found else None
                if found is None or stacked is None:
                    raise ValueError(f"{name}: transformers' model has no linear of that name")
                if self._family.is_down(name):
                    stacked.down_proj[found[1]].copy_(weight)
                else:
                    half = int(found[2] in ("up_proj", "w3"))
                    stacked.gate_up_proj[found[1]].chunk(2)[half].copy_(weight)

    def keep_reference(self) -> None:
        """Runs the text with the weights that are in the model now, with which :meth:`loss` compares."""
        outputs: dict[str, Any] = {}
        hooks = [
            layer.register_forward_hook(lambda _, __, out, name=name: outputs.__setitem__(name, out))  # type: ignore[misc]
            for name, layer in self._layers.items()
        ]
        for window in self._windows:
            self._exact.append(self.logprobs(window))
            self._outputs.append(dict(outputs))
        for hook in hooks:
            hook.remove()

    def loss(self, changed: Iterable[str]) -> float:
        """KL(reference ‖ now) in nats a token. Layers before the first one with a ``changed`` linear do not run."""
        names = list(self._layers)
        places = [names.index(layer_prefix(n).removesuffix(".")) for n in changed if layer_prefix(n)]
        first, total, tokens = min(places, default=0), 0.0, 0
        for at, window in enumerate(self._windows):
            skipped = {name: self._layers[name].forward for name in names[:first]}
            for name in skipped:
                self._layers[name].forward = lambda *_, out=self._outputs[at][name], **__: out  # type: ignore[method-assign]
            try:
                mine = self.logprobs(window)
            finally:
                for name in skipped:
                    del self._layers[name].forward
            exact = self._exact[at]
            total += (exact.exp() * (exact - mine)).sum(dtype=torch.float64).item()
            tokens += len(window)
        return total / tokens

    def logprobs(self, tokens: torch.Tensor) -> torch.Tensor:
        """Of every token after each of ``tokens`` ``[..., T]``: float32 ``[..., T, vocabulary]``."""
        with torch.no_grad():
            logits = self._model(tokens.reshape(-1, tokens.shape[-1]).to(self.device), use_cache=False).logits
        return torch.log_softmax(logits.float(), -1).reshape(*tokens.shape, -1)

    def close(self) -> None:
        """Nothing to end."""


class InSGLang:
    """A server of stock SGLang in this process's children, whose weights can be replaced."""

    def __init__(self, engine: Any, windows: Sequence[torch.Tensor], top: int):
        self._engine, self._windows, self._top = engine, windows, top
        self._exact: list[list[dict[int, float]]] = []

    def put(self, weights: Weights) -> None:
        """Replaces weights. Raises :class:`ValueError` where SGLang refuses them."""
        calls = [
            partial(self._engine.update_weights_from_tensor, [(f"{name}.weight", w) for name, w in weights.items()])
        ]
        if hasattr(self._engine, "begin_weight_update"):  # from 0.5.21 on, which takes weights between the two
            calls = [self._engine.begin_weight_update, *calls, self._engine.end_weight_update]
        answers = [call() for call in calls]
        messages = [message for success, message in map(_answer, answers) if not success]
        if messages:
            raise ValueError(f"{', '.join(list(weights)[:3])}: SGLang does not take these weights: {messages[0]}")

    def keep_reference(self) -> None:
        """Runs the text with the weights that are in the model now, with which :meth:`loss` compares."""
        self._exact = self._run()

    def loss(self, changed: Iterable[str]) -> float:
        """KL(reference ‖ now) in nats a token."""
        del changed
        pairs = [
            pair for exact, mine in zip(self._exact, self._run(), strict=True) for pair in zip(exact, mine, strict=True)
        ]
        return sum(coarse_kl(exact, mine) for exact, mine in pairs) / len(pairs)

    def _run(self) -> list[list[dict[int, float]]]:
        """The likeliest tokens after each position: ``[window][position] -> {token: logprob}``."""
        found = []
        for window in self._windows:  # one by one: results depend on the batch
            out = self._engine.generate(
                input_ids=window.tolist(),
                sampling_params={"temperature": 0, "max_new_tokens": 1},
                return_logprob=True,
                logprob_start_len=0,
                top_logprobs_num=self._top,
            )
            rows = out["meta_info"]["input_top_logprobs"][1:]
            found.append([{token: logprob for logprob, token, *_ in row} for row in rows])
        return found

    def close(self) -> None:
        self._engine.shutdown()


def _answer(done: Any) -> tuple[bool, str]:
    """Whether SGLang did what it was asked, and its message; releases answer with a tuple, or an object."""
    return done[:2] if isinstance(done, tuple) else (done.success, done.message)


def coarse_kl(exact: Mapping[int, float], mine: Mapping[int, float]) -> float:
    """KL of two distributions over the tokens that both list, and one class of all others; at most that of all."""
    both = exact.keys() & mine.keys()
    rest = [max(1e-9, 1 - sum(math.exp(one[token]) for token in both)) for one in (exact, mine)]
    kl = sum(math.exp(exact[token]) * (exact[token] - mine[token]) for token in both)
    return max(0.0, kl + rest[0] * math.log(rest[0] / rest[1]))


def swaps_of(groups: Sequence[Group], sources: Sequence[str], every: int) -> list[tuple[list[Group], str]]:
    """Groups and the source that they come from, in each ``every``-th layer that has a column, and in the last one.

    The experts of a layer are one swap, as far as they have the source.
    """
    units: dict[tuple[str, int | None], list[Group]] = {}
    for group in groups:
        units.setdefault((group.column, group.layer), []).append(group)
    layers: dict[str, list[int]] = {}
    for column, layer in units:
        layers.setdefault(column, []).append(layer if layer is not None else 0)
    out = []
    for (column, layer), members in units.items():
        rows = sorted(layers[column])
        if layer is not None and layer != rows[-1] and rows.index(layer) % every:
            continue
        for source in sources:
            mine = [group for group in members if source in {option.source for option in group.options}]
            if mine:
                out.append((mine, source))
    return out


def patterns_of(groups: Sequence[Group], among: Iterable[str]) -> list[str]:
    """Patterns that match the members of ``groups``, and no other one of ``among``."""
    members = [member for group in groups for member in group.members]
    if groups[0].column == "experts":
        stem = groups[0].name.rpartition(".")[0]
        if len(members) == sum(name.startswith(f"{stem}.") for name in among):
            return [f"{stem}.*"]
    return compress(members)


def main(
    base: Annotated[Path, typer.Argument(help="The recipe with the sources.", exists=True, dir_okay=False)],
    text: Annotated[Path, typer.Argument(help="Text like that which will be served.", exists=True, dir_okay=False)],
    out: Annotated[Path, typer.Option("-o", "--out", help="The file to write, or to continue.")],
    tokens: Annotated[int, typer.Option(help="How many tokens of the text to run at most.")] = 1024,
    window: Annotated[int, typer.Option(help="How many at a time.")] = 512,
    every: Annotated[int, typer.Option(help="Measure in one of so many layers, and in the last.", min=1)] = 1,
    sources: Annotated[str, typer.Option(help="Sources to measure, by commas; all quantized ones by default.")] = "",
    together: Annotated[int, typer.Option(help="How many random sets of swaps to measure.", min=0)] = 6,
    engine: Annotated[Engine, typer.Option(help="What runs the model.")] = Engine.TRANSFORMERS,
    tp: Annotated[int, typer.Option(help="Tensor-parallel ranks of SGLang.", min=1)] = 1,
    top: Annotated[int, typer.Option(help="Tokens whose logprobs are compared in SGLang.", min=2)] = 128,
    float32: Annotated[bool, typer.Option("--float32", help="Run transformers in float32 on a GPU, too.")] = False,
    engine_options: Annotated[str, typer.Option(help="More arguments of `sglang.Engine`, as JSON.")] = "{}",
    allow_unservable: Annotated[bool, typer.Option(help="Measure choices that SGLang could not serve, too.")] = False,
) -> None:
    recipe = load_recipe(base)
    opened = open_sources(recipe)
    choices = Choices(recipe, opened, Request(1, allow_unservable=allow_unservable))
    members = [member for group in choices.groups for member in group.members]
    exact = {member: choices.reference(member) for member in members}
    wanted = [name for name in sources.split(",") if name] or [
        name for name in opened.by_name if any(exact[member].name != name for member in members)
    ]
    if unknown := [name for name in wanted if name not in opened.by_name]:
        raise typer.BadParameter(f"no source is called {unknown[0]}; there are {', '.join(opened.by_name)}")
    swaps = [
        (groups, source)
        for groups, source in swaps_of(choices.groups, wanted, every)
        if any(exact[member].name != source for group in groups for member in group.members)
    ]
    default = opened.by_name[recipe.default]
    folder = str(default.checkpoint.folder)
    ids = AutoTokenizer.from_pretrained(folder)(text.read_text(encoding="utf-8"), return_tensors="pt").input_ids[0]
    windows = [part for part in ids[:tokens].split(window) if len(part) > 1]
    head = {
        "unit": "nats a token",
        "engine": engine.value,
        "tokens": sum(map(len, windows)),
        "text": xxhash.xxh3_128_hexdigest(ids[:tokens].numpy().tobytes()),
        "sources": {name: source.location for name, source in opened.by_name.items()},
    }
    found: dict[str, Any] = {**head, "swaps": [], "together": []}
    known: dict[tuple[str, ...], float] = {}
    if out.exists():
        before = json.loads(out.read_text(encoding="utf-8"))
        if {key: before.get(key) for key in head} != head:
            raise typer.BadParameter(f"{out} was measured on another text, engine or sources; name another file")
        known = {(swap["source"], *swap["modules"]): swap["loss"] for swap in before["swaps"]}
        found["together"] = before["together"]

    runs: InTransformers | InSGLang
    if engine is Engine.SGLANG:
        if default.kinds - {"bf16", "fp16", "fp32"}:
            raise typer.BadParameter(f"SGLang runs the default source, `{default.name}`, which must be unquantized")
        import sglang

        served = sglang.Engine(
            model_path=folder, tp_size=tp, disable_radix_cache=True, disable_cuda_graph=True, log_level="warning",
            **json.loads(engine_options),
        )  # fmt: skip
        runs = InSGLang(served, windows, top)
    else:
        config = AutoConfig.from_pretrained(folder)
        dtype: Any = "auto" if torch.cuda.is_available() and not float32 else torch.float32
        where = {"device_map": "auto"} if torch.cuda.is_available() else {}
        if hasattr(config, "quantization_config"):
            raise typer.BadParameter(f"the default source, `{default.name}`, must be unquantized")
        runs = InTransformers(
            AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **where).eval(), default.facts.family, windows
        )

    def weights(names: Iterable[str], source: str | None) -> dict[str, torch.Tensor]:
        """Dequantized weights; without a ``source`` those of the references."""
        return {
            name: torch.from_numpy(
                (exact[name] if source is None else opened.by_name[source]).dequantize(name)
            ).to(torch.bfloat16 if engine is Engine.SGLANG else torch.float32)
            for name in names
        }  # fmt: skip

    def measured(sets: Sequence[tuple[list[Group], str]]) -> float:
        names = [member for groups, _ in sets for group in groups for member in group.members]
        for groups, source in sets:
            runs.put(weights([member for group in groups for member in group.members], source))
        loss = runs.loss(names)
        runs.put(weights(names, None))
        return loss

    def write() -> None:
        unfinished = out.with_name(f".{out.name}.unfinished")
        unfinished.write_text(json.dumps(found, indent=1), encoding="utf-8")
        unfinished.replace(out)

    try:
        others = [name for name in members if exact[name] is not default]
        runs.put(weights(others, None))
        runs.keep_reference()
        for number, (groups, source) in enumerate(swaps):
            patterns = patterns_of(groups, members)
            loss = known.get((source, *patterns))
            if loss is None:
                loss = measured([(groups, source)])
                if loss == 0:
                    raise typer.BadParameter(
                        f"{patterns[0]} from `{source}` changed nothing: it did not reach the model"
                    )
                print(f"{number + 1}/{len(swaps)}: {patterns[0]} from {source}: {loss:.3g}", flush=True)
            found["swaps"].append({"modules": patterns, "source": source, "loss": max(0.0, loss)})
            write()
        for number in range(len(found["together"]), together):
            picked = random_set(swaps, number)
            loss = measured([swaps[i] for i in picked])
            parts = sum(found["swaps"][i]["loss"] for i in picked)
            print(f"{len(picked)} swaps at once: {loss:.4g}, added up {parts:.4g}", flush=True)
            found["together"].append({"swaps": picked, "loss": loss})
            write()
        left = runs.loss(members[:1])
        least = min((swap["loss"] for swap in found["swaps"]), default=math.inf)
        if left > least / 4:
            raise typer.BadParameter(
                f"with all swaps taken out again the loss is {left:.3g}, as large as the smallest swap's: the engine's "
                "answers are not repeatable enough, or weights were not put back"
            )
    finally:
        runs.close()
    print(f"{out}: {len(found['swaps'])} swaps, {len(found['together'])} sets of them, {head['tokens']} tokens")


def random_set(swaps: Sequence[tuple[list[Group], str]], seed: int) -> list[int]:
    """Indices of swaps of different modules: even seeds take two, odd ones one for all modules that are measured."""
    draw = random.Random(seed)
    by_place: dict[str, list[int]] = {}
    for number, (groups, _) in enumerate(swaps):
        by_place.setdefault(groups[0].name, []).append(number)
    places = sorted(by_place)
    if seed % 2 == 0:
        places = sorted(draw.sample(places, min(2, len(places))))
    return sorted(draw.choice(by_place[place]) for place in places)


if __name__ == "__main__":
    typer.run(main)
