"""Opens a Hugging Face checkpoint by its headers alone: names, dtypes, shapes, byte ranges.

Weights are never mapped into memory, and are read only by :meth:`Checkpoint.read`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath, PureWindowsPath
from threading import Lock

import xxhash

from ..errors import HubError, SourceError
from ..families.facts import ModelFacts
from ..families.mistral_config import config_of, has_latent_attention
from ..formats.registry import leaves as known_leaves
from ..patterns.pattern import MAX_NAME
from ..storage.disk import source_errors
from ..storage.folder import Files, LocalFolder
from ..storage.header import TensorInfo, header_length, parse_header
from ..storage.limits import load_json
from ..storage.module import StoredModule, split_name
from ..text import URL, as_word, hide_password
from .beside import BesideFiles
from .checkpoint import INDEX, REST, Checkpoint, Shard
from .declaration import METHOD
from .declared import read_declarations
from .experts_apart import take_experts_apart
from .flat_scales import without_reduced_dimensions
from .index_remarks import remarks_on_index
from .input_scales import beside_their_weights
from .mistral_layout import (
    OWN_INDEX,
    PARAMS,
    is_consolidated,
    is_own,
    lacks_config,
    refuse_own_names,
    usual_name,
    with_usual_names,
)

__all__ = ["open_checkpoint", "open_storage"]

_MAX_CONFIG_BYTES = 16 << 20
_MAX_INDEX_BYTES = 256 << 20  # Kimi-K3 in MXFP4 has 494,000 entries, a model of 2.4T in GPTQ 565,000
_MAX_JSON_VALUES = 2_000_000
_MAX_INDEX_VALUES = 4_000_000  # an entry takes two
_MAX_JSON_DEPTH = 64
_MAX_HEADERS_BYTES = 512 << 20  # of all shards; those of 1,500,000 tensors take 220 MB
_MAX_TENSORS = 1_500_000
_FIRST_READ = 256 << 10  # most headers come with their length in one read

_ADAPTER = "adapter_config.json"
_IS_ADAPTER = (
    f"an adapter ({_ADAPTER}) and no checkpoint: merge it into its base first, e.g. with PEFT: "
    "merge_and_unload().save_pretrained(...)"
)
_SHARD = re.compile(r"(?P<before>.*)-(?P<number>\d{1,6})-of-(?P<count>\d{1,6})\.safetensors")
_NOT_IN_NAMES = re.compile(r"[ *?{}\[\]]")  # nor what is invisible; these are special in patterns


def open_checkpoint(
    location: str, *, relative_to: Path | None = None, unread: dict[str, str] | None = None
) -> Checkpoint:
    """Opens a local folder (relative ones start at ``relative_to``) or a hub id with optional ``@revision``.

    With ``unread`` a file that cannot be read, is missing or contradicts another is recorded there with the reason, and
    the other files are opened.

    Raises:
        SourceError: nothing is there, only pickle files are there, or a file contradicts itself or another.
    """
    return open_storage(_locate(location, relative_to or Path()), location, unread=unread)


def open_storage(
    storage: Files,
    location: str,
    headers: Iterable[tuple[str, bytes]] | None = None,
    unread: dict[str, str] | None = None,
) -> Checkpoint:
    """Opens a checkpoint whose files are found. ``headers``: (file, header) of its shards, instead of reading them."""
    config = _config_of_own(storage, location)
    own = config is not None
    if config is None:
        config = _read_json(storage, location, "config.json", _MAX_CONFIG_BYTES)
    if config is None and _ADAPTER in storage.files:
        raise SourceError(_IS_ADAPTER, path=location)
    if config is None:
        reason = lacks_config(storage.files) or "no config.json: this is no Hugging Face checkpoint"
        raise SourceError(reason, path=location)
    facts = ModelFacts.of(config)
    declared = read_declarations(config, lambda name: _read_json(storage, location, name, _MAX_CONFIG_BYTES), location)

    compiled = bool(declared) and declared[0].quantization.get("quant_method") == METHOD
    index: dict[str, str] | None = None
    tensors: dict[str, TensorInfo] = {}
    shards: dict[str, Shard] = {}
    beside: frozenset[str] = frozenset()
    left: tuple[str, ...] = ()
    twice: set[str] = set()
    with ThreadPoolExecutor(max_workers=8) as pool:
        if headers is None:
            names, index = _shard_names(storage, location, unread, own=own)
            reader = _HeaderReader(storage, location)
            read = reader.read if unread is None else reader.try_to_read
            # At once only where a network is waited for: memory in which threads read is given back late.
            each = map if isinstance(storage, LocalFolder) else pool.map
            for shard, data in zip(names, each(read, names), strict=True):
                try:
                    if isinstance(data, SourceError):
                        raise data
                    twice |= _add_shard(storage, location, shard, data, tensors, shards, None if compiled else index)
                except SourceError as error:
                    if unread is None:
                        raise
                    unread[shard] = str(error)
            beside, left = _add_beside(BesideFiles(facts, storage.files, names), reader, tensors, shards)
        else:
            for shard, data in headers:
                _add_shard(storage, location, shard, data, tensors, shards)
    absent = {}
    remarks: tuple[str, ...] = ()
    leaves = known_leaves()
    if index is not None:
        if unread:
            index = {name: shard for name, shard in index.items() if shard not in unread}
        if _offline(storage):
            away = {name: shard for name, shard in index.items() if shard not in storage.files}
            here = {(usual_name(name) if own else None) or name: shard for name, shard in away.items()}
            absent = {split_name(name, leaves)[0]: shard for name, shard in here.items()}
            index = {name: shard for name, shard in index.items() if shard in storage.files}
        remarks = tuple(remarks_on_index(index, tensors, beside, twice))
        if remarks and compiled:
            files = [shard for name, shard in index.items() if name not in tensors or tensors[name].file != shard]
            files += [tensor.file for name, tensor in tensors.items() if name not in index]
            text = f"{remarks[0]}: it or {files[0]} was changed after building"
            changed = SourceError(text, path=f"{location}/{INDEX}")
            if unread is None:
                raise changed
            unread[INDEX] = str(changed)
    index = None  # it may take as much memory as the modules

    shown: Mapping[str, TensorInfo] = tensors
    apart: frozenset[str] = frozenset()
    if own:
        shown = with_usual_names(tensors, location)
        apart = frozenset(shards)
    elif not compiled:
        refuse_own_names(tensors.values(), location)
        shown, apart = take_experts_apart(tensors, facts.family, facts.experts)
        shown, flat = without_reduced_dimensions(shown)
        shown, renamed = beside_their_weights(shown, facts.family)
        apart |= flat | renamed
    modules = _modules(shown, leaves, location)
    return Checkpoint(
        location, storage, facts, declared, shards, modules, absent, left, remarks, taken_apart=apart, own_layout=own
    )


def _config_of_own(storage: Files, location: str) -> dict[str, object] | None:
    """The ``config.json`` of a release in Mistral's own layout; None for all others, and for those that are refused."""
    params = _read_json(storage, location, PARAMS, _MAX_CONFIG_BYTES) if is_own(storage.files) else None
    return None if params is None or not has_latent_attention(params) else config_of(params, f"{location}/{PARAMS}")


