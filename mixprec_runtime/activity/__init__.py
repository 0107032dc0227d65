"""How often each expert runs, counted while serving; what a program may ask of it."""

from .tracker import (
    ExpertActivationTracker,
    export_expert_activation_stats,
    get_expert_activation_stats,
    reset_expert_activation_stats,
)

__all__ = [
    "ExpertActivationTracker",
    "export_expert_activation_stats",
    "get_expert_activation_stats",
    "reset_expert_activation_stats",
]
