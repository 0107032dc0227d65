"""Prepares a process for making models of SGLang's: one rank, no weights, with or without a GPU."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import socket
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["environment", "model_config", "prepare", "restart_without_gpu"]

_RANK = {
    "tp_size": 1, "tp_rank": 0, "attn_tp_size": 1, "attn_tp_rank": 0, "attn_dp_size": 1, "attn_dp_rank": 0,
    "pp_size": 1, "pp_rank": 0, "attn_cp_size": 1, "attn_cp_rank": 0, "moe_dp_size": 1, "moe_dp_rank": 0,
    "moe_ep_size": 1, "moe_ep_rank": 0, "moe_tp_size": 1, "moe_tp_rank": 0,
}  # fmt: skip
_FOR_HYBRIDS = {"page_size": 1, "disable_overlap_schedule": True, "mamba_radix_cache_strategy": "no_buffer"}
"""Arguments that SGLang requires on a CPU for models with recurrent states."""


def environment() -> dict[str, str]:
    """This process's environment, changed so that SGLang can be imported without a GPU, for the code paths of GPUs."""
    from ..cpu import engine

    found = engine.environment()
    del found["SGLANG_USE_CPU_ENGINE"]
    return {**found, "HF_HUB_OFFLINE": "1"}


def _stand_in() -> None:
    """Replaces what SGLang imports or calls for a GPU, where making a model does not need it."""
    import torch

    vllm, ops = types.ModuleType("vllm"), types.ModuleType("vllm._custom_ops")
    vllm.__path__ = []
    ops.rotary_embedding = None  # type: ignore[attr-defined]
    sys.modules |= {"vllm": vllm, "vllm._custom_ops": ops}
    torch.cuda.Stream = lambda *_, **__: None  # type: ignore[assignment,misc]
    torch.cuda.get_device_capability = lambda *_, **__: (9, 0)


def prepare() -> None:
    """Sets up server arguments and process groups of one rank."""
    import torch

    os.environ["SGLANG_OPT_USE_TILELANG_MHC_PRE"] = "0"  # a kernel that DeepSeek-V4's class runs once it is loaded
    if not torch.cuda.is_available():
        _stand_in()
    from sglang.srt.distributed import init_distributed_environment, initialize_model_parallel
    from sglang.srt.runtime_context import get_parallel

    _publish(_server_args("dummy"))
    get_parallel()._overrides.update(_RANK)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    init_distributed_environment(
        world_size=1, rank=0, local_rank=0, distributed_init_method=f"tcp://127.0.0.1:{port}", backend="gloo"
    )
    initialize_model_parallel()


def _server_args(path: Path | str, **own: Any) -> Any:
    import torch

    made = importlib.import_module("sglang.srt.server_args").ServerArgs
    known = inspect.signature(made).parameters  # 0.5.23's is no dataclass
    gpu = torch.cuda.is_available()
    options = {} if gpu else {name: value for name, value in _FOR_HYBRIDS.items() if name in known}
    return made(model_path=str(path), device="cuda" if gpu else "cpu", load_format="dummy", **options, **own)


def _publish(args: Any) -> None:
    from sglang.srt.layers.moe import initialize_moe_config

    importlib.import_module("sglang.srt.server_args").set_global_server_args_for_scheduler(args)
    # In 0.5.23 it has no parameter, and reads the published arguments.
    initialize_moe_config(*[args][: len(inspect.signature(initialize_moe_config).parameters)])


def model_config(config: Mapping[str, object], folder: Path, *, draft: bool = False) -> Any:
    """SGLang's ``ModelConfig`` of an unquantized model, whose ``config.json`` is written to ``folder``.

    With ``draft``, that of its draft layers.
    """
    from sglang.srt.configs.model_config import ModelConfig

    plain = {key: value for key, value in config.items() if key not in ("quantization_config", "auto_map")}
    (folder / "config.json").write_text(json.dumps(plain), encoding="utf-8")
    # Or classes for DeepSeek's kind may take the shared experts for routed ones, which says nothing of their names.
    args = _server_args(folder, disable_shared_experts_fusion=True)
    _publish(args)
    return ModelConfig.from_server_args(args, is_draft_model=draft)


def restart_without_gpu(arguments: list[str]) -> None:
    """Starts this program again with :func:`environment`, without which SGLang cannot be imported without a GPU."""
    import torch

    if not torch.cuda.is_available() and os.environ.get("HF_HUB_OFFLINE") != "1":
        os.execve(sys.executable, [sys.executable, "-m", "mixprec_runtime.asking", *arguments], environment())
