"""A build on many machines: each writes a part of the planned shards, and one finishes the checkpoint.

    .out.part-3-of-16.mixprec/    part 3 of 16: a stage as in :mod:`.stage`, with `plan` in it
    .out.mixprec/                 the stage of the output, into which the finish moves the shards of all parts

Every part has a stage of its own, so that machines share no lock and no journal. They need no coordinator either:
each makes the plan itself, and notes what it depends on (:func:`identity`); parts of different plans are refused.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import xxhash

from ..errors import MissingPartsError, OutputError, SourceError
from ..planning.types import Plan, PlannedShard
from ..storage.disk import write_errors
from ..storage.owned import OwnedFolder
from ..storage.threads import Progress
from ..text import as_word, counted, some
from ..versions import __version__
from .copier import Copier
from .stage import Stage
from .stage_lock import stage_name
from .staging import fetch, files_needed, opened_stage, stop_reported
from .target import check_output

__all__ = ["Part", "adopt_parts", "identity", "refuse_parts", "require_sources_here", "shards_of", "write_part"]

MOST_PARTS = 9999
_MOST_BYTES = 1 << 20
_SUFFIX = re.compile(r"\.part-([1-9]\d{0,3})-of-([1-9]\d{0,3})\.mixprec")


@dataclass(frozen=True, slots=True, order=True)
class Part:
    """One of the parts of a build: ``number`` is 1 to ``of``. Raises ``ValueError`` for other numbers."""

    number: int
    of: int

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.of <= MOST_PARTS:
            raise ValueError(f"{self}: parts are 1/N to N/N, and N is at most {MOST_PARTS}")

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    @classmethod
    def parse(cls, text: str) -> Part:
        """``"3/16"`` -> part 3 of 16. Raises ``ValueError`` for other text."""
        found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text, re.ASCII)
        if found is None:
            raise ValueError(f"{text!r} is no part, such as 3/16: the third of 16")
        return cls(int(found[1]), int(found[2]))

    def target(self, out: Path) -> Path:
        """The output whose stage is that of this part; nothing is written at this path itself."""
        return out.with_name(f"{out.name}.part-{self.number}-of-{self.of}")

    def stage(self, out: Path) -> str:
        """The name of this part's stage, beside the output."""
        return stage_name(self.target(out))


def shards_of(plan: Plan, part: Part) -> tuple[PlannedShard, ...]:
    """The shards of a part: a range, empty where there are more parts than shards.

    A shard belongs to the part in whose equal share of all bytes its middle lies, so that a part has at most half of
    its first and half of its last shard more than that share.
    """
    sizes = [shard.file_bytes(plan.sources) for shard in plan.shards]
    total, at, mine = sum(sizes), 0, []
    for shard, size in zip(plan.shards, sizes, strict=True):
        if (2 * at + size) * part.of // (2 * total) == part.number - 1:
            mine.append(shard)
        at += size
    return tuple(mine)


def identity(plan: Plan) -> dict[str, str]:
    """All that a plan's shards depend on, by name: what must be the same on every machine that builds a part."""
    chosen, layout = xxhash.xxh3_128(), xxhash.xxh3_128()
    for shard in plan.shards:
        chosen.update(shard.file.encode())
        layout.update(repr(shard.link).encode())
        for tensor in shard.tensors:
            chosen.update(repr((tensor.source, tensor.info.name)).encode())
            layout.update(repr(tensor.info).encode())
    # The first that differs is named in an error, so causes are before what follows from them.
    return {
        "the version of mixprec": __version__,
        "the release of SGLang (--sglang)": plan.sglang,
        "--drop-mtp": str(plan.recipe.drop_mtp),
        "--link": str(any(shard.link is not None for shard in plan.shards)),
        "`tp` of the recipe": str(list(plan.recipe.tp)),
        "--layout": plan.recipe.layout,
        "`shard_size` of the recipe": str(plan.recipe.shard_size),
        "what the recipe takes from its sources": chosen.hexdigest(),
        **{
            f"the source `{name}` (files, sizes, headers and times of modification)": _state(plan, name, files)
            for name, files in sorted(files_needed(plan).items())
        },
        "where tensors lie in source files": layout.hexdigest(),
    }


