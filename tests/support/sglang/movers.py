"""A process that is one of several ranks whose experts SGLang's EPLB moves, over gloo.

``python -m support.sglang.movers RANK RANKS FOLDER`` reads ``FOLDER/RANK.pt``, a list of :class:`Task`, and writes
``FOLDER/RANK.moved.pt``: the tensors of each, moved. mixprec's hook is around SGLang's function as in a server.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from support.sglang.harness import stand_ins

__all__ = ["Task", "update"]


class Task(NamedTuple):
    """The experts of a model on one rank, and where they are to go."""

    weights: dict[int, list[torch.Tensor]]
    """Layer -> the tensors of its experts on this rank."""
    before: list[int]
    """The expert at each place of all ranks."""
    after: list[int]


def update(task: Task, rank: int, ranks: int) -> None:
    """Has SGLang move the experts of all layers as its EPLB does, in place."""
    from sglang.srt.eplb import expert_location_updater

    def at(places: list[int]) -> Any:
        return SimpleNamespace(
            physical_to_logical_map_cpu=torch.tensor([places] * (max(task.weights) + 1)),
            num_local_physical_experts=len(places) // ranks,
        )

    expert_location_updater._update_expert_weights_raw(
        routed_experts_weights_of_layer=task.weights,
        old_expert_location_metadata=at(task.before),
        new_expert_location_metadata=at(task.after),
        update_layer_ids=list(task.weights),
        nnodes=1,
        rank=rank,
    )


def main(rank: int, ranks: int, folder: Path) -> None:
    """Moves, as one rank, what the other ranks expect."""
    stand_ins()
    from sglang.srt.eplb import expert_location_updater  # noqa: F401  (hooks are registered for imported modules)
    from sglang.srt.plugins import load_plugins

    load_plugins()
    torch.distributed.init_process_group("gloo", f"file://{folder / 'store'}", rank=rank, world_size=ranks)
    tasks = [Task(*task) for task in torch.load(folder / f"{rank}.pt")]
    for task in tasks:
        update(task, rank, ranks)
    torch.save([task.weights for task in tasks], folder / f"{rank}.moved.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
