"""Reads exactly what a rank needs, directly into its parameters.

Each of SGLang's parameters consists of rectangles of the checkpoint's tensors, which are computed before anything is
read. A rank's own files (``mixprec split``) have parameters as they are in memory, in a few large tensors; in merged
files, each rectangle is read by itself. Threads read, through pinned memory to the GPU. Where mixprec cannot compute
the rectangles, SGLang's loader reads tensor by tensor (:mod:`mixprec_runtime.loading.strict`).
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from threading import local
from typing import Any

import numpy as np
import torch
from torch.nn import Module

from mixprec_build.checkpoint.checkpoint import Checkpoint
from mixprec_build.checkpoint.degree import Degree, parse_folder
from mixprec_build.checkpoint.manifest import Manifest, TensorEntry
from mixprec_build.checkpoint.typed import Source
from mixprec_build.errors import MixprecError, SplitError, VerifyError
from mixprec_build.families.draft_class import Draft
from mixprec_build.families.expected import tower_of
from mixprec_build.families.facts import ModelFacts
from mixprec_build.patterns.compress import compress
from mixprec_build.ranks.assemble import as_parameter, contents
from mixprec_build.ranks.files import INDEX, check_headers, open_rank, read_rank
from mixprec_build.ranks.merged import open_compiled, splitter_of
from mixprec_build.ranks.pieces import Parameter
from mixprec_build.storage.disk import inside
from mixprec_build.storage.header import TensorInfo
from mixprec_build.storage.reader import FileReader, TensorReader
from mixprec_build.text import as_word, some

from ..contact.flags import server_args, value_of
from .ledger import DTYPES, Ledger, LoadError, casts
from .repack import Repacking
from .strict import draft_of, expected_on_this_rank, has_no_towers, incomplete, may_be_empty

__all__ = ["Fetch", "Share", "load", "mismatch", "place", "rank_share", "require_class", "require_merged", "this_run"]


logger = logging.getLogger(__name__)

Fetch = Callable[[Iterable[str]], object]

_THREADS = 4
_BUFFER = 16 << 20


@dataclass(frozen=True, slots=True)
class Share:
    """The contents of this rank's parameters, and the files to read them from."""

    where: str
    """Names the files in messages."""
    parameters: Mapping[str, Parameter]
    padded: Mapping[str, tuple[int, int]]
    """MLP or ``...experts`` -> its columns ``(native, stored)``; see :func:`.pad.pad`."""
    path_of: Callable[[str], Path]

    def of_draft(self, draft: Draft) -> Share:
        """The part of it that is for draft layers, by the names of SGLang's class for them."""
        own = [parameter for name, parameter in self.parameters.items() if draft.expects(name)]
        parameters = [replace(parameter, name=draft.name_to_load(parameter.name)) for parameter in own]
        padded: dict[str, tuple[int, int]] = {}
        for name, columns in self.padded.items():
            if draft.expects(name):  # some classes pass names of the checkpoint to their layers
                padded |= {name: columns, draft.sglang_name(name): columns}
        return replace(
            self,
            where=f"draft layers from {self.where}",
            parameters={parameter.name: parameter for parameter in parameters},
            padded=padded,
        )


