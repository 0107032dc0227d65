"""Decides which of the safetensors files that an index does not list belong to the checkpoint.

Draft layers (MTP) often come in a file of their own (``mtp.safetensors``,
``model_mtp.safetensors``, ``model_extra_tensors.safetensors``) that not every release lists. Other files are copies of
the model under other names (``consolidated.safetensors``), or adapters.
"""

from __future__ import annotations

from collections.abc import Iterable

from ..families.facts import ModelFacts

__all__ = ["BesideFiles", "is_draft"]


# SGLang 0.5.17 and 0.5.23, model_loader/weight_utils.py, maybe_add_mtp_safetensors
_READ_BY_SGLANG = "mtp.safetensors"
_ITS_ARCHITECTURES = (
    ("Glm4MoeForCausalLM",), ("Glm4MoeForCausalLMNextN",),
    ("Glm4MoeLiteForCausalLM",), ("Glm4MoeLiteForCausalLMNextN",),
)  # fmt: skip


def is_draft(tensor: str, facts: ModelFacts) -> bool:
    """Whether a tensor is one of a draft layer."""
    return facts.family.is_draft(tensor, facts.layers or facts.layers_of_a_part)


class BesideFiles:
    """Decides which of the files beside those of the index belong to a checkpoint.

    Three kinds do: what SGLang reads although no index lists it, what ``config.json`` names, and the declared layers
    for multi-token prediction where the listed files lack them.
    """

    def __init__(self, facts: ModelFacts, files: Iterable[str], listed: Iterable[str]):
        known = set(listed)
        self._facts = facts
        self.candidates = sorted(file for file in files if file.endswith(".safetensors") and file not in known)
        """Safetensors files that the index does not list."""
        self._named = facts.file_names(".safetensors") if self.candidates else set()

    def certain(self, file: str) -> bool:
        """Whether a file belongs to the checkpoint, whatever its tensors are."""
        return file in self._named or (file == _READ_BY_SGLANG and self._sglang_reads_it())

    def _sglang_reads_it(self) -> bool:
        return self._facts.architectures[:1] in _ITS_ARCHITECTURES and self._facts.draft_layers > 0

    def lacks_draft(self, tensors: Iterable[str]) -> bool:
        """Whether ``config.json`` declares layers for multi-token prediction and none of these tensors is of one."""
        return self._facts.draft_layers > 0 and not any(is_draft(name, self._facts) for name in tensors)

    def is_draft_only(self, tensors: Iterable[str]) -> bool:
        """Whether all of these are tensors of layers for multi-token prediction."""
        names = list(tensors)
        return bool(names) and all(is_draft(name, self._facts) for name in names)
