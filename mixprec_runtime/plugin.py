"""The entry point ``sglang.srt.plugins``: adds the quantization method mixprec to SGLang.

SGLang calls :func:`register` in its main process and in every worker, and only logs exceptions. For a version of SGLang
that is not supported, or that lacks what mixprec uses, :func:`register` therefore adds a method that refuses when a
compiled checkpoint is loaded.
"""

from __future__ import annotations

import importlib
import logging
from typing import Any, ClassVar

from mixprec_build.checkpoint.declaration import METHOD
from mixprec_build.versions import version_problem

from .contact.check import differs, explained, installed, missing
from .contact.names import PLUGIN

__all__ = ["register"]


logger = logging.getLogger(__name__)

_METHODS = ("BASE_QUANTIZATION_METHODS", "QUANTIZATION_METHODS", "CPU_QUANTIZATION_METHODS")


def register() -> None:
    """Adds the quantization method, and hooks that do nothing for models of other methods."""
    logging.getLogger("sglang.srt.configs.model_config").addFilter(_says_more_than_the_method)
    method, problem = _method()
    if problem is not None:
        logger.error(problem)
        method = type("UnfitSGLang", (_Unfit,), {"problem": problem})
    quantization = importlib.import_module("sglang.srt.layers.quantization")
    for name in _METHODS:
        if hasattr(quantization, name):
            getattr(quantization, name)[METHOD] = method
    arguments: Any = importlib.import_module("sglang.srt.server_args")
    if METHOD not in getattr(arguments, "QUANTIZATION_CHOICES", ()):
        arguments.add_quantization_method_choices([METHOD])


def _method() -> tuple[Any, str | None]:
    """The class of the method, or why this SGLang cannot have it."""
    try:
        problem = version_problem(installed())
        if problem is None:
            unfit = missing({PLUGIN})
            problem = differs(unfit) if unfit else None
        if problem is not None:
            return None, problem
        from . import hooks
        from .config import MixPrecConfig

        hooks.register()
        return MixPrecConfig, None
    except Exception as error:  # of any type: SGLang would log it, and know no method of this name
        logger.exception("mixprec cannot be registered")
        return None, explained(error)


def _says_more_than_the_method(record: logging.LogRecord) -> bool:
    """Leaves out the line, four times a start, that any method unknown to SGLang "is not fully optimized yet".

    Kernels are those of the formats' own methods.
    """
    return f"{METHOD} quantization is not fully optimized" not in record.getMessage()


class _Unfit:
    """A quantization method that refuses every checkpoint."""

    problem: ClassVar[str]

    @classmethod
    def override_quantization_method(cls, hf_quant_cfg: Any, user_quant: Any) -> None:
        return None

    @classmethod
    def from_config(cls, config: Any) -> Any:
        raise RuntimeError(cls.problem)
