"""Models that no server takes as they are compiled, and why."""

from __future__ import annotations

from .facts import ModelFacts

__all__ = ["why_unserved"]

# None of 0.5.15.post1 to 0.5.23 has a class Mistral4ForCausalLM, which models/mistral.py would make the decoder of.
_MISTRAL4 = (
    "SGLang has no class for the decoder `mistral4`, that of Mistral-Small-4 in Hugging Face's layout: it serves the "
    "model from Mistral's own. Name a folder with params.json and consolidated*.safetensors of the release, often in "
    "the same repository: mixprec reads these first where both layouts are there"
)
# DeepseekV41ForCausalLM of models/deepseek_v4.py, from 0.5.21 on
_DEEPSEEK_V41 = (
    "mixprec serves no DeepSeek-V4.1: it does not follow what SGLang's class for it (from 0.5.21 on) makes of engram "
    "tables, of layers that share a compressor and of FP8 in blocks of 32 x 32. Serve the release by itself"
)
# sgl-project's release of DeepSeek-V4 in FP8. The type decides what reads a config.json, before `architectures` do.
_DEEPSEEK_REF = (
    "neither SGLang nor transformers knows the `model_type` deepseek_ref of config.json, so no server starts. Name "
    "as `model:` a release of DeepSeek-V4 that says deepseek_v4; this one may be a source beside it"
)
_BY_CLASS = {"Mistral4ForCausalLM": _MISTRAL4, "DeepseekV41ForCausalLM": _DEEPSEEK_V41}
_BY_TYPE = {"mistral4": _MISTRAL4, "deepseek_v41": _DEEPSEEK_V41, "deepseek_ref": _DEEPSEEK_REF}


def why_unserved(facts: ModelFacts) -> str | None:
    """The reason, with a way out; None for a model that a server may take."""
    found = (_BY_CLASS[name] for name in facts.architectures if name in _BY_CLASS)
    return next(found, None) or _BY_TYPE.get(facts.model_type)
