"""Models of which no server takes a compiled checkpoint, and why."""

from __future__ import annotations

from .facts import ModelFacts

__all__ = ["why_unserved"]

_DEEPSEEK_V4 = (
    "mixprec serves no DeepSeek-V4: SGLang's class for it (models/deepseek_v4.py) renames modules and scales as it "
    "loads them, joins wq_a with wkv and the compressors' wkv with wgate by itself, and needs wo_a in a method of its "
    "own FP8, none of which mixprec follows, so that the server would stop. Serve the release by itself"
)
_BY_CLASS = {"DeepseekV4ForCausalLM": _DEEPSEEK_V4}
_BY_TYPE = {"deepseek_v4": _DEEPSEEK_V4}


def why_unserved(facts: ModelFacts) -> str | None:
    """The reason, with a way out; None for a model that a server may take."""
    found = (_BY_CLASS[name] for name in facts.architectures if name in _BY_CLASS)
    return next(found, None) or _BY_TYPE.get(facts.model_type)
