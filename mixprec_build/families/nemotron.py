"""Nemotron-H and Nemotron-3 (``models/nemotron_h.py``): each layer is a Mamba block, attention, an MLP or experts.

MLPs and experts have no gate. Every block is called ``mixer``.
"""

from __future__ import annotations

from .base import Family
from .draft_layers import NEMOTRON_MTP
from .parts import CutBy, ExpertActivation, Projections, Restriction, StoredFormat

__all__ = ["NEMOTRON_H"]

_COMMON = Family()


def _parts_of_blocks(fmt: StoredFormat) -> str | None:
    """``layers/attention/mamba/mamba.py``: five parts, of which the last has one output for each head."""
    return None if fmt.rows_in_fused == 1 else "SGLang joins parts in in_proj that end inside of a block of scales"


def _needs_weight(fmt: StoredFormat) -> str | None:
    """``NemotronHMoE._apply_fc1_latent_proj``, which chooses a GEMM for it."""
    return None if fmt.has_weight else "SGLang's class looks for its weight, and packed formats have none of that name"


NEMOTRON_H = Family(
    model_types=frozenset({"nemotron_h"}),
    architectures=frozenset({"NemotronHForCausalLM"}),
    embedding="backbone.embeddings",
    renamed=(("backbone.", "model."),),
    inner=(("embeddings", "embed_tokens"),),
    embeddings=frozenset({"embeddings", "embed_tokens"}),
    projections=(Projections(None, "up_proj", "down_proj"),),
    activation=ExpertActivation("relu2", gated=False),
    fused=(_COMMON.fused[0],),
    restrictions=(
        Restriction(("mixer.in_proj",), _parts_of_blocks),
        Restriction(("mixer.fc1_latent_proj",), _needs_weight),
    ),
    # The norm within a Mamba block feeds out_proj.
    norms_beside={"out_proj": "norm"},
    linears_before={"o_proj": "v_proj"},
    checked=True,
    can_be_cut=True,
    cuts={
        **_COMMON.cuts,
        "embeddings": CutBy.VOCABULARY,
        "conv1d": CutBy.MAMBA_SECTIONS,
        "in_proj": CutBy.MAMBA_PROJECTIONS,
        "out_proj": CutBy.STATE_INPUTS,
        **dict.fromkeys(("mixer.D", "dt_bias", "mixer.norm"), CutBy.STATE_VALUE_HEADS),
    },
    class_loads=(".mixer.A_log", ".mixer.A"),  # -exp(A_log)
    quantized_head=True,
    draft_layout=NEMOTRON_MTP,
)
