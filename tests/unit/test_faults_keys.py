"""Keys of a quantization_config that change what bytes mean: nothing is read past one that is not known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.write import LLAMA, Config, Tensors, write_tiny

from mixprec_build.checkpoint.typed import open_source
from mixprec_build.errors import SourceError
from mixprec_build.formats.base import FormatError
from mixprec_build.formats.keys import check_keys
from mixprec_build.output.build import plan_recipe

TRANSFORM = {"config_groups": {"v": {"type": "hadamard", "apply": [{"targets": ["Linear"], "location": "input"}]}}}


def _with(where: tuple[str, ...], **keys: Any) -> Any:
    def edit(tensors: Tensors, config: Config) -> None:
        place = config["quantization_config"]
        for word in where:
            place = place[word]
        place.update(keys)

    return edit


@pytest.mark.parametrize(
    ("variant", "where", "keys"),
    [
        ("ct_int4", (), {"transform_config": TRANSFORM}),
        ("ct_int4", (), {"sparsity_config": {"format": "sparse-24-bitmask"}}),
        ("ct_int4", (), {"rotation_of_inputs": 1}),
        ("ct_int4", ("config_groups", "group_0"), {"permutation": "columns"}),
        ("ct_int4", ("config_groups", "group_0", "weights"), {"codebook": [1, 2]}),
        ("gptq_int4", (), {"rotation": "hadamard"}),
        ("gptq_int4", (), {"is_marlin_format": True}),
        ("gptq_int4", (), {"adapter": {"path": "eora"}}),
        ("awq_int4", (), {"pack_method": "order"}),
        ("fp8_block", (), {"fmt": "e5m2"}),
        ("fp8_block", (), {"input_permutation": True}),
        ("fp8_tensor", (), {"pre_quant_scale": True}),
    ],
)
def test_a_key_that_may_change_what_bytes_mean_makes_quantized_modules_unread(
    tmp_path: Path, variant: str, where: tuple[str, ...], keys: Config
) -> None:
    write_tiny(tmp_path / "bf16", LLAMA, "bf16")
    write_tiny(tmp_path / "q", LLAMA, variant, edit=_with(where, **keys))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: bf16\nsources: {bf16: bf16, q: q}\nweights: {'model.layers.*.mlp.*': q}\n")
    with pytest.raises(SourceError, match=next(iter(keys))) as raised:
        plan_recipe(recipe)
    assert "another source" in str(raised.value) or "is not read" in str(raised.value)
    unread = {n for n, f in open_source(str(tmp_path / "q")).formats.items() if isinstance(f, FormatError)}
    assert {n for n in unread if n.endswith("_proj")} and "model.layers.0.mlp.up_proj" in unread


@pytest.mark.parametrize(
    ("variant", "keys"),
    [
        ("ct_int4", {"transform_config": {}, "sparsity_config": {}, "kv_cache_scheme": None}),
        ("ct_int4", {"transform_config": {"config_groups": {}}, "quantization_status": "compressed", "version": "1"}),
        ("ct_int4", {"global_compression_ratio": 1.2, "sparsity_config": {"format": "dense"}}),
        ("gptq_int4", {"damp_percent": 0.1, "true_sequential": True, "meta": {"quantizer": ["x"]}, "rotation": None}),
        ("gptq_int4", {"dynamic": {}, "adapter": None, "pack_dtype": "int32", "lm_head": False}),
        ("awq_int4", {"modules_to_not_convert": None, "do_fuse": False, "exllama_config": {"version": 2}}),
        ("fp8_block", {"fmt": "e4m3", "scale_fmt": None, "modules_to_not_convert": ["lm_head"], "dequantize": False}),
        ("fp8_tensor", {"kv_cache_quant_algo": "FP8", "producer": {"name": "modelopt"}, "exclude_modules": ["x"]}),
    ],
)
def test_keys_that_say_nothing_of_the_bytes_pass(tmp_path: Path, variant: str, keys: Config) -> None:
    write_tiny(tmp_path / "q", LLAMA, variant, edit=_with((), **keys))
    assert not [f for f in open_source(str(tmp_path / "q")).formats.values() if isinstance(f, FormatError)]


def test_where_weights_are_rotated_unquantized_modules_are_unread_too(tmp_path: Path) -> None:
    write_tiny(tmp_path / "q", LLAMA, "ct_int4", edit=_with((), transform_config=TRANSFORM))
    formats = open_source(str(tmp_path / "q")).formats
    assert isinstance(formats["model.embed_tokens"], FormatError)
    assert "stored rotated" in str(formats["model.embed_tokens"])


def test_an_override_with_a_key_that_is_not_known_is_unread(tmp_path: Path) -> None:
    edit = _with((), dynamic={r"+:.*\.up_proj": {"bits": 4, "rotate": "yes"}, "-:.*lm_head": {}})
    write_tiny(tmp_path / "q", LLAMA, "gptq_int4", edit=edit)
    source = open_source(str(tmp_path / "q"))
    assert "`rotate`" in str(source.formats["model.layers.0.mlp.up_proj"])
    assert source.known_format("model.layers.0.mlp.down_proj") is not None


def test_a_key_with_a_strange_name_is_shown_safely() -> None:
    with pytest.raises(FormatError, match=r"\\x1b"):
        check_keys({"quant_method": "fp8", "\x1b[31m": 1}, {"fmt"})
