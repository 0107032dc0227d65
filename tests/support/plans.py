"""Plans of many small steps, for tests that stop a build or a split between any two of them."""

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
    """A plan of several shards, smaller than a recipe may ask for, copied in many small steps, and cut for two."""
    copier._BUFFER = 10_000
    small = replace(load_recipe(recipe), shard_size=40_000, tp=(2,), layout="both")
    return make_plan(small, open_sources(small))


def cut(out: Path, jobs: int = 2) -> None:
    """For two ranks, and one: a degree that its recipe does not ask for."""
    split(out, Degree(1), jobs=jobs, shard_size=100_000)
