"""SGLang's own models in this process, as on any rank of tensor or expert parallelism, without a GPU.

Without ``SGLANG_USE_CPU_ENGINE``, SGLang takes the code paths of a GPU here, with tensors on the CPU: layers are made
and filled as on a GPU, up to the processing after loading, which needs kernels.
"""

from __future__ import annotations

import importlib
import inspect
import json
import runpy
import socket
import subprocess
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

import mixprec_runtime.cpu.engine
from mixprec_runtime.loading.ledger import default_dtype
from support.serving import Shape, write_sources

__all__ = [
    "Changed", "Lacking", "build", "change_config", "change_tensors", "experts_at", "free_port", "groups_of",
    "last_json", "load", "make", "parameters_of", "prepare_deepseek_v4", "rank_of", "run_python", "serve",
    "server_args", "sources", "stage_of", "start", "tensors_of",
]  # fmt: skip

VARIANTS = [
    "bf16", "fp8_block", "fp8_channel", "fp8_tensor", "int8_channel", "int8_block", "gptq_int4", "gptq_int4_g64",
    "gptq_int4_act", "gptq_int8", "awq_int4", "awq_int4_g64", "ct_fp8_block", "ct_fp8_weight", "ct_int4",
    "ct_int4_g32", "ct_int4_asym", "ct_int4_act", "ct_int8",
]  # fmt: skip


# Checkpoints


def sources(folder: Path, shape: Shape, variants: Sequence[str] = VARIANTS, *, head: bool = False) -> dict[str, Path]:
    """The variants of a model, written once below ``folder``; ``head``: with a quantized ``lm_head``."""
    home = folder / f"sources-{abs(hash((shape, tuple(variants), head)))}"
    if home.exists():
        return {v: home / v for v in variants}
    return write_sources(home, shape, variants, skip=["*.kv_b_proj"], head=head)


def build(paths: Mapping[str, Path], lines: Mapping[str, str], out: Path) -> Path:
    """Compiles a mix of sources; ``lines`` are the entries of ``weights:``."""
    from mixprec_build.output.build import plan_recipe, run_plan

    # A source must not have the name of a format that it lacks.
    text = [f"model: {paths['bf16']}", "sources:", *(f"  from_{name}: {path}" for name, path in paths.items())]
    text += ["default: from_bf16", "weights:", *(f"  '{name}': from_{variant}" for name, variant in lines.items())]
    recipe = out.with_suffix(".yaml")
    recipe.write_text("\n".join(text if lines else text[:-1]))
    run_plan(plan_recipe(recipe), out)
    return out


def tensors_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, read by the safetensors library."""
    from safetensors.torch import load_file

    return {name: t for path in sorted(checkpoint.glob("*.safetensors")) for name, t in load_file(path).items()}


def change_tensors(checkpoint: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Has ``edit`` change the tensors of a checkpoint, which is written again, in one file."""
    from safetensors.torch import save_file

    tensors = tensors_of(checkpoint)
    edit(tensors)
    first, *rest = sorted(checkpoint.glob("*.safetensors"))
    for path in rest:
        path.unlink()
    save_file(tensors, first, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, first.name)}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))


def change_config(checkpoint: Path, values: Mapping[str, Any]) -> None:
    """Adds ``values`` to a checkpoint's ``config.json``."""
    path = checkpoint / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


# SGLang in another process


