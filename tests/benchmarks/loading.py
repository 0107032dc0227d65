"""How fast weights reach the GPU: SGLang's loader on a native checkpoint and on a compiled one, a rank's own files,
and what SGLang dumps itself (``presharded``, ``sharded_state``). Needs a GPU and SGLang.

    PYTHONPATH=tests python tests/benchmarks/loading.py FOLDER [LAYERS]

Makes a Qwen3-30B-A3B cut to LAYERS layers (14: 8.8 GB) in block FP8, in FOLDER; loads each form of it in this process
as SGLang's workers do, in turns, five times with the files in the page cache and twice without (the kernel is told to
forget them); prints seconds from the first tensor made to the last one processed.
"""

from __future__ import annotations

import gc
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from support.page_cache import forget
from support.serving import QWEN3_MOE, write_sources
from support.sglang import layers

WARM, COLD = 5, 2


def load(path: Path, load_format: str = "auto", **extra: Any) -> tuple[float, torch.nn.Module]:
    """Seconds to make and fill a model, and the model."""
    import sglang.srt.server_args as arguments
    from sglang.srt.configs.device_config import DeviceConfig
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.layers.dp_attention import initialize_dp_attention
    from sglang.srt.model_loader import get_model

    args = arguments.ServerArgs(model_path=str(path), dtype="bfloat16", device="cuda")
    arguments.set_global_server_args_for_scheduler(args)
    config = ModelConfig.from_server_args(args)
    initialize_dp_attention(args, config)
    how = LoadConfig(load_format=load_format, model_loader_extra_config=extra or {})
    started = time.perf_counter()
    model = get_model(model_config=config, load_config=how, device_config=DeviceConfig("cuda", 0))
    torch.cuda.synchronize()
    return time.perf_counter() - started, model


def seconds(*arguments: Any, **options: Any) -> float:
    found, _ = load(*arguments, **options)
    gc.collect()
    torch.cuda.empty_cache()
    return found


def main() -> None:
    from sglang.srt.model_loader.loader import ShardedStateLoader
    from sglang.srt.plugins import load_plugins

    folder, count = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 14
    shape = QWEN3_MOE.of(
        layers=count, hidden=2048, experts=128, expert_intermediate=768, top_k=8, heads=32, kv_heads=4,
        head_dim=128, vocab=8192,
    )  # fmt: skip
    native = write_sources(folder / "sources", shape, ["fp8_block"])["fp8_block"]
    recipe, merged, own, state = (folder / name for name in ("recipe.yaml", "merged", "own", "state"))
    recipe.write_text(f"model: {native}\n")
    for arguments in (
        ("build", recipe, "-o", merged, "--link"),
        ("build", recipe, "-o", own, "--link"),
        ("split", own, "--tp", "1"),
    ):
        subprocess.run([sys.executable, "-m", "mixprec_build", *map(str, arguments)], check=True)
    layers.start_sglang()
    load_plugins()
    # The first load of all pays for imports and kernels; SGLang's own forms are dumped from it.
    _, model = load(native)
    shutil.copytree(native, state, ignore=shutil.ignore_patterns("*.safetensors*"))
    ShardedStateLoader.save_model(model, str(state))
    del model
    presharded: dict[str, Any] = {"load_format": "presharded", "presharded_path": str(folder / "presharded")}
    seconds(native, **presharded)  # loads as usual, and dumps
    forms: dict[str, tuple[Path, Path, dict[str, Any]]] = {
        "native": (native, native, {}),
        "compiled": (merged, merged, {}),
        "cut for ranks": (own, own / "presplit", {}),
        "native, presharded": (native, folder / "presharded", presharded),
        "native, sharded_state": (state, state, {"load_format": "sharded_state"}),
    }
    found: dict[str, dict[str, list[float]]] = {name: {"warm": [], "cold": []} for name in forms}
    for state_of, turns in (("warm", WARM), ("cold", COLD)):
        for turn in range(turns):
            for name in list(forms)[:: -1 if turn % 2 else 1]:
                path, files, options = forms[name]
                if state_of == "cold":
                    forget(files)
                found[name][state_of].append(seconds(path, **options))
    print(f"{sum(p.stat().st_size for p in native.glob('*.safetensors')) / 1e9:.1f} GB in {count} layers", flush=True)
    for name, times in found.items():
        shown = (
            f"{what} {statistics.median(all_):5.2f} s ({' '.join(f'{t:.2f}' for t in all_)})"
            for what, all_ in times.items()
        )
        print(f"{name:22s} {'  '.join(shown)}", flush=True)


if __name__ == "__main__":
    main()
