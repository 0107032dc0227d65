"""``--quantization mixprec``: gives each layer SGLang's own method for the format of its modules."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from typing import Any

import torch
from sglang.srt.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase

from mixprec_build.checkpoint.declaration import METHOD, Declaration
from mixprec_build.errors import SourceError
from mixprec_build.families.base import Family
from mixprec_build.families.cache_scales import cache_scale, parameters_of
from mixprec_build.families.draft_class import Draft
from mixprec_build.families.names import last_word, numbered_part
from mixprec_build.families.unknown import UNKNOWN
from mixprec_build.formats.base import Format
from mixprec_build.formats.names import name_forms

from . import launch
from .experts import runner
from .experts.method import MixedExpertsMethod
from .formats.registry import model_attributes, served
from .loading.pad import pad, stored_columns
from .native import NativeFormat
from .unnumbered import UnnumberedLayers

__all__ = ["MixPrecConfig"]


class MixPrecConfig(QuantizationConfig):
    """The quantization of a compiled checkpoint.

    ``from_config`` reads ``quantization_config`` of ``config.json``; :meth:`bind` must follow, before layers are made.
    """

    # Some of SGLang's models read this attribute of any config.
    weight_block_size = None

    def __init__(self, declaration: Declaration | None = None):
        super().__init__()
        if declaration is None:  # SGLang does this for a config.json without quantization_config
            raise ValueError(
                "--quantization mixprec is for checkpoints that mixprec built, and config.json of this one names no "
                "quantization: leave it out"
            )
        self.declaration = declaration
        self.__dict__ |= model_attributes()
        self.native = {fmt: NativeFormat(fmt) for fmt in declaration.formats.values()}
        self.padded: Mapping[str, tuple[int, int]] = {}
        """MLP or ``...experts`` that zeros are added to on this rank -> its columns; see :func:`.loading.pad.pad`."""
        self.cache_scales: Mapping[str, Sequence[str]] = {}
        """Scale of the KV cache in the checkpoint -> the parameters of SGLang's attention that are filled with it."""
        self.expert_layers: Mapping[str, Collection[Format]] = {}
        """``...experts`` in the checkpoint -> the formats of this layer."""
        self.runner = "auto"
        """The ``--moe-runner-backend`` of layers that take it; see :mod:`.experts.runner`."""
        self._mapper: Any = None
        self._family = UNKNOWN
        self._draft: Draft | None = None
        self._formats: dict[str, Format] | None = None
        self._experts: dict[str, dict[int, dict[str, Format]]] = {}
        self._unnumbered = UnnumberedLayers((), UNKNOWN)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> MixPrecConfig:
        """Parses ``quantization_config``. Raises :class:`ValueError` for a damaged one."""
        try:
            made = cls(Declaration.from_json(config))
        except SourceError as error:
            raise ValueError(f"config.json of this checkpoint: {error}") from error
        # SGLang adds the mapping of the model, where it has one.
        made.packed_modules_mapping = dict(config.get("packed_modules_mapping") or {})
        return made

    def bind(
        self, modules: Iterable[str], family: Family = UNKNOWN, draft: Draft | None = None
    ) -> Mapping[str, Format]:
        """Sets the modules of the checkpoint, by their Hugging Face names, and the family of SGLang's model.

        With ``draft``, the model consists of these layers only. Returns the format of each module.
        """
        declared = self.declaration.formats_of(modules)
        own = declared if draft is None else {name: fmt for name, fmt in declared.items() if draft.expects(name)}
        mapped = own if self._mapper is None else self._mapper.apply_dict(own)
        formats = {**_other_names({**own, **mapped}), **own, **mapped}
        if draft is not None:
            # Its names may be those of the model's layers.
            formats |= {draft.sglang_name(name): fmt for name, fmt in own.items()}
        experts: dict[str, dict[int, dict[str, Format]]] = defaultdict(lambda: defaultdict(dict))
        for name, fmt in formats.items():
            found = numbered_part(name)
            if found is not None:
                parent, number, part = found
                experts[parent][number][part] = fmt
        self._formats, self._experts, self._family, self._draft = formats, experts, family, draft
        self._unnumbered = UnnumberedLayers(declared, family)
        layers: dict[str, dict[object, Format]] = defaultdict(dict)
        for name, fmt in own.items():
            expert = family.expert_of(name)
            if expert is not None:
                layers[expert[0]].setdefault(fmt.fuses_as, fmt)
        self.expert_layers = {name: tuple(kinds.values()) for name, kinds in layers.items()}
        names = {name: name for name in own}

        def served_name(parameter: str) -> str:
            name = family.sglang_name(parameter)
            return name if draft is None else draft.sglang_name(name)

        self.cache_scales = {
            name: [served_name(parameter) for parameter in parameters_of(scale, formats)]
            for mapped, name in (names if self._mapper is None else self._mapper.apply_dict(names)).items()
            if (scale := cache_scale(mapped)) is not None
        }
        return declared

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Returns SGLang's method for ``layer``; ``prefix`` is SGLang's name of it.

        None where the layer makes its own unquantized method: embeddings, attention, dense experts.

        Raises:
            ValueError: modules of one layer have formats that cannot be served together, or SGLang has no quantized
                method for the layer.
        """
        from sglang.srt.layers.linear import LinearBase
        from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
        from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

        if self._formats is None:
            raise RuntimeError(
                "mixprec's hook into SGLang's model loader is not in place: the log above says why. Start SGLang with "
                "launch_server, `sglang serve` or sgl.Engine, which load plugins in every process"
            )
        if isinstance(layer, FusedMoE | LinearBase):
            prefix = self._unnumbered.next_named(prefix, experts=isinstance(layer, FusedMoE)) or prefix
            if isinstance(layer, FusedMoE):
                with stored_columns(layer, prefix, self.padded, self._family):
                    method = self._experts_method(layer, prefix)
            else:
                fmt = self._one_format(prefix, self._members(prefix))
                method = self._native(fmt).get_quant_method(layer, prefix)
            pad(method, prefix, self.padded, self._family)
            return method
        if isinstance(layer, ParallelLMHead):
            fmt = self._one_format(prefix, self._members(prefix))
            return None if fmt is None else self.native[fmt].get_head_method(layer, prefix)
        if isinstance(layer, VocabParallelEmbedding) and prefix in self._formats:
            fmt = self._formats[prefix]
            if fmt.quantized:
                raise ValueError(f"{prefix} is {fmt.kind}, and SGLang serves embeddings unquantized only")
        return None

    def _members(self, prefix: str) -> dict[str, Format]:
        """The modules of the checkpoint that one layer of SGLang consists of."""
        assert self._formats is not None
        parent, _, last = prefix.rpartition(".")
        # packed_modules_mapping is complete for some models only.
        joined = self.packed_modules_mapping.get(last) or self._family.members_of(last)
        names = [prefix, *(f"{parent}.{part}" if parent else part for part in joined)]
        for stored in zip(*map(self._family.stored_names, names), strict=True):
            found = {name: self._formats[name] for name in stored if name in self._formats}
            if found:
                return found
        return {}

    def can_fuse_shared_expert(self) -> bool:
        """Whether SGLang may append shared experts to the routed ones (asked by models/qwen2_moe.py).

        All experts of each layer must then have one format.
        """
        for experts, numbered in self._experts.items():
            if last_word(experts) != self._family.experts:
                continue
            kinds = {fmt.fuses_as for parts in numbered.values() for fmt in parts.values()}
            shared = self._shared_experts(experts.rpartition(".")[0])
            if (shared and kinds | {fmt.fuses_as for fmt in shared.values()} != kinds) or (shared and len(kinds) > 1):
                return False
        return True

    @property
    def mixed_layers(self) -> list[str]:
        """The layers, by their names in the checkpoint, whose experts have several formats."""
        return [name for name, formats in self.expert_layers.items() if len(formats) > 1]

    def _shared_experts(self, parent: str) -> dict[str, Format]:
        """The linear modules of the shared experts in the MoE block ``parent``."""
        assert self._formats is not None
        words = [word for projections in self._family.projections for word in projections.words]
        names = [f"{parent}.{mlp}.{word}" for mlp in self._family.shared_experts for word in words]
        return {name: self._formats[name] for name in names if name in self._formats}

    def _one_format(self, prefix: str, formats: Mapping[str, Format]) -> Format | None:
        """The one format of a layer's modules; None where the checkpoint has no such layer."""
        if len({fmt.fuses_as for fmt in set(formats.values())}) > 1:
            parts = ", ".join(f"{name} {fmt.kind}" for name, fmt in formats.items())
            raise ValueError(f"{prefix} is one layer to SGLang and needs one format, but the checkpoint has {parts}")
        return next(iter(formats.values()), None)

    def _native(self, fmt: Format | None) -> NativeFormat:
        """SGLang's config of a format; of the default one for layers that the checkpoint lacks, such as a tied head.

        A check after loading finds layers that were left without weights.
        """
        return self.native[fmt or self.declaration.formats[self.declaration.default]]

    def _experts_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        formats: dict[int, tuple[Format, Format]] = {}
        kinds: dict[object, Format] = {}  # BF16 and FP16 share one
        known: dict[Format, Format] = {}
        is_down = self._family.is_down
        for expert, parts in sorted(self._experts_of(prefix).items()):
            for fmt in parts.values():
                if fmt not in known:
                    known[fmt] = kinds.setdefault(fmt.fuses_as, fmt)
            self._one_format(f"{prefix}.{expert}", {p: fmt for p, fmt in parts.items() if not is_down(p)})
            by_projection = {is_down(part): known[fmt] for part, fmt in parts.items()}
            some = next(iter(by_projection.values()))
            formats[expert] = by_projection.get(False, some), by_projection.get(True, some)
        if getattr(layer, "num_fused_shared_experts", 0):
            self._check_fused_shared_experts(prefix.rpartition(".")[0], kinds)
        if len(kinds) > 1:
            launch.check_mixed_experts([prefix])
            # Compiled code finds layers by name, and a draft may have the names of the model's layers.
            return MixedExpertsMethod(formats, self.native, f"draft.{prefix}" if self._draft else prefix)
        only = next(iter(kinds.values()), None)
        method = self._native(only).get_quant_method(layer, prefix)
        if only is not None and self.runner in served(only).runners(only)[1:]:
            runner.give(self.runner, method, layer, prefix)
        return method

    def formats_of_experts(self, prefix: str) -> Collection[Format]:
        """The formats of the layer with experts that SGLang names ``prefix``; empty where there is none."""
        formats = (fmt for parts in self._experts_of(prefix).values() for fmt in parts.values())
        return {fmt.fuses_as: fmt for fmt in formats}.values()

    def _experts_of(self, prefix: str) -> Mapping[int, Mapping[str, Format]]:
        """Expert -> projection -> format, of the layer that SGLang names ``prefix``; empty where there is none."""
        found = (self._experts[name] for name in self._family.stored_names(prefix) if name in self._experts)
        return next(found, {})

    def _check_fused_shared_experts(self, parent: str, kinds: Container[object]) -> None:
        shared = (self._shared_experts(name) for name in self._family.stored_names(parent))
        if any(fmt.fuses_as not in kinds for fmt in next((found for found in shared if found), {}).values()):
            raise ValueError(
                f"{parent}: shared experts are in another format than routed ones, and SGLang would make them one "
                "layer; start it with --disable-shared-experts-fusion"
            )

    # The interface of QuantizationConfig

    def get_name(self) -> str:
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        dtypes = [torch.bfloat16, torch.half, torch.float32]
        return [
            dtype for dtype in dtypes if all(dtype in fmt.get_supported_act_dtypes() for fmt in self.native.values())
        ]

    def get_min_capability(self) -> int:  # an instance method, as in Fp8Config
        return max(fmt.get_min_capability() for fmt in self.native.values())

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    def get_scaled_act_names(self) -> list[str]:
        return []

    def apply_weight_name_mapper(self, hf_to_sglang_mapper: Any) -> None:
        self._mapper = hf_to_sglang_mapper


def _other_names(formats: Mapping[str, Format]) -> dict[str, Format]:
    """Other names that SGLang may use for the modules of a decoder inside a larger model.

    SGLang's decoder classes name their layers ``model.layers...`` wherever the decoder is. A name that could mean
    modules of different formats is left out, so that its layer is refused.
    """
    found: dict[str, Format] = {}
    ambiguous = set()
    for name, fmt in formats.items():
        for other in name_forms(name):
            if found.setdefault(other, fmt) != fmt:
                ambiguous.add(other)
    return {name: fmt for name, fmt in found.items() if name not in ambiguous}
