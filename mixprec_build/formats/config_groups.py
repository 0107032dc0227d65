"""compressed-tensors' configuration: which of its config groups declares a module, and how that is stored.

As compressed-tensors 0.20.0 reads it, ``quantization/quant_config.py`` and ``utils/match.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from reprlib import repr as brief
from typing import TYPE_CHECKING, Any

from ..patterns.budget import Patience
from ..patterns.pattern import PatternError
from ..patterns.regexes import plain_regex
from .base import FormatError
from .keys import check

if TYPE_CHECKING:
    import re

    from ..storage.module import StoredModule
    from .quantization import Quantization

__all__ = ["KEYS_BY_NAME", "METHODS", "Scheme", "scheme_of"]


_METHOD = "compressed-tensors"
METHODS: Mapping[str, frozenset[str]] = {
    _METHOD: frozenset({"config_groups", "format", "global_compression_ratio", "sparsity_config"})
}
"""``quant_method``, and the keys of its configuration that are understood."""
KEYS_BY_NAME = frozenset({"config_groups"})
"""What tells modules apart by their names."""
_GROUP_KEYS = {"targets", "weights", "input_activations", "output_activations", "format"}
_ARGUMENTS = {
    "num_bits", "type", "symmetric", "strategy", "group_size", "block_structure", "dynamic", "actorder", "observer",
    "observer_kwargs", "scale_dtype", "zp_dtype",
}  # fmt: skip
"""Keys of what a group says of weights or activations."""
_MAX_GROUPS = 256
_MAX_TARGETS = 100_000
_MAX_REGEXES = 4096


@dataclass(frozen=True, slots=True)
class Scheme:
    """How one config group stores its modules."""

    name: str
    format: str
    """``pack-quantized``, ``float-quantized``, ``int-quantized``, ..."""
    type: str
    """``int`` or ``float``."""
    bits: int
    strategy: str
    """``tensor``, ``channel``, ``group`` or ``block``."""
    symmetric: bool
    group_size: int | None
    block: object
    actorder: str | None
    """``group`` where inputs are grouped by ``weight_g_idx``."""
    activations: str
    """``none``, ``dynamic`` or ``static``."""

    @classmethod
    def from_json(cls, name: str, data: object, format_: object) -> Scheme:
        """Raises :class:`FormatError` on nonsense, and for what nothing here reads."""
        at = f"config group {name!r:.100}"
        if not isinstance(data, Mapping):
            raise FormatError(f"{at} is not an object")
        check(at, data, _GROUP_KEYS)
        for part in ("weights", "input_activations"):
            arguments = data.get(part)
            if isinstance(arguments, Mapping):
                check(f"{part} of {at}", arguments, _ARGUMENTS)
        own = data.get("format")
        format_ = format_ if own is None else own
        if not isinstance(format_, str):
            raise FormatError(f"{at} has the format {brief(format_)}")
        weights = data.get("weights")
        if not isinstance(weights, Mapping):
            raise FormatError(f"{at} says nothing of its weights")

        def value(key: str, kind: type, default: object) -> Any:
            found = weights.get(key, default)
            if found is not None and type(found) is not kind:
                raise FormatError(f"{at} has weights of {key} {brief(found)}")
            return default if found is None else found

        actorder = weights.get("actorder")
        if actorder is not None and not isinstance(actorder, str | bool):
            raise FormatError(f"{at} has weights of actorder {brief(actorder)}")
        if value("dynamic", bool, False):
            raise FormatError(f"{at} has dynamic weights, which are stored unquantized")
        grouped = actorder is True or (isinstance(actorder, str) and actorder.lower() in ("group", "dynamic"))
        group_size = value("group_size", int, None)
        strategy = value("strategy", str, None)
        if strategy is None:  # which compressed-tensors then infers
            strategy = "tensor" if group_size is None else "channel" if group_size == -1 else "group"
        return cls(
            name,
            format_,
            value("type", str, "int"),
            value("num_bits", int, 8),
            strategy,
            value("symmetric", bool, True),
            group_size,
            weights.get("block_structure"),
            "group" if grouped else None,
            _activations(at, data.get("input_activations")),
        )

    @property
    def described(self) -> str:
        """For messages."""
        format_, type_, strategy = (word[:30] for word in (self.format, self.type, self.strategy))
        return f"config group {self.name!r:.100} ({format_}, {brief(self.bits)} bit {type_}, {strategy})"


def _activations(at: str, data: object) -> str:
    if data is None:
        return "none"
    if not isinstance(data, Mapping):
        raise FormatError(f"{at} has input_activations {brief(data)}")
    bits, dynamic, symmetric = data.get("num_bits", 8), data.get("dynamic", False), data.get("symmetric", True)
    if bits != 8:
        raise FormatError(f"{at} quantizes activations to {brief(bits)} bits; only 8 are read")
    if symmetric is False:
        raise FormatError(f"{at} quantizes activations asymmetrically, which is not read")
    return "dynamic" if dynamic else "static"


class _Groups:
    """The config groups of one configuration, by what their targets match."""

    def __init__(self, quantization: Mapping[str, object]):
        self._quantization, self._patience = quantization, Patience()
        groups, ignore = quantization.get("config_groups"), quantization.get("ignore") or []
        if not isinstance(groups, Mapping) or not groups or len(groups) > _MAX_GROUPS:
            raise FormatError(f"config_groups {brief(groups)} are not 1 to {_MAX_GROUPS} named groups")
        self._ignored, self._unread = self._targets(ignore, "ignore")
        self._groups = []
        for name, data in groups.items():
            targets = data.get("targets") if isinstance(data, Mapping) else None
            self._groups.append((str(name), data, *self._targets(targets, f"config group {name!r:.100}")))
        self._schemes: dict[str, Scheme] = {}

    @staticmethod
    def _targets(words: object, at: str) -> tuple[frozenset[str], list[str]]:
        """Names (of modules or of classes), and regular expressions."""
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise FormatError(f"{at}: targets {brief(words)} are not a list of names")
        regexes = [word for word in words if word.startswith("re:")]
        if len(words) > _MAX_TARGETS or len(regexes) > _MAX_REGEXES:
            raise FormatError(f"{at} holds more than {_MAX_TARGETS} names or {_MAX_REGEXES} regular expressions")
        return frozenset(words) - frozenset(regexes), regexes

    def find(self, module: str) -> Scheme:
        """The scheme of a linear.

        Raises:
            FormatError: it is ignored, or no group's; or the configuration is nonsense.
        """
        try:
            with self._patience:
                if module in self._ignored or self._matches(self._unread, module):
                    raise FormatError("stored quantized, although `ignore` of quantization_config covers it")
                # A name goes before a regular expression, and that before a class.
                name, data = next(self._candidates(module), (None, None))
        except PatternError as error:
            raise FormatError(f"quantization_config {error}") from error
        if name is None:
            raise FormatError("stored quantized, but the targets of no config group cover it")
        if name not in self._schemes:
            self._schemes[name] = Scheme.from_json(name, data, self._quantization.get("format"))
        return self._schemes[name]

    def _candidates(self, module: str) -> Iterator[tuple[str, object]]:
        yield from ((name, data) for name, data, names, _ in self._groups if module in names)
        yield from ((name, data) for name, data, _, regexes in self._groups if self._matches(regexes, module))
        yield from ((name, data) for name, data, names, _ in self._groups if "Linear" in names)

    @staticmethod
    def _matches(regexes: Sequence[str], module: str) -> bool:
        patterns: Iterator[re.Pattern[str]] = (plain_regex(text, text.removeprefix("re:")) for text in regexes)
        return any(pattern.match(module) for pattern in patterns)


def scheme_of(module: StoredModule, quantization: Quantization) -> Scheme | None:
    """What compressed-tensors' configuration says of a quantized linear; None for another method's configuration, and
    for one without groups.

    Raises:
        FormatError: it says that the linear is not quantized, or nonsense.
    """
    if quantization.get("quant_method") != _METHOD or quantization.get("config_groups") is None:
        return None
    return quantization.derive(_Groups).find(module.name)
