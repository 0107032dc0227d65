"""Refuses checkpoints in Mistral's own layout: ``params.json``, ``consolidated*.safetensors`` and names of their own.

Only renaming their tensors would be wrong: in attention with heads of keys and values, their rows of q and k are in an
order for rotary embedding of neighbouring pairs, those of the same release in Hugging Face's layout for pairs half a
head apart. SGLang renames them and turns them as the former (``rope_is_neox_style`` in
``utils/hf_transformers/mistral_utils.py`` of 0.5.15.post1 to 0.5.23), which a ``config.json`` does not say.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from ..errors import SourceError
from ..storage.header import TensorInfo
from ..text import some

__all__ = ["PARAMS", "is_consolidated", "lacks_config", "refuse_own_names", "taken_for_own"]

PARAMS = "params.json"
"""The facts of the model in Mistral's own layout, which SGLang reads instead of ``config.json``."""

# models/mistral.py, mistral_large_3.py and mistral_eagle.py of SGLang. InternLM2 has such words after a prefix.
_OWN = re.compile(r"layers\.\d+\.attention\.(w[qkvo]|wq_a|wq_b|wkv_a_with_mqa|wkv_b)\.\w+|tok_embeddings\.weight")

# is_mistral_model in utils/hf_transformers/mistral_utils.py of SGLang: all words of one of these, in any case
_TAKEN_FOR_OWN = (("mistral-large-3",), ("mistral-small-4",), ("leanstral",), ("eagle", "mistral"))

_INSTEAD = (
    "Name the release in Hugging Face's layout (config.json, model*.safetensors), often in the same repository, or "
    "convert this one with the script that transformers' repository has for the model: other names alone would not do, "
    "as rows of q and k are in another order"
)


def is_consolidated(file: str) -> bool:
    """Whether the name of a file is one of weights in Mistral's own layout."""
    return file.startswith("consolidated") and file.endswith((".safetensors", ".pth"))


def lacks_config(files: Collection[str]) -> str | None:
    """The reason why there is no ``config.json``, if these are files of Mistral's own layout (or Meta's, alike)."""
    own = [*([PARAMS] if PARAMS in files else []), *sorted(file for file in files if is_consolidated(file))]
    if not own:
        return None
    remedy = _INSTEAD
    if any(file.startswith("model") and file.endswith(".safetensors") for file in files):
        remedy = "The model*.safetensors beside them are in Hugging Face's: fetch their config.json, too"
    return f"no config.json, but {some(own)}: Mistral's own layout, which mixprec does not read. {remedy}"


def refuse_own_names(tensors: Iterable[TensorInfo], location: str) -> None:
    """Raises :class:`SourceError` where one of the tensors has a name of Mistral's own layout."""
    for tensor in tensors:
        if tensor.name.startswith(("layers.", "tok_embeddings.")) and _OWN.fullmatch(tensor.name):
            raise SourceError(
                f"tensor {tensor.name!r} has its name in Mistral's own layout, which mixprec does not read. {_INSTEAD}",
                path=f"{location}/{tensor.file}",
            )


def taken_for_own(path: str) -> str | None:
    """The words in the path of a folder for which SGLang reads ``params.json`` instead of its ``config.json``."""
    found = (words for words in _TAKEN_FOR_OWN if all(word in path.lower() for word in words))
    return next((" and ".join(map(repr, words)) for words in found), None)
