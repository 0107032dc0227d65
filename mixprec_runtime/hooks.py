"""Hooks in SGLang's hook registry, around the loading of models and in the scheduler.

For models of other quantization methods they only call SGLang's function, and count expert activity where that is on.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from sglang.srt.utils import is_cpu
from torch.nn import Module

from mixprec_build.checkpoint.declaration import METHOD
from mixprec_build.checkpoint.manifest import MANIFEST, Manifest, read_manifest
from mixprec_build.errors import MixprecError
from mixprec_build.families.facts import ModelFacts
from mixprec_build.formats.base import Format
from mixprec_build.storage.hub import HubRepo

from . import launch, memory
from .activity import hooks as activity
from .config import MixPrecConfig
from .cpu import delta_net, reference
from .loading import cache_scales, loader, names
from .loading.strict import load_strictly

__all__ = ["register"]


logger = logging.getLogger(__name__)


def register() -> None:
    """Registers hooks into the modules that this process has imported.

    SGLang loads plugins in a worker after the worker's own module. Resolving a hook imports its module, which would
    cost processes that load no model several seconds.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    if is_cpu():
        delta_net.provide_kernels()
    for target, hook, kind in (
        ("sglang.srt.model_loader.loader._initialize_model", initialize_model, HookType.AROUND),
        ("sglang.srt.model_loader.utils.get_model_architecture", get_model_architecture, HookType.AROUND),
        ("sglang.srt.managers.scheduler.Scheduler.__init__", ready, HookType.AFTER),
        ("sglang.srt.managers.scheduler.Scheduler.get_internal_state", add_to_internal_state, HookType.AFTER),
        (
            "sglang.srt.managers.scheduler.Scheduler.expert_distribution_handle",
            activity.handle_request,
            HookType.AROUND,
        ),
        *((f"{_MANAGER}.{name}", _answer_update(answer), HookType.AROUND) for name, answer in _UPDATES.items()),
    ):
        if any(name in sys.modules for name in (target.rpartition(".")[0], target.rsplit(".", 2)[0])):
            HookRegistry.register(target, hook, kind)


def initialize_model(
    original: Callable[..., Module], model_config: Any, load_config: Any, quant_config: Any = None
) -> Module:
    """Around ``_initialize_model``: reads the manifest before layers are made; has weights loaded once, and checked.

    Raises:
        RuntimeError: the checkpoint cannot be served with these arguments, or was changed after building.
    """
    if not isinstance(quant_config, MixPrecConfig):
        return _counted(original(model_config, load_config, quant_config), model_config)
    if model_config.is_draft_model:
        raise RuntimeError("mixprec serves no draft models; give --speculative-draft-model-path another checkpoint")
    folder, manifest, fetch = _checkpoint(model_config)
    family = ModelFacts.of_loaded(model_config.hf_config).family
    formats = quant_config.bind(manifest.modules, family)
    _check_declared(formats, manifest)
    launch.check_arguments()
    # With --download-dir, SGLang's loader fetches to a folder of its own.
    own_folder = fetch is not None and load_config.download_dir is not None
    share = None
    if not own_folder:
        share = loader.rank_share(folder, manifest, fetch, merged=load_config.load_format == "auto")

    def leave_to_sglang(reason: str) -> None:
        if fetch is None or manifest.rest is not None:  # SGLang fetches merged files from the hub itself
            loader.require_merged(folder, manifest, reason, on_hub=fetch is not None)

    if share is not None:
        quant_config.padded = share.padded
        launch.check_padded(share.padded)
    else:
        leave_to_sglang(f"this run is {loader.this_run()}")
    model = _counted(original(model_config, load_config, quant_config), model_config)
    if is_cpu():
        reference.replace_model_kernels()
    scales = quant_config.cache_scales
    cache_scales.make(model, quant_config, scales)
    load_weights: Callable[..., Any] = model.load_weights  # type: ignore[assignment]

    def load_once(weights: Any, *args: Any, **kwargs: Any) -> Any:
        model.load_weights = _refuse_update  # type: ignore[assignment]
        if share is not None:
            unfit = loader.mismatch(model, share)
            if unfit is None:
                return loader.load(model, share, lambda tensors: load_weights(tensors, *args, **kwargs))
            reason = f"{share.where} are not for this run ({unfit})"
            if share.padded:
                raise RuntimeError(
                    f"{reason}; at {loader.this_run()} zeros are added to them, so nothing else can be read"
                )
            leave_to_sglang(reason)
            logger.warning("mixprec: SGLang's loader, which is slower, reads the merged files: %s", reason)
        declared = manifest.tensors()
        return load_strictly(
            model,
            lambda tensors: load_weights(
                names.as_parameters(cache_scales.take(model, tensors, scales), formats), *args, **kwargs
            ),
            weights,
            declared,
        )

    model.load_weights = load_once  # type: ignore[assignment]
    return model


