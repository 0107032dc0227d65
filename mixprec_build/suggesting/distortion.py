"""Measures how far a module's stored weights are from a reference's.

Each thread reads one module at a time, and dequantizes and compares a few rows at a time: so many that what is made of
them stays in a core's cache, which is several times as fast as making all of a weight. Results are appended to a file,
a line for each module and source: a stopped run continues, and another budget measures nothing twice.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from ..checkpoint.typed import Source
from ..errors import SourceError
from ..formats.base import Format
from ..storage.header import TensorInfo, parse_header, read_header
from ..storage.reader import FileReader

__all__ = ["Distortion", "DistortionCache", "Moments", "default_cache", "measure"]


_VERSION = 1
"""Part of every key of the cache: after a change of it everything is measured again."""
_CHUNK = 1 << 18
"""Values dequantized at a time: 1 MiB in float32."""
_ADDED = 64
"""Squares that are added in float32, before float64 adds their sums."""
_LEAST, _MOST = 1e-20, 1e30
"""Between them a sum of squares in float32 is as good as one in float64."""
_PANEL = 8
"""Rows that are transposed at a time."""


@dataclass(frozen=True, slots=True)
class Distortion:
    """The error of a module in one source against the reference. ``W`` is ``[N, K]``, ``Δ`` is ``Ŵ − W``.

    With inputs ``x`` of second moments ``m_k = E[x_k²]`` and no correlation between them, ``E‖Δx‖² = Σ_k m_k ‖Δ_k‖²``
    over the columns ``Δ_k``: the diagonal of the layer-wise error that GPTQ minimises (Frantar et al., 2022).
    """

    error: float
    """‖Δ‖² (Frobenius)."""
    power: float
    """‖W‖²."""
    output_error: float | None = None
    """Σ_k m_k ‖Δ_k‖²; None without moments."""
    output_power: float | None = None
    """Σ_k m_k ‖W_k‖²."""


class Moments:
    """Second moments of the inputs of linears: a safetensors file of ``module name -> float [K]``, ``E[x_k²]``.

    For an expert the mean is over the tokens that were routed to it. A ``.weight`` at the end of a name is ignored.
    """

    def __init__(self, path: Path):
        """Raises :class:`SourceError` for a file that is no safetensors file."""
        self._path = path
        data, size = read_header(path)
        tensors, _ = parse_header(data, path=path, file=path.name, file_size=size)
        self._tensors: Mapping[str, TensorInfo] = {name.removesuffix(".weight"): t for name, t in tensors.items()}

    def of(self, module: str, inputs: int) -> npt.NDArray[np.float64]:
        """The moments of a module's inputs, float64 ``[K]``.

        Raises:
            SourceError: the file has none for the module, or some of another length, negative or not finite.
        """
        info = self._tensors.get(module)
        if info is None:
            raise SourceError(
                f"has no moments of {module}; it needs a tensor of that name for every module with a choice, or leave "
                "out --moments",
                path=self._path,
            )
        if info.shape != (inputs,):
            raise SourceError(f"{module} is {list(info.shape)}, the module has {inputs} inputs", path=self._path)
        with FileReader(lambda _: self._path) as reader:
            moments = reader.array(info).astype(np.float64)
        if not (np.isfinite(moments).all() and (moments >= 0).all()):
            raise SourceError(f"{module} has values that are negative or no numbers", path=self._path)
        return moments


def default_cache() -> Path:
    """``$XDG_CACHE_HOME/mixprec/distortion.jsonl``, or below ``~/.cache``."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path("~/.cache").expanduser()) / "mixprec" / "distortion.jsonl"


class DistortionCache:
    """Measured distortions in a file of JSON lines. Each is appended by one write: a kill can damage only the last.

    A line's key stands for what was measured: path, size, header and modification time of the files (on the hub:
    repository and commit), the tensors' places in them, and the moments' values.
    """

    def __init__(self, path: Path | None):
        """Without a ``path`` nothing is stored. Raises :class:`SourceError` where the file cannot be used."""
        self._path, self._lock = path, Lock()
        self._known: dict[str, Distortion] = {}
        self._fd: int | None = None
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
            with path.open("rb") as file:
                data = file.read()
        except OSError as error:
            self.close()
            raise SourceError(
                f"cannot keep errors there: {error.strerror}; name a file with --errors", path=path
            ) from error
        if data and not data.startswith(b'{"key": '):
            self.close()
            raise SourceError("holds no measured errors; name another file with --errors", path=path)
        for line in data.splitlines():
            with suppress(ValueError, TypeError, KeyError):  # damaged by a kill, or by another program
                entry = json.loads(line)
                key = entry.pop("key")
                self._known[key] = Distortion(**entry)
        if data and not data.endswith(b"\n"):
            os.write(self._fd, b"\n")

    def __enter__(self) -> DistortionCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def get(self, key: str) -> Distortion | None:
        return self._known.get(key)

    def put(self, key: str, value: Distortion) -> None:
        with self._lock:
            self._known[key] = value
            if self._fd is not None:
                os.write(self._fd, (json.dumps({"key": key, **asdict(value)}) + "\n").encode())


