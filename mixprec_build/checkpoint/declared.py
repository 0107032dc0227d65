"""Reads what a checkpoint declares of its quantization, in one spelling.

Places in the order in which they are read; SGLang takes the first that exists (``model_loader/weight_utils.py``,
``get_quant_config``, and ``configs/model_config.py``, ``_parse_quant_hf_config``, of 0.5.17):

1. ``quantization_config`` of ``config.json``;
2. that of a part of it, such as ``text_config``: models with a vision tower keep their decoder's there;
3. ``compression_config``, as compressed-tensors wrote it at first;
4. ``hf_quant_config.json``: ModelOpt's, whose keys stand in ``quantization``;
5. ``quantize_config.json``: GPTQ's, and ``quant_config.json``: AutoAWQ's.

Declarations that differ from the first are kept, too: a file may be left over from another release of the model, and
only the tensors show which one is right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from reprlib import repr as brief
from typing import Any

from ..errors import SourceError

__all__ = ["DECLARATION_FILES", "Declared", "differences", "read_declarations", "without_declarations"]


MODELOPT_FILE = "hf_quant_config.json"
DECLARATION_FILES = (MODELOPT_FILE, "quantize_config.json", "quant_config.json")
"""Files beside ``config.json`` that may say how weights are quantized."""
_METHOD_OF_FILE = {MODELOPT_FILE: "modelopt", "quantize_config.json": "gptq", "quant_config.json": "awq"}

_KEYS = ("quantization_config", "compression_config")
_ENCODERS = ("vision", "visual", "audio", "speech", "video")

# Name of a setting -> what other tools call it.
_SPELLINGS: Mapping[str, tuple[str, ...]] = {
    "bits": ("w_bit", "wbits"),
    "group_size": ("q_group_size", "groupsize"),
    "desc_act": ("actorder",),
}
_METHODS: Mapping[str, str] = {"intel/auto-round": "auto-round", "autoround": "auto-round", "auto_round": "auto-round"}


@dataclass(frozen=True, slots=True)
class Declared:
    """One declaration: its settings in the spelling of :func:`read_declarations`, and where it stands."""

    quantization: Mapping[str, object]
    file: str
    place: str
    """The keys that lead to it in the file, such as ``text_config.quantization_config``; empty if it is all of it."""
    spelled: tuple[str, ...] = ()
    """The keys that this reading uses, where a declaration has two names of a setting with different values."""

    @property
    def described(self) -> str:
        """Its place, for messages."""
        at = f"`{self.place}` of {self.file}" if self.place else self.file
        return f"{at} ({', '.join(f'`{key}`' for key in self.spelled)})" if self.spelled else at


def read_declarations(
    config: Mapping[str, object], read: Callable[[str], Mapping[str, object] | None], path: str
) -> tuple[Declared, ...]:
    """Reads all declarations of a checkpoint, in the order above; none if it is not quantized.

    Settings are in one spelling: ``quant_method`` in lower case, inferred if missing; ``bits``, ``group_size`` and
    ``desc_act`` under these names; ModelOpt's keys at the top.

    Args:
        read: returns the content of a file beside ``config.json``, or None where there is none.
        path: the checkpoint's name in messages.

    Raises:
        SourceError: a declaration is not a JSON object.
    """
    found: list[Declared] = []
    for place, block in _blocks(config):
        if not isinstance(block, Mapping):
            raise SourceError(f"`{place}` is not an object", path=f"{path}/config.json")
        found += _spelled(block, "config.json", place)
    if found and found[0].quantization.get("quant_method") == "mixprec":
        return (found[0],)
    for file in DECLARATION_FILES:
        data = read(file)
        if data is not None:
            found += _spelled(_of_file(data, file, path), file, "")
    kept: list[Declared] = []
    for one in found:
        # An empty block, as some exporters leave it, declares nothing.
        if one.quantization and not any(_adds_nothing(one.quantization, other.quantization) for other in kept):
            kept.append(one)
    return tuple(kept)


def differences(one: Declared, other: Declared) -> list[str]:
    """Settings that both have and that differ, as ``"group_size 128 and 64"``."""
    both = [key for key in one.quantization if key in other.quantization]
    return [
        f"{key} {brief(one.quantization[key])} and {brief(other.quantization[key])}"
        for key in both
        if one.quantization[key] != other.quantization[key]
    ]


def without_declarations(config: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` without declarations, in all of its parts."""

    def strip(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: strip(inner) for key, inner in value.items() if key not in _KEYS}
        return [strip(inner) for inner in value] if isinstance(value, list) else value

    stripped: dict[str, Any] = strip(config)
    return stripped


