"""Finds what another source has within the layers of the model, and the mix lacks in all of them.

Layers of a mix are compared with one another in :mod:`.complete`. A tool that drops the same tensor of every layer,
such as the bias of a router or the norms of queries and keys, leaves layers that are alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from itertools import islice
from typing import TYPE_CHECKING

from ..families.expected import is_buffer, layers_due, left_out_of_builds, tower_of
from ..families.names import layer_of
from ..families.parts import Role
from ..patterns.compress import compress, natural_key
from ..text import some
from .problems import Problems, Replacement

if TYPE_CHECKING:
    from ..checkpoint.checkpoint import ValueReader
    from ..checkpoint.typed import Source
    from ..recipe.sources import Sources
    from .types import PlannedModule

__all__ = ["check_biases", "check_lacking"]

_ALWAYS = (Role.NORM, Role.ROUTER)
"""Roles whose modules a class of SGLang's has in each layer or in none. Linears may be joined in one source only."""
_BIASES_LOOKED_AT = 64


def check_lacking(modules: Mapping[str, PlannedModule], sources: Sources, problems: Problems) -> None:
    """Adds to ``problems`` norms and routers that the mix lacks and another source has; warns of bare parameters.

    Args:
        modules: the planned output, without draft layers.
    """
    blocks = {parent for name in modules for parent in (name, *_parents(name))}
    seen: set[str] = set()
    for source in sources.by_name.values():
        others = (name for name in source.checkpoint.modules if name not in modules and name not in seen)
        lacking = [name for name in others if _is_within_layers(name, source, sources, blocks)]
        seen.update(lacking)
        bare = {name for name in lacking if "" in source.checkpoint.modules[name].tensors}
        roles = {name: sources.family.role_by_name(name) for name in lacking if name not in bare}
        certain = [name for name, role in roles.items() if role in _ALWAYS]
        if certain and sources.family.checked:
            problems.hard(
                f"{some(compress(certain))}: the mix has none, and `{source.name}` has; make it the default, or name "
                f"{'it in a line of its own' if len(certain) == 1 else 'them in lines of their own'}",
                Replacement(source.name),
                certain,
                code="incomplete_model",
                modules=certain,
            )
            certain = []
        if likely := sorted([*certain, *bare], key=natural_key):
            problems.warn(
                f"the mix has none, and `{source.name}` has; SGLang does not start if its class for the model needs it",
                Replacement(source.name),
                likely,
                code="incomplete_model",
                modules=likely,
            )


def check_biases(
    modules: Mapping[str, PlannedModule], sources: Sources, reader: ValueReader, problems: Problems
) -> None:
    """Adds to ``problems`` modules without the bias that another source has of them, where that is not zero.

    Biases of the default source are in the mix, see :func:`.collect.collect`. Looks at some of each other source.
    """
    for source in sources.by_name.values():
        without = (
            name
            for name, stored in source.checkpoint.modules.items()
            if "bias" in stored.tensors
            and name in modules
            and modules[name].source != source.name
            and not {"bias", ""} & modules[name].tensors.keys()
        )
        found: dict[str, list[str]] = {}
        for name in islice(without, _BIASES_LOOKED_AT):
            values = reader.read(source.name, source.checkpoint.modules[name].tensors["bias"])
            if values is not None and values.any():
                found.setdefault(modules[name].source, []).append(name)
        for other, names in found.items():
            problems.hard(
                f"{some(compress(names))}: `{source.name}` has a bias that is not zero, and `{other}`, which the mix "
                f"takes this from, has none; biases come along from the default source: make `{source.name}` the "
                "default, or take these modules from it",
                code="incomplete_model",
                modules=names,
                advice=f"If the model has no such biases, `{source.name}` is another model: leave it out",
            )


def _is_within_layers(name: str, source: Source, sources: Sources, blocks: Set[str]) -> bool:
    """Whether a module lies in a block of the model's layers, and is no buffer and nothing that plans leave out."""
    layer, due = layer_of(name), layers_due(sources.model.facts)
    if layer is None or (due is not None and layer not in due) or name.rpartition(".")[0] not in blocks:
        return False
    if sources.is_draft(name) or tower_of(name) is not None:
        return False
    return not is_buffer(name) and left_out_of_builds(name) is None and not _is_of_integers(source, name)


def _is_of_integers(source: Source, name: str) -> bool:
    """Whether it is a bare parameter of integers, such as a table of indices that a class may compute."""
    tensor = source.checkpoint.modules[name].tensors.get("")
    return tensor is not None and (tensor.dtype == "BOOL" or tensor.dtype[:1] in ("I", "U"))


def _parents(name: str) -> Iterator[str]:
    at = len(name)
    while (at := name.rfind(".", 0, at)) > 0:
        yield name[:at]