def measure(
    modules: Mapping[str, tuple[Source, Sequence[Source]]],
    cache: DistortionCache,
    *,
    moments: Moments | None = None,
    jobs: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[tuple[str, str], Distortion]:
    """Measures modules. Returns ``(module, source's name)`` -> its distortion.

    Args:
        modules: name -> its reference, and the other sources that have it.
        jobs: threads. Each has one module of all its sources in memory.
        progress: called with the stored bytes of modules that are done, those of references not counted.

    Raises:
        SourceError: naming module and file, where a weight cannot be read, differs in shape or is no number.
    """
    found: dict[tuple[str, str], Distortion] = {}
    keys = _Keys()
    todo = []
    for name, (reference, others) in modules.items():
        if not others:
            continue
        m = None if moments is None else moments.of(name, _inputs(reference, name))
        missing = []
        for other in others:
            key = keys.of(name, reference, other, m)
            known = cache.get(key)
            if known is None:
                missing.append((other, key))
            else:
                found[name, other.name] = known
                if progress is not None:
                    progress(other.checkpoint.modules[name].nbytes)
        if missing:
            todo.append((name, reference, missing))

    def work(name: str, reference: Source, missing: Sequence[tuple[Source, str]]) -> None:
        m = None if moments is None else moments.of(name, _inputs(reference, name))
        for (other, key), distortion in zip(
            missing, _distortions(name, reference, [other for other, _ in missing], m), strict=True
        ):
            cache.put(key, distortion)
            found[name, other.name] = distortion
            if progress is not None:
                progress(other.checkpoint.modules[name].nbytes)

    _run(work, todo, jobs or os.cpu_count() or 1)
    return found


def _run(work: Callable[..., None], items: Iterable[tuple[Any, ...]], jobs: int) -> None:
    """Runs ``work`` on items in threads, with a bounded queue; the first failure cancels what has not begun."""
    pending: set[Future[None]] = set()
    with ThreadPoolExecutor(max_workers=jobs) as pool:
        try:
            for item in items:
                if len(pending) >= 2 * jobs:
                    done, pending = wait(pending, return_when=FIRST_COMPLETED)
                    for future in done:
                        future.result()
                pending.add(pool.submit(work, *item))
            for future in pending:
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _inputs(source: Source, name: str) -> int:
    return source.format_of(name).shape(source.checkpoint.modules[name])[1]


def _distortions(
    name: str, reference: Source, others: Sequence[Source], moments: npt.NDArray[np.float64] | None
) -> list[Distortion]:
    exact = _Rows(reference, name)
    rounded = [_Rows(other, name) for other in others]
    for other in rounded:
        if other.shape != exact.shape:
            raise SourceError(
                f"{name}: {list(other.shape)}, but {list(exact.shape)} in {exact.where}", path=other.where
            )
    outputs, inputs = exact.shape
    step = _step(max(1, _CHUNK // inputs), [exact, *rounded])
    power = np.zeros(inputs)
    errors = [np.zeros(inputs) for _ in rounded]
    delta = np.empty((step, inputs), np.float32)
    for start in range(0, outputs, step):
        stop = min(outputs, start + step)
        weight = exact.read(start, stop)
        power += _sums_of_squares(weight)
        for rows, error in zip(rounded, errors, strict=True):
            with np.errstate(all="ignore"):
                np.subtract(rows.read(start, stop), weight, out=delta[: stop - start])
            error += _sums_of_squares(delta[: stop - start])
    out = []
    for rows, error in zip(rounded, errors, strict=True):
        if not np.isfinite(error).all():
            raise SourceError(
                f"{name} has weights that are infinite or no numbers, here or in {exact.where}", path=rows.where
            )
        known = None if moments is None else (float(error @ moments), float(power @ moments))
        out.append(Distortion(float(error.sum()), float(power.sum()), *(known or (None, None))))
    return out


def _step(most: int, modules: Sequence[_Rows]) -> int:
    """The number of outputs to dequantize at a time: ``most``, or fewer, or more where words of packed values need it.

    Each time is of whole words, and of whole blocks of scales or within one.
    """
    words = math.lcm(*(rows.word for rows in modules))
    blocks = {block for rows in modules for block in rows.blocks}
    for step in range(most - most % words, 0, -words):
        if all(step % block == 0 or block % step == 0 for block in blocks):
            return step
    return math.lcm(words, *blocks)


def _sums_of_squares(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Σ_n v_nk², float64 ``[K]``, of values float32 ``[N, K]``."""
    sums = np.zeros(values.shape[1])
    for start in range(0, len(values), _ADDED):
        few = values[start : start + _ADDED]
        with np.errstate(all="ignore"):
            squares = np.einsum("nk,nk->k", few, few)
        # Others may be beyond what float32 has, or below.
        if not _LEAST < squares.sum(dtype=np.float64) < _MOST:
            squares = np.einsum("nk,nk->k", few, few, dtype=np.float64)
        sums += squares
    return sums


class _Rows:
    """A module of one source, in memory as it is stored; :meth:`read` dequantizes some of its outputs.

    Attributes:
        word: the number of outputs that share words of packed values.
        blocks: the numbers of outputs that share a scale, of each tensor.
    """

    def __init__(self, source: Source, name: str):
        self._name, self._format = name, source.format_of(name)
        module = source.checkpoint.modules[name]
        self.shape = self._format.shape(module)
        self.where = source.checkpoint.path_of(next(iter(module.tensors.values())).file)
        self._tensors: dict[str, npt.NDArray[Any]] = {}
        self._cuts: dict[str, tuple[int, int]] = {}
        self.word, self.blocks = 1, set[int]()
        for leaf, info in module.tensors.items():
            if leaf == "bias":
                continue
            tensor, axis = source.checkpoint.read(info), self._format.axes(leaf).n
            if axis is not None:
                tensor = _by_outputs(tensor, axis.dim)
                self._cuts[leaf] = axis.dim, axis.per
                if tensor.dtype == np.int32:
                    self.word = math.lcm(self.word, axis.per)
                else:
                    self.blocks.add(axis.per)
            self._tensors[leaf] = tensor

    def read(self, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Outputs ``start`` to ``stop`` in steps of :func:`_step`: float32 ``[stop - start, K]``, not to be changed."""
        parts = dict(self._tensors)
        for leaf, (dim, per) in self._cuts.items():
            parts[leaf] = parts[leaf][(slice(None),) * dim + (slice(start // per, -(-stop // per)),)]
        try:
            with np.errstate(all="ignore"):
                return self._format.dequantize(parts)
        except (IndexError, ValueError) as error:  # a damaged g_idx, for example
            raise SourceError(f"{self._name} cannot be dequantized: {error}", path=self.where) from error


def _by_outputs(tensor: npt.NDArray[Any], dim: int) -> npt.NDArray[Any]:
    """The same tensor, in memory with its axis ``dim`` first: a few outputs lie side by side."""
    if dim != 1 or tensor.ndim != 2:
        return tensor
    out = np.empty(tensor.shape[::-1], tensor.dtype)
    for start in range(0, len(tensor), _PANEL):  # at once it takes twice as long
        out[:, start : start + _PANEL] = tensor[start : start + _PANEL].T
    return out.T


class _Keys:
    """Makes the keys of the cache."""

    def __init__(self) -> None:
        self._files: dict[tuple[int, str], str] = {}

    def of(self, name: str, reference: Source, other: Source, moments: npt.NDArray[np.float64] | None) -> str:
        digest = xxhash.xxh3_128(f"{_VERSION}\0{name}".encode())
        for source in (reference, other):
            fmt = source.format_of(name)
            assert isinstance(fmt, Format)
            digest.update(json.dumps(fmt.to_json(), sort_keys=True).encode())
            for leaf, info in sorted(source.checkpoint.modules[name].tensors.items()):
                place = f"\0{leaf}\0{info.dtype}\0{info.shape}\0{info.start}\0{info.nbytes}\0"
                digest.update(place.encode() + self._file(source, info.file).encode())
        if moments is not None:
            digest.update(moments.tobytes())
        return digest.hexdigest()

    def _file(self, source: Source, file: str) -> str:
        """Identifies a file: on the hub by its commit, else by its path, size, header and modification time."""
        key = (id(source.checkpoint), file)
        if key not in self._files:
            checkpoint = source.checkpoint
            shard = checkpoint.shards[file]
            where = (
                f"{checkpoint.location.partition('@')[0]}@{checkpoint.commit}"
                if checkpoint.commit is not None
                else f"{checkpoint.folder}\0{shard.modified}"
            )
            self._files[key] = f"{where}\0{file}\0{shard.size}\0{shard.header_checksum}"
        return self._files[key]
