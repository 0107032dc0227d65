"""``mixprec split``."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated

import typer

from .options import Folder, Jobs, Layout, Quiet
from .printing import progress_bar

if TYPE_CHECKING:
    from ..storage.threads import Progress

__all__ = ["split"]


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
        str | None,
        typer.Option(
            "--ranks", help="Only these, as in 0-3 or 0,2: a node needs only its own, and others may be cut meanwhile."
        ),
    ] = None,
    finish: Annotated[
        bool, typer.Option("--finish", help="Complete it of ranks that were cut before, on any machines.")
    ] = False,
    take_over: Annotated[
        bool, typer.Option("--take-over", help="Continue a stopped split, even one that another machine began.")
    ] = False,
    layout: Annotated[
        Layout | None,
        typer.Option(
            help="presplit: then drop the merged files; both (the default): keep or restore them; "
            "merged: restore them, and drop the files of all ranks.",
            show_default=False,
        ),
    ] = None,
    jobs: Jobs = None,
    quiet: Quiet = False,
) -> None:
    """Cut a compiled checkpoint for the ranks that will serve it: each then reads its own files only."""
    from ..checkpoint.degree import Degree
    from ..checkpoint.manifest import read_head
    from ..output.split import split as run
    from ..ranks.splitter import Splitter
    from ..text import as_word, counted, human, printable

    if tp is None and (layout is None or ep > 1 or dp > 1 or ranks is not None or finish):
        raise typer.BadParameter("how many ranks are there?", param_hint="--tp")
    if tp is not None and layout is Layout.MERGED:
        raise typer.BadParameter("no files are cut with --layout merged; leave out --tp", param_hint="--tp")
    if finish and ranks is not None:
        raise typer.BadParameter("some ranks are cut, or all are finished: give one of the two", param_hint="--ranks")
    degree = None if tp is None else Degree(tp, ep, dp)
    wanted = (layout or Layout.BOTH).value
    with ExitStack() as stack:

        def watch(splitter: Splitter | None, nbytes: int) -> Progress:
            for remark in [] if splitter is None else splitter.remarks():
                print(f"note: {remark}", file=sys.stderr)
            return stack.enter_context(progress_bar("writing", nbytes, quiet))

        numbers = None if ranks is None or tp is None else _numbers(ranks, tp)
        written = run(
            folder,
            degree,
            layout=wanted,
            ranks=numbers,
            finish=finish,
            take_over=take_over,
            jobs=jobs,
            watch=watch,
        )
    if quiet:
        return
    if written:
        size = sum(file.stat().st_size for path in written for file in path.iterdir())
        print(f"{printable(str(folder))}/presplit/{degree}: files of {counted(len(written), 'rank')}, {human(size)}")
    if layout is not None:
        print(f"{printable(str(folder))}: {_HAS[read_head(folder).layout]}")
    if degree is not None and numbers is not None:
        print(f"when all ranks are cut: mixprec split {printable(as_word(folder))} {degree.cut_options} --finish")
    if degree is not None and written:
        print(f"next: python -m sglang.launch_server --model-path {printable(as_word(folder))} {degree.options}")


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
