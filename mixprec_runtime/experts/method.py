"""A MoE layer whose experts have several formats.

The experts of each format are a group: a FusedMoE of its own, whose weights SGLang's method for the format creates,
loads, repacks and runs. A group numbers its experts from 0; for experts of other groups it gets the id -1, with which
SGLang marks experts of other expert-parallel ranks, so that every kernel skips them. Where :mod:`.chains` supports the
kernels of all groups, it computes the layer; elsewhere each group's method runs on all tokens, and outputs are summed.

An expert whose gate and up have another format than its down is in two groups, one for each projection. Such groups
have no output of their own, so only :mod:`.chains` (on a CPU the reference) can compute them.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from typing import Any
from weakref import WeakValueDictionary

import torch
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.quantization.base_config import FusedMoEMethodBase
from sglang.srt.utils import is_cpu
from torch.nn import ModuleList, Parameter

from mixprec_build.families.expert_groups import GroupMembers, expert_groups
from mixprec_build.formats import registry
from mixprec_build.formats.base import Format

from ..cpu import reference
from ..formats.marlin import in_float32
from ..native import NativeFormat
from . import chains, routing
from .group import ExpertGroup, keep_one_projection, only_rank

__all__ = ["MixedExpertsMethod"]


_PASSED_ON = frozenset({
    "num_experts", "num_local_experts", "hidden_size", "intermediate_size_per_partition", "layer_id", "top_k",
    "num_fused_shared_experts", "params_dtype", "routing_method_type", "runner_backend", "activation", "is_gated",
    "apply_router_weight_on_input", "inplace", "no_combine", "routed_scaling_factor", "gemm1_alpha", "gemm1_beta",
    "gemm1_clamp_limit", "gate_up_interleaved", "swiglu_limit", "layer",
})  # fmt: skip
"""Fields of SGLang's ``MoeRunnerConfig`` that groups get, that are refused here, or that change no result."""
# By name, which is how the compiled operation refers to a layer.
_layers: WeakValueDictionary[str, FusedMoE] = WeakValueDictionary()


