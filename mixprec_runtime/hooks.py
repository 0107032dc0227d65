"""Hooks in SGLang's hook registry, around the loading of models and in the scheduler.

For models of other quantization methods they only call SGLang's function, and count expert activity where that is on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from functools import partial
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
from mixprec_build.text import some
from mixprec_build.versions import RULES, between, untested

from . import drafts, launch, memory
from .activity import hooks as activity
from .canary import check as canary
from .config import MixPrecConfig
from .contact import names as names_of_sglang
from .contact.check import differs, installed
from .contact.names import SESSIONS_SINCE
from .contact.start import hooked_here, require_all
from .cpu import delta_net, reference
from .experts import deepep, moves, runner
from .formats.registry import served
from .formats.repair import never_called
from .loading import ahead, cache_scales, heads, loader, names, output_groups
from .loading.strict import draft_of, load_strictly

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
    for target, hook, kind in _hooks():
        if hooked_here(target):
            HookRegistry.register(target, hook, HookType[kind])


def _hooks() -> Iterator[tuple[str, Callable[..., Any], str]]:
    """Yields SGLang's functions, by their dotted paths, the hooks on them, and when each is called."""
    yield "sglang.srt.model_loader.loader._initialize_model", initialize_model, "AROUND"
    yield "sglang.srt.model_loader.utils.get_model_architecture", get_model_architecture, "AROUND"
    yield "sglang.srt.configs.model_config.ModelConfig._verify_quantization", detect_for_draft, "BEFORE"
    yield "sglang.srt.managers.scheduler.Scheduler.__init__", ready, "AFTER"
    yield "sglang.srt.managers.scheduler.Scheduler.get_internal_state", add_to_internal_state, "AFTER"
    yield "sglang.srt.managers.scheduler.Scheduler.expert_distribution_handle", activity.handle_request, "AROUND"
    yield "sglang.srt.eplb.expert_location_updater.update_expert_weights_single_layer", moves.move_layer, "AROUND"
    for name, update in {**_UPDATES, **(_SESSIONS if between(SESSIONS_SINCE, "", installed()) else {})}.items():
        yield f"{_MANAGER}.{name}", update, "AROUND"


def _check_contact(quant_config: MixPrecConfig, facts: ModelFacts) -> None:
    """Checks that SGLang has all that this checkpoint needs, and that the hooks are in place.

    Raises:
        ContactError: something is missing; the message names it.
    """
    from sglang.srt.runtime_context import get_parallel

    uses = {names_of_sglang.PLUGIN, names_of_sglang.ANY, names_of_sglang.SERVER}
    uses |= {fmt.name for fmt in quant_config.native}
    if quant_config.mixed_layers:
        uses |= {names_of_sglang.GROUPS, names_of_sglang.CHAINS, names_of_sglang.KERNELS}
    if output_groups.are_in(facts.family):
        uses.add(names_of_sglang.DEEPSEEK_V4)
    if deepep.in_use():
        uses.add(names_of_sglang.DEEPEP)
    if activity.enabled():
        uses.add(names_of_sglang.COUNTING)
    if canary.enabled():
        uses.add(names_of_sglang.CANARY)
    if is_cpu():
        uses.add(names_of_sglang.CPU)
    require_all(uses, launch.server_args(), _hooks())
    warning = untested(installed())
    if warning is not None and get_parallel().tp_rank == 0:
        logger.warning("mixprec: %s", warning)


def _unmoved(quant_config: MixPrecConfig) -> dict[tuple[str, str], list[str]]:
    """Format and why experts in it cannot move -> the layers of such experts."""
    found: dict[tuple[str, str], list[str]] = {}
    for name, formats in quant_config.expert_layers.items():
        for fmt in formats:
            why = served(fmt).unmovable(fmt)
            if why:
                found.setdefault((fmt.kind, why), []).append(name)
    return found


