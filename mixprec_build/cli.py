"""The command line: argument parsing and printing, nothing else."""

from __future__ import annotations

import gc
import io
import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from enum import Enum
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from . import __version__
from .errors import MixprecError, RefusedError
from .objective import Objective

if TYPE_CHECKING:
    from rich.console import Console

    from .copier import Progress
    from .plan import Plan

__all__ = ["app", "main"]

app = typer.Typer(
    name="mixprec",
    help="Compile several checkpoints of one model into one whose weights keep the formats they came in.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Allowed(str, Enum):
    """What ``--allow`` lets pass."""

    UNSERVABLE = "unservable"


class Layout(str, Enum):
    """Which files a compiled checkpoint has."""

    MERGED = "merged"
    PRESPLIT = "presplit"
    BOTH = "both"


RecipePath = Annotated[Path, typer.Argument(help="The recipe (YAML).", show_default=False)]
Folder = Annotated[Path, typer.Argument(help="A checkpoint's folder.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print facts as JSON, for programs.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but notes and errors.")]
Allow = Annotated[
    list[Allowed], typer.Option("--allow", help="`unservable`: build also what SGLang could not serve, and record it.")
]
Link = Annotated[bool, typer.Option("--link", help="Reflink or hard-link source files that are taken over whole.")]


@app.command()
def build(
    recipe: RecipePath,
    out: Annotated[Path, typer.Option("--output", "-o", help="The folder to create.", show_default=False)],
    force: Annotated[bool, typer.Option("--force", help="Replace an output that mixprec wrote before.")] = False,
    allow: Allow = [],  # noqa: B006 (typer copies it)
    link: Link = False,
    layout: Annotated[
        Layout | None,
        typer.Option(help="Files for all (merged), cut for ranks (presplit), or both; else what the recipe says."),
    ] = None,
    jobs: Annotated[
        int | None, typer.Option("--jobs", "-j", min=1, help="Copying threads.", show_default=False)
    ] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Compile a recipe's sources into one checkpoint."""
    from .build import run_plan
    from .write import check_output

    plan = _plan(recipe, allow, link, layout)
    check_output(plan, out, force=force)
    _show_plan_notes(plan, as_json)

    def follow(other: Plan) -> None:
        nonlocal plan
        _show_plan_notes(other, as_json, told=plan)
        plan = other

    with _bar("writing", plan.written_bytes, quiet or as_json) as progress:
        unservable = Allowed.UNSERVABLE in allow
        manifest = run_plan(
            plan,
            out,
            force=force,
            allow_unservable=unservable,
            link=link,
            jobs=jobs,
            progress=progress,
            replanned=follow,
        )
    if as_json:
        from .report import plan_facts

        _print_json({"output": str(out), "manifest": str(manifest), **plan_facts(plan)})
    elif not quiet:
        from .report import human
        from .servable import counted

        only_ranks = plan.recipe.layout == Layout.PRESPLIT.value
        cut = "files cut for ranks only" if only_ranks else counted(len(plan.shards), "file")
        print(f"{out}: {len(plan.modules):,} modules, {human(plan.tensor_bytes)} in {cut}")
        for degree, nbytes in plan.presplit.items():
            print(f"{out}/presplit/{degree}: files of all ranks, {human(nbytes)}")
        print(f"next: mixprec verify {out}")


@app.command()
def plan(recipe: RecipePath, allow: Allow = [], link: Link = False, as_json: AsJson = False) -> None:  # noqa: B006
    """Show what a build would write, without writing it."""
    from .report import plan_facts, show_plan

    facts = plan_facts(_plan(recipe, allow, link))
    if as_json:
        _print_json(facts)
    else:
        show_plan(facts, _console())


@app.command()
def inspect(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint's folder, or a hub id.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Show what a checkpoint holds: a compiled one or any other."""
    from .report import inspect_facts, show_inspect
    from .sources import open_on_disk

    facts = inspect_facts(open_on_disk(checkpoint), Path(checkpoint))
    if as_json:
        _print_json(facts)
    else:
        show_inspect(facts, _console())


@app.command()
def verify(
    folder: Folder,
    against: Annotated[
        str | None,
        typer.Option(
            "--against",
            help="Also show how far quantized weights are from those of this unquantized source (its name), folder or "
            "hub id.",
            show_default=False,
        ),
    ] = None,
    source: Annotated[
        list[str], typer.Option("--source", help="NAME=LOCATION: where a source has moved to.", metavar="NAME=LOCATION")
    ] = [],  # noqa: B006
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Compare a compiled checkpoint with its sources, bit for bit."""
    from .manifest import read_manifest, tensor_entries
    from .sources import open_on_disk, open_source
    from .verify import comparable, location_of, weight_errors
    from .verify import verify as run

    moved = dict(_pair(item) for item in source)
    manifest = read_manifest(folder)
    if against:
        entry = manifest["sources"].get(against, {})
        reference = open_source(moved.get(against) or (entry and location_of(entry)) or against)
        ours = open_on_disk(str(folder))
        comparable(ours, reference)  # before the hour that reading may take
    total = sum(entry["bytes"] for entry in tensor_entries(manifest).values())
    with _bar("comparing", total, quiet or as_json) as progress:
        result = run(folder, sources=moved, progress=progress)
    errors = list(weight_errors(ours, reference)) if against else []
    if as_json:
        _print_json(
            {
                "bit_for_bit": result.bit_for_bit,
                "by_checksum": result.by_checksum,
                "gone": result.gone,
                "differences": result.differences,
                "leftovers": result.leftovers,
                "errors": [{"module": e.module, "format": e.kind, "relative": e.relative} for e in errors],
            }
        )
    elif not quiet:
        from .report import show_errors

        for reason in result.gone:
            print(f"compared by checksum only, source {reason}")
        if result.leftovers:
            print(f"left behind by a `mixprec split` that was stopped: {', '.join(result.leftovers)}; repeat it")
        compared = f"{result.bit_for_bit:,} tensors bit for bit with their sources, {result.by_checksum:,} by checksum"
        print(f"compared {compared}")
        if errors:
            show_errors(errors, against or "", _console())
    if result.differences:
        for difference in result.differences:
            print(f"differs: {difference}", file=sys.stderr)
        if not quiet and not as_json:
            print(f"differences: {len(result.differences)}")
        raise typer.Exit(1)
    if not quiet and not as_json:
        print("no difference")


@app.command()
def split(
    folder: Folder,
    tp: Annotated[
        int | None, typer.Option("--tp", min=1, max=9999, help="Tensor-parallel ranks.", show_default=False)
    ] = None,
    ep: Annotated[int, typer.Option("--ep", min=1, help="Expert-parallel ranks among them.")] = 1,
    dp: Annotated[
        int, typer.Option("--dp", min=1, help="Replicas of attention among them, for --enable-dp-attention.")
    ] = 1,
    ranks: Annotated[
        str | None, typer.Option("--ranks", help="Only these, as in 0-3 or 0,2: a node needs only its own.")
    ] = None,
    layout: Annotated[
        Layout | None,
        typer.Option(
            help="presplit: drop the merged files after it; both: keep or restore them (without --layout, too); "
            "merged: restore them, and drop the files of all ranks.",
            show_default=False,
        ),
    ] = None,
    jobs: Annotated[
        int | None, typer.Option("--jobs", "-j", min=1, help="Copying threads.", show_default=False)
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Cut a compiled checkpoint for the ranks that will serve it: each then reads its own files only."""
    from .manifest import layout_of, read_manifest
    from .presplit import Degree, Splitter
    from .report import human
    from .servable import counted
    from .split import split as run

    if tp is None and (layout is None or ep > 1 or dp > 1 or ranks is not None):
        raise typer.BadParameter("how many ranks are there?", param_hint="--tp")
    if tp is not None and layout is Layout.MERGED:
        raise typer.BadParameter("no files are cut with --layout merged; leave out --tp", param_hint="--tp")
    degree = None if tp is None else Degree(tp, ep, dp)
    wanted = (layout or Layout.BOTH).value
    with ExitStack() as stack:

        def watch(splitter: Splitter | None, nbytes: int) -> Progress:
            for remark in [] if splitter is None else splitter.remarks():
                print(f"note: {remark}", file=sys.stderr)
            return stack.enter_context(_bar("writing", nbytes, quiet))

        numbers = None if ranks is None or tp is None else _numbers(ranks, tp)
        written = run(folder, degree, layout=wanted, ranks=numbers, jobs=jobs, watch=watch)
    if quiet:
        return
    if written:
        size = sum(file.stat().st_size for path in written for file in path.iterdir())
        print(f"{folder}/presplit/{degree}: files of {counted(len(written), 'rank')}, {human(size)}")
    if layout is not None:
        print(f"{folder}: {_HAS[layout_of(read_manifest(folder))]}")
    if degree is not None and written:
        print(f"next: python -m sglang.launch_server --model-path {folder} {degree.options}")


_HAS = {
    "merged": "merged files only",
    "presplit": "files cut for ranks only; `mixprec split --layout both` restores the merged ones",
    "both": "merged files, and those cut for ranks",
}


def _numbers(text: str, tp: int) -> list[int]:
    """``"0-3,6"`` -> ``[0, 1, 2, 3, 6]``, of ``tp`` ranks."""
    numbers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or len(part) > 9:
            raise typer.BadParameter(f"{text!r} is no list of ranks like 0-3 or 0,2", param_hint="--ranks")
        if int(last or first) >= tp:
            raise typer.BadParameter(f"{text!r}: of {tp} ranks the last is {tp - 1}", param_hint="--ranks")
        numbers += range(int(first), int(last or first) + 1)
    return numbers


@app.command()
def doctor(
    folder: Annotated[
        Path | None, typer.Argument(help="A compiled checkpoint to be served.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check that this machine can serve compiled checkpoints, or this one, with SGLang."""
    from mixprec_runtime.doctor import examine

    findings = examine(folder)
    if as_json:
        _print_json([{"status": f.status, "subject": f.subject, "text": f.text} for f in findings])
    else:
        from .report import show_findings

        show_findings([(f.status, f.subject, f.text) for f in findings], _console())
    if any(f.status == "fail" for f in findings):
        raise typer.Exit(1)


@app.command()
def suggest(
    base: Annotated[Path, typer.Argument(help="A recipe with the sources to choose from (YAML).", show_default=False)],
    budget: Annotated[str, typer.Option(help="Bytes of the files to be written: 140GB, 130GiB.", show_default=False)],
    out: Annotated[Path, typer.Option("--output", "-o", help="The recipe to write.", show_default=False)],
    stats: Annotated[
        list[Path], typer.Option("--stats", help="Expert activity (JSON, or a dump of SGLang's recorder); repeatable.")
    ] = [],  # noqa: B006
    moments: Annotated[
        Path | None, typer.Option(help="Second moments of the modules' inputs (safetensors).", show_default=False)
    ] = None,
    objective: Annotated[
        Objective | None,
        typer.Option(help="What is kept small; without it `relative-output` with moments, else `relative`."),
    ] = None,
    min_format: Annotated[
        list[str], typer.Option(help="No format of fewer bits there.", metavar="PATTERN: FORMAT")
    ] = [],  # noqa: B006
    pin: Annotated[list[str], typer.Option(help="This source there.", metavar="PATTERN: SOURCE")] = [],  # noqa: B006
    plot: Annotated[Path | None, typer.Option(help="Draw loss against bytes (PNG).", show_default=False)] = None,
    errors: Annotated[
        Path | None,
        typer.Option(help="Where measured errors are kept; ~/.cache/mixprec without it.", show_default=False),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the recipe that is there.")] = False,
    allow: Allow = [],  # noqa: B006
    jobs: Annotated[
        int | None, typer.Option("--jobs", "-j", min=1, help="Measuring threads.", show_default=False)
    ] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Choose a source for every module: the least error within a budget. Writes a recipe."""
    from .activity import read_activity
    from .allocate import suggest as run
    from .choices import Request
    from .distortion import DistortionCache, Moments, default_cache
    from .recipe import load_recipe, parse_size
    from .report import show_suggestion
    from .sources import open_sources
    from .suggestion import check_target, suggestion_facts, write_recipe

    try:
        nbytes = parse_size(budget)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--budget") from error
    check_target(out, base, force=force)
    if plot is not None:
        from .figures import check_picture

        check_picture(plot)
    request = Request(
        budget=nbytes,
        objective=objective,
        activity=read_activity(stats) if stats else None,
        moments=Moments(moments) if moments else None,
        pins=[_wish(text, "--pin") for text in pin],
        floors=[_wish(text, "--min-format") for text in min_format],
        allow_unservable=Allowed.UNSERVABLE in allow,
    )
    recipe = load_recipe(base)
    with ExitStack() as stack:
        cache = stack.enter_context(DistortionCache(errors or default_cache()))

        def watch(total: int) -> Progress:
            return stack.enter_context(_bar("measuring", total, quiet or as_json))

        suggestion = run(recipe, open_sources(recipe), request, cache, jobs=jobs, watch=watch)
    write_recipe(suggestion, out, force=force)
    if plot is not None:
        from .figures import draw_frontier

        draw_frontier(suggestion, plot)
    if as_json:
        _print_json({"recipe": str(out), **suggestion_facts(suggestion)})
    elif not quiet:
        show_suggestion(suggestion_facts(suggestion), _console())
        print(f"next: mixprec plan {out}")


@app.command()
def experts(
    files: Annotated[list[Path], typer.Argument(help="Activity (JSON) or dumps of SGLang's recorder (.pt), added up.")],
    top: Annotated[int, typer.Option(min=0, help="How many of the busiest experts to list.")] = 20,
    heatmap: Annotated[
        Path | None, typer.Option(help="Draw layers x experts: .png or .html.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show how tokens were spread over experts."""
    from .activity import activity_facts, read_activity
    from .report import show_activity

    if heatmap is not None:
        from .figures import check_picture, draw_heatmap

        check_picture(heatmap, page=True)
    activity = read_activity(files)
    if heatmap is not None:
        draw_heatmap(activity, heatmap)
    facts = activity_facts(activity, top)
    if as_json:
        _print_json(facts)
    else:
        from .figures import show_heatmap

        show_activity(facts, _console())
        show_heatmap(activity, _console())


def _wish(text: str, flag: str) -> tuple[str, str]:
    pattern, colon, word = text.rpartition(":")
    if not (colon and pattern.strip() and word.strip()):
        raise typer.BadParameter(f"{text!r} is not `PATTERN: WORD`", param_hint=flag)
    return pattern.strip(), word.strip()


def _pair(text: str) -> tuple[str, str]:
    name, equals, location = text.partition("=")
    if not (name and equals and location):
        raise typer.BadParameter(f"{text!r} is not NAME=LOCATION", param_hint="--source")
    return name, location


def _plan(recipe: Path, allow: list[Allowed], link: bool, layout: Layout | None = None) -> Plan:
    from .build import no_garbage_collection, plan_recipe

    wanted = None if layout is None else layout.value
    with no_garbage_collection():
        plan = plan_recipe(recipe, allow_unservable=Allowed.UNSERVABLE in allow, link=link, layout=wanted)
        gc.freeze()  # its million objects stay until the end, and need not be searched for garbage, at exit neither
    return plan


def _show_plan_notes(plan: Plan, as_json: bool, told: Plan | None = None) -> None:
    """Prints them, but for those that ``told`` has, too."""
    if as_json:
        return
    for note in plan.notes:
        if told is None or note not in told.notes:
            print(f"note: {note}", file=sys.stderr)
    for problem in plan.unservable:
        if told is None or problem not in told.unservable:
            print(f"SGLang cannot serve this: {problem}", file=sys.stderr)


@contextmanager
def _bar(what: str, total: int, quiet: bool) -> Iterator[Progress]:
    """A progress bar with bytes and rate on standard error, where that is a terminal."""
    if quiet or not total:
        yield lambda _: None
        return
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Bar(*columns, console=_console(stderr=True)) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.advance(task, done)


def _console(stderr: bool = False) -> Console:
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    # Piped output is for other programs: wide enough that nothing is folded.
    return Console(stderr=stderr, width=None if stream.isatty() else 160, highlight=False)


def _print_json(facts: object) -> None:
    print(json.dumps(facts, indent=2, ensure_ascii=False))


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(f"mixprec {__version__}")
        raise typer.Exit


class _Stop:
    """Handles Ctrl-C and SIGTERM: the first ends the command in order, as KeyboardInterrupt.

    What comes after it ends the process at once, as a kill would: whatever is being written survives that, and to end
    in order may mean to wait for a disk.
    """

    number = 0
    ended = False

    def __call__(self, number: int, _: FrameType | None) -> None:
        if self.number or self.ended:
            if os.isatty(2):
                os.write(2, b"\x1b[?25h")  # the cursor, which a progress bar hides
            os._exit(128 + number)
        self.number = number
        raise KeyboardInterrupt


def main() -> None:
    """The console script ``mixprec``: errors become one message and an exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A path need not be text, and a terminal need not know every letter.
            stream.reconfigure(errors="backslashreplace")
    stop = _Stop()
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as a shell's background jobs inherit it
            signal.signal(number, stop)
    code: object = 0
    message = ""
    try:
        app(prog_name="mixprec")
    except SystemExit as ended:  # of every command that did not fail, and of one that Ctrl-C ended
        code, message = ended.code, "interrupted" if stop.number else ""
    except MixprecError as error:
        code, message = error.exit_code, str(error)
        if "--json" in sys.argv:
            _print_json({"refused": error.problems} if isinstance(error, RefusedError) else {"error": message})
    except MemoryError:
        code, message = 1, "out of memory"
    except RuntimeError as error:
        if "new thread" not in str(error):
            raise
        code, message = 1, f"out of memory, or of processes: {error}"
    except OSError as error:  # standard output is full, say
        code, message = 1, str(error)
    stop.ended = True
    if message:
        print(f"mixprec: {_printable(message)}", file=sys.stderr)
    sys.exit(128 + stop.number if stop.number else code)  # type: ignore[arg-type]


def _printable(text: str) -> str:
    """Without characters that would command the terminal: a message may quote a stranger's file."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


if __name__ == "__main__":
    main()
