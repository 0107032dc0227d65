"""What SGLang's classes have no place for is refused by their families, whatever class a mix is served by."""

from __future__ import annotations

import pytest

from mixprec_build.families.base import Family
from mixprec_build.families.deepseek import DEEPSEEK_V32
from mixprec_build.families.draft_class import Draft
from mixprec_build.families.facts import ModelFacts
from mixprec_build.families.glm import GLM_DSA
from mixprec_build.families.gpt_oss import GPT_OSS
from mixprec_build.families.kimi import KIMI_K3
from mixprec_build.families.mimo import MIMO_V2
from mixprec_build.families.minimax import MINIMAX_M3
from mixprec_build.families.parts import Role
from mixprec_build.families.qwen3_5 import QWEN3_5
from mixprec_build.families.qwen3_next import QWEN3_NEXT
from mixprec_build.families.registry import FAMILIES, find_family
from mixprec_build.formats.base import Format
from mixprec_build.formats.dense import Dense
from mixprec_build.formats.fp8 import Fp8
from mixprec_build.formats.gptq import Gptq
from mixprec_build.formats.mxfp4 import Mxfp4
from mixprec_build.formats.nvfp4 import Nvfp4
from mixprec_build.formats.w4afp8 import W4afp8

BLOCK = Fp8("block", "dynamic", (128, 128))
SMALL = Fp8("block", "dynamic", (64, 64))
CHANNEL = Fp8("channel")
INT4 = Gptq(4, 128, True, False, "gptq")
DENSE = Dense("BF16")


@pytest.mark.parametrize(
    ("family", "module", "served", "refused"),
    [
        (QWEN3_NEXT, "linear_attn.in_proj_qkvz", [DENSE, BLOCK, CHANNEL], [INT4]),
        (QWEN3_NEXT, "linear_attn.out_proj", [DENSE, BLOCK, INT4], []),
        (QWEN3_5, "linear_attn.in_proj_qkv", [DENSE, BLOCK, INT4], []),
        (GLM_DSA, "self_attn.indexer.wk", [DENSE, BLOCK], [SMALL, CHANNEL, INT4]),
        (DEEPSEEK_V32, "self_attn.indexer.wk", [DENSE, BLOCK, INT4], []),
        (DEEPSEEK_V32, "self_attn.indexer.weights_proj", [DENSE], [BLOCK, INT4]),
        (GPT_OSS, "self_attn.q_proj", [DENSE], [BLOCK, INT4]),
        (KIMI_K3, "self_attn.q_proj", [DENSE, BLOCK, INT4], []),
        (KIMI_K3, "self_attn.f_a_proj", [DENSE], [BLOCK, INT4]),
        (KIMI_K3, "self_attn.q_a_proj", [DENSE], [BLOCK, INT4]),
        (KIMI_K3, "self_attn.o_proj", [DENSE], [BLOCK, CHANNEL, Nvfp4("modelopt", "none"), INT4]),
        (KIMI_K3, "block_sparse_moe.shared_experts.up_proj", [DENSE, BLOCK], [INT4]),
        (KIMI_K3, "block_sparse_moe.routed_expert_down_proj", [DENSE], [BLOCK, INT4]),
        (MIMO_V2, "self_attn.qkv_proj", [DENSE], [BLOCK, INT4]),
        (MIMO_V2, "self_attn.q_proj", [DENSE, BLOCK, INT4], []),
    ],
)
def test_what_a_class_has_no_place_for(
    family: Family, module: str, served: list[Format], refused: list[Format]
) -> None:
    name = f"model.layers.0.{module}"
    assert [fmt for fmt in (*served, *refused) if family.format_limit(name, Role.LINEAR, fmt) is not None] == refused


@pytest.mark.parametrize(("family", "activation"), [(MINIMAX_M3, "swiglu_oai"), (KIMI_K3, "situ")])
def test_experts_with_an_alpha_are_refused_in_what_no_kernel_has_it_for(family: Family, activation: str) -> None:
    """MiniMax-M3's and Kimi-K3's run on Triton and on Marlin."""
    module = "model.layers.3.block_sparse_moe.experts.5.w1"
    for fmt in (Mxfp4(), Mxfp4("weight_packed"), Nvfp4("modelopt", "none"), INT4, BLOCK):
        assert family.format_limit(module, Role.EXPERT, fmt) is None, fmt
    shared = "model.layers.3.block_sparse_moe.shared_experts.gate_proj"
    assert MINIMAX_M3.format_limit(shared, Role.LINEAR, INT4) is None
    kernels = {kernel: family.activation.limit_on(kernel) for kernel in ("Triton", "Marlin", W4afp8.experts_run_on)}
    assert [kernel for kernel, limit in kernels.items() if limit is not None] == ["CUTLASS"]
    assert f"no CUTLASS kernel for experts with this activation ({activation})" in str(kernels["CUTLASS"])


def test_every_family_says_its_classes_and_is_found_by_them() -> None:
    for family in FAMILIES:
        assert family.architectures or family.alike, sorted(family.model_types)
        for architecture in family.architectures:
            assert find_family("something else", [architecture]) is family
    assert find_family("kimi_k2").model_types >= {"deepseek_v3"}  # type: ignore[union-attr]


def test_a_cut_is_named_of_modules_that_a_family_can_have() -> None:
    """What is fused is cut alike, or a rank would join parts of other heads."""
    for family in FAMILIES:
        for group in family.fused if family.can_be_cut else ():
            cuts = {str(family.cuts.get(member)).partition("_")[0] for member in group.members}
            assert len(cuts) == 1 or group.name in ("qkv_proj", "index_qkv_proj"), (
                sorted(family.model_types),
                group.name,
            )


def test_names_of_draft_layers_in_sglangs_classes_for_them() -> None:
    deepseek = Draft.of(ModelFacts.of({"model_type": "deepseek_v3", "num_hidden_layers": 61}))
    qwen = Draft.of(ModelFacts.of({"model_type": "qwen3_next", "num_hidden_layers": 48}), "Qwen3NextForCausalLMMTP")
    assert deepseek is not None and qwen is not None
    names = {
        "model.layers.61.eh_proj": "model.eh_proj",
        "model.layers.61.shared_head.norm.weight": "model.shared_head.norm.weight",
        "model.layers.61.mlp.experts.7.up_proj": "model.decoder.mlp.experts.7.up_proj",
    }
    assert {name: deepseek.sglang_name(name) for name in names} == names
    assert all(map(deepseek.expects, names)) and all(map(deepseek.has_place_for, names))
    copies = ["model.layers.61.embed_tokens.weight", "model.layers.61.shared_head.head"]
    assert not any(map(deepseek.expects, [*copies, "model.layers.6.mlp.up_proj", "model.embed_tokens", "lm_head"]))
    assert deepseek.expects("model.layers.62.enorm") and not deepseek.has_place_for("model.layers.62.enorm")
    own = ["mtp.fc.weight", "mtp.norm", "mtp.pre_fc_norm_hidden", "mtp.layers.0.mlp.gate"]
    assert [qwen.sglang_name(name) for name in own] == [
        "fc.weight", "model.norm", "pre_fc_norm_hidden", "model.layers.0.mlp.gate",
    ]  # fmt: skip
    assert not qwen.expects("model.layers.0.mlp.gate")
    assert Draft.of(ModelFacts.of({"model_type": "llama"})) is None
    assert Draft.of(ModelFacts.of({"model_type": "qwen3_next"}), "Qwen3NextForCausalLM") is None
    assert find_family("unheard_of", ["DeepseekV3ForCausalLMNextN"]) is find_family("deepseek_v3")
