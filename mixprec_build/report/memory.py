"""What a checkpoint needs on GPUs: weights of a rank, the KV cache of tokens and sequences, and what SGLang reserves.

``mem_fraction_static`` is that of SGLang 0.5.17 with its default flags (server_args.py,
``_handle_gpu_memory_settings`` and ``adjust_mem_fraction_for_vlm``); what it leaves to the cache is shared as in
``_profile_available_bytes`` and ``_handle_max_mamba_cache`` of mem_cache/kv_cache_configurator.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from math import prod
from typing import TYPE_CHECKING, Any

from ..checkpoint.degree import Degree
from ..errors import SplitError
from ..families.cache import CacheFacts, UnknownCache
from ..families.facts import ModelFacts
from ..formats.base import Format
from ..ranks.splitter import Splitter
from ..recipe.recipe import parse_size
from ..storage.module import StoredModule
from ..text import human

if TYPE_CHECKING:
    from ..checkpoint.typed import Source
    from ..planning.types import Plan

__all__ = ["FP8_CACHE", "Gpus", "Reserve", "memory_facts", "memory_of_plan", "memory_of_source", "reserve_of"]

FP8_CACHE = "fp8_e4m3"
CONTEXT_BYTES = 1 << 30
"""Bytes of a rank's CUDA context, NCCL and libraries, which SGLang's fraction does not know. Measured: 0.6 to 1 GiB."""
_MIB = 1 << 20
_MOST_GPUS = 1024
_MOST_TOKENS = 1 << 40

# server_args.py: GPUs below these MiB -> tokens of a chunk of prefill, largest batch of a graph below and from tp 4
_BY_MEMORY = (
    (20 * 1024, 2048, 8, 8),
    (35 * 1024, 2048, 24, 80),
    (60 * 1024, 4096, 32, 160),
    (160 * 1024, 8192, 256, 512),
)
_LARGEST = (16384, 512, 512)
_STATES_SHARE = 0.9  # mamba_full_memory_ratio
# _calculate_mamba_ratio: 3, and 2 for the extra buffers of overlapped scheduling
_STATES_OF_A_REQUEST = 5

_SIZES = tuple(size * 10**9 for size in (24, 32, 48, 80, 96, 141, 180, 288))
"""GPUs that are named where the given ones are too small."""
_DEGREES = (1, 2, 4, 8, 16)


@dataclass(frozen=True, slots=True)
class Gpus:
    """GPUs of one size, one tensor-parallel rank on each."""

    number: int
    nbytes: int

    @classmethod
    def parse(cls, text: str) -> Gpus:
        """``"4x80GB"``, ``"8x81559MiB"``, ``"24GB"``. Raises :class:`ValueError`."""
        found = re.fullmatch(r"(?:(\d{1,6})\s*[x×*]\s*)?(.+)", text.strip())
        try:
            number, nbytes = int(found[1] or 1) if found else 0, parse_size(found[2]) if found else 0
        except ValueError:
            number = nbytes = 0
        if not (1 <= number <= _MOST_GPUS and 10**9 <= nbytes <= 10**14):
            raise ValueError(f"{text!r} is no number and size of GPUs; write 4x80GB, or 4x81559MiB as nvidia-smi says")
        return cls(number, nbytes)

    def __str__(self) -> str:
        return f"{self.number} x {human(self.nbytes)}"


@dataclass(frozen=True, slots=True)
class Reserve:
    """What SGLang leaves free of a GPU for activations and CUDA graphs."""

    prefill_tokens: int
    """``--chunked-prefill-size``"""
    graph_batch: int
    """The largest batch of a decoding CUDA graph."""
    mem_fraction_static: float

    def free_for_activations(self, total: int) -> int:
        """Bytes of a GPU of ``total`` bytes."""
        return total - int(total * self.mem_fraction_static)


def reserve_of(gpu_bytes: int, tp: int, latent: bool, encoder: tuple[int, int] | None = None) -> Reserve:
    """The settings that SGLang chooses for a GPU.

    Args:
        latent: whether attention is latent (MLA).
        encoder: layers and width of an encoder of images, if there is one.
    """
    mib = gpu_bytes / _MIB
    row = next((row[1:] for row in _BY_MEMORY if mib < row[0]), _LARGEST)
    tokens, batch = row[0], row[1] if tp < 4 else row[2]
    reserved = 512 + max(tokens, 2048) * 1.5 + tp / 8 * 1024 + batch * 2
    reserved += 1.5 * 1024 if latent else _prefill_graphs(tokens) * 8
    if mib > 60 * 1024:
        reserved = max(reserved, 10 * 1024)
    fraction = round((mib - reserved) / mib, 3)
    if encoder is not None:
        layers, width = encoder
        complexity = layers * width**2 / (24 * 1024**2)
        fraction *= 0.95 * max(0.8, min(1.05, 1 - 0.1 * (complexity - 1)))
    return Reserve(tokens, batch, max(fraction, 0.0))


def _prefill_graphs(most: int) -> int:
    """The number of sizes that ``_generate_prefill_cuda_graph_batch_sizes`` captures."""
    steps = ((4, 33, 4), (48, 257, 16), (288, 513, 32), (576, 1025, 64), (1280, 4097, 256), (4608, most + 1, 512))
    return sum(size <= most for step in steps for size in range(*step))


def memory_of_plan(plan: Plan, gpus: Gpus, context: int, **options: Any) -> dict[str, Any]:
    """As :func:`memory_facts`, of what a plan builds."""
    modules = {name: (module.format, module.stored) for name, module in plan.modules.items()}
    return memory_facts(modules, plan.sources.model.facts, gpus, context, **options)


def memory_of_source(source: Source, gpus: Gpus, context: int, **options: Any) -> dict[str, Any]:
    """As :func:`memory_facts`, of a checkpoint. Raises :class:`SourceError` where a format is not supported."""
    modules = {name: (source.format_of(name), module) for name, module in source.checkpoint.modules.items()}
    return memory_facts(modules, source.facts, gpus, context, **options)


def memory_facts(
    modules: Mapping[str, tuple[Format, StoredModule]],
    facts: ModelFacts,
    gpus: Gpus,
    context: int,
    *,
    cache_dtype: str = "auto",
    ep: int = 1,
) -> dict[str, Any]:
    """What a checkpoint needs on these GPUs, as plain data; bytes are those of the rank that has most.

    Args:
        modules: all of its modules, each with its format and tensors.
        context: tokens of a sequence.
        cache_dtype: ``auto`` for 16 bits, or ``fp8_e4m3``, as ``--kv-cache-dtype`` of SGLang.
        ep: expert-parallel ranks among the GPUs.

    Raises:
        SplitError: the model cannot be cut for so many ranks.
        ValueError: ``context`` or ``cache_dtype`` is out of range.
    """
    if not 1 <= context <= _MOST_TOKENS:
        raise ValueError(f"a context of {context} tokens; write a number of 1 or more")
    if cache_dtype not in ("auto", FP8_CACHE):
        raise ValueError(f"{cache_dtype!r} is no dtype of the cache; write auto or {FP8_CACHE}")
    needs = _Needs(modules, facts)
    try:
        found = needs.on(gpus, context, cache_dtype, ep)
    except SplitError as error:
        raise SplitError(f"on {gpus}: {error}") from error
    if not found["fits"] and found["sequences"] is not None:
        found["would_fit"] = list(needs.alternatives(gpus, context, cache_dtype, ep, found))
    return found


class _Needs:
    """The needs of one checkpoint, whose ranks are cut once for each degree."""

    def __init__(self, modules: Mapping[str, tuple[Format, StoredModule]], facts: ModelFacts):
        family, layers = facts.family, facts.layers
        drafts = {name for name in modules if family.is_draft(name, layers)}
        self._facts = facts
        self._modules = {name: both for name, both in modules.items() if name not in drafts}
        self._drafts = sum(modules[name][1].nbytes for name in drafts)
        self._rank = cache(self._largest_rank)

    def on(self, gpus: Gpus, context: int, cache_dtype: str, ep: int) -> dict[str, Any]:
        """The facts for some GPUs. Raises :class:`SplitError`."""
        degree = Degree(gpus.number, ep)
        weights, remarks = self._rank(degree)
        known = self._facts.cache
        latent = isinstance(known, CacheFacts) and known.latent is not None
        reserve = reserve_of(gpus.nbytes, degree.tp, latent, self._facts.encoder)
        activations = reserve.free_for_activations(gpus.nbytes - CONTEXT_BYTES)
        copies = self._copies(degree.tp)
        free = gpus.nbytes - CONTEXT_BYTES - activations - weights - copies
        return {
            "gpus": gpus.number,
            "gpu_bytes": gpus.nbytes,
            "tp": degree.tp,
            "ep": degree.ep,
            "options": degree.options,
            "context": context,
            "kv_cache_dtype": cache_dtype,
            "weight_bytes": weights,
            "unquantized_copy_bytes": copies,
            "draft_bytes_left_out": self._drafts,
            "cuda_bytes": CONTEXT_BYTES,
            "reserved_bytes": activations,
            "reserve": asdict(reserve),
            "notes": remarks,
            **_cache_on(known, degree.tp, 1 if cache_dtype == FP8_CACHE else 2, free, context),
        }

    def _largest_rank(self, degree: Degree) -> tuple[int, list[str]]:
        """Bytes of the rank that has most, and remarks on zeros."""
        if degree.tp == 1 and not (self._facts.names_family and self._facts.family.can_be_cut):
            return sum(stored.nbytes for _, stored in self._modules.values()), []
        splitter = Splitter(self._modules, self._facts, degree)
        firsts = range(0, degree.tp, degree.moe_tp)
        return max(sum(p.nbytes for p in splitter.parameters(rank)) for rank in firsts), splitter.remarks()

    def _copies(self, tp: int) -> int:
        known = self._facts.cache
        names = known.copied(self._modules) if isinstance(known, CacheFacts) else []
        shapes = (fmt.shape(stored) for fmt, stored in (self._modules[name] for name in names))
        return sum(2 * prod(shape) for shape in shapes) // tp

    def alternatives(
        self, gpus: Gpus, context: int, cache_dtype: str, ep: int, found: Mapping[str, Any]
    ) -> Iterator[dict[str, Any]]:
        """Yields changes each of which lets a sequence fit: a cache in FP8, a shorter context, more or larger GPUs."""
        if cache_dtype == "auto" and self.on(gpus, context, FP8_CACHE, ep)["fits"]:
            yield {"change": "kv_cache_dtype", "kv_cache_dtype": FP8_CACHE}
        shorter = found["tokens"] // 1024 * 1024
        if shorter and self.on(gpus, shorter, cache_dtype, ep)["fits"]:
            yield {"change": "context", "context": shorter}
        more = (number for number in _DEGREES if number > gpus.number)
        larger = (size for size in _SIZES if size > gpus.nbytes)
        for change, choices in (
            ("gpus", (Gpus(number, gpus.nbytes) for number in more)),
            ("gpu_bytes", (Gpus(gpus.number, size) for size in larger)),
        ):
            for other in choices:
                try:
                    fits = self.on(other, context, cache_dtype, ep)["fits"]
                except SplitError:
                    continue
                if fits:
                    yield {"change": change, "gpus": other.number, "gpu_bytes": other.nbytes}
                    break


def _cache_on(known: CacheFacts | UnknownCache, tp: int, item: int, free: int, context: int) -> dict[str, Any]:
    """What fits into ``free`` bytes of a rank. Numbers that are not known are None."""
    if isinstance(known, UnknownCache):
        return {
            "cache": None,
            "cache_unknown": known.reason,
            "bytes_per_token": None,
            "bytes_per_sequence": None,
            "cache_bytes": max(free, 0),
            "tokens": None,
            "sequences": None,
            "fits": False if free <= 0 else None,
        }
    token, sequence = known.bytes_per_token(tp, item), known.bytes_per_sequence(tp)
    slots, room = 0, max(free, 0)
    if sequence:
        slots = max(int((room * _STATES_SHARE / (1 + _STATES_SHARE) - sequence) // sequence), 0)
        room = max(room - (slots + 1) * sequence, 0)
    tokens = int(room // token)
    sequences = tokens // context
    if sequence:
        sequences = min(sequences, slots // _STATES_OF_A_REQUEST)
    return {
        "cache": known.kind,
        "cache_unknown": None,
        "bytes_per_token": token,
        "bytes_per_sequence": sequence,
        "cache_bytes": max(free, 0),
        "tokens": tokens,
        "sequences": sequences,
        "fits": sequences > 0,
    }
