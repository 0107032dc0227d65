"""Measures how far a module's stored weights are from a reference's, by numpy or on a GPU.

Each thread has one module at a time. Results are appended to a file, a line for each module and source: a stopped run
continues, and another budget measures nothing twice. They are the same wherever they were computed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import xxhash

from ..checkpoint.typed import Source
from ..errors import DeviceError, SourceError
from ..formats.base import Format
from ..storage.header import TensorInfo, parse_header, read_header
from ..storage.reader import FileReader
from .comparing import Comparer

if TYPE_CHECKING:
    from ..storage.reader import TensorReader

__all__ = ["Distortion", "DistortionCache", "Moments", "comparer_on", "default_cache", "measure"]


_VERSION = 1
"""Part of every key of the cache: after a change of it everything is measured again."""


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
    comparer: Callable[[], Comparer] = Comparer,
) -> dict[tuple[str, str], Distortion]:
    """Measures modules. Returns ``(module, source's name)`` -> its distortion.

    Args:
        modules: name -> its reference, and the other sources that have it.
        jobs: threads; as many as the comparer asks for by default. Each has one module of all its sources in memory.
        progress: called with the stored bytes of modules that are done, those of references not counted.
        comparer: makes what compares, if anything is left to measure.

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

    if not todo:
        return found
    compares = comparer()
    readers: dict[str, TensorReader] = {}

    def work(name: str, reference: Source, missing: Sequence[tuple[Source, str]]) -> None:
        m = None if moments is None else moments.of(name, _inputs(reference, name))
        others = [other for other, _ in missing]
        distortions = _distortions(compares, name, reference, others, readers, m)
        for (other, key), distortion in zip(missing, distortions, strict=True):
            cache.put(key, distortion)
            found[name, other.name] = distortion
            if progress is not None:
                progress(other.checkpoint.modules[name].nbytes)

    with ExitStack() as stack:
        for source in {s.name: s for reference, others in modules.values() for s in (reference, *others)}.values():
            readers[source.name] = stack.enter_context(source.checkpoint.storage.reader())
        _run(work, todo, jobs or compares.jobs)
    return found


def comparer_on(device: str) -> Comparer:
    """What compares on a ``device``: ``cpu`` (numpy), ``cuda``, or ``auto``, the latter where torch finds a GPU.

    Raises:
        DeviceError: ``cuda``, but torch is missing, or finds no GPU.
    """
    if device == "cpu":
        return Comparer()
    try:
        from .device import TorchComparer, why_unusable
    except (ImportError, OSError, AttributeError) as error:  # it is missing, damaged or too old
        reason: str | None = f"torch cannot be imported ({error})"
        advice = "pip install -U torch"
    else:
        reason, advice = why_unusable(), "see `nvidia-smi` and `python -m torch.utils.collect_env`"
        if reason is None:
            return TorchComparer()
    if device == "cuda":
        raise DeviceError(f"--device cuda: {reason}; {advice}, or take --device cpu, which measures the same by numpy")
    return Comparer()


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
    comparer: Comparer,
    name: str,
    reference: Source,
    others: Sequence[Source],
    readers: Mapping[str, TensorReader],
    moments: npt.NDArray[np.float64] | None,
) -> list[Distortion]:
    power, errors = comparer.squares(name, reference, others, readers)
    out = []
    for other, error in zip(others, errors, strict=True):
        if not np.isfinite(error).all():
            raise SourceError(
                f"{name} has weights that are infinite or no numbers, here or in {_where(reference, name)}",
                path=_where(other, name),
            )
        known = None if moments is None else (float(error @ moments), float(power @ moments))
        out.append(Distortion(float(error.sum()), float(power.sum()), *(known or (None, None))))
    return out


def _where(source: Source, name: str) -> str:
    return source.checkpoint.path_of(next(iter(source.checkpoint.modules[name].tensors.values())).file)


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
