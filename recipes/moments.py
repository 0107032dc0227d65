"""Second moments of what each linear of a model multiplies, over a text of yours: for `mixprec suggest --moments`.

    python recipes/moments.py MODEL TEXT.txt -o moments.safetensors

MODEL is the unquantized checkpoint, a folder or a hub id. It runs in transformers, on GPUs where there are any (with
accelerate over several of them). For experts the moments are those of the tokens that each one gets, times the weight
that the router gives it there, E[(g xₖ)²]: so much of its output is in the layer's sum. An expert that gets no token
has the mean of its layer's. Needs torch and transformers: `pip install '.[demo]'`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from mixprec_build.checkpoint.typed import open_source
from mixprec_build.families.base import Family
from mixprec_build.families.names import layer_prefix


class Moments:
    """Sums of squared inputs by module, and how many tokens they are of."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._tokens: dict[str, int] = {}

    def add(self, module: str, inputs: torch.Tensor, gates: torch.Tensor | None = None) -> None:
        """``inputs`` ``[..., K]`` of one module; ``gates`` ``[..., 1]``: what the router multiplies its output with."""
        rows = (inputs.float() if gates is None else inputs.float() * gates).reshape(-1, inputs.shape[-1])
        seen = rows.square().sum(0).double().cpu()
        self._sums[module] = self._sums.get(module, 0) + seen
        self._tokens[module] = self._tokens.get(module, 0) + len(rows)

    def mean(self, modules: Iterable[str]) -> torch.Tensor | None:
        """E[(g x_k)²] over the tokens of several modules, ``[K]``; None where they got none."""
        seen = [module for module in modules if self._tokens.get(module)]
        if not seen:
            return None
        total = sum((self._sums[module] for module in seen), torch.zeros(()))
        return (total / sum(self._tokens[module] for module in seen)).float()


def collect(
    model: torch.nn.Module, modules: Iterable[str], family: Family, ids: torch.Tensor, window: int
) -> dict[str, torch.Tensor]:
    """E[x_k²] ``[K]``, of experts E[(g x_k)²] with the router's weight ``g``, float32, for those of a checkpoint's
    ``modules`` that ``model``, which is of ``family``, has, over tokens ``ids`` ``[T]`` in windows of ``window``.

    Raises:
        ValueError: the model keeps its experts in a way that is not known here.
    """
    wanted, moments = set(modules), Moments()
    experts: dict[str, dict[int, dict[str, str]]] = {}
    for name in wanted:
        if found := family.expert_of(name):
            block, number, part = found
            experts.setdefault(layer_prefix(block), {}).setdefault(number, {})[part] = name
    hooks = []
    for name, module in model.named_modules():
        layer = layer_prefix(name)
        if isinstance(module, torch.nn.Linear) and name in wanted:
            hooks.append(module.register_forward_pre_hook(_linear(name, moments)))
        elif layer in experts and hasattr(module, "gate_up_proj") and hasattr(module, "down_proj"):
            if not isinstance(module.gate_up_proj, torch.nn.Parameter):
                continue  # a dense MLP, whose linears are modules
            hook = _experts(module, experts[layer], family, moments)
            hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        with torch.no_grad():
            for part in ids.split(window):
                model(part[None].to(next(model.parameters()).device))
    finally:
        for hook in hooks:
            hook.remove()
    out = {name: mean for name in wanted if (mean := moments.mean([name])) is not None}
    for members in experts.values():
        for part in {part for parts in members.values() for part in parts}:
            names = [parts[part] for parts in members.values()]
            whole = moments.mean(names)
            if whole is not None:
                out |= {name: whole.clone() for name in names if name not in out}
    return out


def _linear(name: str, moments: Moments) -> Callable[..., None]:
    return lambda _, inputs: moments.add(name, inputs[0])


def _experts(module: Any, members: dict[int, dict[str, str]], family: Family, moments: Moments) -> Callable[..., None]:
    """For transformers' modules that hold all experts of a layer: ``gate_up_proj [E, 2I, H]``, ``down_proj``
    ``[E, H, I]``."""
    count, hidden, intermediate = module.down_proj.shape
    if tuple(module.gate_up_proj.shape) != (count, 2 * intermediate, hidden) or not hasattr(module, "act_fn"):
        raise ValueError(f"{type(module).__name__} keeps its experts in a way that is not known here")
    signature = inspect.signature(module.forward)

    def add(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden_states, chosen, weights = list(signature.bind(*args, **kwargs).arguments.values())[:3]
        if weights.shape != chosen.shape:
            raise ValueError(f"{type(module).__name__} weighs its experts in a way that is not known here")
        rows, top_k = hidden_states.reshape(-1, hidden), chosen.shape[-1]
        chosen, weights = chosen.reshape(-1, top_k), weights.reshape(-1, top_k)
        for expert in chosen.unique().tolist():
            if expert not in members:
                continue
            token, place = (chosen == expert).nonzero(as_tuple=True)
            x, gates = rows[token], weights[token, place, None]
            gate, up = torch.nn.functional.linear(x, module.gate_up_proj[expert]).chunk(2, dim=-1)
            for name in members[expert].values():
                moments.add(name, module.act_fn(gate) * up if family.is_down(name) else x, gates)

    return add


def main(
    model: Annotated[str, typer.Argument(help="The unquantized checkpoint: a folder or a hub id.")],
    text: Annotated[Path, typer.Argument(help="Text like that which will be served.", exists=True, dir_okay=False)],
    out: Annotated[Path, typer.Option("-o", "--out", help="The file to write.")],
    tokens: Annotated[int, typer.Option(help="How many tokens of the text to run at most.")] = 65_536,
    window: Annotated[int, typer.Option(help="How many at a time.")] = 2048,
) -> None:
    source = open_source(model)
    names = [name for name, module in source.checkpoint.modules.items() if "weight" in module.tensors]
    ids = AutoTokenizer.from_pretrained(model)(text.read_text(encoding="utf-8"), return_tensors="pt").input_ids[0]
    where = {"device_map": "auto"} if torch.cuda.is_available() else {}
    runs = AutoModelForCausalLM.from_pretrained(model, dtype="auto", **where).eval()
    found = collect(runs, names, source.facts.family, ids[:tokens], window)
    save_file(dict(sorted(found.items())), out)
    print(f"{out}: {len(found):,} modules, {min(tokens, len(ids)):,} tokens")


if __name__ == "__main__":
    typer.run(main)