# After loading, weights are repacked for kernels, experts in several formats have lost their names in SGLang's model,
# and zeros may have been added: SGLang's loaders would update some parameters and corrupt others.
_NO_UPDATES = "weights of a checkpoint that mixprec built cannot be updated while they serve; start the server again"


def _refuse_update(*_: Any, **__: Any) -> None:
    raise RuntimeError(_NO_UPDATES)


def _answer_update(answer: str) -> Callable[..., Any]:
    """A hook that answers a request to update weights with a refusal; an exception would end the server."""

    def update(original: Callable[..., Any], manager: Any, *args: Any, **kwargs: Any) -> Any:
        if manager.tp_worker.model_runner.model_config.quantization != METHOD:
            return original(manager, *args, **kwargs)
        from sglang.srt.managers import io_struct

        return getattr(io_struct, answer)(success=False, message=_NO_UPDATES)

    return update


_MANAGER = "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"
_UPDATES = {
    "update_weights_from_disk": "UpdateWeightFromDiskReqOutput",
    "update_weights_from_distributed": "UpdateWeightsFromDistributedReqOutput",
    "update_weights_from_tensor": "UpdateWeightsFromTensorReqOutput",
    "update_weights_from_ipc": "UpdateWeightsFromIPCReqOutput",
}


def _counted(model: Module, model_config: Any) -> Module:
    """The model, with counters of expert activity where the environment asks for them."""
    if activity.enabled() and not model_config.is_draft_model:
        from sglang.srt.runtime_context import get_parallel

        launch.check_counted_experts()
        parallel = get_parallel()
        activity.install(model, first_rank=parallel.tp_rank == 0, gathered=parallel.attn_dp_size > 1)
    return model


def _checkpoint(model_config: Any) -> tuple[Path, Manifest, loader.Fetch | None]:
    """The checkpoint's folder, its manifest and, for one on the hub, a function that fetches files to the folder."""
    path, fetch = Path(model_config.model_path), None
    try:
        if not path.is_dir():
            repository = HubRepo.open(model_config.model_path, model_config.revision)
            path, fetch = repository.fetch([MANIFEST])[MANIFEST].parent, repository.fetch
        return path, read_manifest(path), fetch
    except MixprecError as error:
        raise RuntimeError(f"{error} (SGLang is given the whole folder that `mixprec build` writes)") from error


def _check_declared(declared: Mapping[str, Format], manifest: Manifest) -> None:
    """Raises ``RuntimeError`` where formats, or their parameters, differ between config.json and the manifest."""
    for name, module in manifest.modules.items():
        now, then = declared[name], manifest.formats[module.format]
        if now != then:
            raise RuntimeError(
                f"config.json declares {name} as {now.kind} {now.to_json()}, the manifest as {then.to_json()}: one of "
                "them was changed after building; build the checkpoint again"
            )


def get_model_architecture(original: Callable[..., Any], model_config: Any) -> Any:
    """Around ``get_model_architecture``: has Mixtral made with fused experts.

    For methods that it does not know, SGLang takes ``QuantMixtralForCausalLM`` (model_loader/utils.py:214), whose
    experts are separate linears; for ``fp8`` it does not.
    """
    if model_config.quantization != METHOD:
        return original(model_config)
    model_config.quantization = "fp8"
    try:
        return original(model_config)
    finally:
        model_config.quantization = METHOD


def ready(_: Any, scheduler: Any, *args: Any, **kwargs: Any) -> None:
    """After ``Scheduler.__init__``: begins to count activity, checks where tensors are, and logs their memory."""
    runner = scheduler.tp_worker.model_runner
    activity.begin(runner)
    if runner.model_config.quantization == METHOD:
        memory.check_placement(runner.model, torch.device(runner.device))
        memory.serve(runner.model)
        if is_cpu():
            reference.announce(logger)


def add_to_internal_state(output: Any, *_: Any) -> None:
    """After ``Scheduler.get_internal_state``: adds statistics to ``/server_info`` and ``Engine.get_server_info()``."""
    stats = memory.get_mixed_precision_memory_stats()
    if stats:
        output.internal_state[METHOD] = stats
    counted = activity.state()
    if counted:
        output.internal_state[activity.STATE] = counted
