"""First on PYTHONPATH: SGLang's Marlin kernels without atomic additions, whose order, and so whose sum, is chance.

Both servers of a comparison run under it, so that what differs is not the kernel's.
"""

import importlib.machinery
import sys
from types import ModuleType
from typing import Any

_KERNELS = {
    "sglang.kernels.ops.moe.moe_wna16_marlin": "moe_wna16_marlin_gemm",
    "sglang.kernels.ops.quantization.gptq_marlin": "gptq_marlin_gemm",
}


class _Finder:
    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> Any:
        if name not in _KERNELS:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        assert spec is not None and spec.loader is not None
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            kernel = getattr(module, _KERNELS[name])

            def repeatable(*args: Any, use_atomic_add: bool = False, **kwargs: Any) -> Any:
                return kernel(*args, use_atomic_add=False, **kwargs)

            setattr(module, _KERNELS[name], repeatable)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, _Finder())  # type: ignore[arg-type]
