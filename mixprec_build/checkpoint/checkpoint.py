"""An opened checkpoint: names, dtypes, shapes and byte ranges, from its headers alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..families.facts import ModelFacts
from ..storage.folder import Files, LocalFolder
from ..storage.header import TensorInfo
from ..storage.module import StoredModule
from ..storage.reader import FileReader
from ..text import some
from .declared import Declared
from .mistral_layout import OWN_INDEX, PARAMS, is_consolidated

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Checkpoint", "ValueReader"]


INDEX = "model.safetensors.index.json"
_WITHOUT_CLASS = "Hugging Face's layout, for which SGLang has no class of this model"
REST = "presplit/rest"
"""The folder of what a compiled checkpoint keeps of merged files that were dropped."""


@dataclass(frozen=True, slots=True)
class Shard:
    """One safetensors file: its size, the length and checksum of its header, the ``format`` of its ``__metadata__``."""

    size: int
    header_bytes: int
    """The eight bytes of the length included: where the data section starts."""
    header_checksum: str
    metadata: object
    modified: int | None
    """Time of modification in ns, if the file is on this machine: a plan depends on values in it, too."""


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """An opened checkpoint.

    ``declared`` has its declarations of quantization; empty for an unquantized model.
    """

    location: str
    storage: Files
    facts: ModelFacts
    declared: tuple[Declared, ...]
    shards: Mapping[str, Shard] = field(repr=False)
    modules: Mapping[str, StoredModule] = field(repr=False)
    absent: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Modules known from the index only -> their shard, which the cache of an unreachable hub lacks."""
    left_aside: tuple[str, ...] = ()
    """Safetensors files that the index does not list and that are not read."""
    remarks: tuple[str, ...] = ()
    """Differences between the index and its files."""
    taken_apart: frozenset[str] = frozenset()
    """Files with tensors that have other names or shapes here: those of all experts of a layer, which are taken apart,
    scales in four dimensions, scales of inputs that are named unlike their weights, all in Mistral's own layout. They
    cannot be linked."""
    own_layout: bool = False
    """Whether it is in Mistral's own layout: tensors have the names of DeepSeek-V3 here, see :mod:`.mistral_layout`."""
    values: dict[str, bytes] = field(default_factory=dict, repr=False)
    """Tensor -> its first bytes, of those that were read from the hub because their files are not on this machine."""

    def tensors(self) -> dict[str, TensorInfo]:
        """All tensors by name, module by module."""
        return {tensor.name: tensor for module in self.modules.values() for tensor in module.tensors.values()}

    @property
    def quantization(self) -> Mapping[str, object]:
        """The settings of the first declaration; empty without any."""
        return self.declared[0].quantization if self.declared else {}

    @property
    def quantization_file(self) -> str:
        """The file that :attr:`quantization` is from."""
        return self.declared[0].file if self.declared else "config.json"

    @property
    def index_file(self) -> str:
        """The name of its index, whether there is one or not."""
        return OWN_INDEX if self.own_layout else INDEX

    @property
    def commit(self) -> str | None:
        """The hub commit, for provenance."""
        return getattr(self.storage, "commit", None)

    @property
    def offline(self) -> str | None:
        """The reason why the cache was opened instead of the hub; None when it was not."""
        return getattr(self.storage, "offline", None)

    @property
    def folder(self) -> str | None:
        """The absolute path of a local checkpoint."""
        return str(self.storage.folder.resolve()) if isinstance(self.storage, LocalFolder) else None

    def notes_on_files(self) -> Iterator[str]:
        """Yields sentences on the files that are :attr:`left_aside`, and on another layout."""
        if self.own_layout:
            yield (
                f"{PARAMS} and consolidated*.safetensors are read, Mistral's own layout: tensors have the names of "
                "DeepSeek-V3 here and in what is built (model.layers.3.mlp.experts.0.gate_proj for "
                "layers.3.experts.0.w1)"
            )
        if self.own_layout:
            copies, layout = [file for file in self.left_aside if file.startswith("model")], _WITHOUT_CLASS
        else:
            copies, layout = [file for file in self.left_aside if is_consolidated(file)], "Mistral's own layout"
        if copies:
            yield f"{some(copies)}: not read, by name a copy of the weights in {layout}"
        if others := [file for file in self.left_aside if file not in copies]:
            yield (
                f"{some(others)} beside the files that the index lists: not read, as neither config.json names them "
                "nor SGLang reads them"
            )

    def path_of(self, file: str) -> str:
        """The name of a file of this checkpoint in messages."""
        return f"{self.location}/{file}"

    def read(self, tensor: TensorInfo) -> np.ndarray:
        """A tensor's values, ``shape`` as stored; BF16 and FP8 as ml_dtypes types."""
        with self.storage.reader() as reader:
            return reader.array(tensor)

    def read_values(self, tensors: Iterable[TensorInfo]) -> None:
        """Reads the first values of tensors whose files are only on the hub, for :class:`ValueReader`."""
        if isinstance(self.storage, LocalFolder) or self.offline is not None:
            return
        wanted = [tensor for tensor in tensors if tensor.name not in self.values]
        away = {file for file in {tensor.file for tensor in wanted} if self.storage.cached(file) is None}
        wanted = [tensor for tensor in wanted if tensor.file in away and tensor.contiguous]

        def read(tensor: TensorInfo) -> bytes:
            return self.storage.read(tensor.file, tensor.start, min(tensor.nbytes, ValueReader.LIMIT))

        with ThreadPoolExecutor(max_workers=8) as pool:
            self.values.update(zip((tensor.name for tensor in wanted), pool.map(read, wanted), strict=True))


class ValueReader:
    """Reads the first values of tensors of several checkpoints, on this machine or read ahead from a hub."""

    LIMIT = 64 << 10

    def __init__(self, checkpoints: Mapping[str, Checkpoint]):
        self._readers = {name: FileReader(c.storage.cached, ahead=c.values) for name, c in checkpoints.items()}

    def __enter__(self) -> ValueReader:
        return self

    def __exit__(self, *_: object) -> None:
        for reader in self._readers.values():
            reader.close()

    def read(self, checkpoint: str, tensor: TensorInfo) -> np.ndarray | None:
        """The first values of a tensor, flat, up to 64 KiB; None where they are not on this machine."""
        return self._readers[checkpoint].first_values(tensor, min(tensor.nbytes, self.LIMIT))