def run_python(code: str, *arguments: str, timeout: float = 300, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs a new interpreter, with the environment that SGLang needs without a GPU."""
    environment = {**mixprec_runtime.cpu.engine.environment(), **variables}
    command = [sys.executable, "-W", "ignore", "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)


def last_json(done: subprocess.CompletedProcess[str]) -> Any:
    """The JSON on the last line of a process's output."""
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    return json.loads(done.stdout.splitlines()[-1])


# SGLang in this process


def stand_ins() -> None:
    """Registers empty modules from which SGLang imports names that it does not call here."""
    runpy.run_path(str(Path(mixprec_runtime.cpu.engine.__file__).with_name("site") / "sitecustomize.py"))
    vllm, ops = types.ModuleType("vllm"), types.ModuleType("vllm._custom_ops")
    vllm.__path__ = []
    ops.rotary_embedding = None  # type: ignore[attr-defined]
    sys.modules |= {"vllm": vllm, "vllm._custom_ops": ops}


def start() -> None:
    """Loads plugins and makes process groups of one rank, as SGLang's workers do before they make a model."""
    stand_ins()
    from sglang.srt.distributed import init_distributed_environment, initialize_model_parallel
    from sglang.srt.layers.quantization import marlin_utils
    from sglang.srt.model_loader import loader  # noqa: F401  (hooks are registered for imported modules)
    from sglang.srt.plugins import load_plugins
    from sglang.srt.runtime_context import get_parallel

    from support.sglang.configs import register_configs

    register_configs()
    load_plugins()
    marlin_utils.get_device_capability = lambda *_: (9, 0)
    publish(server_args("dummy"))
    get_parallel()._overrides.update(_ranks(0, 1, 1))
    init_distributed_environment(
        world_size=1, rank=0, local_rank=0, distributed_init_method=f"tcp://127.0.0.1:{free_port()}", backend="gloo"
    )
    initialize_model_parallel()


def prepare_deepseek_v4(monkeypatch: Any) -> None:
    """Has SGLang's class for DeepSeek-V4 run no kernel once loaded, and make rotary embeddings as on a GPU."""
    from sglang.srt.layers.rotary_embedding import factory

    monkeypatch.setenv("SGLANG_OPT_USE_TILELANG_MHC_PRE", "0")
    stock = factory.get_rope_cpu  # 0.5.23 also calls it without a scaling, which it refuses
    monkeypatch.setattr(
        factory, "get_rope_cpu", lambda *given: stock(*given) if given[5] is not None else factory.get_rope(*given[:8])
    )


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def server_args(path: Path | str, **options: Any) -> Any:
    # By the module, so that the class is looked up where this SGLang has it.
    return importlib.import_module("sglang.srt.server_args").ServerArgs(model_path=str(path), device="cpu", **options)


class Changed:
    """``ServerArgs`` with values that are changed after SGLang's own checks."""

    def __init__(self, args: Any, **values: Any):
        self._args = args
        self.__dict__ |= values

    def __getattr__(self, name: str) -> Any:
        return getattr(self._args, name)


class Lacking:
    """``ServerArgs`` without one of its arguments, as if SGLang had renamed it."""

    def __init__(self, args: Any, name: str):
        self._args, self._name = args, name

    def __getattr__(self, name: str) -> Any:
        if name == self._name:
            raise AttributeError(name)
        return getattr(self._args, name)


def publish(args: Any) -> None:
    from sglang.srt.layers.moe import initialize_moe_config

    importlib.import_module("sglang.srt.server_args").set_global_server_args_for_scheduler(args)
    # In 0.5.23 it has no parameter, and reads the published arguments.
    initialize_moe_config(*[args][: len(inspect.signature(initialize_moe_config).parameters)])


def _ranks(rank: int, tp: int, ep: int, dp: int = 1) -> dict[str, int]:
    """The values of ``get_parallel()`` on one of ``tp`` ranks, with ``ep`` parts of experts and ``dp`` of attention."""
    moe_tp, attn_tp = tp // ep, tp // dp
    return {
        "tp_size": tp, "tp_rank": rank, "attn_tp_size": attn_tp, "attn_tp_rank": rank % attn_tp,
        "attn_dp_size": dp, "attn_dp_rank": rank // attn_tp,
        "pp_size": 1, "pp_rank": 0, "attn_cp_size": 1, "attn_cp_rank": 0, "moe_dp_size": 1, "moe_dp_rank": 0,
        "moe_ep_size": ep, "moe_ep_rank": rank // moe_tp, "moe_tp_size": moe_tp, "moe_tp_rank": rank % moe_tp,
    }  # fmt: skip


@contextmanager
def rank_of(rank: int, tp: int, ep: int = 1, dp: int = 1) -> Iterator[None]:
    """Has this process take the place of one of several ranks while the context lasts."""
    from sglang.srt.layers import dp_attention
    from sglang.srt.runtime_context import get_flags, get_parallel

    parallel = get_parallel()
    values: dict[str, Any] = dict(_ranks(rank, tp, ep, dp))
    for kind, group_rank, size in (  # in 0.5.23, layers read their group
        ("tp", rank, tp),
        ("attn_tp", values["attn_tp_rank"], tp // dp),
        ("moe_ep", values["moe_ep_rank"], ep),
        ("moe_tp", values["moe_tp_rank"], tp // ep),
    ):
        values[f"{kind}_group"] = _Group(getattr(parallel, f"{kind}_group"), group_rank, size)
    # 0.5.15 has the flag in the module.
    old = hasattr(dp_attention, "_ENABLE_DP_ATTENTION_FLAG")
    where, flag = (dp_attention, "_ENABLE_DP_ATTENTION_FLAG") if old else (get_flags().dp, "enabled")
    with patch.dict(parallel._overrides, values), patch.object(where, flag, dp > 1):
        yield


@contextmanager
def stage_of(rank: int, stages: int) -> Iterator[None]:
    """Has this process take the place of one of several pipeline stages while the context lasts."""
    from sglang.srt.distributed import parallel_state
    from sglang.srt.runtime_context import get_parallel

    parallel = get_parallel()
    group = _Group(parallel.pp_group, rank, stages)
    # 0.5.23 has the group in its context only.
    known = patch.object(parallel_state, "_PP", group) if hasattr(parallel_state, "_PP") else nullcontext()
    with known, patch.dict(parallel._overrides, {"pp_size": stages, "pp_rank": rank, "pp_group": group}):
        yield


@contextmanager
def experts_at(places: list[list[int]]) -> Iterator[None]:
    """Has each layer's experts be at other places, as ``--init-expert-location`` does: the expert at each place."""
    from sglang.srt.eplb import expert_location
    from sglang.srt.layers.moe.fused_moe_triton import layer

    logical = torch.tensor(places)
    metadata = types.SimpleNamespace(
        physical_to_logical_map_cpu=logical,
        num_logical_experts=len({*places[0]}),
        logical_to_all_physical=lambda layer, expert, *_: [p for p, e in enumerate(places[layer]) if e == expert],
    )
    with ExitStack() as stack:
        for module in (expert_location, layer):
            stack.enter_context(patch.object(module, "get_global_expert_location_metadata", lambda: metadata))
        yield


class _Group:
    """A process group of one rank, with the rank and size of a larger one."""

    def __init__(self, group: Any, rank: int, size: int):
        self._group, self.rank_in_group, self.world_size = group, rank, size
        self.is_first_rank, self.is_last_rank = rank == 0, rank == size - 1

    def __getattr__(self, name: str) -> Any:
        return getattr(self._group, name)


def make(
    checkpoint: Path, dtype: str = "bfloat16", *, draft: bool = False, **options: Any
) -> tuple[torch.nn.Module, Any]:
    """SGLang's model for a checkpoint, before loading, and its ``ModelConfig``. ``options`` are of ``ServerArgs``.

    With ``draft``, the model that drafts for speculative decoding.
    With ``load_format="safetensors"``, SGLang's own loader will read the merged files, tensor by tensor.
    """
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.model_loader import loader

    args = server_args(checkpoint, dtype=dtype, **options)
    publish(args)
    config = ModelConfig.from_server_args(args, is_draft_model=draft)
    how = LoadConfig(load_format=args.load_format)
    quantization = loader._get_quantization_config(config, how)
    with default_dtype(config.dtype):
        # Read from the module, which has mixprec's hook around it.
        return loader._initialize_model(config, how, quantization), config


def load(model: torch.nn.Module, config: Any) -> None:
    """Loads a checkpoint's files as SGLang does, without the processing after loading."""
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.model_loader.loader import DefaultModelLoader

    model.load_weights(DefaultModelLoader(LoadConfig())._get_all_weights(config, model))


def serve(checkpoint: Path, **options: Any) -> torch.nn.Module:
    """:func:`make` and :func:`load`."""
    model, config = make(checkpoint, **options)
    load(model, config)
    return model


def parameters_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The parameters of a layer that are not empty, without those of its submodules."""
    return {name: p.data for name, p in module.named_parameters(recurse=False) if p.numel()}


def groups_of(layer: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The layers with a MoE layer's weights: itself, or a group for each format."""
    yield from getattr(layer, "groups", [layer])
