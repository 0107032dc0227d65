"""An opened checkpoint: names, dtypes, shapes and byte ranges, known from its headers alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..families.facts import ModelFacts
from ..storage.folder import Files, LocalFolder
from ..storage.header import TensorInfo
from ..storage.module import StoredModule
from ..storage.reader import FileReader
from .declared import Declared

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Checkpoint", "ValueReader"]


INDEX = "model.safetensors.index.json"
REST = "presplit/rest"
"""What a compiled checkpoint keeps of merged files that were dropped."""


@dataclass(frozen=True, slots=True)
class Shard:
    """One safetensors file: its size, the length and checksum of its header, the ``format`` of its ``__metadata__``."""

    size: int
    header_bytes: int
    """With the eight bytes of its length: where the data section starts."""
    header_checksum: str
    metadata: object
    modified: int | None
    """When its file was last changed (ns), where that is on this machine: the plan rests on its values too."""


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """An opened checkpoint.

    ``declared`` is what it says of its quantization, in all places; empty for a plain model.
    """

    location: str
    storage: Files
    facts: ModelFacts
    declared: tuple[Declared, ...]
    tensors: Mapping[str, TensorInfo]
    shards: Mapping[str, Shard] = field(repr=False)
    modules: Mapping[str, StoredModule] = field(repr=False)
    absent: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Modules known from the index only -> their shard, which the cache of an unreachable hub lacks."""
    left_aside: tuple[str, ...] = ()
    """Safetensors files that the index does not list and that are not read."""
    remarks: tuple[str, ...] = ()
    """What the index and its files say differently."""
    taken_apart: frozenset[str] = frozenset()
    """Files with tensors that hold all experts of a layer, each of which has tensors of its own here."""
    values: dict[str, bytes] = field(default_factory=dict, repr=False)
    """Tensor -> its first bytes, of those that were read although their files are not on this machine."""

    @property
    def quantization(self) -> Mapping[str, object]:
        """The declaration that counts where several disagree and the tensors do not tell; empty without any."""
        return self.declared[0].quantization if self.declared else {}

    @property
    def quantization_file(self) -> str:
        """The file that :attr:`quantization` is from."""
        return self.declared[0].file if self.declared else "config.json"

    @property
    def commit(self) -> str | None:
        """The hub commit, for provenance."""
        return getattr(self.storage, "commit", None)

    @property
    def offline(self) -> str | None:
        """Why the cache answered for the hub; None when it did not have to."""
        return getattr(self.storage, "offline", None)

    @property
    def folder(self) -> str | None:
        """The absolute path of a local checkpoint."""
        return str(self.storage.folder.resolve()) if isinstance(self.storage, LocalFolder) else None

    def path_of(self, file: str) -> str:
        """How messages name a file of this checkpoint."""
        return f"{self.location}/{file}"

    def read(self, tensor: TensorInfo) -> np.ndarray:
        """A tensor's values, ``shape`` as stored; BF16 and FP8 as ml_dtypes types."""
        with self.storage.reader() as reader:
            return reader.array(tensor)

    def read_values(self, tensors: Iterable[TensorInfo]) -> None:
        """Reads the first values of tensors whose files are on an online hub only, for :class:`ValueReader`."""
        if isinstance(self.storage, LocalFolder) or self.offline is not None:
            return
        wanted = [tensor for tensor in tensors if tensor.name not in self.values]
        away = {file for file in {tensor.file for tensor in wanted} if self.storage.cached(file) is None}
        wanted = [tensor for tensor in wanted if tensor.file in away]

        def read(tensor: TensorInfo) -> bytes:
            return self.storage.read(tensor.file, tensor.start, min(tensor.nbytes, ValueReader.LIMIT))

        with ThreadPoolExecutor(max_workers=8) as pool:
            self.values.update(zip((tensor.name for tensor in wanted), pool.map(read, wanted), strict=True))


class ValueReader:
    """Reads the first values of small tensors of several checkpoints, where they are here or were read ahead."""

    LIMIT = 64 << 10

    def __init__(self, checkpoints: Mapping[str, Checkpoint]):
        self._readers = {name: FileReader(c.storage.cached, ahead=c.values) for name, c in checkpoints.items()}

    def __enter__(self) -> ValueReader:
        return self

    def __exit__(self, *_: object) -> None:
        for reader in self._readers.values():
            reader.close()

    def read(self, checkpoint: str, tensor: TensorInfo) -> np.ndarray | None:
        """The first values of a tensor, flat, up to 64 KiB; None where they are not here."""
        return self._readers[checkpoint].first_values(tensor, min(tensor.nbytes, self.LIMIT))
