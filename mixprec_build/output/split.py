"""``mixprec split``: changes which files a compiled checkpoint has: merged ones, files of ranks, or both.

New files are written, synced and listed in the manifest before others are dropped, and files leave the manifest before
the first of them is removed, so that all files in the manifest are complete at any moment. Nothing reads what a stopped
split leaves beside them, and the same command removes or finishes it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import xxhash

from ..checkpoint.checkpoint import REST
from ..checkpoint.degree import Degree
from ..checkpoint.manifest import (
    MANIFEST,
    Manifest,
    RankEntry,
    read_manifest,
)
from ..checkpoint.typed import Source
from ..errors import InterruptedBuildError, OutputError, SplitError, VerifyError
from ..families.parts import Role
from ..ranks.assemble import as_parameter, write_parameters
from ..ranks.files import RankIndex, damage, finished, read_index, write_rank
from ..ranks.layout import PRESPLIT, RESTORED, is_ours
from ..ranks.merged import (
    CutFolder,
    Rectangle,
    header_tensor,
    in_no_rank,
    open_compiled,
    smallest_complete_degree,
    splitter_of,
)
from ..ranks.pieces import Parameter
from ..ranks.splitter import Splitter
from ..recipe.recipe import DEFAULT_SHARD_SIZE
from ..storage.disk import check_space, inside, write_errors
from ..storage.header import TensorInfo
from ..storage.owned import OwnedFolder
from ..storage.reader import TensorReader, checksum_on_disk
from ..storage.threads import Progress, run_all
from ..versions import __version__
from .leftovers import clear_leftovers
from .locked import locked
from .rank_differences import differences_of

__all__ = ["split"]


def split(
    folder: Path,
    degree: Degree | None = None,
    *,
    layout: str = "both",
    ranks: Iterable[int] | None = None,
    jobs: int | None = None,
    shard_size: int = DEFAULT_SHARD_SIZE,
    watch: Callable[[Splitter | None, int], Progress] | None = None,
) -> list[Path]:
    """Writes files of ranks of a compiled checkpoint and lists them in its manifest. Returns the folders of the ranks.

    Ranks that exist stay as they are, unless their headers or sizes show damage.

    Args:
        layout: ``presplit`` drops the merged files afterwards, ``both`` keeps or restores them, ``merged`` restores
            them and drops the files of all ranks.
        ranks: cut only these; all by default.
        shard_size: most bytes of a file.
        watch: called with the splitter (None without ``degree``) and the bytes to be written; returns the function
            that is called with bytes as they are done.

    Raises:
        VerifyError: ``folder`` is no compiled checkpoint, or merged files that were restored are not what was built.
        SplitError: the checkpoint cannot be cut for ``degree``, or lacks files that are needed for it.
        OutputError: another split or a build is writing there.
        WriteError: the disk is full, fails, or forbids it.
        InterruptedBuildError: Ctrl-C.
    """
    with locked(folder) as (owned, check):
        manifest = read_manifest(folder)
        check()
        with write_errors(folder):
            if (found := owned.entry(PRESPLIT)) is not None and not is_ours(found):
                raise OutputError(f"{folder / PRESPLIT}: is {found.kind}; remove it, ranks' files are written there")
        clear_leftovers(owned, manifest, keep=manifest.shards)
        source = Source.of("", open_compiled(folder, manifest))
        with source.checkpoint.storage.reader() as reader:
            try:
                with write_errors(folder):  # errors that no step reports itself
                    return _Split(folder, owned, manifest, source, reader, shard_size, jobs, check).run(
                        degree, layout, ranks, watch
                    )
            except KeyboardInterrupt:
                kept = "what is finished is kept: the same command goes on from there"
                raise InterruptedBuildError(f"{folder}: interrupted; {kept}") from None


class _StoppedError(Exception):
    """Ends a thread when another has failed."""


class _Split:
    """The steps of one :func:`split`. ``_manifest`` is always the one on the disk."""

    def __init__(
        self,
        folder: Path,
        owned: OwnedFolder,
        manifest: Manifest,
        source: Source,
        reader: TensorReader,
        shard_size: int,
        jobs: int | None,
        check: Callable[[], None],
    ):
        self._check = check
        """Raises if the folder was replaced; called before each change of it."""
        self._folder, self._owned, self._manifest = folder, owned, manifest
        self._source, self._reader = source, reader
        self._shard_size, self._jobs = shard_size, jobs or min(8, os.cpu_count() or 1)
        self._watch: Progress = lambda _: None
        self._stopped = threading.Event()
        self._unlisting = threading.Lock()

    def run(
        self,
        degree: Degree | None,
        layout: str,
        ranks: Iterable[int] | None,
        watch: Callable[[Splitter | None, int], Progress] | None,
    ) -> list[Path]:
        if layout == "merged":
            degree = None
        wanted = [] if degree is None else sorted(range(degree.tp) if ranks is None else set(ranks))
        if degree is not None and (not wanted or not all(0 <= rank < degree.tp for rank in wanted)):
            raise SplitError(f"--ranks: the ranks of {degree} are 0 to {degree.tp - 1}")
        names = [] if degree is None else [degree.folder(rank) for rank in wanted]
        if degree is not None:
            self._owned.entries(f"{PRESPLIT}/{degree}")  # refuses a link
        intact = self._intact_ranks()
        if layout == "presplit":
            smallest_complete_degree(self._folder, [*intact, *names])
        roles = map(self._source.facts.family.role_by_name, self._source.checkpoint.modules)
        if degree is not None and degree.ep > 1 and Role.EXPERT not in roles:
            raise SplitError(f"{self._folder}: its model has no experts; leave out --ep")
        splitter = None if degree is None else splitter_of(self._source, degree)
        missing = [rank for rank, name in zip(wanted, names, strict=True) if name not in intact]
        heads = self._heads(splitter, missing) if splitter is not None and missing else {}
        # Ranks that a stopped split finished are taken over. Missing ones that are listed are damaged.
        entries = {
            name: line
            for name, head in heads.items()
            if name not in self._manifest.ranks and (line := finished(self._folder / name, head))
        }
        plans = {
            name: splitter.parameters(head["rank"])
            for name, head in heads.items()
            if splitter is not None and name not in entries
        }
        storage = self._source.checkpoint.storage
        dropped = isinstance(storage, CutFolder)
        if isinstance(storage, CutFolder):
            storage.prepare()
        restore = self._absent() if dropped and layout != "presplit" else {}
        need = sum(p.nbytes for plan in plans.values() for p in plan)
        need += sum(tensor.nbytes for built in restore.values() for tensor, _ in built)
        check_space(self._folder, need)
        if watch is not None:
            self._watch = watch(splitter, need)

        if dropped and layout != "presplit":
            self._restore(restore)
        if heads:
            self._cut(heads, plans, entries)
        if layout == "presplit":
            if not dropped:
                self._keep_rest(plans)
            self._check()
            clear_leftovers(self._owned, self._manifest)
        if layout == "merged":
            self._drop_ranks()
        return [self._folder / name for name in names]

    def _intact_ranks(self) -> list[str]:
        """The listed ranks whose headers and sizes show no damage."""
        return [name for name, line in self._manifest.ranks.items() if damage(self._folder, name, line) is None]

    def _list(self, ranks: Mapping[str, RankEntry], rest: RankEntry | None) -> None:
        """Lists these ranks, and what is kept of dropped files, in a manifest that replaces the old by one rename."""
        manifest = self._manifest.listing(ranks, rest)
        fresh = f".{MANIFEST}.new"
        self._check()
        with write_errors(self._folder / fresh):
            with suppress(FileNotFoundError):
                self._owned.unlink(fresh)  # it may be a link
            with os.fdopen(self._owned.create(fresh), "wb") as file:
                file.writelines(manifest.dump())
                file.flush()
                os.fsync(file.fileno())
            self._check()
            self._owned.rename(fresh, MANIFEST)
            self._owned.sync()
        self._manifest = manifest

    def _heads(self, splitter: Splitter, ranks: Iterable[int]) -> dict[str, dict[str, Any]]:
        """The beginning of each rank's index, which has all that the rank's files depend on."""
        entry = self._manifest.files.get("config.json")
        config = None if entry is None else entry.checksum
        digest = xxhash.xxh3_128(f"{__version__} {self._shard_size} {config}".encode(errors="backslashreplace"))
        for name, tensor in self._manifest.tensors().items():
            digest.update(f"\n{name} {tensor.checksum}".encode(errors="backslashreplace"))
        degree = splitter.degree
        padded = {name: [share.native, share.columns] for name, share in splitter.padded.items()}
        head = {"tp": degree.tp, "ep": degree.ep, "cut_of": digest.hexdigest(), "padded": padded}
        return {degree.folder(rank): {**head, "rank": rank} for rank in ranks}

    def _cut(
        self,
        heads: Mapping[str, Mapping[str, Any]],
        plans: Mapping[str, Sequence[Parameter]],
        entries: dict[str, RankEntry],
    ) -> None:
        """Writes ranks, and lists them with those of ``entries``."""

        def write(name: str) -> None:
            self._check()
            entries[name] = write_rank(
                self._owned, name, heads[name], self._reader, plans[name], self._shard_size, self._progress
            )

        self._run(write, plans)
        self._list({**self._manifest.ranks, **entries}, self._manifest.rest)

    def _run(self, write: Callable[[str], None], names: Iterable[str]) -> None:
        run_all([partial(write, name) for name in names], self._jobs, self._stopped, self._folder)

    def _progress(self, done: int) -> None:
        if self._stopped.is_set():
            raise _StoppedError
        self._watch(done)

    def _keep_rest(self, fresh: Collection[str]) -> None:
        """Writes and lists what only the merged files contain, so that these can be dropped.

        First reads the merged files back from the disk and compares them with what was built, and the files of ranks
        with them. ``fresh`` are ranks that were cut just now; one that differs is removed.
        """
        self._check()
        checkpoint = self._source.checkpoint
        for file, entry in self._manifest.shards.items():
            shard = checkpoint.shards.get(file)
            if shard is None or shard.header_checksum != entry.checksum:
                raise VerifyError(f"{self._folder / file}: its header was changed; build the checkpoint again")
        degree = smallest_complete_degree(self._folder, self._intact_ranks())
        splitter = splitter_of(self._source, degree)
        parameters = {degree.folder(rank): splitter.parameters(rank) for rank in range(degree.tp)}
        self._compare_merged("build the checkpoint again")
        self._run(lambda name: self._compare_rank(name, parameters[name], name in fresh), parameters)
        in_ranks: dict[str, set[Rectangle]] = {}
        for piece in (piece for rank in parameters.values() for parameter in rank for piece in parameter.pieces):
            in_ranks.setdefault(piece.tensor.name, set()).add((piece.rows, piece.columns))
        headers = (header_tensor(file, shard.header_bytes) for file, shard in checkpoint.shards.items())
        rest = [as_parameter(tensor) for tensor in (*in_no_rank(checkpoint.tensors.values(), in_ranks), *headers)]
        check_space(self._folder, sum(p.nbytes for p in rest))
        self._check()
        kept = write_rank(self._owned, REST, {"padded": {}}, self._reader, rest, self._shard_size, None)
        for difference in differences_of(read_index(self._folder, REST, kept), rest, self._reader):
            raise VerifyError(f"{difference}: the merged files are kept: the same command writes it again")
        self._list(self._manifest.ranks, kept)

    def _compare_rank(self, name: str, parameters: Sequence[Parameter], fresh: bool) -> None:
        """Raises :class:`VerifyError` where a rank's files on disk are not what the merged files are cut into."""
        difference = next(differences_of(self._index(name), parameters, self._reader), None)
        if difference is None:
            return
        path = self._folder / name
        if not fresh:
            degree = path.parent.name
            raise VerifyError(f"{difference}: the merged files are kept; remove {path} and split again for {degree}")
        with self._unlisting:
            ranks = {other: line for other, line in self._manifest.ranks.items() if other != name}
            self._list(ranks, self._manifest.rest)
            with write_errors(path):
                self._owned.remove(name, is_ours)
        raise VerifyError(
            f"{difference}: something was misread or miswritten; {path} was removed and the merged files are kept: "
            "the same command cuts it again"
        )

    def _compare_merged(self, remedy: str) -> None:
        """Raises :class:`VerifyError` where a merged file on disk is not what was built."""
        built = self._built()

        def compare(file: str) -> None:
            if not self._is_intact(file, built[file]):
                raise VerifyError(
                    f"{self._folder / file}: is not as it was built, `mixprec verify {self._folder}` says where; "
                    f"nothing was dropped: {remedy}"
                )

        self._run(compare, built)

    def _index(self, name: str) -> RankIndex:
        return read_index(self._folder, name, self._manifest.ranks[name])

    def _absent(self) -> dict[str, list[tuple[TensorInfo, str]]]:
        """The merged files that are missing or damaged, and their contents."""
        return {file: built for file, built in self._built().items() if not self._is_intact(file, built)}

    def _is_intact(self, file: str, built: Sequence[tuple[TensorInfo, str]]) -> bool:
        path = inside(self._folder, file)
        if not path.is_file() or path.stat().st_size != self._manifest.files[file].nbytes:
            return False
        return all(checksum_on_disk(path, tensor) == due for tensor, due in built)

    def _built(self) -> dict[str, list[tuple[TensorInfo, str]]]:
        """The contents of each merged file, header and tensors in order, with the checksums they were built with."""
        checkpoint, entries = self._source.checkpoint, self._manifest.tensors()
        built = {
            file: [(header_tensor(file, shard.header_bytes), self._manifest.files[file].checksum)]
            for file, shard in checkpoint.shards.items()
        }
        for tensor in sorted(checkpoint.tensors.values(), key=lambda tensor: tensor.start):
            if tensor.name not in entries:
                raise VerifyError(f"{tensor.name}: in {tensor.file}, but not in the manifest")
            built[tensor.file].append((tensor, entries[tensor.name].checksum))
        return built

    def _restore(self, files: Mapping[str, Sequence[tuple[TensorInfo, str]]]) -> None:
        def write(file: str) -> None:
            built, part = files[file], f"{RESTORED}/{file}"
            parameters = [as_parameter(tensor) for tensor, _ in built]
            written = write_parameters(self._owned.create(part), b"", parameters, self._reader, self._progress)
            for (parameter, checksum), (_, due) in zip(written, built, strict=True):
                if checksum != due:
                    raise VerifyError(
                        f"{parameter.name}: put together from the files of ranks it is not what was built; "
                        f"`mixprec verify {self._folder}` says which file was changed: bring that again, or remove its "
                        "folder where all ranks of another degree are there"
                    )
            self._check()
            # The merged files are listed as dropped until all are restored: nothing reads one that is being copied.
            self._owned.move_file(part, file)
            for tensor, due in built:
                if checksum_on_disk(self._folder / file, tensor) != due:
                    raise VerifyError(f"{self._folder / file}: {tensor.name} was miswritten; repeat the command")

        with write_errors(self._folder / RESTORED):
            self._check()
            self._owned.make_folder(RESTORED)
            self._run(write, files)
            self._owned.sync()
            self._list(self._manifest.ranks, None)
            self._check()
            clear_leftovers(self._owned, self._manifest)

    def _drop_ranks(self) -> None:
        if self._owned.stat(PRESPLIT) is None and not self._manifest.ranks:
            return
        self._compare_merged("bring it again; the files of ranks are kept")
        if self._manifest.ranks:
            self._list({}, self._manifest.rest)
        self._check()
        with write_errors(self._folder):
            self._owned.remove(PRESPLIT, is_ours)
            self._owned.sync()
