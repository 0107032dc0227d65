"""Step-3.5 (``models/step3p5.py``): a gate for each attention head, windows with other heads, shared experts; and
Step-3.7 (``models/step3p7.py``), the same decoder beside an encoder of images.

All experts of a layer are in three tensors, ``moe.gate_proj.weight [E, I, H]``, with scales in as many dimensions where
they are FP8. SGLang's class loads no others, so that mixprec's loader fills its layers with single experts.

Releases of Step-3.7 call the decoder ``model.``, as Step-3.5's, or ``model.language_model.``. SGLang never quantizes
the draft layers of either.
"""

from __future__ import annotations

from dataclasses import replace

from .base import Family
from .degrees import DegreeLimits
from .draft_layers import STEP_MTP
from .parts import CutBy, ExpertActivation, OtherHeads, StackedExperts, never_quantized
from .unknown import UNKNOWN

__all__ = ["STEP", "STEP35", "STEP37"]

_COMMON = Family()
_WEIGHTS = ("BF16", "F16", "F32", "F8_E4M3")

STEP35 = Family(
    model_types=frozenset({"step3p5"}),
    architectures=frozenset({"Step3p5ForCausalLM"}),
    in_prefixes=(("mlp.experts", "moe.experts"),),
    stacked_experts=tuple(
        stacked
        for word in _COMMON.projections[0].words
        for stacked in (
            StackedExperts(f"moe.{word}.weight", (word,), beside=True, dtypes=_WEIGHTS),
            StackedExperts(f"moe.{word}.weight_scale_inv", (word,), beside=True, leaf="weight_scale_inv"),
        )
    ),
    activation=ExpertActivation(limits="swiglu_limits"),
    restrictions=(never_quantized("self_attn.g_proj"),),
    attention_inputs=_COMMON.attention_inputs | {"g_proj"},
    other_heads=OtherHeads(
        "layer_types",
        "sliding_attention",
        "attention_other_setting.num_attention_heads",
        "attention_other_setting.num_attention_groups",
    ),
    cuts={**_COMMON.cuts, "g_proj": CutBy.QUERY_HEADS},
    checked=True,
    can_be_cut=True,
    degrees=DegreeLimits(ranks_up_to_experts=True),
    quantized_head=True,
    needs_own_loader=True,
    attention_replicas=True,
    complete_in_replicas=frozenset({"embed_tokens"}),
    draft_layout=STEP_MTP,
)

STEP37 = replace(
    STEP35,
    model_types=frozenset({"step3p7"}),
    architectures=frozenset({"Step3p7ForConditionalGeneration"}),
    renamed=(
        ("model.language_model.", "language_model.model."),
        ("model.vision_model.", "vision_model."),
        ("model.vit_large_projector.", "vit_large_projector."),
        ("model.", "language_model.model."),
        ("lm_head", "language_model.lm_head"),
    ),
    degrees=STEP35.degrees._replace(encoder=("heads",)),
    attention_replicas=False,  # the encoder, shared by the ranks of a replica, adds up the outputs of all of them
)

STEP = replace(UNKNOWN, alike=("step3p",), draft_layout=STEP_MTP)
