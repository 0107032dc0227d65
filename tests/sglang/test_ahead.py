"""Tensors that are copied ahead of the model are the tensors of the files, and only so many are."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from mixprec_runtime.ahead import read_ahead
from mixprec_runtime.strict import DTYPES

MIB = 1 << 20


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def test_every_tensor_comes_unchanged_and_in_its_place() -> None:
    noise = torch.randint(0, 256, (40 * MIB,), dtype=torch.uint8)
    tensors = {f"{word}.{size}": noise[:size].view(dtype) for word, dtype in DTYPES.items() for size in (8, MIB)}
    tensors |= {
        "two axes": noise[: 2 * MIB].view(torch.float16).view(1024, -1),
        "turned": noise[:MIB].view(1024, -1).t(),
        "large": noise,
        "none": noise[:0],
        "a number": torch.tensor(3.0),
    }
    found = dict(read_ahead(tensors.items(), pin_memory=False, held=lambda: 0))
    assert list(found) == list(tensors)
    for name, tensor in tensors.items():
        assert found[name].shape == tensor.shape and found[name].dtype == tensor.dtype
        assert torch.equal(bytes_of(found[name]), bytes_of(tensor)), name
        copied = MIB <= tensor.nbytes <= 32 * MIB and tensor.is_contiguous()
        assert (found[name].data_ptr() != tensor.data_ptr()) == copied, name


@pytest.mark.parametrize("size", [MIB, 100 * MIB])
def test_it_is_64_mib_ahead(size: int) -> None:
    taken = 0

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal taken
        for number in range(200):
            taken += size
            yield str(number), torch.empty(size, dtype=torch.uint8)

    ahead = read_ahead(weights(), pin_memory=False, held=lambda: 0)
    for number in range(1, 4):
        next(ahead)
        assert taken <= number * size + 64 * MIB
    ahead.close()


def test_what_a_model_keeps_does_not_fill_pinned_memory() -> None:
    kept: list[torch.Tensor] = []
    tensors = {str(number): torch.zeros(8 * MIB, dtype=torch.uint8) for number in range(120)}

    def held() -> int:
        return sum(tensor.nbytes for tensor in kept)

    for name, tensor in read_ahead(tensors.items(), pin_memory=False, held=held):
        if tensor is not tensors[name]:
            kept.append(tensor)
    assert 512 * MIB <= held() <= 704 * MIB
    assert tensor is tensors[name]
