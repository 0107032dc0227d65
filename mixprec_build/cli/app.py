"""The command line: parses arguments, calls the API, turns errors into one message and an exit code."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from types import FrameType
from typing import Annotated, Any

import typer

from ..errors import MissingPartsError, MixprecError, RecipeError, RefusedError
from ..storage.garbage import give_back_large_blocks
from ..text import printable
from ..versions import __version__
from .build import build
from .doctor import doctor
from .experts import experts
from .inspect import inspect
from .plan import plan
from .printing import print_json
from .split import split
from .streams import OutputLostError, finish_output, open_streams
from .suggest import suggest
from .verify import verify

__all__ = ["app", "main"]


app = typer.Typer(
    name="mixprec",
    help="Compile several checkpoints of one model into one whose weights keep the formats they came in.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _with_json_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Makes a command print errors as JSON, too, if it is called with ``--json``."""

    @wraps(command)
    def run(**options: Any) -> None:
        try:
            command(**options)
        except MixprecError as error:
            if options.get("as_json"):
                with suppress(OutputLostError):
                    print_json(_facts_of(error))
            raise

    return run


def _facts_of(error: MixprecError) -> dict[str, object]:
    if isinstance(error, RefusedError):
        return {"refused": [problem.to_json() for problem in error.problems]}
    if isinstance(error, MissingPartsError):
        return {"error": str(error), "fix": None, "missing_parts": list(error.parts)}
    fix = error.fix if isinstance(error, RecipeError) else None
    return {"error": str(error), "fix": None if fix is None else fix.to_json()}


for _command in (build, plan, inspect, verify, split, doctor, suggest, experts):
    app.command()(_with_json_errors(_command))


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(f"mixprec {__version__}")
        raise typer.Exit


class _Stop:
    """Handles Ctrl-C and SIGTERM: the first raises KeyboardInterrupt, which ends the command in order.

    A second one ends the process at once, since an orderly end may have to wait for a disk. What is being written
    survives that as it survives a kill.
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
    open_streams()
    give_back_large_blocks()
    stop = _Stop()
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as a shell's background jobs inherit it
            signal.signal(number, stop)
    code, message = _ended(stop)
    stop.ended = True
    try:
        finish_output()
    except OutputLostError as error:
        code, message = code or error.exit_code, message or error.message
    if message:
        lines = "\n".join(map(printable, message.split("\n")))  # it may quote an untrusted file
        print(f"mixprec: {lines}", file=sys.stderr)
    sys.exit(128 + stop.number if stop.number else code)  # type: ignore[arg-type]


def _ended(stop: _Stop) -> tuple[object, str]:
    """Runs the command; returns its exit code and the message to end with."""
    try:
        app(prog_name="mixprec")
    except SystemExit as ended:  # after a command that did not fail, and after Ctrl-C
        return ended.code, "interrupted" if stop.number else ""
    except OutputLostError as error:
        return error.exit_code, error.message
    except MixprecError as error:
        return error.exit_code, str(error)
    except MemoryError:
        return 1, "out of memory"
    except RuntimeError as error:
        if "new thread" not in str(error):
            raise
        return 1, f"out of memory, or of processes: {error}"
    except OSError as error:
        return 1, str(error)
    return 0, ""
