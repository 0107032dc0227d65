"""Hunyuan 1, dense and MoE (``models/hunyuan.py``), whose class tells its layers no numbers, and its head no name."""

from __future__ import annotations

from .base import Family
from .degrees import DegreeLimits

__all__ = ["HUNYUAN"]

HUNYUAN = Family(
    model_types=frozenset({"hunyuan_v1_moe", "hunyuan_v1_dense", "hunyuan"}),
    architectures=frozenset({"HunYuanMoEV1ForCausalLM", "HunYuanDenseV1ForCausalLM"}),
    inner=(("gate.wg", "gate"),),
    routers=frozenset({"gate", "wg"}),
    checked=True,
    can_be_cut=True,
    degrees=DegreeLimits(ranks_up_to_experts=True),
)
