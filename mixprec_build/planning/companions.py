"""The files that come along with the model: tokenizer, generation config, chat template, license, ..."""

from __future__ import annotations

from pathlib import Path

from ..checkpoint.checkpoint import INDEX, Checkpoint
from ..checkpoint.declared import DECLARATION_FILES
from ..checkpoint.manifest import MANIFEST
from ..errors import SourceError
from ..storage.disk import MAX_FILE_BYTES, open_size
from ..storage.folder import LocalFolder

__all__ = ["companion_files"]


# Left behind by other tools: they describe the source's quantization, not the output's.
_STALE = {"config.json", INDEX, MANIFEST, *DECLARATION_FILES}
_KEPT_SUFFIXES = {".json", ".jinja", ".model", ".py", ".tiktoken", ".txt", ".vocab"}
_KEPT_NAMES = {"LICENSE", "LICENCE", "NOTICE", "USE_POLICY.md"}


def companion_files(model: Checkpoint) -> dict[str, int]:
    """The files of the model's checkpoint that are copied, never weights, and their bytes; 0 where a hub does not say.

    Raises:
        SourceError: one is no regular file, or larger than mixprec reads.
    """
    found = {}
    for name, size in sorted(model.storage.files.items()):
        if "/" in name or name in _STALE or name.endswith(".index.json"):
            continue
        if Path(name).suffix not in _KEPT_SUFFIXES and name not in _KEPT_NAMES:
            continue
        if isinstance(model.storage, LocalFolder):
            size = open_size(model.storage.fetch([name])[name])
        if size is not None and size > MAX_FILE_BYTES:
            raise SourceError(f"{size} bytes; at most {MAX_FILE_BYTES} are read", path=model.path_of(name))
        found[name] = size or 0
    return found
