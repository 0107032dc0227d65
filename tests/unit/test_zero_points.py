"""Zero points of symmetric GPTQ and AutoRound weights: which of the two conventions they are stored in, they say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.write import LLAMA, Config, Tensors, write_tiny

from mixprec_build.errors import RefusedError
from mixprec_build.formats.gptq import Gptq
from mixprec_build.output.build import plan_recipe, run_plan

V1, V2 = 0x77777777, 0x88888888
LINE = "model.layers.*.mlp.*"


def written(folder: Path, word: int | None, **declared: object) -> Path:
    """A recipe of a BF16 Llama and one in GPTQ, every word of whose ``qzeros`` is ``word``."""

    def edit(tensors: Tensors, config: Config) -> None:
        if "packing_format" in declared:
            del config["quantization_config"]["checkpoint_format"]
        config["quantization_config"].update(declared)
        for name in [name for name in tensors if name.endswith((".qzeros", ".g_idx"))]:
            if name.endswith(".qzeros") and word is not None:
                tensors[name] = np.full(tensors[name].shape, word, np.uint32).view(np.int32)
            elif name.endswith(".g_idx") and "packing_format" in declared:
                del tensors[name]  # which AutoRound does not write

    write_tiny(folder / "bf16", LLAMA, "bf16")
    write_tiny(folder / "int4", LLAMA, "gptq_int4", edit=edit)
    recipe = folder / "recipe.yaml"
    recipe.write_text(f"model: bf16\nsources: {{bf16: bf16, int4: int4}}\nweights: {{'{LINE}': int4}}\n")
    return recipe


def auto_round(packing: str) -> dict[str, object]:
    return {"quant_method": "auto-round", "packing_format": packing, "autoround_version": "0.16.1"}


DECLARED: list[tuple[dict[str, Any], str]] = [
    ({"checkpoint_format": "gptq"}, "gptq"),
    ({"checkpoint_format": "gptq_v2"}, "gptq_v2"),
    (auto_round("auto_round:auto_gptq"), "gptq"),
    (auto_round("auto_round"), "gptq_v2"),
    # auto-round 0.16.1, export_to_autoround/export.py: "gptqmodel" and kernels alone are packed without minus one
    (auto_round("auto_round:gptqmodel"), "gptq_v2"),
    (auto_round("auto_round:exllamav2"), "gptq_v2"),
]


@pytest.mark.parametrize(("word", "stored"), [(V1, "gptq"), (V2, "gptq_v2")])
@pytest.mark.parametrize(("declared", "meant"), DECLARED)
def test_what_is_stored_counts(tmp_path: Path, declared: dict[str, Any], meant: str, word: int, stored: str) -> None:
    plan = plan_recipe(written(tmp_path, word, **declared))
    formats = {module.format for module in plan.modules.values() if module.format.quantized}
    assert formats == {Gptq(4, 128, True, False, stored)}
    said = [note for note in plan.notes if "their values are stored as by" in note]
    assert len(said) == int(meant != stored)
    if said:
        assert f"`int4` declares layout {meant}, and their values are stored as by layout {stored}" in said[0]


def test_what_is_stored_is_written(tmp_path: Path) -> None:
    plan = plan_recipe(written(tmp_path, V2, checkpoint_format="gptq"))
    run_plan(plan, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    (fmt,) = [f for f in config["quantization_config"]["formats"].values() if f["kind"] == "gptq_int4"]
    assert fmt["layout"] == "gptq_v2"


@pytest.mark.parametrize("declared", [declared for declared, _ in DECLARED])
def test_zero_points_that_are_neither_are_refused(tmp_path: Path, declared: dict[str, Any]) -> None:
    with pytest.raises(RefusedError, match=r"declared symmetric .* but they hold other zero points"):
        plan_recipe(written(tmp_path, 0x99999999, **declared))


def test_both_conventions_in_one_gemm_are_refused(tmp_path: Path) -> None:
    recipe = written(tmp_path, None)
    from safetensors.numpy import load_file, save_file

    (file,) = (tmp_path / "int4").glob("*.safetensors")
    tensors = load_file(file)
    name = "model.layers.0.mlp.up_proj.qzeros"
    tensors[name] = np.full(tensors[name].shape, V2, np.uint32).view(np.int32)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(RefusedError, match="its parts store zero points in two ways"):
        plan_recipe(recipe)


def test_a_symmetric_weight_means_the_same_in_both() -> None:
    """Reading by the wrong one would move every weight by one step."""
    rng = np.random.default_rng(0)
    q = rng.integers(0, 2**31, (16, 64), dtype=np.int64).astype(np.int32)
    scales = np.ones((1, 64), np.float16)
    values = {
        (layout, word): Gptq(4, 128, True, False, layout).dequantize(
            {"qweight": q, "qzeros": np.full((1, 8), word, np.uint32).view(np.int32), "scales": scales}
        )
        for layout in ("gptq", "gptq_v2")
        for word in (V1, V2)
    }
    first, *others = values.values()
    assert first.min() == -8 and first.max() == 7
    assert all((other == first).all() for other in others)
