"""The entry point ``sglang.srt.plugins``: adds the quantization method mixprec to SGLang.

SGLang calls :func:`register` in its main process and in every worker, and only logs exceptions. For an unsupported
version of SGLang, :func:`register` therefore adds a method that refuses when a compiled checkpoint is loaded.
"""

from __future__ import annotations

import logging
from typing import Any, ClassVar

from mixprec_build.checkpoint.declaration import METHOD
from mixprec_build.versions import version_problem

__all__ = ["register"]


logger = logging.getLogger(__name__)


def register() -> None:
    """Adds the quantization method, and hooks that do nothing for models of other methods."""
    from sglang.srt.layers import quantization
    from sglang.srt.server_args import QUANTIZATION_CHOICES, add_quantization_method_choices
    from sglang.version import __version__ as sglang_version

    problem = version_problem(sglang_version)
    method: Any
    if problem is None:
        from . import hooks
        from .config import MixPrecConfig as method

        hooks.register()
    else:
        logger.error(problem)
        method = type("UnfitSGLang", (_Unfit,), {"problem": problem})
    for methods in (
        quantization.BASE_QUANTIZATION_METHODS,
        quantization.QUANTIZATION_METHODS,
        quantization.CPU_QUANTIZATION_METHODS,
    ):
        methods[METHOD] = method
    if METHOD not in QUANTIZATION_CHOICES:
        add_quantization_method_choices([METHOD])


class _Unfit:
    """A quantization method that refuses every checkpoint."""

    problem: ClassVar[str]

    @classmethod
    def override_quantization_method(cls, hf_quant_cfg: Any, user_quant: Any) -> None:
        return None

    @classmethod
    def from_config(cls, config: Any) -> Any:
        raise RuntimeError(cls.problem)
