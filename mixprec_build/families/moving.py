"""Families of which only the rows that SGLang's classes move while loading are known here.

Found by reading ``models/`` of SGLang 0.5.15 to 0.5.23.
"""

from __future__ import annotations

import re
from dataclasses import replace

from .base import Family
from .parts import MovedRows
from .unknown import UNKNOWN

__all__ = ["GPT2", "INTERNVL", "PERSIMMON"]


def _family(model_type: str, architecture: str, modules: str) -> Family:
    return replace(
        UNKNOWN,
        model_types=frozenset({model_type}),
        architectures=frozenset({architecture}),
        moved=(MovedRows(architecture, re.compile(rf".*\.({modules})")),),
    )


# internvl.py: wqkv is cut into heads of q, k and v
INTERNVL = _family("internvl_chat", "InternVLChatModel", "wqkv")
# persimmon.py: query_key_value is stored head by head
PERSIMMON = _family("persimmon", "PersimmonForCausalLM", "query_key_value")
# gpt2.py: Conv1D is stored transposed
GPT2 = _family("gpt2", "GPT2LMHeadModel", "c_attn|c_proj|c_fc")