def _modules(tensors: Mapping[str, TensorInfo], leaves: Set[str], location: str) -> dict[str, StoredModule]:
    """The modules that tensors are of. Raises :class:`SourceError` for a name that no model uses."""
    parts: dict[str, dict[str, TensorInfo]] = {}
    for name, tensor in tensors.items():
        module, leaf = split_name(name, leaves)
        stored = parts.get(module)
        if stored is None:
            # What follows the name of a module is one of ``leaves``, of which each is fine.
            if not module.isprintable() or _NOT_IN_NAMES.search(module):
                raise _bad_name(tensor, location)
            stored = parts[module] = {}
        if not 0 < len(name) <= MAX_NAME:
            raise _bad_name(tensor, location)
        stored[leaf] = tensor
    return {name: StoredModule(name, stored) for name, stored in parts.items()}


def _add_shard(
    storage: Files,
    location: str,
    shard: str,
    data: bytes,
    tensors: dict[str, TensorInfo],
    shards: dict[str, Shard],
    index: Mapping[str, str] | None = None,
) -> set[str]:
    """Adds the tensors in the header of a file, and returns those that a file before has, too.

    Such a tensor is taken from the one of both that ``index`` names.
    """
    size = _size(storage, shard)
    found, metadata = parse_header(data, path=f"{location}/{shard}", file=shard, file_size=size)
    twice = found.keys() & tensors.keys()
    for name in twice:
        meant = None if index is None else index.get(name)
        if meant not in (tensors[name].file, shard):
            raise SourceError(
                f"tensor {name!r} is in {tensors[name].file} and in {shard}, and no index says which of them is meant; "
                "fetch both again, or remove the file that is left over",
                path=location,
            )
        if meant != shard:
            del found[name]
    tensors |= found
    if len(tensors) > _MAX_TENSORS:
        raise SourceError(f"more than {_MAX_TENSORS} tensors", path=location)
    file = storage.cached(shard)
    with source_errors(Path(f"{location}/{shard}")):
        modified = None if file is None else file.stat().st_mtime_ns
    # Only `format` is needed of the metadata, which may take as much memory as the headers of all tensors.
    kept = {"format": metadata["format"]} if isinstance(metadata, dict) and "format" in metadata else None
    shards[shard] = Shard(size, len(data), xxhash.xxh3_128_hexdigest(data), kept, modified)
    return twice


