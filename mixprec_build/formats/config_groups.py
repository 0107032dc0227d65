"""Reads compressed-tensors' configuration: which config group declares a module, and how it is stored.

As compressed-tensors 0.20.0 reads it, ``quantization/quant_config.py`` and ``utils/match.py``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from reprlib import repr as brief
from typing import TYPE_CHECKING, Any, TypeVar

from ..patterns.budget import MatchBudget
from ..patterns.pattern import PatternError
from ..patterns.regexes import plain_regex
from .base import FormatError
from .keys import check
from .names import name_forms

if TYPE_CHECKING:
    from ..storage.module import StoredModule
    from .quantization import Quantization

__all__ = ["METHODS", "Scheme", "first_fitting", "groups_of", "scheme_of"]

T = TypeVar("T")


_METHOD = "compressed-tensors"
METHODS: Mapping[str, frozenset[str]] = {
    _METHOD: frozenset({"config_groups", "format", "global_compression_ratio", "sparsity_config"})
}
"""``quant_method`` -> the keys of its configuration that are understood."""
_CLASSES = ("Linear",)
"""Classes of linears, as targets name them."""
_ENGINE_CLASS = re.compile(r"\w*(MoE|Experts)\w*")
"""An inference engine's class of all experts of a layer, which compressed-tensors does not know."""
_EXPERT = re.compile(r".+\.experts\.\d+\..+")
_GROUP_KEYS = {"targets", "weights", "input_activations", "output_activations", "format"}
_ARGUMENTS = {
    "num_bits", "type", "symmetric", "strategy", "group_size", "block_structure", "dynamic", "actorder", "observer",
    "observer_kwargs", "scale_dtype", "zp_dtype",
}  # fmt: skip
"""Keys of a group's settings of weights or activations."""
_MAX_GROUPS = 256
_MAX_TARGETS = 100_000
_MAX_REGEXES = 4096


@dataclass(frozen=True, slots=True)
class Scheme:
    """The settings of one config group."""

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
        """Parses a config group. Raises :class:`FormatError` if it is malformed or not supported."""
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
        group_size, fp4 = value("group_size", int, None), (weights.get("type"), weights.get("num_bits")) == ("float", 4)
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
            _activations(at, data.get("input_activations"), fp4=fp4),
        )

    @property
    def described(self) -> str:
        """Its description for messages."""
        format_, type_, strategy = (word[:30] for word in (self.format, self.type, self.strategy))
        return f"config group {self.name!r:.100} ({format_}, {brief(self.bits)} bit {type_}, {strategy})"


def _activations(at: str, data: object, *, fp4: bool) -> str:
    """``fp4``: whether weights are 4-bit floats, with which activations may be 4-bit floats, too."""
    if data is None:
        return "none"
    if not isinstance(data, Mapping):
        raise FormatError(f"{at} has input_activations {brief(data)}")
    bits, dynamic, symmetric = data.get("num_bits", 8), data.get("dynamic", False), data.get("symmetric", True)
    if bits != 8 and not (fp4 and bits == 4):
        raise FormatError(f"{at} quantizes activations to {brief(bits)} bits; only 8 are read")
    if symmetric is False:
        raise FormatError(f"{at} quantizes activations asymmetrically, which is not read")
    return "dynamic" if dynamic else "static"


