"""Options that several commands share."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


class Allowed(str, Enum):
    """Values of ``--allow``."""

    UNSERVABLE = "unservable"


class Layout(str, Enum):
    """Values of ``--layout``: which files a compiled checkpoint has."""

    MERGED = "merged"
    PRESPLIT = "presplit"
    BOTH = "both"


RecipePath = Annotated[Path, typer.Argument(help="The recipe (YAML).", show_default=False)]
Folder = Annotated[Path, typer.Argument(help="A checkpoint's folder.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print facts as JSON, for programs.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but notes and errors.")]
Allow = Annotated[
    list[Allowed], typer.Option("--allow", help="`unservable`: accept what SGLang could not serve, and record it.")
]
Link = Annotated[bool, typer.Option("--link", help="Reflink or hard-link source files that are used unchanged.")]


class Checked(str, Enum):
    """Values of ``--check``: which quantized modules have their weights compared with unquantized ones."""

    SAMPLE = "sample"
    FULL = "full"


Check = Annotated[
    Checked,
    typer.Option("--check", help="Compare quantized weights with the unquantized ones: a sample of modules, or all."),
]

Jobs = Annotated[
    int | None,
    typer.Option("--jobs", "-j", min=1, max=256, help="Threads that copy or measure; up to 8 by default."),
]
