"""Where stock SGLang is wrong about a format it has, mended on the instance of its method.

Each mend is inert where a later SGLang does the right thing by itself. Line numbers are those of SGLang 0.5.17.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from sglang.srt.layers.moe import get_moe_runner_backend
from sglang.srt.layers.quantization.base_config import QuantizeMethodBase
from sglang.srt.layers.quantization.gptq import GPTQConfig
from sglang.srt.layers.quantization.marlin_utils import check_marlin_supports_shape, check_moe_marlin_supports_layer
from sglang.srt.utils import is_cpu
from torch.nn import Parameter

from mixprec_build.formats.awq import Awq
from mixprec_build.formats.base import Format
from mixprec_build.formats.fp8 import Fp8
from mixprec_build.formats.gptq import Gptq
from mixprec_build.formats.packed import Packed
from mixprec_build.formats.scaled import Scaled

from .. import launch

__all__ = ["check_experts", "mend_experts", "mend_linear"]


_SOME_MAP = torch.empty(0, dtype=torch.int32)
_ADVICE = "Serve with fewer tensor-parallel ranks, or build the checkpoint with another format for this module."


def mend_linear(method: QuantizeMethodBase, fmt: Format, prefix: str) -> None:
    """Mends the method of one linear layer."""
    if isinstance(fmt, Scaled) and fmt.block is not None:
        _check_block_partition(method, fmt.block)
        _answer_to_weight_scale(method, ("",))
    if isinstance(fmt, Gptq):
        _fall_back_to_exllama(method, fmt)
    if isinstance(fmt, Awq | Packed):
        _mind_marlin_shapes(method, fmt.group_size)
    if isinstance(fmt, Awq) or (isinstance(fmt, Packed) and not fmt.sym):
        _mind_whole_words(method)
    if isinstance(fmt, Fp8) and fmt.activations == "none":
        _mind_marlin_shapes(method, -1)
    if isinstance(fmt, Packed):
        _let_go_of_what_was_packed(method)
    _name_errors(method, fmt, prefix)


def check_experts(layer: Any, fmt: Format, prefix: str) -> None:
    """What a FusedMoE layer's kernels need, before SGLang chooses a method for it. Where shapes do not fit Marlin, GPTQ
    goes wrong and AWQ falls back to other kernels (quantization/awq/awq.py:352), which know no ids of -1."""
    if isinstance(fmt, Fp8) and torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9):
        raise ValueError(
            f"{prefix} ({fmt.kind}): Triton multiplies experts in FP8 from compute capability 8.9 on; build the "
            "checkpoint with another format for them"
        )
    if isinstance(fmt, Gptq | Awq | Packed) and not check_moe_marlin_supports_layer(layer, fmt.group_size):
        raise ValueError(
            f"{prefix} ({fmt.kind}): Marlin has no kernel for experts of hidden size {layer.hidden_size} and "
            f"{layer.intermediate_size_per_partition} intermediate columns a rank in groups of {fmt.group_size}. "
            f"{_ADVICE}"
        )


def mend_experts(method: QuantizeMethodBase, fmt: Format, prefix: str) -> None:
    """Mends the method of one FusedMoE layer."""
    if isinstance(fmt, Gptq):
        _mend_gptq_experts(method, fmt)
    if isinstance(fmt, Awq):
        _mend_awq_experts(method, fmt)
    if isinstance(fmt, Packed):
        _mend_packed_experts(method, fmt)
    if isinstance(fmt, Scaled) and fmt.block is not None:
        _answer_to_weight_scale(method, ("w13_", "w2_"))
    if isinstance(fmt, Fp8) and fmt.granularity == "tensor" and fmt.activations == "dynamic":
        _mend_tensor_scaled_experts(method)
    _name_errors(method, fmt, prefix)


def _name_errors(method: QuantizeMethodBase, fmt: Format, prefix: str) -> None:
    """SGLang's complaints about shapes do not say which layer they are about, nor what to do."""
    create = method.create_weights

    def create_weights(layer: Any, *args: Any, **kwargs: Any) -> None:
        try:
            create(layer, *args, **kwargs)
        except (ValueError, AssertionError) as error:
            raise ValueError(f"{prefix} ({fmt.kind}): {error} {_ADVICE}") from error

    method.create_weights = create_weights


