"""What a build and a part of one have in common: source files at hand, an opened stage, and how they end."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ..checkpoint.checkpoint import INDEX
from ..errors import InterruptedBuildError, MixprecError, OutputError, WriteError
from ..planning.types import Plan, PlannedShard
from ..storage.disk import write_errors
from .stage import Stage

__all__ = ["fetch", "files_needed", "opened_stage", "stop_reported"]


def files_needed(plan: Plan, shards: Sequence[PlannedShard] | None = None) -> dict[str, set[str]]:
    """Source -> its files that ``shards`` take tensors from; by default all shards of the plan."""
    needed: dict[str, set[str]] = {name: set() for name in plan.sources.by_name}
    for shard in plan.shards if shards is None else shards:
        for tensor in shard.tensors:
            needed[tensor.source].add(tensor.info.file)
    return needed


def fetch(plan: Plan, shards: Sequence[PlannedShard] | None = None) -> dict[tuple[str, str], Path]:
    """Downloads the source files that ``shards`` (by default all) need and this machine lacks.

    Returns ``(source, file)`` -> path.
    """
    paths = {}
    for source, files in files_needed(plan, shards).items():
        storage = plan.sources.by_name[source].checkpoint.storage
        # With these in the cache the same recipe can be built again without the hub, unless scales may be folded into
        # norms in other shards.
        described_by = {"config.json", "quantize_config.json", INDEX} & storage.files.keys()
        fetched = storage.fetch(sorted(files | described_by))
        paths.update({(source, file): fetched[file] for file in files})
    return paths


@contextmanager
def opened_stage(target: Path, out: Path, take_over: bool) -> Iterator[Stage]:
    """Opens the stage of ``target``. Raises :class:`OutputError` where the folder of ``out`` cannot be written."""
    with ExitStack() as stack:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            stage = stack.enter_context(Stage.open(target, take_over=take_over))
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
                with write_errors(out):
                    raise
            raise OutputError(f"{out}: cannot be created ({error.filename}: {error.strerror})") from error
        yield stage


@contextmanager
def stop_reported(stage: Stage, out: Path, shards: int) -> Iterator[None]:
    """Says in errors what a build that stops leaves in its stage, of ``shards`` in all."""
    try:
        yield
    except (KeyboardInterrupt, InterruptedBuildError):
        raise InterruptedBuildError(f"{out}: interrupted; {stage.kept(shards)}") from None
    except MemoryError:
        raise WriteError(f"{out}: out of memory; {stage.kept(shards)}") from None
    except MixprecError as error:
        if (stage.finished or isinstance(error, WriteError)) and not stage.published:
            error.args = (f"{error}; {stage.kept(shards)}",)
        raise
