"""``--moe-runner-backend`` by layer.

SGLang has one runner for the experts of a model, and reads it in many places: layers, their methods, the router, the
all-to-all. While a compiled model is made and served, they find ``auto``, with which each format has a runner of its
own. The runner that is asked for is found only by the calls that choose and prepare it, of the layers that take it.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

from sglang.srt.layers.deep_gemm_wrapper import configurer
from sglang.srt.layers.moe import utils
from sglang.srt.runtime_context import get_flags, get_parallel

from mixprec_build.formats.base import Format
from mixprec_build.patterns.compress import compress
from mixprec_build.text import some

from ..formats.registry import served
from ..launch import BY_LAYER, refuse, server_args, value_of

__all__ = [
    "Layers",
    "asked_for",
    "by_formats",
    "found_as",
    "give",
    "only_format",
    "problem",
    "require_heeded",
    "settle",
    "takes",
]


logger = logging.getLogger(__name__)

Layers = Mapping[str, Collection[Format]]
"""``model.layers.0.mlp.experts`` -> the formats of a layer's experts."""

_HEEDED = frozenset({
    "num_experts", "num_local_experts", "hidden_size", "intermediate_size_per_partition", "layer_id", "top_k",
    "num_fused_shared_experts", "params_dtype", "routing_method_type", "runner_backend", "inplace",
    "routed_scaling_factor", "gate_up_interleaved", "layer", "use_tp_all_gather_activation",
})  # fmt: skip
"""Fields of SGLang's ``MoeRunnerConfig`` that DeepGEMM's runner acts on, or that change no result."""


def takes(formats: Collection[Format], runner: str) -> bool:
    """Whether experts of a layer in ``formats`` run on ``runner``, or can: by themselves, or all in one format."""
    each = [served(fmt).runners(fmt) for fmt in formats]
    return any(names[0] == runner for names in each) or (len(each) == 1 and runner in each[0])


def only_format(formats: Collection[Format]) -> Format | None:
    """The format of a layer's experts, if it is one."""
    return next(iter(formats)) if len(formats) == 1 else None


def asked_for(*, draft: bool) -> str:
    """The runner that the arguments ask for, or SGLang chose; ``auto`` where there is none."""
    args = server_args()
    own = value_of(args, "speculative_moe_runner_backend") if draft else None
    return str(own or value_of(args, "moe_runner_backend"))


def settle(layers: Layers, *, draft: bool) -> str:
    """Returns the runner to give to layers that take it, and has SGLang's code find ``auto`` in its place.

    Args:
        layers: the layers with experts of the model to be made.
        draft: whether it drafts for speculative decoding, where another runner can be asked for.

    Raises:
        RuntimeError: no layer can run on it.
    """
    runner = asked_for(draft=draft)
    if runner == "auto" or not layers:
        return "auto"
    found = problem(runner, layers, inherited=draft and runner == asked_for(draft=False))
    refuse([] if found is None else [found])
    _leave_to_layers(draft=draft)
    if get_parallel().tp_rank == 0:
        logger.info("mixprec: %s", _summary(runner, layers))
    return runner


def problem(runner: str, layers: Layers, *, inherited: bool = False) -> str | None:
    """Why ``layers`` cannot be served with ``--moe-runner-backend``, as a sentence; None if they can.

    ``inherited``: a draft has it only because the model has.
    """
    if not any(takes(formats, runner) for formats in layers.values()):
        if inherited:
            return None
        return (
            f"--moe-runner-backend {runner} is for layers whose experts are {BY_LAYER[runner]}, and this checkpoint "
            f"has none: {by_formats(layers)}; build one with such layers, or leave it out, and each gets its own"
        )
    if runner == "deep_gemm" and not configurer.ENABLE_JIT_DEEPGEMM:
        return (
            "--moe-runner-backend deep_gemm needs a GPU of compute capability 9.0 or 10, the package deep_gemm, and "
            "SGLANG_ENABLE_JIT_DEEPGEMM not to be 0; leave it out"
        )
    return None


def _summary(runner: str, layers: Layers) -> str:
    """Which layers run on ``runner``, for the log."""
    taking = [name for name, formats in layers.items() if takes(formats, runner)]
    others = {name: formats for name, formats in layers.items() if name not in taking}
    kept = f"; others keep their own: {by_formats(others)}" if others else ""
    return f"--moe-runner-backend {runner}: {some(compress(taking))}{kept}"


def by_formats(layers: Layers) -> str:
    """``model.layers.{0..3}.mlp.experts are gptq_int4``, for each combination of formats."""
    names: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for name, formats in layers.items():
        names[tuple(sorted({fmt.kind for fmt in formats}))].append(name)
    return some([f"{' and '.join(compress(group))} are {' and '.join(kinds)}" for kinds, group in names.items()], 6)


def _place() -> tuple[Any, str]:
    """The object and its attribute where SGLang's code finds the runner."""
    if hasattr(utils, "MOE_RUNNER_BACKEND"):  # 0.5.15
        return utils, "MOE_RUNNER_BACKEND"
    return get_flags().moe, "runner_backend"


def _leave_to_layers(*, draft: bool) -> None:
    """Has SGLang's code find ``auto`` while it makes and runs a model, or drafts."""
    owner, name = _place()
    setattr(owner, name, utils.MoeRunnerBackend.AUTO)
    if draft:  # SGLang puts this one in place while a draft runs
        setattr(owner, f"SPECULATIVE_{name}" if name.isupper() else f"speculative_{name}", utils.MoeRunnerBackend.AUTO)


@contextmanager
def found_as(runner: str) -> Iterator[None]:
    """Has SGLang's code find another runner while the context lasts."""
    owner, name = _place()
    before = getattr(owner, name)
    setattr(owner, name, utils.MoeRunnerBackend(runner))
    try:
        yield
    finally:
        setattr(owner, name, before)


def require_heeded(layer: Any, flag: str, prefix: str) -> None:
    """Raises ``ValueError`` where DeepGEMM's runner, which ``flag`` asks for, would ignore what a layer needs."""
    config = layer.moe_runner_config
    values = {field.name: (getattr(config, field.name), field.default) for field in fields(config)}
    # The attribute came after 0.5.15.
    values["with_bias"] = getattr(layer, "with_bias", "w13_weight_bias" in layer._parameters), False
    for name, (value, default) in values.items():
        if name not in _HEEDED and value != default:
            raise ValueError(
                f"{prefix}: {flag} does not go with {name}={value!r}, which SGLang's class gives to the experts of "
                "this model; leave it out"
            )


def give(runner: str, method: Any, layer: Any, prefix: str) -> None:
    """Has SGLang's ``method`` of one layer run its experts on ``runner``.

    Raises:
        ValueError: the runner would ignore what the layer needs. Or later, SGLang chose another one nevertheless.
    """
    require_heeded(layer, f"--moe-runner-backend {runner}", prefix)

    def within(call: Callable[..., Any]) -> Callable[..., Any]:
        def calling(*args: Any, **kwargs: Any) -> Any:
            with found_as(runner):
                return call(*args, **kwargs)

        return calling

    create = within(method.create_moe_runner)

    def create_moe_runner(*args: Any, **kwargs: Any) -> None:
        create(*args, **kwargs)
        chosen = method.runner.runner_backend.value
        if chosen != runner:
            raise ValueError(f"{prefix}: SGLang chose {chosen} for --moe-runner-backend {runner}; leave it out")

    method.create_moe_runner = create_moe_runner
    method.process_weights_after_loading = within(method.process_weights_after_loading)