def _answer_to_weight_scale(method: QuantizeMethodBase, prefixes: tuple[str, ...]) -> None:
    """Llama renames ``weight_scale_inv`` to ``weight_scale`` while loading (models/llama.py:679 and
    model_loader/auto_loader.py:192), a parameter that block FP8 and Int8 do not have, and drops it with a warning;
    and compressed-tensors stores it under that name.

    Until the weights are loaded, an empty parameter of that name passes on what it is given.
    """
    create, process = method.create_weights, method.process_weights_after_loading

    def create_weights(layer: Any, *args: Any, **kwargs: Any) -> None:
        create(layer, *args, **kwargs)
        for prefix in prefixes:
            alias = Parameter(torch.empty(0), requires_grad=False)
            alias.weight_loader = _passing_on(layer, f"{prefix}weight_scale_inv")  # type: ignore[attr-defined]
            layer.register_parameter(f"{prefix}weight_scale", alias)

    def process_weights_after_loading(layer: Any) -> None:
        for prefix in prefixes:
            layer._parameters.pop(f"{prefix}weight_scale", None)
        process(layer)

    method.create_weights = create_weights
    method.process_weights_after_loading = process_weights_after_loading


def _passing_on(layer: Any, name: str) -> Callable[..., None]:
    def load(_: Parameter, loaded_weight: torch.Tensor, *shard: Any, **expert: Any) -> None:
        parameter = layer._parameters[name]
        parameter.weight_loader(parameter, loaded_weight, *shard, **expert)

    return load


def _check_block_partition(method: QuantizeMethodBase, block: tuple[int, int]) -> None:
    """SGLang compares with the global tensor-parallel size (quantization/fp8.py:478), which is not this layer's
    under data-parallel attention, and then cuts through a block without a word."""

    def check(layer: Any, outputs: list[int], inputs: int, whole: tuple[int, int]) -> None:
        for size, all_of_it, step in zip((sum(outputs), inputs), whole, block, strict=True):
            if size < all_of_it and size % step:
                raise ValueError(f"a rank would hold {size} of {all_of_it}, no multiple of its block of {step}.")

    _check_first(method, check)


def _fall_back_to_exllama(method: QuantizeMethodBase, fmt: Gptq) -> None:
    """``check_marlin_supports_shape`` is called, and its answer dropped (gpu/quantization/gptq_kernels.py:139). Where
    it is no, SGLang's ``GPTQConfig`` has a kernel for FP16 activations, up to some version before 0.5.23."""

    def check(layer: Any, outputs: list[int], inputs: int, whole: tuple[int, int]) -> None:
        fits, why = check_marlin_supports_shape(sum(outputs), inputs, whole[1], fmt.group_size)
        if fits:
            return
        if not fmt.fits_untiled(outputs, inputs):
            raise ValueError(str(why))
        if layer.params_dtype != torch.half and not is_cpu():
            raise ValueError(f"{why} SGLang's other GPTQ kernel does, in FP16 only: give --dtype half.")
        other = GPTQConfig(fmt.bits, fmt.group_size, fmt.desc_act, False, {})
        try:
            layer.scheme = other.get_linear_scheme(layer)
        except RuntimeError as error:
            raise ValueError(f"{why} This SGLang has no other: {error}") from error

    _check_first(method, check)


def _mind_marlin_shapes(method: QuantizeMethodBase, group_size: int) -> None:
    """AWQ falls back to a kernel for FP16 activations (quantization/awq/awq.py:337), whatever the model's dtype."""

    def check(layer: Any, outputs: list[int], inputs: int, whole: tuple[int, int]) -> None:
        fits, why = check_marlin_supports_shape(sum(outputs), inputs, whole[1], group_size)
        if not fits:
            raise ValueError(str(why))

    _check_first(method, check)