def _blocks(config: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    """Yields ``(place, block)`` of all declarations in ``config.json``, those of vision and audio encoders last."""
    if config.get("quantization_config") is not None:
        yield "quantization_config", config["quantization_config"]
    decoders: list[tuple[str, object]] = []
    encoders: list[tuple[str, object]] = []
    parts: list[tuple[str, Mapping[str, object]]] = [("", config)]
    for place, part in parts:
        for key, value in part.items():
            if isinstance(value, Mapping) and key not in _KEYS:
                inner = f"{place}{key}."
                parts.append((inner, value))
                if value.get("quantization_config") is not None:
                    encodes = any(word in inner.lower() for word in _ENCODERS)
                    block = (f"{inner}quantization_config", value["quantization_config"])
                    (encoders if encodes else decoders).append(block)
    yield from decoders
    if config.get("compression_config") is not None:
        yield "compression_config", config["compression_config"]
    yield from encoders


def _of_file(data: Mapping[str, object], file: str, path: str) -> Mapping[str, object]:
    """The settings in a file beside ``config.json``."""
    if file == MODELOPT_FILE and "quantization" in data:
        inner = data["quantization"]
        if not isinstance(inner, Mapping):
            raise SourceError("`quantization` is not an object", path=f"{path}/{file}")
        if inner.get("quant_algo") is None:  # an unquantized model, perhaps with an FP8 KV cache
            return {}
        outer = {key: value for key, value in data.items() if key != "quantization"}
        return {"quant_method": "modelopt", **inner, **outer}
    method = _method_of(data) or _METHOD_OF_FILE.get(file)
    return data if method is None or data.get("quant_method") is not None else {**data, "quant_method": method}


def _spelled(block: Mapping[str, object], file: str, place: str) -> list[Declared]:
    """A declaration in one spelling; two readings where it has two names of a setting with different values."""
    settings: dict[str, object] = dict(block)
    method = settings.get("quant_method")
    if isinstance(method, str):
        settings["quant_method"] = _METHODS.get(method.lower(), method.lower())
    elif method is None:
        method = _method_of(settings)
        if method is not None:
            settings["quant_method"] = method
    other: dict[str, object] = {}
    aliases: list[str] = []
    for word, words in _SPELLINGS.items():
        alias = next((alias for alias in words if settings.get(alias) is not None), None)
        if alias is None:
            continue
        if settings.get(word) is None:
            settings[word] = settings[alias]
        elif settings[word] != settings[alias]:
            other[word] = settings[alias]
            aliases.append(alias)
    if not other:
        return [Declared(settings, file, place)]
    first = Declared(settings, file, place, tuple(other))
    return [first, Declared({**settings, **other}, file, place, tuple(aliases))]


def _method_of(settings: Mapping[str, object]) -> str | None:
    """Infers the method of a declaration that does not name it."""
    producer = settings.get("producer")
    maker = producer.get("name") if isinstance(producer, Mapping) else None
    if settings.get("quant_algo") is not None or maker == "modelopt":
        return "modelopt"
    if settings.get("w_bit") is not None or settings.get("q_group_size") is not None:
        return "awq"
    if "global_quant_config" in settings:
        return "quark"
    return None


def _adds_nothing(quantization: Mapping[str, object], other: Mapping[str, object]) -> bool:
    """Whether ``other`` has all settings of ``quantization``."""
    return all(key in other and other[key] == value for key, value in quantization.items())
