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
DropMtp = Annotated[
    bool,
    typer.Option("--drop-mtp", help="Leave out draft layers (MTP), and write a config.json that declares none."),
]


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


def _release(text: str | None) -> str | None:
    if text is None:
        return None
    from packaging.version import InvalidVersion

    from ..versions import version_problem

    try:
        problem = version_problem(text)
    except InvalidVersion:
        problem = f"{text!r} is no release of SGLang, such as 0.5.17"
    if problem:
        raise typer.BadParameter(problem)
    return text


ForSglang = Annotated[
    str | None,
    typer.Option(
        "--sglang",
        metavar="VERSION",
        callback=_release,
        help="Follow this release's rules; by default those of the one installed here, else of the newest tested.",
        show_default=False,
    ),
]


class KvCache(str, Enum):
    """Values of ``--kv-cache-dtype``, as SGLang calls them."""

    AUTO = "auto"
    FP8 = "fp8_e4m3"


OnGpus = Annotated[
    str | None,
    typer.Option("--gpus", metavar="4x80GB", help="Also show what it needs on these GPUs.", show_default=False),
]
Context = Annotated[int, typer.Option("--context", min=1, help="With --gpus: tokens of a sequence.")]
KvCacheDtype = Annotated[
    KvCache, typer.Option("--kv-cache-dtype", help="With --gpus: a KV cache in 16 bits (auto) or in FP8.")
]
ExpertRanks = Annotated[int, typer.Option("--ep", min=1, help="With --gpus: expert-parallel ranks among them.")]
