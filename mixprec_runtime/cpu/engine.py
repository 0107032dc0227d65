"""SGLang on a machine without a GPU: ``python -m mixprec_runtime.cpu --model-path out/ --port 30000``.

Starts stock ``python -m sglang.launch_server`` with the CPU engine's settings; other arguments go to it unchanged.
Kernels that SGLang lacks there are replaced by :mod:`mixprec_runtime.cpu.reference`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

__all__ = ["ENGINE", "environment"]


ENGINE: dict[str, Any] = {
    "device": "cpu",
    "attention_backend": "torch_native",
    "sampling_backend": "pytorch",
    "grammar_backend": "none",
    "disable_cuda_graph": True,
    "disable_overlap_schedule": True,
    "mem_fraction_static": 0.1,
    "max_total_tokens": 4096,
}
"""What ``sgl.Engine`` takes to run on a CPU."""


def environment(ranks: int = 1) -> dict[str, str]:
    """This process's environment with what SGLang's CPU engine reads, for ``ranks`` tensor-parallel ranks."""
    site = str(Path(__file__).with_name("site"))
    paths = [site, *filter(None, [os.environ.get("PYTHONPATH")])]
    several = {
        "SGLANG_CPU_OMP_THREADS_BIND": "|".join(map(str, range(ranks))),
        # Ranks of a torch that brings NCCL would use it, GPU or not; without its library they take gloo.
        "SGLANG_NCCL_SO_PATH": os.devnull,
    }
    own = several if ranks > 1 else {}
    return {**os.environ, **own, "SGLANG_USE_CPU_ENGINE": "1", "PYTHONPATH": os.pathsep.join(paths)}