def _add_beside(
    files: BesideFiles, reader: _HeaderReader, tensors: dict[str, TensorInfo], shards: dict[str, Shard]
) -> tuple[frozenset[str], tuple[str, ...]]:
    """Adds files that the index does not list and that belong to the checkpoint; returns these, and the others."""
    added: list[str] = []
    left: list[str] = []
    lacks_draft = bool(files.candidates) and files.lacks_draft(tensors)
    for file in files.candidates:
        belongs = files.certain(file)
        if belongs or lacks_draft:
            data = reader.read(file)
            belongs = belongs or files.is_draft_only(reader.names(file, data))
        if belongs:
            _add_shard(reader.storage, reader.location, file, data, tensors, shards)
        (added if belongs else left).append(file)
    return frozenset(added), tuple(left)


def _offline(storage: Files) -> bool:
    """Whether a hub's cache was opened instead of the hub: it may lack some shards."""
    return getattr(storage, "offline", None) is not None


def _locate(location: str, relative_to: Path) -> Files:
    try:
        folder = relative_to / Path(location).expanduser()
        if folder.is_dir():
            return LocalFolder.open(folder)
    except (OSError, RuntimeError) as error:  # RuntimeError for the home folder of a user that does not exist
        raise SourceError(f"cannot be looked at: {getattr(error, 'strerror', error)}", path=location) from error
    if URL.match(location):
        raise SourceError(
            "a URL; write a local folder or a hub id like org/name@revision", path=hide_password(location)
        )
    from ..storage.hub import HubRepo, parse_repo_id

    looks_local = location.startswith(("/", "./", "../", "~")) or location.count("/") != 1
    parsed = None if looks_local else parse_repo_id(location)
    if parsed is None:
        where = "" if Path(location).is_absolute() else f" ({folder.absolute()})"
        if folder.exists():
            raise SourceError(f"is no folder{where}; name the folder that the checkpoint's files are in", path=location)
        raise SourceError(f"no such folder{where}, and not a hub id like org/name@revision", path=location)
    try:
        return HubRepo.open(*parsed)
    except HubError as error:
        if folder.parent.is_dir():  # perhaps a mistyped path
            error.args = (f"{error}; and there is no folder {folder.absolute()}",)
        raise


def _read_json(
    storage: Files, location: str, name: str, limit: int, values: int = _MAX_JSON_VALUES
) -> dict[str, object] | None:
    if name not in storage.files:
        return None
    path = f"{location}/{name}"
    size = _size(storage, name)
    if size > limit:
        raise SourceError(f"{size} bytes; at most {limit} are read", path=path)
    try:
        data = load_json(storage.read(name, 0, size), values)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"not valid JSON: {error}", path=path) from error
    if not isinstance(data, dict):
        raise SourceError("not a JSON object", path=path)
    if _deeper_than(_MAX_JSON_DEPTH, data):
        # Printing or writing it would run out of stack.
        raise SourceError(f"nested deeper than {_MAX_JSON_DEPTH} levels", path=path)
    return data


def _deeper_than(depth: int, value: object) -> bool:
    level = [value]
    for _ in range(depth):
        inner = (node.values() if isinstance(node, dict) else node for node in level if isinstance(node, dict | list))
        level = [child for children in inner for child in children]
    return bool(level)


def _size(storage: Files, name: str) -> int:
    size = storage.files[name]
    # An offline cache knows a size only by the file itself.
    return storage.fetch([name])[name].stat().st_size if size is None else size


