"""Files that are copied beside the weights: tokenizer, generation config, chat template, license, ..."""

from __future__ import annotations

from pathlib import Path

from ..checkpoint.checkpoint import INDEX, Checkpoint
from ..checkpoint.declared import DECLARATION_FILES
from ..checkpoint.manifest import MANIFEST
from ..checkpoint.mistral_layout import PARAMS
from ..errors import SourceError
from ..storage.disk import MAX_FILE_BYTES, open_size
from ..storage.folder import LocalFolder

__all__ = ["CARD", "companion_files"]

CARD = "README.md"
"""The model card. That of the recipe's model is kept in the one that a build writes."""
MAX_CARD_BYTES = 4 << 20


# Not copied: these describe the source's weights, not the output's. With params.json SGLang would take a folder whose
# path has the name of some models of Mistral's for one in Mistral's own layout, and look for consolidated*.safetensors.
_STALE = {"config.json", INDEX, MANIFEST, PARAMS, *DECLARATION_FILES}
_KEPT_SUFFIXES = {".json", ".jinja", ".model", ".py", ".tiktoken", ".txt", ".vocab"}
_KEPT_NAMES = {"LICENSE", "LICENCE", "NOTICE", "USE_POLICY.md"}


def companion_files(model: Checkpoint) -> dict[str, int]:
    """File name -> bytes, of the model's files that are copied, which are never weights. 0 where a hub states no size.

    The model card is among them, though a build writes another one above it.

    Raises:
        SourceError: one is no regular file, or larger than mixprec reads.
    """
    found = {}
    for name, size in sorted(model.storage.files.items()):
        if "/" in name or name in _STALE or name.endswith(".index.json"):
            continue
        if Path(name).suffix not in _KEPT_SUFFIXES and name not in _KEPT_NAMES and name != CARD:
            continue
        if isinstance(model.storage, LocalFolder):
            size = open_size(model.storage.fetch([name])[name])
        most = MAX_CARD_BYTES if name == CARD else MAX_FILE_BYTES
        if size is not None and size > most:
            raise SourceError(f"{size} bytes; at most {most} are read", path=model.path_of(name))
        found[name] = size or 0
    return found
