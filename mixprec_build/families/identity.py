"""Compares two config.json to see whether they are of one model.

SGLang builds the model from the config.json of ``model:``, whatever the weights were made for. A key that is known to
change what the model computes must agree with that of each source, one that is known not to may differ, and any other
difference is noted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from reprlib import repr as brief

from .draft_layers import DRAFT_KEYS

__all__ = ["Difference", "config_differences"]


# Keys that change what the model computes.
_FUNCTION = (
    "hidden_size", "num_hidden_layers", "intermediate_size", "head_dim", "num_attention_heads",
    "num_key_value_heads", "num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts",
    "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size", "n_shared_experts",
    "first_k_dense_replace", "decoder_sparse_step", "mlp_only_layers", "moe_layer_freq", "moe_layer_interval",
    "q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim",
    "hidden_act", "hidden_activation", "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps",
    "layernorm_epsilon", "partial_rotary_factor", "rope_interleave", "rope_interleaved", "attn_logit_softcapping",
    "final_logit_softcapping", "query_pre_attn_scalar", "attention_multiplier", "residual_multiplier",
    "embedding_multiplier", "logits_scaling", "logit_scale", "scale_emb", "scale_depth", "dim_model_base",
    "scoring_func", "topk_method", "topk_group", "n_group", "norm_topk_prob", "routed_scaling_factor",
    "moe_router_use_sigmoid", "use_qk_norm", "use_qkv_bias", "attention_bias", "mlp_bias", "qkv_bias", "clip_qkv",
    "attn_output_gate", "linear_conv_kernel_dim", "linear_key_head_dim", "linear_value_head_dim",
    "linear_num_key_heads", "linear_num_value_heads", "full_attention_interval", "layer_types", "sliding_window",
    "use_sliding_window", "attention_chunk_size", "no_rope_layers", "num_kv_shared_layers", "alibi", "parallel_attn",
    "llama_4_scaling",
    "compress_ratios", "compress_rope_theta", "hc_mult", "num_hash_layers", "o_groups", "o_lora_rank", "swiglu_limit",
    "index_topk", "index_n_heads", "index_head_dim", "hc_eps", "hc_sinkhorn_iters",
)  # fmt: skip

# Keys that do not: settings of a run, of training or of one library, and facts that the weights show.
_HARMLESS = frozenset(
    {
        "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "name_or_path",
        "_commit_hash", "use_cache", "quantization_config", "compression_config", "text_config", "vision_config",
        "vocab_size", "tie_word_embeddings", "model_type", "pad_token_id", "bos_token_id", "eos_token_id",
        "initializer_range", "attention_dropout", "hidden_dropout", "embd_pdrop", "attn_pdrop", "resid_pdrop",
        "residual_dropout", "embedding_dropout", "router_aux_loss_coef", "router_jitter_noise", "aux_loss_alpha",
        "output_router_logits", "seq_aux", "pretraining_tp", "ep_size", "_attn_implementation", "attn_implementation",
        "_attn_implementation_autoset", "output_attentions", "output_hidden_states", "return_dict", "torchscript",
        "use_bfloat16", "pruned_heads", "chunk_size_feed_forward", "is_decoder", "is_encoder_decoder",
        "add_cross_attention", "cross_attention_hidden_size", "tie_encoder_decoder", "finetuning_task", "id2label",
        "label2id", "num_labels", "problem_type", "task_specific_params", "tokenizer_class", "prefix",
        "sep_token_id", "decoder_start_token_id", "unsloth_version", "unsloth_fixed", "gradient_checkpointing",
        "temperature", "top_p", "top_k", "typical_p", "repetition_penalty", "length_penalty", "max_length",
        "min_length", "do_sample", "num_beams", "num_beam_groups", "num_return_sequences", "early_stopping",
        "diversity_penalty", "encoder_no_repeat_ngram_size", "no_repeat_ngram_size", "bad_words_ids",
        "forced_bos_token_id", "forced_eos_token_id", "begin_suppress_tokens", "suppress_tokens",
        "exponential_decay_length_penalty", "remove_invalid_values", "return_dict_in_generate", "output_scores",
        "tf_legacy_loss", "use_flash_attn", "use_mrope", "max_window_layers", *DRAFT_KEYS,
        "rope_theta", "rope_scaling", "rope_parameters", "tokenizer_version", "model_id",
        "language_model_only", "torch_compile", "fused_rms_norm", "use_fused_rope", "expert_dtype",
    }
)  # fmt: skip

# Values of keys that are missing or null.
_DEFAULTS: Mapping[str, object] = {
    "attention_bias": False, "mlp_bias": False, "clip_qkv": None, "attn_logit_softcapping": None, "alibi": False,
    "final_logit_softcapping": None, "sliding_window": None, "use_sliding_window": False, "num_kv_shared_layers": 0,
    "attention_chunk_size": None, "q_lora_rank": None,
}  # fmt: skip

# Keys without which SGLang leaves out what the key is for: the model's config.json must not lack one that a source has.
_LEFT_OUT_WITHOUT = ("swiglu_limit",)

# DeepSeek's class of SGLang's makes the last of any that scales.
_SAME_ROPE = {"mrope": "default", "deepseek_yarn": "yarn"}


@dataclass(frozen=True, slots=True)
class Difference:
    """One difference of two config.json. ``counts``: whether it is known to change what the model computes."""

    key: str
    ours: object
    theirs: object
    counts: bool

    def __str__(self) -> str:
        return f"{self.key} {_shown(self.ours)} and {_shown(self.theirs)}"


def config_differences(ours: Mapping[str, object], theirs: Mapping[str, object]) -> list[Difference]:
    """The differences between two config.json, those first that change what the model computes.

    The size of the vocabulary and a tied head are left out, which the weights show. ``model_type`` never counts: one
    architecture may have several.
    """
    ours, theirs = _flat(ours), _flat(theirs)
    found = [Difference(key, a, b, counts=True) for key in _FUNCTION for a, b in _both(key, ours, theirs) if a != b]
    lacking = [key for key in _LEFT_OUT_WITHOUT if ours.get(key) is None and theirs.get(key) is not None]
    found += [Difference(key, None, theirs[key], counts=True) for key in lacking]
    ours_rope, theirs_rope = _rope(ours), _rope(theirs)
    for key in dict.fromkeys((*ours_rope, *theirs_rope)):
        a, b = ours_rope.get(key), theirs_rope.get(key)
        # A missing value has a default that depends on the family; only a missing type of scaling always means none.
        if a != b and a is not None and b is not None:
            found.append(Difference(key, a, b, counts=True))
    rest = (ours.keys() & theirs.keys()) - _HARMLESS - set(_FUNCTION) | ({"model_type"} & ours.keys() & theirs.keys())
    return found + [
        Difference(key, ours[key], theirs[key], counts=False)
        for key in sorted(rest)
        if _plain(ours[key]) != _plain(theirs[key]) and None not in (ours[key], theirs[key])
    ]


def _flat(config: Mapping[str, object]) -> dict[str, object]:
    text = config.get("text_config")
    flat = {**config, **text} if isinstance(text, dict) else dict(config)
    if not flat.get("use_sliding_window", True):
        flat["sliding_window"] = None
    return flat


def _both(key: str, ours: Mapping[str, object], theirs: Mapping[str, object]) -> Iterator[tuple[object, object]]:
    """Yields the two values of a key, if both are known."""
    if key not in ours and key not in theirs:
        return
    values = [config.get(key, _DEFAULTS.get(key)) for config in (ours, theirs)]
    # Other keys have defaults that depend on the family. A missing window is Mistral's default, not none.
    known = [
        value is not None or (key in _DEFAULTS and (key in config or key != "sliding_window"))
        for value, config in zip(values, (ours, theirs), strict=True)
    ]
    if all(known):
        yield _plain(values[0]), _plain(values[1])


def _rope(config: Mapping[str, object]) -> dict[str, object]:
    """Settings of position encodings, path -> value.

    transformers 4 spells them ``rope_theta`` and ``rope_scaling``, transformers 5 ``rope_parameters``.
    """
    found: dict[str, object] = {}
    settings: dict[str, object] = {}
    for key in ("rope_scaling", "rope_parameters"):
        value = config.get(key)
        if isinstance(value, Mapping):
            settings |= value
    nested = {str(kind): part for kind, part in settings.items() if isinstance(part, Mapping)}
    for kind, part in (nested or {"": settings}).items():
        at = f"rope_parameters.{kind}." if kind else ""
        theta = part.get("rope_theta", None if kind else config.get("rope_theta"))
        if theta is not None:
            found[f"{at}rope_theta"] = _plain(theta)
        type_ = part.get("rope_type", part.get("type")) or "default"
        found[f"{at}rope_type"] = _SAME_ROPE.get(type_, type_) if isinstance(type_, str) else type_
        if type_ != "default":
            for key, value in part.items():
                if key not in ("rope_theta", "rope_type", "type", "mrope_section") and value is not None:
                    found[f"{at}rope_scaling.{key}"] = _plain(value)
    return found


def _plain(value: object) -> object:
    """A value without the null entries of its objects, which mean the same as missing ones."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return value


def _shown(value: object) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if isinstance(value, str) and value.isprintable() and len(value) < 60 else brief(value)
