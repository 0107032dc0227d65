"""``--quantization mixprec``: gives each layer SGLang's own method for the format of its modules."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

import torch
from sglang.srt.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase

from mixprec_build.checkpoint.declaration import METHOD, Declaration
from mixprec_build.errors import SourceError
from mixprec_build.families.base import Family
from mixprec_build.families.cache_scales import cache_scale, parameters_of
from mixprec_build.families.names import last_word, layer_prefix, numbered_part
from mixprec_build.families.unknown import UNKNOWN
from mixprec_build.formats.base import Format
from mixprec_build.formats.names import name_forms
from mixprec_build.patterns.compress import compress
from mixprec_build.text import some

from . import launch
from .experts.method import MixedExpertsMethod
from .formats.registry import model_attributes
from .loading.pad import pad
from .native import NativeFormat

__all__ = ["MixPrecConfig"]


class MixPrecConfig(QuantizationConfig):
    """The quantization of a compiled checkpoint.

    ``from_config`` reads ``quantization_config`` of ``config.json``; :meth:`bind` must follow, before layers are made.
    """

    # Some of SGLang's models read this attribute of any config.
    weight_block_size = None

    def __init__(self, declaration: Declaration | None = None):
        super().__init__()
        if declaration is None:  # SGLang does this for a draft model without quantization_config
            raise ValueError(
                "--quantization mixprec is for checkpoints that mixprec built, and config.json of this one names no "
                "quantization: leave it out; for a draft model, add --speculative-draft-model-quantization unquant"
            )
        self.declaration = declaration
        self.__dict__ |= model_attributes()
        self.native = {fmt: NativeFormat(fmt) for fmt in declaration.formats.values()}
        self.padded: Mapping[str, tuple[int, int]] = {}
        """MLP or ``...experts`` that zeros are added to on this rank -> its columns; see :func:`.loading.pad.pad`."""
        self.cache_scales: Mapping[str, Sequence[str]] = {}
        """Scale of the KV cache in the checkpoint -> the parameters of SGLang's attention that are filled with it."""
        self._mapper: Any = None
        self._family = UNKNOWN
        self._formats: dict[str, Format] | None = None
        self._experts: dict[str, dict[int, dict[str, Format]]] = {}
        self._by_last_word: dict[str, list[str]] | None = None

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

    def bind(self, modules: Iterable[str], family: Family = UNKNOWN) -> Mapping[str, Format]:
        """Sets the modules of the checkpoint, by their Hugging Face names, and the family of SGLang's model.

        Returns the format of each module.
        """
        declared = {name: self.declaration.format_of(name) for name in modules}
        mapped = declared if self._mapper is None else self._mapper.apply_dict(declared)
        formats = {**_other_names({**declared, **mapped}), **declared, **mapped}
        experts: dict[str, dict[int, dict[str, Format]]] = defaultdict(lambda: defaultdict(dict))
        for name, fmt in formats.items():
            found = numbered_part(name)
            if found is not None:
                parent, number, part = found
                experts[parent][number][part] = fmt
        self._formats, self._experts, self._family = formats, experts, family
        self._by_last_word = None
        names = {name: name for name in declared}
        self.cache_scales = {
            name: [family.sglang_name(parameter) for parameter in parameters_of(scale, formats)]
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
            if isinstance(layer, FusedMoE):
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
        return self._members_anywhere(prefix, joined)

    def _members_anywhere(self, prefix: str, joined: Iterable[str]) -> dict[str, Format]:
        """The modules that a name without the layer's number may mean, in all layers; empty where ``prefix`` has one.

        models/hunyuan.py names every layer's projection ``.self_attn.qkv_proj``.

        Raises:
            ValueError: these modules have different formats.
        """
        assert self._formats is not None
        short = prefix.strip(".")
        if layer_prefix(f".{short}"):
            return {}
        if self._by_last_word is None:
            self._by_last_word = defaultdict(list)
            for name in self._formats:
                self._by_last_word[last_word(name)].append(name)
        parent, _, last = short.rpartition(".")
        found = {
            name: self._formats[name]
            for word in (last, *joined)
            for name in self._by_last_word.get(word, ())
            if name.endswith(f".{parent}.{word}" if parent else f".{word}")
        }
        if len({fmt.fuses_as for fmt in found.values()}) > 1:
            raise ValueError(_ambiguous_name(prefix, found))
        return found

    def _experts_anywhere(self, prefix: str) -> dict[int, dict[str, Format]]:
        """As :meth:`_members_anywhere`, for experts: those of one layer, once all layers are known to be alike."""
        short = prefix.strip(".")
        if layer_prefix(f".{short}."):
            return {}
        last = last_word(short) or self._family.experts
        layers = [
            self._experts[name]
            for name in self._experts
            if last_word(name) == self._family.experts == last and f".{name}".endswith(f".{short}" if short else "")
        ]
        if any(layer != layers[0] for layer in layers):
            raise ValueError(_ambiguous_name(prefix, [name for name in self._experts if last_word(name) == last]))
        return layers[0] if layers else {}

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
        found = (self._experts[name] for name in self._family.stored_names(prefix) if name in self._experts)
        stored = next(found, None) or self._experts_anywhere(prefix)
        for expert, parts in sorted(stored.items()):
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
            launch.check_mixed_experts()
            return MixedExpertsMethod(formats, self.native, prefix)
        return self._native(next(iter(kinds.values()), None)).get_quant_method(layer, prefix)

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


def _ambiguous_name(prefix: str, modules: Iterable[str]) -> str:
    return (
        f"SGLang's model names this layer {prefix!r}, without its number, and the checkpoint has "
        f"{some(compress(modules))} in several formats: store them all in one format to serve this model"
    )
