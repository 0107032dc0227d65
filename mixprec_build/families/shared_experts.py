"""Which of SGLang's model classes look into the methods of their shared experts."""

from __future__ import annotations

import re
from collections.abc import Mapping

__all__ = ["compares_shared_experts"]


# Families of the classes that look into the methods of their shared experts: deepseek_v2.py, glm4_moe.py,
# glm4_moe_lite.py and what is built on them.
_COMPARING = re.compile(r"deepseek|glm4_moe|glm_moe|kimi|mistral_large_3|dots_vlm|longcat|bailing|axk1")


def compares_shared_experts(config: Mapping[str, object]) -> bool:
    """Whether the model class of a ``config.json`` compares the methods of shared experts' gate and up with down."""
    text = config.get("text_config")
    flat = {**config, **text} if isinstance(text, dict) else config
    architectures = flat.get("architectures")
    names = architectures if isinstance(architectures, list) else []
    return any(
        _COMPARING.match(str(word).lower()) is not None
        for word in (flat.get("model_type"), config.get("model_type"), *names)
    )
