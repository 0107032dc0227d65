"""Checkpoints in Mistral's own layout, ``params.json`` and ``consolidated*.safetensors``: those of latent attention.

:func:`with_usual_names` gives their tensors the names of DeepSeek-V3, and :mod:`mixprec_build.families.mistral_config`
makes a ``config.json``, so that such a release is a source like any other, and what is built of it an ordinary folder.

Other models in that layout are refused. Only renaming their tensors would be wrong: in attention with heads of keys and
values, their rows of q and k are in an order for rotary embedding of neighbouring pairs, those of the same release in
Hugging Face's layout for pairs half a head apart. SGLang renames them and turns them as the former
(``rope_is_neox_style`` in ``utils/hf_transformers/mistral_utils.py`` of 0.5.15.post1 to 0.5.23), which no
``config.json`` says.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

from ..errors import SourceError
from ..families.mistral_large import hugging_face_name
from ..storage.header import TensorInfo
from ..text import some

__all__ = [
    "OWN_INDEX",
    "PARAMS",
    "is_consolidated",
    "is_own",
    "lacks_config",
    "refuse_own_names",
    "taken_for_own",
    "usual_name",
    "with_usual_names",
]

PARAMS = "params.json"
"""The facts of the model in Mistral's own layout, which SGLang reads instead of ``config.json``."""
OWN_INDEX = "consolidated.safetensors.index.json"

# models/mistral.py, mistral_large_3.py and mistral_eagle.py of SGLang. InternLM2 has such words after a prefix.
_OWN = re.compile(r"layers\.\d+\.attention\.(w[qkvo]|wq_a|wq_b|wkv_a_with_mqa|wkv_b)\.\w+|tok_embeddings\.weight")
_LATENT = ("wq_a", "wq_b", "wkv_a_with_mqa", "wkv_b")

# is_mistral_model in utils/hf_transformers/mistral_utils.py of SGLang: all words of one of these, in any case
_TAKEN_FOR_OWN = (("mistral-large-3",), ("mistral-small-4",), ("leanstral",), ("eagle", "mistral"))

_INSTEAD = (
    "Name the release in Hugging Face's layout (config.json, model*.safetensors), often in the same repository, or "
    "convert this one with the script that transformers' repository has for the model: other names alone would not do, "
    "as rows of q and k are in another order"
)
_WITH_PARAMS = f"This one has it: put it into files called consolidated*.safetensors again, beside its {PARAMS}"


def is_consolidated(file: str) -> bool:
    """Whether the name of a file is one of weights in Mistral's own layout."""
    return file.startswith("consolidated") and file.endswith((".safetensors", ".pth"))


def is_own(files: Collection[str]) -> bool:
    """Whether these are files of a release in Mistral's own layout, perhaps beside another in Hugging Face's."""
    return PARAMS in files and any(is_consolidated(file) and file.endswith(".safetensors") for file in files)


def with_usual_names(tensors: Mapping[str, TensorInfo], location: str) -> dict[str, TensorInfo]:
    """The tensors of a release by their names in DeepSeek-V3; those of the encoder of images keep theirs.

    Raises:
        SourceError: a tensor of the decoder has no name there, or two have the same.
    """
    found: dict[str, TensorInfo] = {}
    for name, tensor in tensors.items():
        other = usual_name(name)
        if other is None:
            raise SourceError(
                f"tensor {name!r} is none of those that SGLang loads of Mistral-Large-3 (`remapping` in "
                "models/mistral_large_3.py); "
                + (
                    "a draft model (EAGLE) is no source: give it to SGLang by --speculative-draft-model-path"
                    if name.startswith("eagle")
                    else "name a release that has no other"
                ),
                path=f"{location}/{tensor.file}",
            )
        if other in found:
            raise SourceError(
                f"tensor {name!r} and another one are both {other!r} by the names of DeepSeek-V3; remove the one that "
                "is left over",
                path=f"{location}/{tensor.file}",
            )
        found[other] = tensor._replace(name=other)
    return found


_ENCODER = ("vision_encoder.", "vision_language_adapter.", "patch_merger.", "pre_mm_projector_norm.")
_FAKE_QUANTIZER = re.compile(r"(.+\.([qkv])_fake_quantizer)\.qscale_act")


def usual_name(tensor: str) -> str | None:
    """The name of a tensor in DeepSeek-V3, for the encoder of images its own; None for one of another model."""
    if not tensor.startswith(_ENCODER):
        return hugging_face_name(tensor)
    # SGLang's class leaves these out, and a plan does so with scales of caches.
    fake = _FAKE_QUANTIZER.fullmatch(tensor)
    return f"{fake[1]}.{fake[2]}_scale" if fake else tensor


def lacks_config(files: Collection[str]) -> str | None:
    """The reason why there is no ``config.json``, if these are files of Mistral's own layout (or Meta's, alike)."""
    own = [*([PARAMS] if PARAMS in files else []), *sorted(file for file in files if is_consolidated(file))]
    if not own:
        return None
    remedy = _INSTEAD
    if any(file.startswith("model") and file.endswith(".safetensors") for file in files):
        remedy = "The model*.safetensors beside them are in Hugging Face's: fetch their config.json, too"
    return (
        f"no config.json, but {some(own)}: Mistral's own layout, which mixprec reads only of models with latent "
        f"attention. {remedy}"
    )


def refuse_own_names(tensors: Iterable[TensorInfo], location: str) -> None:
    """Raises :class:`SourceError` where one of the tensors has a name of Mistral's own layout."""
    for tensor in tensors:
        found = _OWN.fullmatch(tensor.name) if tensor.name.startswith(("layers.", "tok_embeddings.")) else None
        if found is not None:
            remedy = _WITH_PARAMS if found[1] in _LATENT else _INSTEAD
            raise SourceError(
                f"tensor {tensor.name!r} has its name in Mistral's own layout, which mixprec reads only of models with "
                f"latent attention. {remedy}",
                path=f"{location}/{tensor.file}",
            )


def taken_for_own(path: str) -> str | None:
    """The words in the path of a folder for which SGLang reads ``params.json`` instead of its ``config.json``."""
    found = (words for words in _TAKEN_FOR_OWN if all(word in path.lower() for word in words))
    return next((" and ".join(map(repr, words)) for words in found), None)
