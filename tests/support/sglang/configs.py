"""Configs of models whose releases bring a class of their own for them, which transformers does not have."""

from __future__ import annotations

from contextlib import suppress

__all__ = ["register_configs"]

_WITHOUT_CLASS = ("bailing_moe", "internlm2", "mimo_v2_flash", "minimax_m3")


def register_configs() -> None:
    """Registers a class for each of them that neither transformers nor SGLang has registered.

    It takes any key, as releases' own classes do after their defaults. Engines send configs to their processes, which
    must have called this.
    """
    from transformers import AutoConfig, PretrainedConfig

    for model_type in _WITHOUT_CLASS:
        name = f"{model_type}_config"
        made = type(name, (PretrainedConfig,), {"model_type": model_type, "__module__": __name__})
        globals()[name] = made  # where pickle looks for it
        with suppress(ValueError):
            AutoConfig.register(model_type, made)
