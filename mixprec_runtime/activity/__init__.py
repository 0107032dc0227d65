"""Counts how often each expert runs while a model is served."""

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