class _Groups:
    """The config groups of one configuration, by their targets.

    Groups are tried in the order of their targets: exact names, then regular expressions in alphabetical order, then
    classes; of groups with the same target the last one first (``lifecycle/apply.py``, ``apply_quantization_config``).
    compressed-tensors takes the first group. The others are kept, because modules of files that were assembled from
    several checkpoints may belong to one of them.
    """

    def __init__(self, quantization: Mapping[str, object]):
        self._quantization, self._budget = quantization, MatchBudget()
        groups, ignore = quantization.get("config_groups"), quantization.get("ignore") or []
        if not isinstance(groups, Mapping) or not groups or len(groups) > _MAX_GROUPS:
            raise FormatError(f"config_groups {brief(groups)} are not 1 to {_MAX_GROUPS} named groups")
        self._data = {str(name): data for name, data in groups.items()}
        words = self._words(ignore, "ignore")
        self._ignored = frozenset(word for word in words if not word.startswith("re:"))
        self._ignored_regexes = [word for word in words if word.startswith("re:")]
        by_target: dict[str, list[str]] = {}
        for name, data in reversed(self._data.items()):
            targets = data.get("targets") if isinstance(data, Mapping) else None
            for target in dict.fromkeys(self._words(targets, f"config group {name!r:.100}")):
                by_target.setdefault(target, []).append(name)
        self._by_name = {target: names for target, names in by_target.items() if not target.startswith("re:")}
        self._by_regex = sorted((target, names) for target, names in by_target.items() if target.startswith("re:"))
        engine = [names for target, names in self._by_name.items() if _ENGINE_CLASS.fullmatch(target)]
        self._by_class = [name for word in _CLASSES for name in self._by_name.get(word, ())]
        self._by_engine_class = [name for names in engine for name in names]
        self._other_forms = any("language_model" in word for word in (*by_target, *words))
        self._schemes: dict[str, Scheme | FormatError] = {}

    @staticmethod
    def _words(words: object, at: str) -> list[str]:
        """Checks a list of names of modules or classes, and of regular expressions, which begin with ``re:``."""
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise FormatError(f"{at}: targets {brief(words)} are not a list of names")
        if len(words) > _MAX_TARGETS or sum(word.startswith("re:") for word in words) > _MAX_REGEXES:
            raise FormatError(f"{at} holds more than {_MAX_TARGETS} names or {_MAX_REGEXES} regular expressions")
        return words

    def find(self, module: str) -> tuple[str, ...]:
        """The names of the groups that a linear may belong to, first the one that compressed-tensors takes.

        Raises:
            FormatError: it is ignored or belongs to no group, or the configuration is malformed.
        """
        forms = name_forms(module) if self._other_forms or "language_model" in module else (module,)
        try:
            with self._budget:
                if any(form in self._ignored or self._matches(self._ignored_regexes, form) for form in forms):
                    raise FormatError("stored quantized, although `ignore` of quantization_config covers it")
                found = tuple(dict.fromkeys(self._candidates(module, forms)))
        except PatternError as error:
            raise FormatError(f"quantization_config {error}") from error
        if not found:
            raise FormatError("stored quantized, but the targets of no config group cover it")
        return found

    def scheme(self, group: str) -> Scheme:
        """The settings of a group. Raises :class:`FormatError` if they are malformed or not supported."""
        if group not in self._schemes:
            try:
                self._schemes[group] = Scheme.from_json(group, self._data[group], self._quantization.get("format"))
            except FormatError as error:
                self._schemes[group] = error.with_traceback(None)
        found = self._schemes[group]
        if isinstance(found, FormatError):
            raise FormatError(str(found))
        return found

    def _candidates(self, module: str, forms: Iterable[str]) -> Iterator[str]:
        for form in forms:
            named = [*self._by_name.get(form, ()), *self._named_by_regex(form)]
            if named:
                yield from named
                break
        yield from self._by_class
        if _EXPERT.fullmatch(module):
            yield from self._by_engine_class

    def _named_by_regex(self, module: str) -> Iterator[str]:
        for target, names in self._by_regex:
            if self._matches([target], module):
                yield from names

    @staticmethod
    def _matches(regexes: Sequence[str], module: str) -> bool:
        patterns: Iterator[re.Pattern[str]] = (plain_regex(text, text.removeprefix("re:")) for text in regexes)
        return any(pattern.match(module) for pattern in patterns)


def first_fitting(module: StoredModule, quantization: Quantization, read: Callable[[Scheme | None], T]) -> T:
    """The result of ``read`` for the first scheme of a quantized linear that its tensors agree with.

    ``read`` is called with None for another method's configuration, and for one without groups. It raises
    :class:`FormatError` where a scheme does not fit.

    Raises:
        FormatError: the linear is declared unquantized, the configuration is malformed, or no scheme fits, with the
            error of the first.
    """
    if quantization.get("quant_method") != _METHOD or quantization.get("config_groups") is None:
        return read(None)
    groups = quantization.derive(_Groups)
    first: FormatError | None = None
    for group in groups.find(module.name):
        try:
            return read(groups.scheme(group))
        except FormatError as error:
            first = first or error
    assert first is not None
    raise first


def scheme_of(module: StoredModule, quantization: Quantization) -> Scheme | None:
    """The scheme that compressed-tensors takes for a quantized linear; None as in :func:`first_fitting`.

    Raises:
        FormatError: the linear is declared unquantized, or the configuration is malformed.
    """
    if quantization.get("quant_method") != _METHOD or quantization.get("config_groups") is None:
        return None
    groups = quantization.derive(_Groups)
    return groups.scheme(groups.find(module.name)[0])


def groups_of(name: str, quantization: Quantization) -> Hashable:
    """The groups of a module by its name, which tell modules apart that are stored alike; None for other methods."""
    if quantization.get("quant_method") != _METHOD or quantization.get("config_groups") is None:
        return None
    try:
        return quantization.derive(_Groups).find(name)
    except FormatError as error:
        return str(error)
