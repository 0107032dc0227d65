"""Settings of SGLang without a GPU: ``python -m mixprec_runtime.cpu --model-path out/ --port 30000``.

Starts stock ``python -m sglang.launch_server`` with these settings and the arguments that it was given.
:mod:`mixprec_runtime.cpu.reference` replaces the kernels that SGLang lacks on a CPU.
"""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path
from typing import Any

from mixprec_build.versions import between

__all__ = ["ENGINE", "environment"]


ENGINE: dict[str, Any] = {
    "device": "cpu",
    "attention_backend": "torch_native",
    "sampling_backend": "pytorch",
    "grammar_backend": "none",
    "disable_cuda_graph": True,
    "disable_overlap_schedule": True,
    # Else a scheduler without requests keeps a core busy, which other processes here need.
    "sleep_on_idle": True,
    # What other processes take while weights are loaded counts as theirs, and some of this must be left.
    "mem_fraction_static": 0.3,
    "max_total_tokens": 4096,
}
"""Arguments of ``sgl.Engine`` for a CPU."""


def environment(ranks: int = 1, stages: int = 1) -> dict[str, str]:
    """This process's environment, with the variables of SGLang's CPU engine.

    They are for ``ranks`` of tensor parallelism in each of ``stages`` of a pipeline.
    """
    site = str(Path(__file__).with_name("site"))
    paths = [site, *filter(None, [os.environ.get("PYTHONPATH")])]
    own = {}
    # Cores for the ranks of a stage; from 0.5.19 on, for those of all stages.
    bound = ranks * stages if stages > 1 and between("0.5.19", "", importlib.metadata.version("sglang")) else ranks
    if bound > 1:
        own["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(map(str, range(bound)))
    if ranks * stages > 1:
        # Without the library of NCCL, ranks use gloo; with it they would use NCCL, GPU or not.
        own["SGLANG_NCCL_SO_PATH"] = os.devnull
    # 0.5.23's compiled prefix cache stops generation on a CPU: "insert value must be an int64 tensor".
    cache = {"SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND": "python"}
    return {**cache, **os.environ, **own, "SGLANG_USE_CPU_ENGINE": "1", "PYTHONPATH": os.pathsep.join(paths)}