def _let_go_of_what_was_packed(method: QuantizeMethodBase) -> None:
    """DeepSeek's dense MLPs call ``weight_packed`` ``weight``, too (models/deepseek_v2.py:290), which would keep it in
    memory beside what Marlin repacks it into."""
    process = method.process_weights_after_loading

    def process_weights_after_loading(layer: Any) -> None:
        parameters = layer._parameters
        alias = "weight" in parameters and parameters["weight"] is parameters.get("weight_packed")
        process(layer)
        if alias:
            layer.weight = layer.weight_packed

    method.process_weights_after_loading = process_weights_after_loading


def _mind_whole_words(method: QuantizeMethodBase) -> None:
    """Outputs that are packed in words of eight are cut by words, and what is left over is dropped without a word."""

    def check(layer: Any, outputs: list[int], inputs: int, whole: tuple[int, int]) -> None:
        for size in outputs:
            if size % 8:
                raise ValueError(f"a rank would hold {size} outputs of a part, no multiple of 8.")

    _check_first(method, check)


def _check_first(method: QuantizeMethodBase, check: Callable[[Any, list[int], int, tuple[int, int]], None]) -> None:
    """Before a linear's weights are made, ``check`` is shown the layer, the outputs of each part and the inputs on this
    rank, and ``(N, K)`` of the whole."""
    create = method.create_weights

    # ReplicatedLinear gives the sizes by position, the others by name.
    def create_weights(
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        check(layer, output_partition_sizes, input_size_per_partition, (output_size, input_size))
        create(layer, input_size_per_partition, output_partition_sizes, input_size, output_size, *args, **kwargs)

    method.create_weights = create_weights


def _mend_gptq_experts(method: QuantizeMethodBase, fmt: Gptq) -> None:
    """GPTQ experts on Marlin (quantization/gptq/schemes/gptq_moe.py, gpu/quantization/gptq_kernels.py).

    - Their scales are made FP16 whatever the model's dtype (gptq_moe.py:217), which the kernel refuses to multiply
      with BF16 activations: made again in the model's dtype, one rounding at load.
    - Without desc_act, ``w2_scales`` gets the rows of all ranks (gptq_moe.py:184) instead of this rank's, and is
      then half filled or fails to load.
    - The scales of w13 are permuted as if its inputs were as many as this rank's intermediate size
      (gptq_kernels.py:338), which is wrong where that is no more than one group.
    - Zero points are made in the model's dtype and kept for ever, although symmetric weights have none to read.
    """
    create, process = method.create_weights, method.process_weights_after_loading

    def create_weights(
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **kwargs: Any,
    ) -> None:
        if fmt.desc_act and layer.moe_tp_size > 1:
            raise ValueError(
                "experts with desc_act cannot be cut for tensor parallelism; use expert parallelism (--ep-size)."
            )
        with _seen(layer, moe_tp_size=1):
            create(layer, num_experts, hidden_size, intermediate_size_per_partition, params_dtype, **kwargs)
        for weight in ("w13", "w2"):
            _recast(layer, f"{weight}_scales", params_dtype)
            _recast(layer, f"{weight}_qzeros", torch.int32)

    def process_weights_after_loading(layer: Any) -> None:
        with _seen(layer, intermediate_size_per_partition=layer.hidden_size):
            process(layer)
        for name in ("w13_qzeros", "w2_qzeros"):
            layer._parameters.pop(name, None)

    method.create_weights = create_weights
    method.process_weights_after_loading = process_weights_after_loading
    _mend_marlin_experts(method, fmt)


def _mend_awq_experts(method: QuantizeMethodBase, fmt: Awq) -> None:
    """AWQ experts on Marlin (gpu/quantization/awq_kernels.py).

    The scales of w13 are permuted as if its inputs were as many as this rank's intermediate size (awq_kernels.py:206),
    which is wrong where that is one group. Here the inputs are counted by the groups that there are scales of.
    """
    from sglang.srt.hardware_backend.gpu.quantization import awq_kernels

    _permute_by_groups(method, awq_kernels)
    _mend_marlin_experts(method, fmt)


def _permute_by_groups(method: QuantizeMethodBase, module: ModuleType) -> None:
    """``module`` is where the method's class finds ``marlin_moe_permute_scales``."""
    process, permute = method.process_weights_after_loading, module.marlin_moe_permute_scales

    def permute_by_groups(s: torch.Tensor, size_k: int, size_n: int, group_size: int) -> torch.Tensor:
        permuted: torch.Tensor = permute(s, s.shape[1] * group_size, size_n, group_size)
        return permuted

    def process_weights_after_loading(layer: Any) -> None:
        with patch.object(module, "marlin_moe_permute_scales", permute_by_groups):
            process(layer)

    method.process_weights_after_loading = process_weights_after_loading


def _mend_packed_experts(method: QuantizeMethodBase, fmt: Packed) -> None:
    """Experts of compressed-tensors on Marlin (compressed_tensors/schemes/compressed_tensors_wNa16_moe.py).

    - ``weight_shape`` gets a parameter of float32 for its whole numbers, and nobody reads it: whole numbers, taken away
      after loading.
    - Input orders are made at full size also where there are none to load, and are then replaced by empty ones.
    - With input orders, each rank would need those of the others: as for GPTQ, no tensor parallelism.
    - The scales of w13 are permuted as if its inputs were as many as its repacked words (:300).
    - Ids of -1 are left out only where the layer's dispatcher has a map of experts (:468), which a group of experts has
      not.
    """
    from sglang.srt.layers.quantization.compressed_tensors.schemes import compressed_tensors_wNa16_moe

    create, create_runner, apply = method.create_weights, method.create_moe_runner, method.apply

    def create_weights(
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **kwargs: Any,
    ) -> None:
        if fmt.actorder and layer.moe_tp_size > 1:
            raise ValueError(
                "experts with weight_g_idx cannot be cut for tensor parallelism; use expert parallelism (--ep-size)."
            )
        create(layer, num_experts, hidden_size, intermediate_size_per_partition, params_dtype, **kwargs)
        for weight in ("w13", "w2"):
            _recast(layer, f"{weight}_weight_shape", torch.int64)
            for name in (f"{weight}_weight_g_idx", f"{weight}_g_idx_sort_indices"):
                if not fmt.actorder:
                    empty = torch.empty((num_experts, 0), dtype=torch.int32, device=layer._parameters[name].device)
                    layer.register_parameter(name, Parameter(empty, requires_grad=False))

    def create_moe_runner(layer: Any, *args: Any, **kwargs: Any) -> None:
        if not get_moe_runner_backend().is_auto():
            raise ValueError(f"{fmt.kind} experts run on Marlin: leave out --moe-runner-backend")
        create_runner(layer, *args, **kwargs)
        if _sees_other_ranks(layer):
            launch.check_experts_elsewhere(fmt.kind)

    method.create_weights = create_weights
    method.create_moe_runner = create_moe_runner
    _permute_by_groups(method, compressed_tensors_wNa16_moe)
    process = method.process_weights_after_loading

    def process_weights_after_loading(layer: Any) -> None:
        for name in ("w13_weight_shape", "w2_weight_shape"):
            layer._parameters.pop(name, None)
        process(layer)

    def apply_with_map(layer: Any, dispatch_output: Any) -> Any:
        scheme = layer.scheme
        if not _sees_other_ranks(layer) or not scheme.runner.runner_backend.is_marlin():
            return apply(layer, dispatch_output)
        info = scheme.get_marlin_quant_info(layer)
        info.expert_map = _SOME_MAP
        return scheme.runner.run(dispatch_output, info)

    method.process_weights_after_loading = process_weights_after_loading
    method.apply = apply_with_map


def _mend_marlin_experts(method: QuantizeMethodBase, fmt: Gptq | Awq) -> None:
    """Ids of -1, which stand for experts of other ranks, are left out by the kernel only where it is given an
    ``expert_map`` (moe/fused_moe_triton/fused_marlin_moe.py), and neither GPTQ nor AWQ gives one: elsewhere it
    multiplies by whatever lies before the weights. Only whether there is a map matters, not what is in it.
    """
    create_runner = method.create_moe_runner

    def create_moe_runner(layer: Any, *args: Any, **kwargs: Any) -> None:
        if not get_moe_runner_backend().is_auto():  # asserted, without a word (gptq_kernels.py:360, awq_moe.py:132)
            raise ValueError(f"{fmt.kind} experts run on Marlin only: leave out --moe-runner-backend")
        create_runner(layer, *args, **kwargs)
        if _sees_other_ranks(layer):
            _skip_other_ranks(layer.scheme.kernel.runner)

    method.create_moe_runner = create_moe_runner


def _sees_other_ranks(layer: Any) -> bool:
    """Whether routed ids may be -1: those of experts on other ranks, or in other groups of a mixed layer."""
    return bool(layer.moe_ep_size > 1 or getattr(layer, "virtual_rank", False))


def _mend_tensor_scaled_experts(method: QuantizeMethodBase) -> None:
    """FP8 with one scale a tensor quantizes activations with one scale as well, the largest of all rows
    (kernels/ops/moe/fused_moe_triton_kernels.py:765). Rows of experts elsewhere hold what memory held before, and
    set that scale. Activations are scaled token by token instead, with the same weights and weight scales."""
    create_runner = method.create_moe_runner

    def create_moe_runner(layer: Any, *args: Any, **kwargs: Any) -> None:
        create_runner(layer, *args, **kwargs)
        if not _sees_other_ranks(layer):
            return
        launch.check_experts_elsewhere("fp8_tensor", scales_stay=True)
        run = method.runner.run
        columns: dict[str, torch.Tensor] = {}

        def run_by_token(dispatch_output: Any, quant_info: Any, *args: Any, **kwargs: Any) -> Any:
            for name, weight in (("w13_scale", quant_info.w13_weight), ("w2_scale", quant_info.w2_weight)):
                if name not in columns:
                    scale = getattr(quant_info, name).reshape(-1, 1, 1)
                    columns[name] = scale.expand(-1, weight.shape[1], 1).contiguous()
                setattr(quant_info, name, columns[name])
            quant_info.per_channel_quant = True
            return run(dispatch_output, quant_info, *args, **kwargs)

        method.runner.run = run_by_token

    method.create_moe_runner = create_moe_runner


def _skip_other_ranks(runner: Any) -> None:
    run = runner.run

    def run_with_map(dispatch_output: Any, quant_info: Any, *args: Any, **kwargs: Any) -> Any:
        if quant_info.expert_map is None:
            quant_info.expert_map = _SOME_MAP
        return run(dispatch_output, quant_info, *args, **kwargs)

    runner.run = run_with_map


def _recast(layer: Any, name: str, dtype: torch.dtype) -> None:
    """Makes a parameter that nothing was loaded into once more, in ``dtype``."""
    old = getattr(layer, name)
    if old.dtype != dtype:
        new = Parameter(torch.empty_like(old, dtype=dtype), requires_grad=False)
        new.__dict__.update(old.__dict__)
        layer.register_parameter(name, new)


@contextmanager
def _seen(layer: Any, **values: Any) -> Iterator[None]:
    """Attributes of a layer, for the length of one call, as SGLang's code should have read them."""
    before = {name: getattr(layer, name) for name in values}
    layer.__dict__.update(values)
    try:
        yield
    finally:
        layer.__dict__.update(before)
