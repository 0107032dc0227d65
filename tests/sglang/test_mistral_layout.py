"""What SGLang does with Mistral's own layout: the names, rotary embedding and folders for which mixprec refuses it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from support.serving import LLAMA
from support.sglang.harness import sources

from mixprec_build.checkpoint.mistral_layout import refuse_own_names, taken_for_own
from mixprec_build.errors import SourceError
from mixprec_build.storage.header import TensorInfo

pytestmark = pytest.mark.usefixtures("sglang")

PARAMS = {
    "dim": 64, "n_layers": 1, "n_heads": 4, "n_kv_heads": 2, "head_dim": 16, "hidden_dim": 128, "norm_eps": 1e-5,
    "vocab_size": 256, "rope_theta": 1e4,
}  # fmt: skip


def test_names_that_its_classes_rename_are_refused() -> None:
    from sglang.srt.models.mistral import MistralForCausalLMMistralFormat
    from sglang.srt.models.mistral_eagle import MistralForCausalLMEagle
    from sglang.srt.models.mistral_large_3 import MistralLarge3ForCausalLM

    for its in (MistralForCausalLMMistralFormat, MistralForCausalLMEagle, MistralLarge3ForCausalLM):
        names = [pattern.replace(r"(\d+)", "3").replace("\\.", ".") for pattern in its.remapping]
        linears = [name for name in names if ".attention.w" in name]
        assert len(linears) >= 4
        for name in linears:
            for leaf in ("weight", "qscale_weight", "qscale_act"):
                tensor = TensorInfo(name.replace(r"(\w+)", leaf), "BF16", (1,), "a.safetensors", 0, 2)
                with pytest.raises(SourceError, match="Mistral's own layout"):
                    refuse_own_names([tensor], "there")


def test_queries_and_keys_are_in_another_order() -> None:
    """Its own config says how they turn, a ``config.json`` does not: tensors with other names alone answer wrongly."""
    from sglang.srt.layers.rotary_embedding import get_rope
    from sglang.srt.utils.hf_transformers.mistral_utils import adapt_config_dict
    from transformers import MistralConfig

    config, _ = adapt_config_dict(dict(PARAMS), "a-model")
    assert config["rope_is_neox_style"] is False
    assert getattr(MistralConfig(), "rope_is_neox_style", True) is True  # models/llama.py asks so

    heads, size, tokens = 2, 16, 5
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, heads * size, 64, generator=generator)
    x, positions = torch.randn(tokens, 64, generator=generator), torch.arange(3, 3 + tokens)

    def scores(q: torch.Tensor, k: torch.Tensor, *, neox: bool) -> torch.Tensor:
        rope = get_rope(size, size, 64, 10000, neox, dtype=torch.float32)
        turned = rope.forward_native(positions, x @ q.T, x @ k.T)
        a, b = (t.view(tokens, heads, size) for t in turned)
        return torch.einsum("thd,shd->hts", a, b)

    def as_hugging_face_has_them(rows: torch.Tensor) -> torch.Tensor:
        """As `permute_for_rope` of transformers' conversion scripts orders rows."""
        return rows.view(heads, size // 2, 2, -1).transpose(1, 2).reshape(heads * size, -1)

    own = scores(q, k, neox=False)
    torch.testing.assert_close(scores(*map(as_hugging_face_has_them, (q, k)), neox=True), own)
    assert (scores(q, k, neox=True) - own).abs().max() > own.abs().mean()


@pytest.mark.parametrize(
    "path",
    [
        "/models/Mistral-Large-3-mix", "out/mistral-small-4", "Leanstral/out", "Mistral-7B-EAGLE", "/eagle/mistral/out",
        "Mistral-7B", "eagle", "mistral-small-3.2", "mistral_large_3", "ministral-3",
    ],
)  # fmt: skip
def test_folders_that_it_takes_for_one_by_their_name(path: str) -> None:
    from sglang.srt.utils.hf_transformers.mistral_utils import is_mistral_model

    assert is_mistral_model(path) is (taken_for_own(path) is not None)


def test_such_a_folder_does_not_open_in_hugging_faces_layout(folder: Path, tmp_path: Path) -> None:
    from sglang.srt.utils.hf_transformers import get_config

    made = sources(folder, LLAMA.of(layers=2), ["bf16"])["bf16"]
    other = tmp_path / "Mistral-Large-3-mix"
    other.symlink_to(made, target_is_directory=True)
    assert get_config(str(made), trust_remote_code=False).architectures == ["LlamaForCausalLM"]
    with pytest.raises(FileNotFoundError, match=re.escape("params.json")):
        get_config(str(other), trust_remote_code=False)
