"""Contents of a folder: files by path; tensors by name, read by the safetensors library."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open

__all__ = ["file_tensors", "folder_tensors", "tree"]


def file_tensors(path: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Name -> dtype, shape and bytes of each tensor of a safetensors file."""
    out = {}
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 (safe_open is no dict)
            view = file.get_slice(name)
            tensor = file.get_tensor(name).contiguous()
            data = tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
            out[name] = (view.get_dtype(), view.get_shape(), data)
    return out


def folder_tensors(folder: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """As :func:`file_tensors`, for all safetensors files of a folder."""
    return {name: entry for path in sorted(folder.glob("*.safetensors")) for name, entry in file_tensors(path).items()}


def tree(folder: Path) -> dict[str, bytes]:
    """Relative path -> contents of every file below a folder."""
    return dict(_walk(folder))


def _walk(folder: Path) -> Iterator[tuple[str, bytes]]:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield str(path.relative_to(folder)), path.read_bytes()