def _check_release(manifest: Manifest) -> None:
    """Raises ``RuntimeError`` where this release of SGLang lacks what the checkpoint was planned to use."""
    version = installed()
    lost = [
        f"{RULES[name].text}, for {some(patterns)}"
        for name, patterns in manifest.needs.items()
        if name in RULES and not RULES[name].holds_in(version)
    ]
    if lost:
        raise RuntimeError(
            f"this checkpoint was planned for SGLang {manifest.planned_for}, and SGLang {version} has no more "
            f"{'; nor '.join(lost)}. Serve it with that release, or build it again with --sglang {version}"
        )


def initialize_model(
    original: Callable[..., Module], model_config: Any, load_config: Any, quant_config: Any = None
) -> Module:
    """Around ``_initialize_model``: reads the manifest before layers are made; has weights loaded once, and checked.

    Raises:
        RuntimeError: the checkpoint cannot be served with these arguments, or was changed after building.
    """
    if not isinstance(quant_config, MixPrecConfig):
        return _counted(original(model_config, load_config, quant_config), model_config)
    # Reading the manifest and making layers takes seconds, in which the disk would have nothing to do.
    with ahead.reading(ahead.files_of(Path(model_config.model_path), *loader.place())):
        return _initialize_mixed(original, model_config, load_config, quant_config)


def _initialize_mixed(
    original: Callable[..., Module], model_config: Any, load_config: Any, quant_config: MixPrecConfig
) -> Module:
    """:func:`initialize_model` of a checkpoint that mixprec built."""
    folder, manifest, fetch = _checkpoint(model_config)
    facts = ModelFacts.of_loaded(model_config.hf_config)
    launch.drop_chosen_runner(facts.family.architectures)
    launch.check_arguments()
    draft = None
    if model_config.is_draft_model:
        draft = drafts.of_model(model_config, facts, manifest.modules)
    else:
        drafts.check_own(facts, manifest.modules)
    formats = quant_config.bind(manifest.modules, facts.family, draft)
    _check_declared(formats, manifest)
    _check_contact(quant_config, facts)
    _check_release(manifest)
    output_groups.check(facts)
    launch.check_mixed_experts(quant_config.mixed_layers)
    launch.check_moved_experts(_unmoved(quant_config))
    asked = runner.asked_for(draft=model_config.is_draft_model)
    deepep.check(quant_config.expert_layers, asked)
    quant_config.runner = runner.settle(quant_config.expert_layers, draft=model_config.is_draft_model)
    if canary.enabled() and not is_cpu():
        if fetch is not None:
            raise RuntimeError(f"{canary.SWITCH} needs a checkpoint on this machine: download it first")
        canary.require(folder, model_config.dtype)
    can_leave = partial(loader.require_class, facts)
    if fetch is not None and load_config.download_dir is not None:
        can_leave("--download-dir has SGLang's loader fetch files to a folder of its own; leave it out")
        share = None
    else:
        share = loader.rank_share(
            folder,
            manifest,
            fetch,
            merged=load_config.load_format == "auto",
            draft=model_config.is_draft_model,
            can_leave=can_leave,
        )
    if share is not None and draft is not None:
        share = share.of_draft(draft)

    def leave_to_sglang(reason: str) -> None:
        if fetch is None or manifest.rest is not None:  # SGLang fetches merged files from the hub itself
            loader.require_merged(folder, manifest, reason, on_hub=fetch is not None)

    if share is not None:
        quant_config.padded = share.padded
        launch.check_padded(share.padded)
    else:
        leave_to_sglang(f"this run is {loader.this_run()}")
    output_groups.dequantize(facts.family)
    with deepep.made_by_format(quant_config):
        model = _counted(original(model_config, load_config, quant_config), model_config)
    if model_config.is_draft_model:
        memory.add_draft(model)
    else:
        moves.prepare(model)
    if is_cpu():
        reference.replace_model_kernels(model)
    names.keep_names(model)
    heads.drop_unstored_biases(model, manifest.tensors())
    heads.add_left_out_biases(model)
    scales = quant_config.cache_scales
    cache_scales.make(model, quant_config, scales)
    load_weights = output_groups.load_apart(facts.family, model.load_weights)  # type: ignore[arg-type]

    def load_once(weights: Any, *args: Any, **kwargs: Any) -> Any:
        model.load_weights = _refuse_update  # type: ignore[assignment]
        if share is not None:
            unfit = loader.mismatch(model, share)
            if unfit is None:
                memory.name_files(model, share.where)
                return loader.load(model, share, lambda tensors: load_weights(tensors, *args, **kwargs))
            reason = f"{share.where} are not for this run ({unfit})"
            if share.padded:
                raise RuntimeError(
                    f"{reason}; at {loader.this_run()} zeros are added to them, so nothing else can be read"
                )
            can_leave(reason)
            leave_to_sglang(reason)
            logger.warning("mixprec: SGLang's loader, which is slower, reads the merged files: %s", reason)
        declared = manifest.tensors()
        renamed = {name: fmt for name, fmt in formats.items() if not facts.family.is_left_to_class(name)}
        memory.name_files(model, f"the merged files in {folder}, by SGLang's loader")
        return load_strictly(
            model,
            lambda tensors: load_weights(
                names.as_parameters(cache_scales.take(model, tensors, scales), renamed), *args, **kwargs
            ),
            weights,
            declared,
            names.converter(formats),
        )

    model.load_weights = load_once  # type: ignore[assignment]
    return model