def _state(plan: Plan, source: str, files: set[str]) -> str:
    digest = xxhash.xxh3_128()
    shards = plan.sources.by_name[source].checkpoint.shards
    for file in sorted(files):
        digest.update(repr((file, shards[file].size, shards[file].header_checksum, shards[file].modified)).encode())
    return digest.hexdigest()


def require_sources_here(plan: Plan) -> None:
    """Raises :class:`SourceError` where a source file that the plan needs is not on this machine.

    Each of many machines would download it, and values that are checked before a build could differ between plans.
    """
    for name, files in files_needed(plan).items():
        checkpoint = plan.sources.by_name[name].checkpoint
        away = [file for file in sorted(files) if checkpoint.storage.cached(file) is None]
        if away:
            commit = f" --revision {checkpoint.commit}" if checkpoint.commit else ""
            raise SourceError(
                f"the source `{name}`: {some(away)} must be downloaded before a build in parts; run `hf download "
                f"{checkpoint.location.partition('@')[0]}{commit}` once, with HF_HOME on the file system that all "
                "machines share",
                path=checkpoint.location,
            )


def refuse_parts(out: Path) -> None:
    """Raises :class:`OutputError` where parts of a build wait beside an output that is built as a whole."""
    with write_errors(out):
        target = out.resolve()
        if not target.parent.is_dir():
            return
        with OwnedFolder.open(target.parent) as root:
            parts = _parts(root, target)
    if parts:
        raise OutputError(
            f"{out}: {counted(len(parts), 'part')} of a build in parts wait beside it ({_places(target, parts)}); "
            "finish that with --finish, or remove these folders"
        )


