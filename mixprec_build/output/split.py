"""``mixprec split``: changes which files a compiled checkpoint has: merged ones, files of ranks, or both.

New files are written, synced and listed in the manifest before others are dropped, and files leave the manifest before
the first of them is removed, so that all files in the manifest are complete at any moment. Nothing reads what a stopped
split leaves beside them, and the same command removes or finishes it.

Splits of some ranks that change nothing else run side by side, on any machines that share the file system. Each holds
the locks of its ranks, writes nothing but these, and lists them in the manifest as it is by then. Where a file system
does not lock folders for all machines, one may so list its ranks that another's are listed no more: these stay, and the
finish, a split of all ranks that cuts none, lists all that are complete.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
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
    new_manifest,
    read_manifest,
)
from ..checkpoint.typed import Source
from ..errors import InterruptedBuildError, OutputError, SplitError, VerifyError
from ..families.parts import Role
from ..ranks.assemble import as_parameter, write_parameters
from ..ranks.files import RankIndex, damage, finished, read_index, write_rank
from ..ranks.layout import PRESPLIT, RESTORED, SPLIT_LOCK, is_ours
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
from ..storage.reader import TensorReader, checksum_on_disk
from ..storage.threads import Progress, run_all
from ..text import as_word
from ..versions import __version__
from .leftovers import clear_leftovers
from .locked import LockedFolder, manifest_version, opened
from .missing_ranks import missing_ranks
from .rank_differences import differences_of

__all__ = ["split"]


def split(
    folder: Path,
    degree: Degree | None = None,
    *,
    layout: str = "both",
    ranks: Iterable[int] | None = None,
    finish: bool = False,
    take_over: bool = False,
    jobs: int | None = None,
    shard_size: int = DEFAULT_SHARD_SIZE,
    watch: Callable[[Splitter | None, int], Progress] | None = None,
) -> list[Path]:
    """Writes files of ranks of a compiled checkpoint and lists them in its manifest. Returns the folders of the ranks.

    Ranks that exist stay as they are, unless their headers or sizes show damage.

    Args:
        layout: ``presplit`` drops the merged files afterwards, ``both`` keeps or restores them, ``merged`` restores
            them and drops the files of all ranks.
        ranks: cut only these; all by default. Where the layout stays as it is, others may be cut at the same time.
        finish: cut none, for all ranks were cut before.
        take_over: also cut ranks that a split on another machine was cutting until just now.
        shard_size: most bytes of a file.
        watch: called with the splitter (None without ``degree``) and the bytes to be written; returns the function
            that is called with bytes as they are done.

    Raises:
        VerifyError: ``folder`` is no compiled checkpoint, or merged files that were restored are not what was built.
        SplitError: the checkpoint cannot be cut for ``degree``, or lacks files that are needed for it.
        MissingRanksError: ``finish`` lacks ranks.
        OutputError: another split, of the same ranks or of more than some, or a build is writing there.
        WriteError: the disk is full, fails, or forbids it.
        InterruptedBuildError: Ctrl-C.
    """
    if layout == "merged":
        degree = None
    if finish and (degree is None or ranks is not None):
        raise ValueError("all ranks of a degree are finished: with its number of ranks, and without some of them")
    wanted = _wanted(degree, ranks)
    with opened(folder) as place, ExitStack() as stack:
        place.begin()
        place.check()
        owned = place.owned
        with write_errors(folder):
            version = manifest_version(owned)
        manifest = read_manifest(folder)
        place.check()
        with write_errors(folder):
            if (found := owned.entry(PRESPLIT)) is not None and not is_ours(found):
                raise OutputError(f"{folder / PRESPLIT}: is {found.kind}; remove it, ranks' files are written there")
        beside: list[str] = []
        if degree is not None and ranks is not None and layout == ("both" if manifest.rest is None else "presplit"):
            beside = [degree.folder(rank) for rank in wanted]
        mine = stack.enter_context(place.split_locks(beside, take_over))
        with write_errors(folder):
            changed = manifest_version(owned) != version  # as it can be where folders are not locked
        if changed:
            dropped, manifest = manifest.rest is not None, read_manifest(folder)
            if dropped is (manifest.rest is None):
                raise OutputError(f"{folder}: another `mixprec split` changed its layout meanwhile; repeat the command")
        if beside:
            place.unlock()
        else:
            clear_leftovers(owned, manifest, keep=manifest.shards)
        source = Source.of("", open_compiled(folder, manifest))
        with source.checkpoint.storage.reader() as reader:
            try:
                with write_errors(folder):  # errors that no step reports itself
                    work = _Split(place, mine, manifest, source, reader, shard_size, jobs, beside)
                    return work.run(degree, layout, wanted, finish, watch)
            except KeyboardInterrupt:
                kept = "what is finished is kept: the same command goes on from there"
                raise InterruptedBuildError(f"{folder}: interrupted; {kept}") from None


def _wanted(degree: Degree | None, ranks: Iterable[int] | None) -> list[int]:
    if degree is None:
        return []
    wanted = sorted(range(degree.tp) if ranks is None else set(ranks))
    if not wanted or not all(0 <= rank < degree.tp for rank in wanted):
        raise SplitError(f"--ranks: the ranks of {degree} are 0 to {degree.tp - 1}")
    return wanted


class _StoppedError(Exception):
    """Ends a thread when another has failed."""


class _Split:
    """The steps of one :func:`split`.

    ``beside`` are the ranks' folders of a split that others run beside; of any other one ``_manifest`` is always the
    one on the disk. ``mine`` raises where another split has taken this one's locks over.
    """

    def __init__(
        self,
        place: LockedFolder,
        mine: Callable[[], None],
        manifest: Manifest,
        source: Source,
        reader: TensorReader,
        shard_size: int,
        jobs: int | None,
        beside: Sequence[str],
    ):
        self._place, self._mine, self._beside = place, mine, beside
        self._folder, self._owned, self._manifest = place.folder, place.owned, manifest
        self._source, self._reader = source, reader
        self._shard_size, self._jobs = shard_size, jobs or min(8, os.cpu_count() or 1)
        self._watch: Progress = lambda _: None
        self._stopped = threading.Event()
        self._unlisting = threading.Lock()

    def run(
        self,
        degree: Degree | None,
        layout: str,
        wanted: Sequence[int],
        finish: bool,
        watch: Callable[[Splitter | None, int], Progress] | None,
    ) -> list[Path]:
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
        if finish and plans and degree is not None:
            raise missing_ranks(self._folder, self._manifest, degree, [heads[name]["rank"] for name in plans])
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
            if not self._beside:
                clear_leftovers(self._owned, self._manifest)
        if layout == "merged":
            self._drop_ranks()
        return [self._folder / name for name in names]

    def _intact_ranks(self) -> list[str]:
        """The listed ranks whose headers and sizes show no damage."""
        return [name for name, line in self._manifest.ranks.items() if damage(self._folder, name, line) is None]

    def _check(self) -> None:
        """Raises if the folder was replaced, or another split has taken over; called before each change."""
        self._place.check()
        self._mine()

    def _list(self, ranks: Mapping[str, RankEntry], rest: RankEntry | None) -> None:
        """Lists these ranks, and what is kept of dropped files, in a manifest that replaces the old by one rename."""
        manifest = self._manifest.listing(ranks, rest)
        # Splits that run side by side may list at the same time, where the folder cannot be locked for all machines.
        fresh = new_manifest(*self._beside[:1])
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
                self._owned, name, heads[name], self._reader, plans[name], self._shard_size, self._progress, self._mine
            )

        self._run(write, plans)
        if self._beside:
            self._place.wait()
            self._check()
            self._manifest = read_manifest(self._folder)
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
        tensors = sorted(checkpoint.tensors().values(), key=lambda tensor: (tensor.file, tensor.start))
        rest = [as_parameter(tensor) for tensor in (*in_no_rank(tensors, in_ranks), *headers)]
        check_space(self._folder, sum(p.nbytes for p in rest))
        self._check()
        kept = write_rank(self._owned, REST, {"padded": {}}, self._reader, rest, self._shard_size, None, self._mine)
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
                    f"{self._folder / file}: is not as it was built, `mixprec verify {as_word(self._folder)}` "
                    f"says where; nothing was dropped: {remedy}"
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
        for tensor in sorted(checkpoint.tensors().values(), key=lambda tensor: tensor.start):
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
                        f"`mixprec verify {as_word(self._folder)}` says which file was changed: bring that again, "
                        "or remove its folder where all ranks of another degree are there"
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
        if not self._manifest.ranks and [entry.name for entry in self._owned.entries(PRESPLIT)] == [SPLIT_LOCK]:
            return
        self._compare_merged("bring it again; the files of ranks are kept")
        if self._manifest.ranks:
            self._list({}, self._manifest.rest)
        self._check()
        with write_errors(self._folder):
            self._owned.remove(PRESPLIT, lambda entry: is_ours(entry) and entry.name != SPLIT_LOCK)
            self._owned.sync()
