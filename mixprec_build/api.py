"""The functions of ``import mixprec_build as mp``, which do for programs what the commands do.

They raise subclasses of :class:`~mixprec_build.errors.MixprecError`, whose text is meant for a user.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from .output.verify import Verification
    from .planning.types import Plan
    from .storage.threads import Progress
    from .suggesting.allocate import Suggestion

__all__ = ["build", "inspect", "memory", "plan", "split", "suggest", "verify"]

Layout = Literal["merged", "presplit", "both"]
"""The files of a checkpoint: those of the complete model, those cut for ranks, or both."""
Check = Literal["sample", "full"]
"""The quantized modules whose weights are compared with unquantized ones: a sample, or all."""
Device = Literal["auto", "cpu", "cuda"]
"""Numpy, torch on a GPU, or the latter where torch is installed and finds one. Both measure the same errors."""


def plan(
    recipe: str | PathLike[str],
    *,
    allow_unservable: bool = False,
    link: bool = False,
    layout: Layout | None = None,
    check: Check = "sample",
    drop_mtp: bool = False,
    sglang: str | None = None,
) -> Plan:
    """Decides what a recipe (a YAML file) builds: for every tensor its source and its file. Writes nothing.

    >>> plan = mp.plan("mix.yaml")
    >>> plan.modules["model.layers.0.mlp.down_proj"].format.kind
    'gptq_int4'

    Args:
        allow_unservable: plan a mix even if SGLang could not serve it; the reasons are then in ``plan.unservable``.
        link: reflink or hard-link source files whose every tensor is used, instead of copying them.
        layout: overrides the recipe's.
        check: compare the weights of a ``sample`` of the quantized modules with unquantized ones, or of all
            (``full``); differences are in ``plan.notes``.
        drop_mtp: leave out draft layers (MTP); the ``config.json`` that is built declares none.
        sglang: the release of SGLang to plan for, such as ``"0.5.17"``; by default the one that is installed beside
            mixprec, else the newest that mixprec was tested with.

    Raises:
        RecipeError: the recipe cannot be read, or asks for what no source has.
        SourceError: a checkpoint cannot be read.
        RefusedError: the mix cannot be served; ``problems`` has every reason.
    """
    from .output.build import plan_recipe

    return plan_recipe(
        Path(recipe),
        allow_unservable=allow_unservable,
        link=link,
        layout=layout,
        check_all=check == "full",
        drop_mtp=drop_mtp,
        sglang=sglang,
    )


def build(
    recipe: str | PathLike[str] | Plan,
    out: str | PathLike[str],
    *,
    force: bool = False,
    take_over: bool = False,
    part: tuple[int, int] | None = None,
    finish: bool = False,
    allow_unservable: bool = False,
    link: bool = False,
    layout: Layout | None = None,
    check: Check = "sample",
    drop_mtp: bool = False,
    sglang: str | None = None,
    card: bool = True,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> Path:
    """Compiles a recipe, or a plan of :func:`plan`, into the folder ``out``, which appears complete or not at all.

    >>> mp.build("mix.yaml", "out").name
    'mixprec_manifest.json'

    Args:
        force: replace an ``out`` that mixprec wrote before.
        take_over: continue a stopped build, even one that another machine began.
        part: build only this part of the files, beside ``out``: ``(3, 16)`` for the third of 16, each on any machine
            that shares the file system.
        finish: make ``out`` of the parts, all of which must be complete.
        allow_unservable, link, layout, check, drop_mtp, sglang: as for :func:`plan`; ``layout``, ``drop_mtp`` and
            ``sglang`` only with a recipe.
        card: write a model card for the hub, ``README.md``, with the model's own below it.
        jobs: copying threads; up to 8 by default.
        progress: called with the bytes just done, from any thread; they add up to ``plan.written_bytes`` at most.

    Returns:
        The path of the manifest; with ``part`` that of the folder with the part's files, which is not made where there
        are more parts than files.

    Raises:
        RecipeError, SourceError, RefusedError: as :func:`plan`.
        OutputError: ``out`` has other files in it, overlaps a source, or is in use; or parts are of another plan.
        MissingPartsError: ``finish`` lacks parts, which its ``parts`` names.
        WriteError: the disk is full or fails. The same call continues after the files that are finished.
    """
    from .output.build import run_plan
    from .output.parts import Part
    from .planning.types import Plan

    wanted = None if part is None else Part(*part)

    if not isinstance(recipe, Plan):
        recipe = plan(
            recipe,
            allow_unservable=allow_unservable,
            link=link,
            layout=layout,
            check=check,
            drop_mtp=drop_mtp,
            sglang=sglang,
        )
    return run_plan(
        recipe,
        Path(out),
        force=force,
        take_over=take_over,
        part=wanted,
        finish=finish,
        allow_unservable=allow_unservable,
        link=link,
        check_all=check == "full",
        card=card,
        jobs=jobs,
        progress=progress,
    )


def inspect(checkpoint: str | PathLike[str]) -> dict[str, Any]:
    """Describes a checkpoint by its headers: a compiled one or any other, by its folder or hub id.

    >>> sorted(entry["name"] for entry in mp.inspect("out")["formats"])
    ['bf16', 'fp8_block', 'gptq_int4']

    Returns:
        The data that ``mixprec inspect --json`` prints: ``formats`` with modules, parameters and bytes of each,
        ``layers`` with the formats in each, ``mtp`` with those of draft layers, and for a compiled checkpoint
        ``sources`` and ``manifest_checksum``.

    Raises:
        SourceError: the checkpoint cannot be read.
        VerifyError: its manifest was changed.
    """
    from .ranks.on_disk import open_on_disk
    from .report.facts import inspect_facts

    return inspect_facts(open_on_disk(str(checkpoint)), Path(checkpoint))


def memory(
    subject: Plan | str | PathLike[str],
    gpus: str,
    context: int = 32768,
    *,
    cache_dtype: Literal["auto", "fp8_e4m3"] = "auto",
    ep: int = 1,
) -> dict[str, Any]:
    """Computes what serving a plan, or a checkpoint by its folder or hub id, needs on GPUs.

    >>> needs = mp.memory(mp.plan("mix.yaml"), "1x24GB", context=4096)
    >>> needs["fits"], needs["options"]
    (True, '--tp 1')

    Args:
        gpus: their number, one tensor-parallel rank each, and size: ``4x80GB``.
        context: tokens of a sequence.
        cache_dtype: ``auto`` for a KV cache in 16 bits, or ``fp8_e4m3``.
        ep: expert-parallel ranks among the GPUs.

    Returns:
        The data under ``memory`` that ``mixprec plan --gpus --json`` prints: bytes of a rank, ``tokens`` and
        ``sequences`` that fit, and with ``fits`` False what ``would_fit``.

    Raises:
        SplitError: the model cannot be cut for so many ranks.
        SourceError: the checkpoint cannot be read.
        ValueError: ``gpus``, ``context`` or ``cache_dtype`` says nothing that exists.
    """
    from .planning.types import Plan
    from .ranks.on_disk import open_on_disk
    from .report.memory import Gpus, memory_of_plan, memory_of_source

    wanted = Gpus.parse(gpus)
    if isinstance(subject, Plan):
        return memory_of_plan(subject, wanted, context, cache_dtype=cache_dtype, ep=ep)
    return memory_of_source(open_on_disk(str(subject)), wanted, context, cache_dtype=cache_dtype, ep=ep)


def verify(
    folder: str | PathLike[str],
    *,
    sources: Mapping[str, str] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Verification:
    """Compares a compiled checkpoint with its manifest and its sources, bit for bit.

    >>> mp.verify("out").differences
    ()

    Args:
        sources: name of a source -> its new location. Tensors of sources that are gone are compared by checksum.
        progress: called with the bytes just compared, from any thread.

    Returns:
        All differences found, and how many tensors were compared in which way.

    Raises:
        VerifyError: there is no manifest, or it was changed.
        SourceError: the checkpoint cannot be opened.
        OutputError: another command is changing it.
    """
    from .output.verify import verify as run

    return run(Path(folder), sources=sources, watch=None if progress is None else lambda _: progress)


def split(
    folder: str | PathLike[str],
    tp: int | None = None,
    *,
    ep: int = 1,
    dp: int = 1,
    ranks: Iterable[int] | None = None,
    layout: Layout = "both",
    finish: bool = False,
    take_over: bool = False,
    jobs: int | None = None,
) -> list[Path]:
    """Cuts a compiled checkpoint for the ranks that will serve it.

    >>> [str(path) for path in mp.split("out", tp=1)]
    ['out/presplit/tp1-ep1/rank-0-of-1']

    Args:
        tp: tensor-parallel ranks; None with ``layout="merged"``.
        ep: expert-parallel ranks among them.
        dp: replicas of attention among them (``--enable-dp-attention``).
        ranks: cut only these; all by default. Machines that share the file system may cut others at the same time.
        layout: ``presplit`` drops the merged files afterwards, ``both`` keeps or restores them, ``merged`` restores
            them and drops the files of ranks.
        finish: complete the checkpoint of ranks that were cut before, all of them.
        take_over: cut ranks that another machine was cutting, without waiting until it was silent for long enough.
        jobs: copying threads; up to 8 by default.

    Returns:
        The folders of the ranks.

    Raises:
        SplitError: the checkpoint cannot be cut for these ranks.
        MissingRanksError: ``finish`` lacks ranks, which its ``ranks`` has.
        VerifyError: ``folder`` is not a compiled checkpoint, or was changed.
        OutputError, WriteError: as :func:`build`.
    """
    from .checkpoint.degree import Degree
    from .output.split import split as run

    degree = None if tp is None else Degree(tp, ep, dp)
    return run(Path(folder), degree, layout=layout, ranks=ranks, finish=finish, take_over=take_over, jobs=jobs)


def suggest(
    recipe: str | PathLike[str],
    budget: int | str,
    out: str | PathLike[str] | None = None,
    *,
    force: bool = False,
    stats: Sequence[str | PathLike[str]] = (),
    moments: str | PathLike[str] | None = None,
    swaps: str | PathLike[str] | None = None,
    objective: str | None = None,
    pins: Sequence[tuple[str, str]] = (),
    floors: Sequence[tuple[str, str]] = (),
    errors: str | PathLike[str] | None = None,
    device: Device = "auto",
    allow_unservable: bool = False,
    jobs: int | None = None,
) -> Suggestion:
    """Chooses a source for every module: the least expected loss within a budget of bytes.

    >>> suggestion = mp.suggest("mix.yaml", "700kB", "suggested.yaml", errors="errors")
    >>> suggestion.nbytes <= 700_000
    True

    Args:
        recipe: names the sources to choose from; its lines decide modules that have no choice.
        budget: bytes of the files to be written, as a number or as in ``"140GB"``.
        out: the recipe to write; none by default.
        force: replace an ``out`` that exists.
        stats: files of expert activity, added up.
        moments: a file of second moments of the modules' inputs (safetensors).
        swaps: a file of measured swaps (JSON), from ``recipes/swaps.py``.
        objective: ``weight``, ``relative``, ``output``, ``relative-output`` or ``measured``; by default the last with
            swaps, else ``relative-output`` with moments, else ``relative``.
        pins: ``(pattern, source)``: the only source for these modules.
        floors: ``(pattern, format)``: no format of fewer bits for these modules.
        errors: a file that stores measured errors; below ``~/.cache/mixprec`` by default.
        device: where errors are measured.
        allow_unservable: as for :func:`plan`.
        jobs: measuring threads; one a CPU by default, on a GPU at most 16.

    Returns:
        The plan of the mix, its bytes and loss, and the alternatives.

    Raises:
        BudgetError: no mix fits into the budget; the message states the smallest.
        DeviceError: ``device`` is ``cuda``, and torch is missing or finds no GPU.
        OutputError: ``out`` exists, or cannot be written.
        RecipeError, SourceError, StatsError, RefusedError: see their docstrings.
    """
    from .recipe.recipe import load_recipe, parse_size
    from .recipe.sources import open_sources
    from .suggesting.activity import read_activity
    from .suggesting.allocate import suggest as run
    from .suggesting.choices import Request
    from .suggesting.distortion import DistortionCache, Moments, default_cache
    from .suggesting.objective import Objective
    from .suggesting.recipe_file import check_target, write_recipe
    from .suggesting.swaps import read_swaps

    if out is not None:
        check_target(Path(out), Path(recipe), force=force)
    base = load_recipe(Path(recipe))
    request = Request(
        budget=parse_size(budget) if isinstance(budget, str) else budget,
        objective=None if objective is None else Objective(objective),
        activity=read_activity([Path(path) for path in stats]) if stats else None,
        moments=None if moments is None else Moments(Path(moments)),
        swaps=None if swaps is None else read_swaps(Path(swaps)),
        pins=pins,
        floors=floors,
        allow_unservable=allow_unservable,
    )
    with DistortionCache(default_cache() if errors is None else Path(errors)) as cache:
        suggestion = run(base, open_sources(base), request, cache, device=device, jobs=jobs)
    if out is not None:
        write_recipe(suggestion, Path(out), force=force)
    return suggestion
