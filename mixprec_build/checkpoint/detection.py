"""Finds the format of every module of a checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import SourceError
from ..formats.base import Format, FormatError
from ..formats.quantization import Quantization
from ..formats.registry import recognise, settings_by_name
from .declaration import METHOD, Declaration
from .declared import Declared, differences

if TYPE_CHECKING:
    from ..storage.module import StoredModule
    from .checkpoint import Checkpoint

__all__ = ["detect"]


def detect(checkpoint: Checkpoint) -> dict[str, Format | FormatError]:
    """The format of each module, or an error if it has no supported one, which matters only if the module is used."""
    if checkpoint.quantization.get("quant_method") == METHOD:
        return _detect_compiled(checkpoint)
    declared = checkpoint.declared or (Declared({}, "config.json", ""),)
    readings = [(one, Quantization(one.quantization)) for one in declared]
    known: dict[object, Format | FormatError] = {}
    found = {}
    for name, module in checkpoint.modules.items():
        # Modules with equal tensors and equal settings are checked once: thousands of experts are alike. Bare
        # parameters are checked one by one, since buffers are known by their names.
        bare = "" in module.tensors
        what = name if bare else (_outline(module), *[settings_by_name(name, said) for _, said in readings])
        if what not in known:
            known[what] = _recognise(module, readings)
        found[name] = known[what]
    return found


def _detect_compiled(checkpoint: Checkpoint) -> dict[str, Format | FormatError]:
    """Detects the formats of a checkpoint that mixprec built, by its declaration."""
    try:
        declaration = Declaration.from_json(checkpoint.quantization)
    except SourceError as error:
        raise SourceError(str(error), path=checkpoint.path_of(checkpoint.quantization_file)) from error
    known: dict[object, Format | FormatError] = {}
    found = {}
    for name, fmt in declaration.formats_of(checkpoint.modules).items():
        module = checkpoint.modules[name]
        what = (_outline(module), fmt)  # checked once, as above
        if what not in known:
            known[what] = _checked(module, fmt)
        found[name] = known[what]
    return found


def _outline(module: StoredModule) -> tuple[tuple[str, str, tuple[int, ...]], ...]:
    """All that a format is checked by: leaf, dtype and shape of each tensor."""
    return tuple([(leaf, tensor.dtype, tensor.shape) for leaf, tensor in module.tensors.items()])


def _checked(module: StoredModule, fmt: Format) -> Format | FormatError:
    """The format, or an error where the module's tensors contradict it."""
    try:
        fmt.check(module)
    except FormatError as error:
        return error.with_traceback(None)
    return fmt


def _recognise(module: StoredModule, readings: list[tuple[Declared, Quantization]]) -> Format | FormatError:
    """The format by the one declaration that the module's tensors agree with.

    Returns an error if they agree with none, or with several that differ.
    """
    fitting: dict[Format, Declared] = {}
    errors = []
    for declared, quantization in readings:
        try:
            fitting.setdefault(recognise(module, quantization), declared)
        except FormatError as error:
            errors.append(error.with_traceback(None))  # which would keep its frames, for every module
    if not fitting:
        return errors[0]
    (fmt, first), *others = fitting.items()
    for _, other in others:
        differ = "; ".join(differences(first, other)) or "other settings"
        return FormatError(
            f"{first.described} and {other.described} declare it differently ({differ}), and its tensors agree with "
            "both; correct the one that is wrong, or remove it"
        )
    return fmt