def rank_share(
    folder: Path,
    manifest: Manifest,
    fetch: Fetch | None = None,
    *,
    merged: bool = True,
    draft: bool = False,
    can_leave: Callable[[str], object] = lambda reason: None,
) -> Share | None:
    """Finds what this rank reads: its own files, else, with ``merged``, its share of the merged ones.

    None where SGLang's loader must read the merged files, because of arguments that change how tensors are cut, or of
    an unknown family of models; ``can_leave`` is told why before. None, too, where merged files are missing.

    Args:
        folder: the checkpoint.
        manifest: its manifest.
        fetch: downloads files, by their paths, from the hub to ``folder``; called for those to read only.
        merged: whether the merged files may be read.
        draft: whether it is for the model that drafts.
        can_leave: raises where SGLang's loader cannot read them, such as :func:`require_class`.

    Raises:
        RuntimeError: files are damaged, changed since the build, or cannot be fetched.
    """
    from sglang.srt.runtime_context import get_parallel

    parallel, args = get_parallel(), server_args()
    degree, rank = place()
    usual = (
        (parallel.attn_tp_size, parallel.attn_tp_rank) == (degree.attention_tp, rank % degree.attention_tp)
        and (parallel.moe_tp_size, parallel.moe_ep_rank) == (degree.moe_tp, rank // degree.moe_tp)
        and value_of(args, "moe_dense_tp_size") in (None, degree.tp)
    )
    if not usual:
        can_leave("--moe-dense-tp-size, --moe-dp-size and context parallelism change what ranks have; leave them out")
        return None
    places = _places()
    if places and draft:
        can_leave("--init-expert-location and --ep-num-redundant-experts are not looked at for drafts; leave them out")
        return None
    try:
        own = degree.folder(rank)
        download: Fetch = fetch or (lambda _: None)
        if own in manifest.ranks and not places:
            download([f"{own}/{INDEX}"])
        index = None if places else read_rank(folder, manifest, degree, rank)
        if index is not None:
            download([f"{own}/{file}" for file in index.files])
            files = index.folder
            check_headers(index)
            stored = _with_head({name: _stored(tensor) for name, tensor in open_rank(index).items()})
            return Share(f"the files in {files}", stored, index.padded, lambda file: inside(files, file))
        if not merged:
            can_leave("--load-format safetensors has SGLang's loader read the merged files; leave it out")
        elif manifest.rest is None:
            names = deque(["config.json", "model.safetensors.index.json", *manifest.shards])
            names.rotate(-rank)  # ranks fetch at the same time: each begins with another file
            download(names)
            how = {"replicated_head": bool(value_of(args, "enable_dp_lm_head")), "places": places}
            return _of_merged(folder, manifest, degree, rank, how, can_leave)
        return None
    except MixprecError as error:
        raise RuntimeError(str(error)) from error


def _places() -> dict[int, list[int]]:
    """Layer -> the expert at each place, by ``--init-expert-location`` and ``--ep-num-redundant-experts``.

    Empty where each expert has the place of its number.
    """
    from sglang.srt.eplb.expert_location import get_global_expert_location_metadata

    metadata = get_global_expert_location_metadata()
    if metadata is None:
        return {}
    layers: list[list[int]] = metadata.physical_to_logical_map_cpu.tolist()
    return {} if all(places == [*range(len(places))] for places in layers) else dict(enumerate(layers))


def place() -> tuple[Degree, int]:
    """The degree of this run, and the rank in it of this process."""
    from sglang.srt.runtime_context import get_parallel

    parallel = get_parallel()
    return Degree(parallel.tp_size, parallel.moe_ep_size, parallel.attn_dp_size), parallel.tp_rank


def _with_head(parameters: dict[str, Parameter]) -> dict[str, Parameter]:
    """Adds the ``lm_head`` tied to the embedding, which the last of several pipeline stages has as a parameter."""
    from sglang.srt.runtime_context import get_parallel

    embedding = parameters.get("model.embed_tokens.weight")
    if get_parallel().pp_size > 1 and embedding is not None:
        parameters.setdefault("lm_head.weight", replace(embedding, name="lm_head.weight"))
    return parameters


def _stored(tensor: TensorInfo) -> Parameter:
    """A parameter that is stored as one tensor, to be read row by row, also where it is of all experts."""
    if len(tensor.shape) < 3:
        return as_parameter(tensor)
    experts, rows, *columns = tensor.shape
    flat = tensor._replace(shape=(experts * rows, prod(columns)))
    return Parameter(tensor.name, tensor.dtype, tensor.shape, as_parameter(flat).pieces, experts=True)


def _of_merged(
    folder: Path,
    manifest: Manifest,
    degree: Degree,
    rank: int,
    how: Mapping[str, Any],
    can_leave: Callable[[str], object],
) -> Share | None:
    """A rank's share of the merged files; None where a file is missing, or tensors cannot be cut for it.

    ``how`` are options of :func:`.splitter_of`.
    """
    if not all((folder / name).exists() for name in manifest.shards):
        return None
    checkpoint = open_compiled(folder, manifest)
    changed = _changed(checkpoint, manifest)
    if changed is not None:
        raise VerifyError(f"{folder}: {changed}; `mixprec verify` finds all differences; build it again")
    try:
        splitter = splitter_of(Source.of("", checkpoint), degree, **how)
        parameters = _with_head({parameter.name: parameter for parameter in splitter.parameters(rank)})
    except SplitError as error:
        can_leave(str(error))
        logger.warning("mixprec: SGLang's loader, which is slower, reads the files: %s", error)
        return None
    padded = {name: (share.native, share.columns) for name, share in splitter.padded.items()}
    where = f"the weights in {folder} of rank {rank} of {degree}"
    return Share(where, parameters, padded, lambda file: inside(folder, file))


def _changed(checkpoint: Checkpoint, manifest: Manifest) -> str | None:
    """The first difference of the merged files' headers from those that were built, as a sentence; None if equal."""
    built = {file: entry.checksum for file, entry in manifest.shards.items()}
    headers = {file: shard.header_checksum for file, shard in checkpoint.shards.items()}
    if headers == built:
        return None
    for name, entry, info in manifest.differences(checkpoint.tensors()):
        if info is None:
            return f"{name}, which the manifest lists, is not in its files"
        if entry is None:
            return f"{name} is not in the checkpoint's manifest: a file was added or changed after building"
        return (
            f"{name} is {info.dtype} {list(info.shape)} in {info.file}, and was built as {entry.dtype} "
            f"{list(entry.shape)} in {entry.file}: the checkpoint was changed after building"
        )
    file = min(file for file in headers.keys() | built.keys() if headers.get(file) != built.get(file))
    return f"{file}: its header was changed after building"


def require_merged(folder: Path, manifest: Manifest, because: str, *, on_hub: bool = False) -> None:
    """Raises ``RuntimeError`` where merged files are missing; ``because`` says why this run needs them."""
    dropped = manifest.rest is not None
    missing = [name for name in manifest.shards if dropped or not (folder / name).exists()]
    if not missing:
        return
    degrees = sorted({degree for degree, _ in filter(None, map(parse_folder, manifest.ranks))}, key=str)
    have, remedies = "it has no files cut for ranks", []
    if degrees:
        have = f"it has files cut for {', '.join(map(str, degrees))}"
        remedies.append(f"start SGLang with {' or '.join(f'`{degree.options}`' for degree in degrees)}")
    if not dropped:
        remedies.append("copy the merged files to it, and `mixprec split` them for this run")
    elif on_hub:
        remedies.append(
            "download the whole repository, and restore its merged files with `mixprec split --layout both`"
        )
    else:
        remedies.append(f"restore the merged files with `mixprec split {as_word(folder)} --layout both`")
    raise RuntimeError(f"{folder}: {missing[0]} is not there, and {because}; {have}: {', or '.join(remedies)}")


def require_class(facts: ModelFacts, because: str) -> None:
    """Raises ``RuntimeError`` where SGLang's class cannot load a checkpoint; ``because`` says why mixprec cannot."""
    if facts.family.needs_own_loader:
        raise RuntimeError(
            f"SGLang's class for {facts.own_model_type} cannot load single experts, as compiled checkpoints have them, "
            f"and mixprec's loader cannot be used: {because}"
        )


def this_run() -> str:
    """The degree of this run, such as ``"tp4-ep1"``, and whether experts have places of their own."""
    return f"{place()[0]}{', with experts at other places' if _places() else ''}"


def mismatch(model: Module, share: Share) -> str | None:
    """Why ``share`` does not fit the parameters of ``model``, which SGLang may cut in another way; None if it does."""
    if any(getattr(module, "num_fused_shared_experts", 0) for module in model.modules()):
        return "shared experts are stored apart from routed ones: give --disable-shared-experts-fusion"
    parameters, empty, left_to_class = _parameters(model), may_be_empty(model), _left_to_class(model)
    for name, parameter in parameters.items():
        if left_to_class(name):
            continue
        stored = share.parameters.get(name)
        if stored is None:
            if empty(name):
                continue
            return f"they have no {name}"
        if stored.shape != tuple(parameter.shape):
            return f"{name} is {list(stored.shape)} in them and {list(parameter.shape)} in SGLang"
        if not casts(DTYPES.get(stored.dtype), parameter.dtype):
            return f"{name} is {stored.dtype} in them and {parameter.dtype} in SGLang"
    belongs = expected_on_this_rank(model)
    extra = sorted(n for n in share.parameters.keys() - parameters.keys() if not left_to_class(n) and belongs(n))
    return f"SGLang has no {extra[0]}" if extra else None


def _left_to_class(model: Module) -> Callable[[str], bool]:
    """Returns a predicate for names of tensors and parameters that SGLang's class loads itself."""
    return ModelFacts.of_loaded(getattr(model, "config", None)).family.is_left_to_class


def _parameters(model: Module) -> dict[str, torch.Tensor]:
    return {name: parameter.data for name, parameter in model.named_parameters() if parameter.numel()}


def load(model: Module, share: Share, finish: Callable[[Iterable[tuple[str, torch.Tensor]]], Any]) -> Any:
    """Fills the parameters of ``model`` and returns the result of ``finish``, which is the model's ``load_weights``.

    ``finish`` gets only the tensors that SGLang's class loads itself: those of encoders, whose parameters it names and
    cuts in its own way, and those that it computes parameters from.

    Raises:
        LoadError: a file is damaged, or cannot be read.
    """
    parameters = _parameters(model)
    device = next((parameter.device for parameter in parameters.values() if parameter.is_cuda), None)
    left_to_class = _left_to_class(model)
    taken = [share.parameters[name] for name in parameters if name in share.parameters and not left_to_class(name)]
    if device is not None:
        torch.cuda.synchronize()  # parameters must be initialized before other streams write to them

    def begin() -> None:
        # The default is GPU 0, where a context would take memory.
        if device is not None:
            torch.cuda.set_device(device)

    try:
        with FileReader(share.path_of) as reader, ThreadPoolExecutor(_THREADS, initializer=begin) as pool:
            copies, started = _Copies(reader), time.perf_counter()
            # Without a GPU there is nothing to repack.
            repacking = Repacking(model, {parameter.name for parameter in taken if device is not None})
            ordered = sorted(taken, key=lambda parameter: (repacking.place(parameter.name), -parameter.nbytes))
            # Nothing here keeps a filled parameter, whose memory repacking frees.
            filled = pool.map(lambda parameter: copies.fill(parameters.pop(parameter.name), parameter), ordered)
            for parameter, _ in zip(ordered, filled, strict=True):
                repacking.filled(parameter.name)
            size, seconds = sum(parameter.nbytes for parameter in taken) / 1e9, time.perf_counter() - started
            logger.debug("mixprec: read %s: %.2f GB in %.1f s", share.where, size, seconds)
            result = _load_by_class(model, share, copies, finish)
    except (MixprecError, OSError) as error:
        raise LoadError(str(error)) from error
    # Some models derive tensors for the names that load_weights got, and it got none: SGLang wants this call of loaders
    # that do not use load_weights (model_loader/loader.py:333). Pixtral's class does not pass it on to its decoder.
    decoder = getattr(model, "language_model", None)
    derive = getattr(model, "post_load_weights", getattr(decoder, "post_load_weights", None))
    if derive is not None:
        derive()
    return result


def _load_by_class(
    model: Module, share: Share, copies: _Copies, finish: Callable[[Iterable[tuple[str, torch.Tensor]]], Any]
) -> Any:
    """Passes the tensors that SGLang's class loads itself to ``finish``, and checks that they fill their parameters.

    Raises:
        LoadError: tensors were lost, or parameters not filled; the message names them.
    """
    left_to_class, belongs, text_only = _left_to_class(model), expected_on_this_rank(model), has_no_towers(model)

    def here(name: str) -> bool:
        return left_to_class(name) and (not text_only if tower_of(name) is not None else belongs(name))

    stored = {name: value for name, value in share.parameters.items() if here(name)}
    if not stored:
        draft, family = draft_of(model), ModelFacts.of_loaded(getattr(model, "config", None)).family
        unneeded = family.needs_own_loader or (draft is not None and draft.described.needs_tensors)
        return None if unneeded else finish(iter(()))

    def read(parameter: Parameter) -> torch.Tensor:
        into = torch.empty(parameter.shape, dtype=DTYPES[parameter.dtype], device="cpu")
        copies.fill(into, parameter)
        return into

    declared = {name: TensorEntry(value.dtype, value.shape, value.nbytes, "", "", "") for name, value in stored.items()}
    filled = ((name, value) for name, value in model.named_parameters() if left_to_class(name))
    ledger = Ledger(declared, filled)
    result = finish(ledger.follow((name, read(value)) for name, value in stored.items()))
    lost, unfilled = incomplete(ledger, model)
    if lost or unfilled:
        what = some(compress([*lost, *unfilled]))
        raise LoadError(f"SGLang's {type(model).__name__} did not load {what} in full")
    return result


class _Copies(local):
    """Fills parameters; those on a GPU through two buffers of pinned memory for each thread."""

    def __init__(self, reader: TensorReader):
        self._reader = reader
        self._buffers: list[tuple[torch.Tensor, torch.cuda.Event]] = []
        self._stream: torch.cuda.Stream | None = None

    def fill(self, into: torch.Tensor, parameter: Parameter) -> None:
        dtype = DTYPES[parameter.dtype]
        if into.dtype == dtype and into.is_contiguous() and into.device.type in ("cpu", "cuda"):
            self._fill_bytes(into.reshape(-1).view(torch.uint8), parameter)
        else:
            stored = torch.empty(parameter.shape, dtype=dtype)
            self._fill_bytes(stored.reshape(-1).view(torch.uint8), parameter)
            into.copy_(stored.reshape(into.shape))

    def _fill_bytes(self, into: torch.Tensor, parameter: Parameter) -> None:
        if into.is_cuda:
            self._stream = self._stream or torch.cuda.Stream(into.device)  # type: ignore[no-untyped-call]
            with torch.cuda.stream(self._stream):
                self._through_buffers(into, parameter)
            self._stream.synchronize()  # what uses it runs on another stream
            return
        at = 0
        in_place: Callable[[int], Any] = lambda nbytes: into[at : at + nbytes].numpy()  # noqa: E731
        for chunk in contents(parameter, self._reader, most=_BUFFER, allocate=in_place):
            at += len(chunk)

    def _through_buffers(self, into: torch.Tensor, parameter: Parameter) -> None:
        at = 0
        for chunk in contents(parameter, self._reader, most=_BUFFER, allocate=self._next_buffer):
            buffer, copied = self._buffers[-1]
            into[at : at + len(chunk)].copy_(buffer[: len(chunk)], non_blocking=True)
            copied.record()
            at += len(chunk)

    def _next_buffer(self, nbytes: int) -> np.ndarray[Any, Any]:
        """The less recently used buffer, once its copy to the GPU is complete."""
        if len(self._buffers) < 2:
            self._buffers.append((torch.empty(0, dtype=torch.uint8), torch.cuda.Event()))  # type: ignore[no-untyped-call]
        else:
            self._buffers.reverse()
        buffer, copied = self._buffers[-1]
        copied.synchronize()
        if len(buffer) < nbytes:
            buffer = torch.empty(max(nbytes, _BUFFER), dtype=torch.uint8, pin_memory=torch.cuda.is_available())
            self._buffers[-1] = buffer, copied
        window: np.ndarray[Any, Any] = buffer[:nbytes].numpy()
        return window
