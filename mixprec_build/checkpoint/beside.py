"""Safetensors files that a checkpoint's index does not list, and which of them belong to the checkpoint.

Layers for multi-token prediction (MTP) often come in a file of their own (``mtp.safetensors``,
``model_mtp.safetensors``, ``model_extra_tensors.safetensors``) that not every release lists. Other files are copies of
the whole model under other names (``consolidated.safetensors``), or adapters.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

__all__ = ["BesideFiles", "draft_layers", "is_draft"]


# SGLang 0.5.17 and 0.5.23, model_loader/weight_utils.py, maybe_add_mtp_safetensors
_READ_BY_SGLANG = "mtp.safetensors"
_ITS_ARCHITECTURES = frozenset(
    {"Glm4MoeForCausalLM", "Glm4MoeForCausalLMNextN", "Glm4MoeLiteForCausalLM", "Glm4MoeLiteForCausalLMNextN"}
)
_COUNTS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_modules", "mtp_num_layers", "num_mtp_layers")
_DRAFT = re.compile(r"(?:model\.|language_model\.)*mtp(?:_layers|_block)?\.")
_LAYER = re.compile(r"(?:model\.|language_model\.|backbone\.)*layers\.(\d+)\.")


def draft_layers(config: Mapping[str, object]) -> int:
    """How many layers for multi-token prediction ``config.json`` declares, in itself or in a part such as
    ``text_config``."""
    parts = [config, *(part for part in config.values() if isinstance(part, Mapping))]
    counts = (part.get(key) for part in parts for key in _COUNTS)
    return max((count for count in counts if type(count) is int), default=0)


def is_draft(tensor: str, config: Mapping[str, object]) -> bool:
    """Whether a tensor is one of a layer for multi-token prediction: called ``mtp``, or of a layer after the last."""
    if _DRAFT.match(tensor):
        return True
    layer = _LAYER.match(tensor)
    parts = [config, *(part for part in config.values() if isinstance(part, Mapping))]
    layers = next((part["num_hidden_layers"] for part in parts if type(part.get("num_hidden_layers")) is int), None)
    return layer is not None and isinstance(layers, int) and int(layer[1]) >= layers > 0


class BesideFiles:
    """Decides which of the files beside those of the index belong to a checkpoint.

    Three kinds do: what SGLang reads although no index lists it, what ``config.json`` names, and the declared layers
    for multi-token prediction where the listed files lack them.
    """

    def __init__(self, config: Mapping[str, object], files: Iterable[str], listed: Iterable[str]):
        known = set(listed)
        self._config = config
        self.candidates = sorted(file for file in files if file.endswith(".safetensors") and file not in known)
        """Names of the files; a reader opens their headers."""
        self._named = _strings(config) if self.candidates else set()

    def certain(self, file: str) -> bool:
        """Whether a file belongs to the checkpoint, whatever it holds."""
        return file in self._named or (file == _READ_BY_SGLANG and self._sglang_reads_it())

    def _sglang_reads_it(self) -> bool:
        architectures = self._config.get("architectures")
        first = architectures[0] if isinstance(architectures, list) and architectures else None
        return first in _ITS_ARCHITECTURES and draft_layers(self._config) > 0

    def lacks_draft(self, tensors: Iterable[str]) -> bool:
        """Whether ``config.json`` declares layers for multi-token prediction and none of these tensors is of one."""
        return draft_layers(self._config) > 0 and not any(is_draft(name, self._config) for name in tensors)

    def holds_draft(self, tensors: Iterable[str]) -> bool:
        """Whether these are tensors of such layers alone."""
        names = list(tensors)
        return bool(names) and all(is_draft(name, self._config) for name in names)


def _strings(value: object) -> set[str]:
    """The file names among the values of ``config.json``."""
    found, level = set(), [value]
    for node in level:
        if isinstance(node, Mapping):
            level.extend(node.values())
        elif isinstance(node, list):
            level.extend(node)
        elif isinstance(node, str) and node.endswith(".safetensors"):
            found.add(node)
    return found
