"""Layouts of draft layers beside the source code of SGLang's classes for them: modules, and what is never quantized."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from mixprec_build.families import draft_layers as layers
from mixprec_build.families.draft_layers import DraftLayout

CLASSES = [
    ("deepseek_nextn", layers.NEXTN),
    ("glm4_moe_nextn", layers.NEXTN),
    ("deepseek_v4_nextn", layers.V4_MTP),
    ("step3p5_mtp", layers.STEP_MTP),
    ("mimo_v2_nextn", layers.MIMO_V2_MTP),
    ("bailing_moe_nextn", layers.BAILING_NEXTN),
    ("qwen3_5_mtp", layers.QWEN_MTP),
    ("qwen3_next_mtp", layers.QWEN_MTP),
    ("qwen3_moe_mtp", layers.QWEN_MTP),
    ("mimo_mtp", layers.MIMO_MTP),
    ("ernie4_eagle", layers.ERNIE_MTP),
]


def source_of(module: str) -> str:
    package = find_spec("sglang")
    assert package is not None and package.submodule_search_locations
    (path,) = Path(package.submodule_search_locations[0]).rglob(f"{module}.py")
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize(("module", "layout"), CLASSES)
def test_its_class_has_the_modules_and_no_quantization_where_the_layout_says_so(
    module: str, layout: DraftLayout
) -> None:
    source = source_of(module)
    # `mtp.norm` is the last norm of the model inside; Step's `shared_head` is a class.
    for name in {*layout.in_each, *layout.once} - {"norm"}:
        made = re.findall(rf"self\.(?:\w+\.)?{name.rpartition('.')[2]} = ([\w.]+)\(", source)
        assert made, name
        assert ("nn.Linear" in made) == (name in layout.plain), (name, made)


@pytest.mark.parametrize(("module", "layout"), CLASSES)
def test_its_decoder_layer_gets_a_quantization_config_or_not(module: str, layout: DraftLayout) -> None:
    made = re.findall(
        r"self\.(?:decoder|mtp_block|model) = \w*(?:Layer|Block|Model|ForCausalLM)\(((?:[^()]|\([^()]*\))*)\)",
        source_of(module),
    )
    assert made
    in_layers = [a for a in made if any(word in a for word in ("layer_id", "0,", "mtp_config"))]
    assert all(("quant_config" in arguments) == layout.quantized for arguments in in_layers or made)