# After loading, weights are repacked for kernels, experts in several formats have lost their names in SGLang's model,
# and zeros may have been added: SGLang's loaders would update some parameters and corrupt others.
_NO_UPDATES = (
    "weights of a checkpoint that mixprec built cannot be updated while they serve, since kernels have repacked them; "
    "start the server again with the other checkpoint"
)


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
    "update_weights_from_disk": _answer_update("UpdateWeightFromDiskReqOutput"),
    "update_weights_from_distributed": _answer_update("UpdateWeightsFromDistributedReqOutput"),
    "update_weights_from_tensor": _answer_update("UpdateWeightsFromTensorReqOutput"),
    "update_weights_from_ipc": _answer_update("UpdateWeightsFromIPCReqOutput"),
}
# The end of a session processes all weights once more, also where none was updated: repacked ones would be repacked.
_SESSIONS = {
    "begin_weight_update": _answer_update("BeginWeightUpdateReqOutput"),
    "end_weight_update": _answer_update("EndWeightUpdateReqOutput"),
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


def detect_for_draft(model_config: Any) -> None:
    """Before ``ModelConfig._verify_quantization``: has SGLang read the method of a draft from its ``config.json``.

    SGLang passes ``--quantization mixprec`` on to the draft, and believes it where ``config.json`` names no method.
    """
    if model_config.is_draft_model and model_config.quantization == METHOD:
        model_config.quantization = None


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
    worker = scheduler.tp_worker.model_runner
    activity.begin(worker)
    models = [worker.model] if worker.model_config.quantization == METHOD else []
    if models and launch.moves_experts():
        moves.take_present(worker.model)
    for draft in memory.drafts():
        if draft_of(draft) is not None:
            drafts.check_shared(worker.model, draft)
        models.append(draft)
    for model in models:
        _check_repairs(model)
        memory.check_placement(model, torch.device(worker.device))
    if models:
        memory.serve(*models)
        if is_cpu():
            reference.announce(logger)


def _check_repairs(model: Module) -> None:
    """Raises ``RuntimeError`` where SGLang did not call what a repair is around."""
    # On a CPU, the reference replaces what comes after creating weights.
    replaced = ("process_weights_after_loading", "create_moe_runner") if is_cpu() else ()
    missed = never_called(model.modules(), without=("apply", *replaced))
    if missed:
        raise RuntimeError(differs(missed))


def add_to_internal_state(output: Any, *_: Any) -> None:
    """After ``Scheduler.get_internal_state``: adds statistics to ``/server_info`` and ``Engine.get_server_info()``."""
    stats = memory.get_mixed_precision_memory_stats()
    if stats:
        output.internal_state[METHOD] = stats
    counted = activity.state()
    if counted:
        output.internal_state[activity.STATE] = counted
