"""The version of mixprec, and the releases of SGLang that its checkpoints are served with."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = [
    "INSTALL", "NEWEST", "OLDEST", "RULES", "UNTILED", "Rule", "__version__", "beside", "between", "untested",
    "version_problem",
]  # fmt: skip


__version__ = "0.1.0"

OLDEST, NEWEST = "0.5.15.post1", "0.5.23"
INSTALL = f"pip install 'sglang>={OLDEST},<={NEWEST}'"


@dataclass(frozen=True, slots=True)
class Rule:
    """Something that only some releases of SGLang serve: those from ``since`` on and before ``until``."""

    name: str
    text: str
    since: str = ""
    until: str = ""

    def holds_in(self, version: str) -> bool:
        """Whether a release serves it."""
        return between(self.since, self.until, version)


UNTILED = Rule("gptq_untiled", "another GPTQ kernel (exllama) for shapes that Marlin excludes", until="0.5.20")
RULES = {rule.name: rule for rule in (UNTILED,)}


def between(since: str, until: str, version: str) -> bool:
    """Whether a release is one of those from ``since`` on and before ``until``; empty bounds are open."""
    from packaging.version import Version

    # A build from source has what the release has that it precedes.
    release = Version(Version(version).base_version)
    return (not since or release >= Version(since)) and (not until or release < Version(until))


def beside() -> str:
    """The release of SGLang that is installed beside mixprec, else the newest that mixprec was tested with."""
    from importlib import metadata

    try:
        return metadata.version("sglang")
    except metadata.PackageNotFoundError:
        return NEWEST


def version_problem(version: str) -> str | None:
    """Returns a message if this version of SGLang is too old to serve, else None."""
    from packaging.version import Version

    if Version(OLDEST) <= Version(version):
        return None
    return (
        f"mixprec {__version__} serves with SGLang {OLDEST} and newer, tested up to {NEWEST}, and this is SGLang "
        f"{version}. Install one that fits: {INSTALL}"
    )


def untested(version: str) -> str | None:
    """Returns a warning for a version of SGLang that is newer than all that mixprec was tested with, else None."""
    from packaging.version import Version

    if Version(version) <= Version(NEWEST):
        return None
    return (
        f"SGLang {version} is newer than {NEWEST}, the newest that mixprec {__version__} was tested with. It has every "
        "name that mixprec uses; run `mixprec doctor --kernels out/` to compare its kernels with reference arithmetic"
    )
