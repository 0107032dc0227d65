"""The checkpoints that these tests serve, and the expected contents of SGLang's parameters.

Written from the definitions of formats and models, without mixprec.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path

import torch

from support.serving import DEEPSEEK, LLAMA, MIXTRAL, QWEN2, QWEN2_MOE, QWEN3, QWEN3_MOE, Shape
from support.sglang.harness import VARIANTS, build, sources, tensors_of

__all__ = ["ALL", "EIGHT", "FLOATS", "FOURS", "HEADS", "MIXES", "RELEASES", "Expected", "Mix", "mix"]

# Large enough for four ranks of every format.
_SIZES = {"hidden": 512, "intermediate": 1024, "expert_intermediate": 512, "heads": 4, "kv_heads": 2, "head_dim": 128}

Mix = tuple[Shape, Mapping[str, str]]

MIXES: Mapping[str, Mix] = {
    "llama": (
        LLAMA.of(**_SIZES, layers=8),
        {
            "model.layers.0.self_attn.*": "fp8_block",
            "model.layers.0.mlp.*": "gptq_int4",
            "model.layers.1.self_attn.*": "fp8_channel",
            "model.layers.1.mlp.*": "fp8_tensor",
            "model.layers.1.mlp.down_proj": "gptq_int8",
            "model.layers.2.self_attn.*": "gptq_int4_act",
            "model.layers.2.self_attn.o_proj": "bf16",
            "model.layers.2.mlp.*": "gptq_int4_g64",
            "model.layers.2.mlp.down_proj": "gptq_int4_act",
            "model.layers.3.self_attn.*": "awq_int4",
            "model.layers.3.mlp.*": "awq_int4_g64",
            "model.layers.4.self_attn.*": "ct_int4",
            "model.layers.4.mlp.*": "ct_int4_asym",
            "model.layers.5.self_attn.*": "ct_fp8_block",
            "model.layers.5.self_attn.o_proj": "ct_int4_act",
            "model.layers.5.mlp.*": "ct_fp8_weight",
            "model.layers.6.self_attn.*": "ct_int8",
            "model.layers.6.mlp.*": "ct_int4_act",
            "model.layers.6.mlp.down_proj": "ct_int4_g32",
            "model.layers.7.self_attn.*": "int8_channel",
            "model.layers.7.mlp.*": "int8_block",
        },
    ),
    "qwen2": (
        QWEN2.of(**_SIZES, layers=3),
        {
            "model.layers.0.self_attn.*": "gptq_int4",
            "model.layers.0.mlp.*": "fp8_block",
            "model.layers.1.self_attn.*": "fp8_tensor",
            "model.layers.2.self_attn.*": "awq_int4",
        },
    ),
    "qwen3": (
        QWEN3.of(**_SIZES),
        {"model.layers.*.self_attn.*": "fp8_block", "model.layers.1.mlp.*": "fp8_channel"},
    ),
    "qwen3_moe": (
        QWEN3_MOE.of(**_SIZES, layers=7),
        {
            "model.layers.*.self_attn.*": "fp8_block",
            "model.layers.0.mlp.experts.*": "gptq_int4",
            "model.layers.1.mlp.experts.*": "fp8_block",
            "model.layers.2.mlp.experts.*": "gptq_int4",
            "model.layers.2.mlp.experts.{0..2}.*": "fp8_block",
            "model.layers.2.mlp.experts.4.*": "fp8_channel",
            "model.layers.2.mlp.experts.6.*": "bf16",
            "model.layers.3.mlp.experts.{1,2,7}.*": "fp8_tensor",
            "model.layers.3.mlp.experts.{4,5}.*": "gptq_int8",
            "model.layers.3.mlp.experts.6.*": "gptq_int4_g64",
            "model.layers.3.mlp.experts.{0,3}.*": "awq_int4",
            "model.layers.4.mlp.experts.*": "awq_int4_g64",
            "model.layers.5.mlp.experts.*": "ct_int4",
            "model.layers.5.mlp.experts.2.*": "ct_int4_g32",
            "model.layers.5.mlp.experts.{3,4}.*": "ct_int8",
            "model.layers.5.mlp.experts.5.*": "ct_fp8_block",
            "model.layers.5.mlp.experts.6.*": "fp8_block",
            "model.layers.6.mlp.experts.*": "int8_block",
            "model.layers.6.mlp.experts.{1..3}.*": "int8_channel",
            "model.layers.6.mlp.experts.5.*": "ct_int4",
        },
    ),
    "split_experts": (  # experts with gate and up in another format than down
        QWEN3_MOE.of(**_SIZES, layers=3),
        {
            "model.layers.0.mlp.experts.*": "fp8_block",
            "model.layers.0.mlp.experts.*.down_proj": "gptq_int4",
            "model.layers.1.mlp.experts.*": "gptq_int4_g64",
            "model.layers.1.mlp.experts.{0..2}.down_proj": "fp8_block",
            "model.layers.1.mlp.experts.4.*": "fp8_block",
            "model.layers.1.mlp.experts.6.down_proj": "bf16",
            "model.layers.1.mlp.experts.7.*": "fp8_channel",
            "model.layers.1.mlp.experts.7.down_proj": "fp8_tensor",
            "model.layers.2.mlp.experts.{1,2,7}.down_proj": "fp8_tensor",
            "model.layers.2.mlp.experts.{3,4}.*": "ct_int4",
            "model.layers.2.mlp.experts.3.down_proj": "int8_block",
            "model.layers.2.mlp.experts.5.*": "int8_channel",
            "model.layers.2.mlp.experts.5.down_proj": "gptq_int8",
        },
    ),
    "mixtral": (
        MIXTRAL.of(**_SIZES, layers=5),
        {
            "model.layers.*.self_attn.*": "fp8_channel",
            "model.layers.0.block_sparse_moe.experts.*": "gptq_int4_g64",
            "model.layers.1.block_sparse_moe.experts.*": "fp8_tensor",
            "model.layers.2.block_sparse_moe.experts.{0..3}.*": "gptq_int8",
            "model.layers.3.block_sparse_moe.experts.*": "awq_int4",
            "model.layers.3.block_sparse_moe.experts.{1,6}.*": "fp8_block",
            "model.layers.4.block_sparse_moe.experts.*": "ct_int4",
            "model.layers.2.block_sparse_moe.experts.2.w2": "fp8_channel",
        },
    ),
    "deepseek": (
        DEEPSEEK.of(**_SIZES, layers=3),
        {
            "model.layers.*.self_attn.q_b_proj": "fp8_channel",
            "model.layers.1.self_attn.q_a_proj": "fp8_block",
            "model.layers.1.self_attn.kv_a_proj_with_mqa": "fp8_block",
            "model.layers.2.self_attn.q_a_proj": "fp8_channel",
            "model.layers.2.self_attn.kv_a_proj_with_mqa": "fp8_channel",
            "model.layers.*.self_attn.o_proj": "fp8_block",
            "model.layers.0.mlp.*": "gptq_int4",
            "model.layers.1.mlp.experts.*": "fp8_channel",
            "model.layers.1.mlp.shared_experts.*": "fp8_block",
            "model.layers.2.mlp.experts.*": "gptq_int4",
            "model.layers.2.mlp.experts.{3,5}.*": "fp8_block",
        },
    ),
}


# Large enough for eight ranks, more than there are key-value heads.
_FOR_EIGHT = {"hidden": 256, "intermediate": 1024, "expert_intermediate": 1024, "heads": 8, "kv_heads": 2}
EIGHT: Mapping[str, Mix] = {
    "llama_8": (
        LLAMA.of(**_FOR_EIGHT, head_dim=128, layers=8),
        {
            **MIXES["llama"][1],
            "model.layers.7.self_attn.*": "int8_block",
            "model.layers.7.mlp.*": "int8_channel",
        },
    ),
    "qwen3_moe_8": (
        QWEN3_MOE.of(**_FOR_EIGHT, head_dim=128, layers=2),
        {
            "model.layers.*.self_attn.*": "fp8_block",
            "model.layers.0.mlp.experts.{0,1}.*": "fp8_block",
            "model.layers.0.mlp.experts.2.*": "fp8_channel",
            "model.layers.0.mlp.experts.3.*": "gptq_int4",
            "model.layers.0.mlp.experts.4.*": "awq_int4",
            "model.layers.0.mlp.experts.{5,7}.*": "ct_int4",
            "model.layers.1.mlp.experts.0.*": "fp8_tensor",
            "model.layers.1.mlp.experts.1.*": "gptq_int8",
            "model.layers.1.mlp.experts.2.*": "gptq_int4_g64",
            "model.layers.1.mlp.experts.3.*": "awq_int4_g64",
            "model.layers.1.mlp.experts.4.*": "ct_int4_g32",
            "model.layers.1.mlp.experts.5.*": "ct_int8",
            "model.layers.1.mlp.experts.6.*": "int8_channel",
            "model.layers.1.mlp.experts.7.*": "int8_block",
        },
    ),
}


# Mixes of releases of several producers.
RELEASES: Mapping[str, Mix] = {
    "auto_round_in_fp8": (
        QWEN3_MOE.of(**_SIZES),
        {"model.layers.*.self_attn.*": "fp8_block", "model.layers.*.mlp.experts.*": "auto_round_int4"},
    ),
    "auto_round_beside_shared_experts": (
        QWEN2_MOE.of(expert_intermediate=128),
        {"model.layers.*.self_attn.*": "fp8_block", "model.layers.*.mlp.experts.*": "auto_round_int4",
         "model.layers.*.mlp.shared_expert.*": "fp8_block"},
    ),
}  # fmt: skip


# Mixes with a quantized lm_head.
HEADS: Mapping[str, Mix] = {
    "head_in_fp8": (
        QWEN3.of(hidden=256, layers=1),
        {"model.layers.*.self_attn.*": "fp8_channel", "lm_head": "fp8_channel"},
    ),
    "head_in_int4": (LLAMA.of(hidden=256, layers=1), {"model.layers.*.mlp.*": "gptq_int4", "lm_head": "gptq_int4"}),
}


# Mixes with experts in 4-bit floats of several producers.
FLOATS: Mapping[str, Mix] = {
    "mxfp4": (
        QWEN3_MOE.of(**_SIZES, layers=3),
        {
            "model.layers.*.self_attn.*": "fp8_block",
            "model.layers.0.mlp.experts.*": "ct_mxfp4",
            "model.layers.1.mlp.experts.*": "deepseek_mxfp4",
            "model.layers.1.mlp.experts.{0..2}.*": "fp8_block",
            "model.layers.1.mlp.experts.4.*": "mxfp4",
            "model.layers.1.mlp.experts.6.*": "bf16",
            "model.layers.2.mlp.experts.*": "mxfp4",
            "model.layers.2.mlp.experts.{1,3}.down_proj": "gptq_int4",
            "model.layers.2.mlp.experts.5.*": "deepseek_mxfp4",
            "model.layers.2.mlp.experts.5.down_proj": "ct_mxfp4",
        },
    ),
}

# Mixes of 4-bit formats with scales of several levels, whose parameters :class:`Expected` does not know.
FOURS: Mapping[str, Mix] = {
    "w4afp8_and_nvfp4": (
        QWEN3_MOE.of(**_SIZES, layers=3),
        {
            "model.layers.*.self_attn.*": "fp8_e8m0_32",
            "model.layers.0.mlp.experts.*": "w4afp8",
            "model.layers.1.mlp.experts.*": "nvfp4",
            "model.layers.1.mlp.experts.{0..2}.*": "fp8_bytes",
            "model.layers.1.mlp.experts.4.*": "w4afp8",
            "model.layers.2.mlp.experts.*": "ct_nvfp4",
            "model.layers.2.mlp.experts.{1,3}.down_proj": "fp8_e8m0",
        },
    ),
}

ALL: Mapping[str, Mix] = {**MIXES, **EIGHT, **RELEASES, **HEADS, **FLOATS, **FOURS}


def mix(folder: Path, name: str) -> Path:
    """The checkpoint of that name, built once below ``folder``."""
    out, (shape, lines) = folder / name, ALL[name]
    if out.exists():
        return out
    variants = VARIANTS if name in MIXES else sorted({"bf16", *lines.values()})
    return build(sources(folder, shape, variants, head=name in HEADS), lines, out)


def variant_of(mix: Mix, module: str) -> str:
    """The variant of a linear module: that of the last line that matches."""
    found = "bf16"
    for line, variant in mix[1].items():
        if any(fnmatchcase(module, pattern) for pattern in _patterns(line)):
            found = variant
    return found


def _patterns(line: str) -> list[str]:
    braces = re.search(r"\{(.*?)\}", line)
    if not braces:
        return [line]
    first, dots, last = braces[1].partition("..")
    numbers = range(int(first), int(last) + 1) if dots else braces[1].split(",")
    return [line.replace(braces[0], str(number)) for number in numbers]


# Layers that SGLang joins from modules, in the order of its GEMM.
_PARTS = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj_with_mqa": ("q_a_proj", "kv_a_proj_with_mqa"),
}
_EXPERT_PARTS = {
    "mixtral": {"w13": ("w1", "w3"), "w2": ("w2",)},
    "": {"w13": ("gate_proj", "up_proj"), "w2": ("down_proj",)},
}
_LINEAR = re.compile(r"(?!.*\.kv_b_proj$).*(_proj|_with_mqa|\.w[123])")  # quantized in the sources
_ROW_PARALLEL = ("o_proj", "down_proj", "w2")
_REPLICATED = ("gate", "fused_qkv_a_proj_with_mqa")

# Leaf -> the axes of the module's outputs and inputs.
_AXES = {
    "weight": (0, 1), "weight_scale_inv": (0, 1), "weight_scale": (0, 1), "scale": (0, 1), "bias": (0, None),
    "qweight": (1, 0), "qzeros": (1, 0), "scales": (1, 0), "g_idx": (None, 0),
    "weight_packed": (0, 1), "weight_zero_point": (0, 1), "weight_g_idx": (None, 0), "weight_shape": (None, None),
}  # fmt: skip
# Variants that differ in the names of scales only have one format.
_SAME = {"ct_fp8_block": "fp8_block"}


class Expected:
    """The expected contents of a model's parameters on a rank of tensor (``tp``) and expert parallelism (``ep``)."""

    def __init__(self, folder: Path, mix: Mix, rank: int = 0, tp: int = 1, ep: int = 1):
        self.shape, self._mix, self._rank, self._tp, self._ep = mix[0], mix, rank, tp, ep
        variants = VARIANTS if mix in MIXES.values() else sorted({"bf16", *mix[1].values()})
        paths = sources(folder, mix[0], variants, head="lm_head" in mix[1])
        stored = {variant: tensors_of(path) for variant, path in paths.items()}
        self._tensors: dict[str, torch.Tensor] = {}
        for module in dict.fromkeys(name.rpartition(".")[0] for name in stored["bf16"]):
            own = stored[self.variant(module)]
            self._tensors |= {name: tensor for name, tensor in own.items() if name.rpartition(".")[0] == module}

    def variant(self, module: str) -> str:
        """The variant that a module comes from."""
        return variant_of(self._mix, module) if _LINEAR.fullmatch(module) or module == "lm_head" else "bf16"

    def local(self) -> list[int]:
        """The numbers of this rank's experts."""
        each = self.shape.experts // self._ep
        first = self._rank // (self._tp // self._ep) * each
        return list(range(first, first + each))

    def groups(self, layer: str, *, everywhere: bool = False) -> list[tuple[str, list[int], list[int]]]:
        """For each format of a layer, the experts with gate and up in it, and those with down in it.

        Two entries where these differ. Experts are those of this rank, or of all ranks.
        """
        halves: dict[str, tuple[list[int], list[int]]] = {}
        parts = _EXPERT_PARTS.get(self.shape.family, _EXPERT_PARTS[""])
        for expert in range(self.shape.experts) if everywhere else self.local():
            for half, weight in enumerate(("w13", "w2")):
                variant = self.variant(f"{layer}.{expert}.{parts[weight][0]}")
                halves.setdefault(_SAME.get(variant, variant), ([], []))[half].append(expert)
        groups = []
        for variant, (ups, downs) in halves.items():
            apart = [(variant, ups, downs)] if ups == downs else [(variant, ups, []), (variant, [], downs)]
            groups += [group for group in apart if group[1] or group[2]]
        return groups

    def parts(self, layer: str) -> list[str]:
        """The modules of the checkpoint that a linear layer of SGLang's joins."""
        parent, _, last = layer.rpartition(".")
        return [f"{parent}.{part}" for part in _PARTS.get(last, (last,))]

    def linear(self, layer: str) -> dict[str, torch.Tensor]:
        return self._joined(self.parts(layer), layer.rpartition(".")[2], self._tp, self._rank)

    def experts(self, layer: str, ups: list[int], downs: list[int]) -> dict[str, torch.Tensor]:
        """The stacked tensors ``w13_*`` of the experts ``ups``, and ``w2_*`` of ``downs``, which share a format."""
        tp = self._tp // self._ep
        out = {}
        for weight, parts in _EXPERT_PARTS.get(self.shape.family, _EXPERT_PARTS[""]).items():
            numbers = ups if weight == "w13" else downs
            if not numbers:
                continue
            each = [
                self._joined([f"{layer}.{e}.{part}" for part in parts], weight, tp, self._rank % tp) for e in numbers
            ]
            for leaf in each[0]:
                stacked = torch.stack([_bytes(tensors[leaf]) for tensors in each]).view(each[0][leaf].dtype)
                words = each[0].get("weight_packed")
                if leaf in ("weight_packed", "weight_scale") and words is not None and words.dtype == torch.int32:
                    stacked = stacked.transpose(1, 2)  # as SGLang's loader does
                scalars = leaf == "weight_scale" and each[0][leaf].numel() == len(parts)
                out[f"{weight}_{leaf}"] = stacked.squeeze(-1) if scalars else stacked
        return out

    def _joined(self, modules: list[str], last: str, tp: int, rank: int) -> dict[str, torch.Tensor]:
        leaves = [leaf for leaf in _AXES if f"{modules[0]}.{leaf}" in self._tensors]
        out = {}
        for leaf in leaves:
            renamed = leaf == "scale" or (leaf == "weight_scale" and self.variant(modules[0]) in _SAME)
            name = "weight_scale_inv" if renamed else leaf
            cut = [self._cut(f"{module}.{leaf}", leaf, last, tp, rank) for module in modules]
            outputs = _AXES[leaf][0]
            if cut[0].dim() == 0:
                out[name] = torch.stack(cut)
            elif outputs is None:
                out[name] = cut[-1]  # the modules have one input order, and SGLang keeps one of their shapes
            else:
                out[name] = torch.cat([_bytes(t) for t in cut], outputs).view(cut[0].dtype)
        return out

    def _cut(self, name: str, leaf: str, last: str, tp: int, rank: int) -> torch.Tensor:
        tensor = self._tensors[name]
        outputs, inputs = _AXES[leaf]
        if tensor.dim() == 0 or last in _REPLICATED:
            return tensor
        if last in _ROW_PARALLEL:
            # With desc_act, a rank's inputs may be of any group.
            act = self.variant(name.rpartition(".")[0]).endswith("_act") and leaf in (
                "scales",
                "qzeros",
                "weight_scale",
            )
            uncut = inputs is None or act or tensor.shape[inputs] == 1  # one scale for all inputs
            return tensor if uncut else tensor.chunk(tp, inputs)[rank]
        if outputs is None:
            return tensor
        if ".k_proj" in name or ".v_proj" in name:
            copies = max(1, tp // self.shape.kv_heads)
            return tensor.chunk(tp // copies, outputs)[rank // copies]
        return tensor.chunk(tp, outputs)[rank]

    def modules(self) -> dict[str, dict[str, torch.Tensor]]:
        """All uncut tensors by module and leaf."""
        out: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in self._tensors.items():
            module, _, leaf = name.rpartition(".")
            out.setdefault(module, {})[leaf] = tensor
        return out

    def plain(self, name: str) -> torch.Tensor:
        """Any other tensor."""
        tensor = self._tensors[name]
        return tensor.chunk(self._tp)[self._rank] if "embed_tokens" in name or "lm_head" in name else tensor


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of 8-bit floats, for which some versions of torch lack cat and stack."""
    return tensor.view(torch.uint8) if tensor.is_floating_point() and tensor.itemsize == 1 else tensor
