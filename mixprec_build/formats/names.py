"""Finds the names that a declaration may have for a module."""

from __future__ import annotations

__all__ = ["name_forms"]


def name_forms(module: str) -> tuple[str, ...]:
    """The names that a declaration may have for a module, its own first.

    A decoder inside of a larger model is ``language_model.model.layers.0`` in older checkpoints,
    ``model.language_model.layers.0`` in newer ones and ``model.layers.0`` to a declaration in ``text_config``.
    """
    core = module.removeprefix("language_model.").replace("model.language_model.", "model.", 1)
    inner = core.removeprefix("model.")
    forms = (module, core, f"language_model.{core}", f"language_model.{inner}", f"model.language_model.{inner}")
    return tuple(dict.fromkeys(forms))