class MixedExpertsMethod(FusedMoEMethodBase):
    """The method of a FusedMoE layer whose experts have several formats.

    Args:
        formats: routed expert's number in the checkpoint -> the formats of its gate and up, and of its down.
        native: SGLang's configs of these formats.
        prefix: the layer's name.
    """

    def __init__(
        self, formats: Mapping[int, tuple[Format, Format]], native: Mapping[Format, NativeFormat], prefix: str
    ):
        self._formats, self._native, self._prefix = formats, native, prefix

    def create_weights(
        self,
        layer: FusedMoE,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        with_bias: bool = False,
        **_: Any,
    ) -> None:
        local_ids = {e: layer._map_global_expert_id_to_local_expert_id(e) for e in self._formats}
        groups = expert_groups(self._formats, [expert for expert, local in local_ids.items() if local >= 0])
        if any(ups != downs for ups, downs in groups):
            self._refuse_split_experts(layer, groups)
        self._refuse(layer)
        # (projection, expert) -> its group, and its number within the group.
        place: dict[tuple[str, int], tuple[int, int]] = {}
        # A row for each group that has the projection: local id -> number in the group, or -1. Indexing with the id -1
        # finds the last column.
        numbers: dict[str, list[list[int]]] = {"w13": [], "w2": []}
        layer.groups = ModuleList()
        for g, (ups, downs) in enumerate(groups):
            for weight, members in (("w13", ups), ("w2", downs)):
                row = [-1] * (num_experts + 1)
                for i, expert in enumerate(members):
                    place[weight, expert] = g, i
                    row[local_ids[expert]] = i
                numbers[weight] += [row] if members else []
            fmt = self._formats[ups[0]][0] if ups else self._formats[downs[0]][1]
            size = hidden_size, intermediate_size_per_partition
            made = self._group(layer, fmt, len(ups or downs), size, params_dtype, with_bias=with_bias)
            if ups != downs:
                keep_one_projection(made, "w13" if ups else "w2")
            layer.groups.append(made)
        device = next(layer.parameters()).device
        for name, rows in (("up_numbers", numbers["w13"]), ("down_numbers", numbers["w2"])):
            layer.register_buffer(name, torch.tensor(rows, dtype=torch.int32, device=device), persistent=False)
        layer.chains = None  # found when the layer first runs
        _layers[self._prefix] = layer
        self._register_placeholders(layer, place)

    def _refuse_split_experts(self, layer: FusedMoE, groups: list[GroupMembers]) -> None:
        """Raises ``ValueError`` where :mod:`.chains` cannot compute experts in two groups."""
        config, unfit = layer.moe_runner_config, ""
        whole = {fmt.kind for both in self._formats.values() if len({*both}) > 1 for fmt in both if fmt.experts_whole}
        if whole:
            unfit = f"cannot be in {', '.join(sorted(whole))}, which SGLang has no kernels for one projection of"
        if not chains.activates(config):
            gate = "" if config.is_gated else " without a gate"
            unfit = f"do not go with its activation ({config.activation}{gate})"
        if max(sum(map(bool, members)) for members in zip(*groups, strict=True)) > routing.MOST_GROUPS:
            unfit = f"cannot be in more than {routing.MOST_GROUPS} formats"
        if unfit:
            raise ValueError(
                f"{self._prefix}: experts whose gate and up are in another format than their down {unfit}; build the "
                "checkpoint with the three in one format"
            )

    def _refuse(self, layer: FusedMoE) -> None:
        config = layer.moe_runner_config
        if layer.num_fused_shared_experts:
            raise ValueError(
                f"{self._prefix}: experts in several formats cannot include the shared ones; start SGLang with "
                "--disable-shared-experts-fusion"
            )
        if config.no_combine:
            raise ValueError(f"{self._prefix}: experts in several formats do not go with no_combine in this version")
        # What a later SGLang adds to its runners' config would be lost on the way to the groups.
        for field in fields(config):
            if field.name not in _PASSED_ON and getattr(config, field.name) != field.default:
                raise ValueError(
                    f"{self._prefix}: experts in several formats do not go with {field.name}="
                    f"{getattr(config, field.name)!r}, which SGLang's runners get for this model"
                )

    def _group(
        self,
        layer: FusedMoE,
        fmt: Format,
        experts: int,
        size: tuple[int, int],
        dtype: torch.dtype,
        *,
        with_bias: bool,
    ) -> ExpertGroup:
        """A group of ``experts``, whose ``size`` is their hidden size and their columns on this rank."""
        config, (hidden, intermediate) = layer.moe_runner_config, size
        beta = {"gemm1_beta": config.gemm1_beta} if hasattr(config, "gemm1_beta") else {}  # since 0.5.18
        with only_rank():
            group = ExpertGroup(
                num_experts=experts,
                hidden_size=hidden,
                intermediate_size=intermediate * layer.moe_tp_size,
                layer_id=layer.layer_id,
                top_k=layer.top_k,
                params_dtype=dtype,
                quant_config=self._native[fmt],
                prefix=f"{self._prefix}.{fmt.kind}",
                activation=config.activation,
                apply_router_weight_on_input=config.apply_router_weight_on_input,
                # In place, a runner would overwrite the next group's input.
                inplace=False,
                routed_scaling_factor=config.routed_scaling_factor,
                gemm1_alpha=config.gemm1_alpha,
                gemm1_clamp_limit=config.gemm1_clamp_limit,
                is_gated=config.is_gated,
                with_bias=with_bias,
                gate_up_interleaved=config.gate_up_interleaved,
                swiglu_limit=config.swiglu_limit,
                **beta,
            )
        # The Triton runner skips ids of -1 only where the layer has more experts than the rank.
        group.moe_runner_config.num_experts = experts + 1
        if hasattr(group.quant_method, "enter_torch_compile"):
            # SGLang would replace the kernels by torch code that takes -1 for the last expert
            # (moe/fused_moe_native.py). The layer is one custom operation, so nothing needs replacing.
            group.quant_method.enter_torch_compile = lambda num_tokens: None
        return group

    def _register_placeholders(self, layer: FusedMoE, place: Mapping[tuple[str, int], tuple[int, int]]) -> None:
        """Registers empty parameters, whose loaders pass each tensor on to the expert's group.

        Models look tensors up among the layer's parameters. Every leaf of every format has one: Mixtral
        (models/mixtral.py:448) also looks up experts of other ranks, whose formats this rank may lack.
        """
        leaves = {leaf for fmt in registry.FORMATS for leaf in fmt.leaves} - {"", "bias"}
        names = {f"{weight}_{leaf}" for weight in ("w13", "w2") for leaf in leaves}
        for name in sorted(names.union(*(dict(group.named_parameters(recurse=False)) for group in layer.groups))):
            placeholder = Parameter(torch.empty(0), requires_grad=False)
            placeholder.weight_loader = self._placeholder_loader(layer, name, place)  # type: ignore[attr-defined]
            layer.register_parameter(name, placeholder)

    def _placeholder_loader(self, layer: FusedMoE, name: str, place: Mapping[tuple[str, int], tuple[int, int]]) -> Any:
        weight = name.partition("_")[0]

        def load(_: Parameter, loaded_weight: torch.Tensor, weight_name: str, shard_id: str, expert_id: int) -> None:
            if (weight, expert_id) not in place:  # another rank's
                return
            number, index = place[weight, expert_id]
            group = layer.groups[number]
            parameter = group._parameters.get(name)
            if parameter is None:
                declared = self._formats[expert_id][weight == "w2"].kind
                raise ValueError(
                    f"{self._prefix}.{expert_id} is declared {declared}, and the checkpoint has a tensor for {name} of "
                    "it, which that format does not have"
                )
            parameter.weight_loader(parameter, loaded_weight, weight_name, shard_id=shard_id, expert_id=index)

        return load

    def create_moe_runner(self, layer: Any, moe_runner_config: Any) -> None:
        self.moe_runner_config = moe_runner_config

    def process_weights_after_loading(self, layer: Any) -> None:
        """Removes the placeholders. SGLang processes the groups too, since they are modules with a method."""
        for name in list(layer._parameters):
            del layer._parameters[name]

    def apply(self, layer: Any, dispatch_output: Any) -> Any:
        from sglang.srt.layers.moe.token_dispatcher import StandardCombineInput

        hidden_states, topk = dispatch_output.hidden_states, dispatch_output.topk_output
        if torch.compiler.is_compiling():
            out = _run_by_name(hidden_states, topk.topk_weights, topk.topk_ids, self._prefix)
        else:
            out = self.run(layer, dispatch_output)
        return StandardCombineInput(hidden_states=out)

    def run(self, layer: Any, dispatch_output: Any) -> torch.Tensor:
        """The layer's output ``[tokens, hidden]``."""
        hidden_states, topk = dispatch_output.hidden_states, in_float32(dispatch_output.topk_output)
        if not len(hidden_states):  # some of SGLang's runners fail without rows
            return torch.empty_like(hidden_states)
        if not len(layer.groups):
            return torch.zeros_like(hidden_states)
        if not is_cpu():
            if layer.chains is None:
                layer.chains = chains.of(layer, dispatch_output)
            if layer.chains.ups:
                return chains.run(layer, hidden_states, topk)
        if any(group.projection for group in layer.groups):
            if is_cpu():
                return reference.split_experts(layer, dispatch_output)
            raise RuntimeError(
                f"{self._prefix}: SGLang runs these experts on kernels that cannot multiply by gate and up alone; "
                "build the checkpoint with gate, up and down of an expert in one format"
            )
        ids = routing.numbers_in_groups(topk.topk_ids, layer.up_numbers)
        outputs = []
        with _outputs_apart():
            for group, numbers in zip(layer.groups, ids, strict=True):
                mine = dispatch_output._replace(topk_output=topk._replace(topk_ids=numbers))
                out = group.quant_method.apply(group, mine).hidden_states
                outputs.append(out[:, : hidden_states.shape[1]])  # some methods have padded weights
        return routing.add_up(outputs)


def _outputs_apart() -> AbstractContextManager[None]:
    """Has Marlin's runners make memory for their outputs while the context lasts.

    SGLang's class of Kimi-K3 gives them that of the layer's output, which all groups would write to.
    """
    try:
        from sglang.srt.layers.zero_copy_context import set_moe_output
    except ModuleNotFoundError:  # before 0.5.17
        return nullcontext()
    apart: AbstractContextManager[None] = set_moe_output(None)
    return apart


@torch.library.custom_op("mixprec::mixed_experts", mutates_args=())
def _run_by_name(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, name: str) -> torch.Tensor:
    """A layer as one operation, since ``torch.compile`` can trace neither the choice of kernels nor side streams."""
    from sglang.srt.layers.moe.token_dispatcher.standard import StandardDispatchOutput
    from sglang.srt.layers.moe.topk import StandardTopKOutput

    layer = _layers[name]
    topk = StandardTopKOutput(topk_weights=weights, topk_ids=ids, router_logits=weights)
    method: MixedExpertsMethod = layer.quant_method
    return method.run(layer, StandardDispatchOutput(x, None, topk))


@_run_by_name.register_fake
def _(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, name: str) -> torch.Tensor:
    return torch.empty_like(x)