def write_part(
    plan: Plan,
    out: Path,
    part: Part,
    *,
    force: bool = False,
    take_over: bool = False,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> Path:
    """Writes the shards of a part into its stage, whose path is returned; writes nothing where it has no shards.

    A part that was stopped continues after its finished shards, and one that is complete only reads their journal.

    Raises:
        OutputError: ``out`` or the part's stage is in use, or parts of another plan wait beside it.
        SourceError: a source cannot be read or has changed since it was planned.
        WriteError: the disk is full, fails, or forbids it.
    """
    target = out.resolve()
    shards = shards_of(plan, part)
    folder = target.with_name(part.stage(target))
    check_output(plan, out, force=force)
    mine = identity(plan)
    if not shards:
        with write_errors(out):
            if target.parent.is_dir():
                with OwnedFolder.open(target.parent) as root:
                    _require_one_plan(root, target, mine, part)
        return folder
    paths = fetch(plan, shards)
    with (
        opened_stage(part.target(target), out, take_over) as stage,
        stop_reported(stage, out, len(shards)),
        write_errors(out),  # errors that no step reports itself
    ):
        _require_one_plan(stage.root, target, mine, part)
        stage.write_plan(json.dumps(mine).encode())
        copier = Copier(plan, paths, stage, progress or (lambda _: None), shards=shards)
        copier.run(jobs or min(8, os.cpu_count() or 1))
        # Another machine may have noted another plan since: the later of the two sees it.
        _require_one_plan(stage.root, target, mine, part)
    return folder


def adopt_parts(stage: Stage, plan: Plan, keys: Mapping[str, str], *, take_over: bool) -> None:
    """Moves the finished shards of all parts into ``stage``, that of the output. Moves none unless all are there.

    Args:
        keys: file -> key of its shard now.
        take_over: also of parts that another machine may still be writing.

    Raises:
        MissingPartsError: parts are missing or not complete.
        OutputError: a part is being written, or is of another plan.
    """
    out, root = stage.out, stage.root
    parts = _parts(root, out)
    _require_one_plan(root, out, identity(plan), None)
    ready: dict[str, Part] = {}
    for part in parts:
        with Stage.open(part.target(out), take_over=take_over) as other:
            ready.update(dict.fromkeys(_kept(other, keys), part))
    wanted = [file for file in keys if file not in stage.finished]
    missing = {file for file in wanted if file not in ready}
    if missing:
        raise _missing(plan, out, parts[0].of if parts else None, missing, bool(stage.finished))
    for part in parts:
        with Stage.open(part.target(out), take_over=take_over) as other:
            kept = {*_kept(other, keys)}
            stage.adopt(other, [file for file in wanted if ready[file] == part and file in kept])
            if not all(file in stage.finished for file in wanted if ready[file] == part):
                raise OutputError(f"{other.folder}: was changed meanwhile; repeat --finish, which says what is missing")
            other.finished.clear()  # nothing in it is needed: it is removed at the end


def _kept(stage: Stage, keys: Mapping[str, str]) -> list[str]:
    return [file for file, entry in stage.finished.items() if stage.is_kept(file, entry, keys)]


def _missing(plan: Plan, out: Path, count: int | None, missing: set[str], begun: bool) -> MissingPartsError:
    command = f"`mixprec build {as_word(plan.recipe.path)} -o {as_word(out)} --part"
    if count is None:
        there = "files of a build in parts are missing" if begun else "no part of it is there"
        return MissingPartsError(f"{out}: {there}; build each part before --finish: {command} 1/N` to `N/N`")
    lacking = []
    for number in range(1, count + 1):
        part = Part(number, count)
        shards = shards_of(plan, part)
        absent = sum(shard.file in missing for shard in shards)
        if absent:
            lacking.append((part, f"{part} lacks {absent} of {counted(len(shards), 'file')}"))
    verb = "is" if len(lacking) == 1 else "are"
    which = some([text for _, text in lacking], 16)
    names = [str(part) for part, _ in lacking]
    return MissingPartsError(
        f"{out}: {len(lacking)} of {counted(count, 'part')} {verb} not complete: {which}; build "
        f"{'it' if len(names) == 1 else 'each'} with the options of the others: {command} {names[0]}`",
        names,
    )


def _parts(root: OwnedFolder, out: Path) -> list[Part]:
    """The parts of an output that have a stage, in order."""
    return sorted(_stages(root, out))


def _stages(root: OwnedFolder, out: Path) -> Iterator[Part]:
    start = f".{out.name}"
    for entry in root.entries():
        found = _SUFFIX.fullmatch(entry.name.removeprefix(start)) if entry.name.startswith(start) else None
        if found is not None and int(found[1]) <= int(found[2]):
            yield Part(int(found[1]), int(found[2]))


def _require_one_plan(root: OwnedFolder, out: Path, mine: Mapping[str, str], part: Part | None) -> None:
    """Raises :class:`OutputError` where a part beside ``out`` is of another plan, or of another number of parts."""
    parts = _parts(root, out)
    counts = {other.of for other in (*parts, *([part] if part else []))}
    if len(counts) > 1:
        raise OutputError(
            f"{out}: parts of {' and of '.join(map(str, sorted(counts)))} do not belong together "
            f"({_places(out, parts)}); remove the folders of those that are not wanted"
        )
    for other in parts:
        name = other.stage(out)
        theirs = _noted(root, name)
        # One that has noted nothing was only just begun, and compares itself with this one.
        different = next((what for what in mine if theirs and theirs.get(what) != mine[what]), None)
        if different is not None and theirs is not None:
            seen = f" ({_short(theirs.get(different))} there, {_short(mine[different])} here)"
            raise OutputError(
                f"{root.path / name}: part {other} was built from another plan: it differs in {different}{seen}; build "
                "all parts from the same recipe, sources, options and version, or remove that folder"
            )


def _short(value: str | None) -> str:
    return "nothing" if value is None else f"{value[:12]}..." if len(value) > 24 else value


def _noted(root: OwnedFolder, name: str) -> dict[str, str] | None:
    """What a part noted of its plan; None where it noted nothing yet."""
    try:
        fd = root.open_file(f"{name}/plan", os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    with os.fdopen(fd, "rb") as file:
        state = os.fstat(fd)
        if stat.S_ISREG(state.st_mode) and state.st_size <= _MOST_BYTES:
            with suppress(ValueError, RecursionError):
                noted = json.loads(file.read())
                if isinstance(noted, dict):
                    return {str(key): str(value) for key, value in noted.items()}
    raise OutputError(f"{root.path / name}/plan: is no file that mixprec wrote; remove {root.path / name}")


def _places(out: Path, parts: Sequence[Part]) -> str:
    return some([str(out.with_name(part.stage(out))) for part in parts], 3)