def _shard_names(
    storage: Files, location: str, unread: dict[str, str] | None = None, *, own: bool = False
) -> tuple[list[str], dict[str, str] | None]:
    """The shards of a checkpoint, and the index's tensor -> shard map if there is an index.

    ``own``: whether it is in Mistral's own layout.
    """
    index_file = OWN_INDEX if own else INDEX
    index = _read_json(storage, location, index_file, _MAX_INDEX_BYTES, _MAX_INDEX_VALUES)
    if index is not None:
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
            raise SourceError("`weight_map` must map tensor names to file names", path=f"{location}/{index_file}")
        shards = sorted(set(weight_map.values()))
        for shard in shards:
            pure = PureWindowsPath(shard)  # recognises backslashes and drives as well
            if pure.anchor or pure.drive or len(pure.parts) != 1 or PurePosixPath(shard).suffix != ".safetensors":
                raise SourceError(
                    f"names the file {shard!r}, which is no shard in this folder", path=f"{location}/{index_file}"
                )
            if shard not in storage.files and not _offline(storage):
                remedy = "fetch it again"
                if "model.safetensors" in storage.files and not any(other in storage.files for other in shards):
                    remedy = (
                        f"none of the files that {INDEX} names is there, but model.safetensors is: the index is "
                        "another checkpoint's; remove it"
                    )
                if isinstance(storage, LocalFolder) and (storage.folder / REST).is_dir():
                    remedy = (
                        "this checkpoint has files cut for ranks only: restore the merged ones with "
                        f"`mixprec split {as_word(storage.folder.absolute())} --layout both`"
                    )
                missing = SourceError(f"the shard {shard} is missing; {remedy}", path=location)
                if unread is None:
                    raise missing
                unread[shard] = str(missing)
        return [shard for shard in shards if shard in storage.files], weight_map
    found = [name for name in storage.files if name.endswith(".safetensors")]
    if found and all(name.startswith("adapter_model") for name in found):
        raise SourceError(_IS_ADAPTER, path=location)
    if own:
        found = [name for name in found if is_consolidated(name)]
    if "model.safetensors" in found or len(found) == 1:
        return ["model.safetensors" if "model.safetensors" in found else found[0]], None
    # A copy of the weights in Mistral's own layout beside them is no part of these.
    for complete in (found, [name for name in found if not is_consolidated(name)]):
        if complete and _are_all_shards(complete):
            return sorted(complete), None
    if found:
        raise SourceError(
            f"{len(found)} .safetensors files but no {index_file} that says which belong together", path=location
        )
    if any(name.endswith((".bin", ".pt", ".pth", ".gguf")) for name in storage.files):
        raise SourceError(
            "only safetensors files are read, and there are none here; convert it first, "
            "e.g. with transformers: save_pretrained(..., safe_serialization=True)",
            path=location,
        )
    raise SourceError("no safetensors files", path=location)


def _are_all_shards(files: Iterable[str]) -> bool:
    """Whether files are all that their names count, as ``model-00001-of-00002.safetensors`` does."""
    parts = [_SHARD.fullmatch(file) for file in files]
    counted = {(part["before"], int(part["count"])) for part in parts if part is not None}
    if None in parts or len(counted) != 1:
        return False
    ((_, count),) = counted
    return sorted(int(part["number"]) for part in parts if part is not None) == list(range(1, count + 1))


class _HeaderReader:
    """Reads the headers of shards. May be shared by threads."""

    def __init__(self, storage: Files, location: str):
        self.storage, self.location = storage, location
        self._lock, self._total = Lock(), 0

    def read(self, name: str) -> bytes:
        """The bytes before the data section of a shard."""
        size = _size(self.storage, name)
        first = self.storage.read(name, 0, min(size, _FIRST_READ))
        end = 8 + header_length(first[:8], path=f"{self.location}/{name}", file_size=size)
        with self._lock:
            self._total += end
            if self._total > _MAX_HEADERS_BYTES:
                raise SourceError(f"headers of more than {_MAX_HEADERS_BYTES} bytes in all", path=self.location)
        if end > len(first):
            first += self.storage.read(name, len(first), end - len(first))
        return first[:end]

    def try_to_read(self, name: str) -> bytes | SourceError:
        """As :meth:`read`, but returns an error instead of raising it."""
        try:
            return self.read(name)
        except SourceError as error:
            return error

    def names(self, file: str, header: bytes) -> list[str]:
        """The tensors that a file's header declares."""
        path, size = f"{self.location}/{file}", _size(self.storage, file)
        return list(parse_header(header, path=path, file=file, file_size=size)[0])


def _bad_name(tensor: TensorInfo, location: str) -> SourceError:
    name, path = tensor.name, f"{location}/{tensor.file}"
    if len(name) > MAX_NAME:
        return SourceError(f"tensor name {name[:MAX_NAME]!r}... is longer than any model's", path=path)
    return SourceError(f"tensor name {name!r} has characters no model uses", path=path)
