"""Builds and splits of many small steps, for tests that stop them between two steps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mixprec_build.checkpoint.degree import Degree
from mixprec_build.output import copier
from mixprec_build.output.split import split
from mixprec_build.planning.planner import make_plan
from mixprec_build.planning.types import Plan
from mixprec_build.recipe.recipe import load_recipe
from mixprec_build.recipe.sources import open_sources

__all__ = ["cut", "planned"]


def planned(recipe: Path) -> Plan:
    """A plan for two ranks with many small steps: its shards are smaller than a recipe may ask for."""
    copier._BUFFER = 10_000
    small = replace(load_recipe(recipe), shard_size=40_000, tp=(2,), layout="both")
    return make_plan(small, open_sources(small))


def cut(out: Path, jobs: int = 2) -> None:
    """Splits ``out`` for two ranks and for one; the recipe asks for two only."""
    split(out, Degree(1), jobs=jobs, shard_size=100_000)
