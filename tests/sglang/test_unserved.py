"""Models whose classes mixprec does not follow: a server stops at once, and says why."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import producers as made
from support.sglang.harness import serve

from mixprec_build.output.build import plan_recipe, run_plan

pytestmark = pytest.mark.usefixtures("sglang", "streams")


def test_a_server_names_what_stands_in_the_way(tmp_path: Path) -> None:
    """DeepSeek-V4, built although the plan refused it: SGLang's class would stop at an assertion."""
    stored = {"*.experts.?.*": made.DSV4_MXFP4, "*.shared_experts.*": made.DSV4_FP8, "*.attn.w*": made.DSV4_FP8}
    made.Checkpoint(made.deepseek_v4(), stored).write(tmp_path / "q", made.real_config("deepseek-v4-flash"))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: q\n")
    run_plan(plan_recipe(recipe, allow_unservable=True), tmp_path / "out")
    with pytest.raises(RuntimeError, match="mixprec serves no DeepSeek-V4: SGLang's class"):
        serve(tmp_path / "out")
