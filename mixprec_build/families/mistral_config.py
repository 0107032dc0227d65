"""Makes a ``config.json`` of the ``params.json`` of Mistral-Large-3 and its relatives.

With the settings that SGLang makes of it (``adapt_config_dict`` in ``utils/hf_transformers/mistral_utils.py`` of
0.5.15.post1 to 0.5.23), so that it is served alike: DeepSeek-V3's attention with frequencies of YaRN but not its
magnitudes, queries scaled by their position, a router by softmax, and an encoder of images beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from reprlib import repr as brief

from ..errors import SourceError

__all__ = ["PROCESSOR_FILES", "config_of", "has_latent_attention", "processor_of"]

PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
"""Files that say how images are prepared; SGLang needs one of them at its start."""

# params.json -> config.json
_NAMES = {
    "dim": "hidden_size", "norm_eps": "rms_norm_eps", "n_kv_heads": "num_key_value_heads",
    "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads", "hidden_dim": "intermediate_size",
    "activation": "hidden_act", "tied_embeddings": "tie_word_embeddings",
}  # fmt: skip
_OF_EXPERTS = {
    "route_every_n": "moe_layer_freq", "first_k_dense_replace": "first_k_dense_replace",
    "num_experts_per_tok": "num_experts_per_tok", "num_experts": "n_routed_experts",
    "expert_hidden_dim": "moe_intermediate_size", "routed_scale": "routed_scaling_factor",
    "num_shared_experts": "n_shared_experts", "num_expert_groups": "n_group",
    "num_expert_groups_per_tok": "topk_group",
}  # fmt: skip
_YARN = {
    "factor": "factor", "original_max_position_embeddings": "original_max_position_embeddings", "beta": "beta_fast",
    "alpha": "beta_slow", "apply_scale": "apply_yarn_scaling",
}  # fmt: skip
_PARTS = ("moe", "yarn", "quantization", "vision_encoder")
_DEFAULTS = {
    "hidden_act": "silu", "tie_word_embeddings": False, "max_seq_len": 128_000, "max_position_embeddings": 128_000,
}  # fmt: skip
_ROUTING = {"topk_method": None, "scoring_func": "softmax", "routing_method_type": 1}
"""What no ``params.json`` says; the last is ``RoutingMethodType.Renormalize``."""
_ACTIVATIONS = {"NO_SCALES": "dynamic", "TENSOR": "static", None: "static"}
"""``qscheme_act`` -> ``activation_scheme``."""


def has_latent_attention(params: Mapping[str, object]) -> bool:
    """Whether a ``params.json`` is of a model with latent attention, whose rows are in the order that SGLang loads."""
    return params.get("kv_lora_rank") is not None


def config_of(params: Mapping[str, object], path: str) -> dict[str, object]:
    """The ``config.json`` of a ``params.json``, which ``path`` names.

    Raises:
        SourceError: SGLang does not serve it as Mistral-Large-3, or it has settings that mixprec does not know.
    """

    def refuse(reason: str) -> SourceError:
        return SourceError(reason, path=path)

    def part(key: str) -> Mapping[str, object]:
        value = params.get(key) or {}
        if not isinstance(value, Mapping):
            raise refuse(f"`{key}` is not an object")
        return value

    experts, yarn, scaling = part("moe"), part("yarn"), part("llama_4_scaling")
    if not experts.get("num_shared_experts"):
        raise refuse(
            "latent attention, but no `moe` with `num_shared_experts`: of such models mixprec reads those that SGLang "
            "serves as Mistral-Large-3; a draft model for one (EAGLE) is no source, give it to SGLang by "
            "--speculative-draft-model-path"
        )
    for key in ("original_max_position_embeddings", "beta"):
        if key not in scaling:
            raise refuse(f"`llama_4_scaling` has no `{key}`, without which SGLang does not load the model")
    unknown = sorted(yarn.keys() - _YARN.keys())
    if unknown:
        raise refuse(f"`yarn` has `{unknown[0]}`, which neither SGLang nor mixprec knows")
    if params.get("multimodal"):
        raise refuse("`multimodal`: an encoder that SGLang's class does not make; it makes one of `vision_encoder`")
    text: dict[str, object] = {_NAMES.get(key, key): value for key, value in params.items() if key not in _PARTS}
    text = {**_DEFAULTS, **text, **{_OF_EXPERTS[key]: value for key, value in experts.items() if key in _OF_EXPERTS}}
    text |= {**_ROUTING, "model_type": "deepseek_v3", "architectures": ["MistralLarge3ForCausalLM"]}
    if yarn:
        theta = {"rope_theta": params["rope_theta"]} if "rope_theta" in params else {}
        scaled = {_YARN[key]: value for key, value in yarn.items()}
        text["rope_scaling"] = {"rope_type": "deepseek_yarn", "mscale_all_dim": 1, **theta, **scaled}
    quantization = text.pop("quantization_config", None)
    if declared := part("quantization"):
        activations = [scheme for word, scheme in _ACTIVATIONS.items() if word == declared.get("qscheme_act")]
        if declared.get("qformat_weight") != "fp8_e4m3" or not activations:
            raise refuse(f"`quantization` is {brief(dict(declared))}, which mixprec does not read, only fp8_e4m3")
        quantization = {"quant_method": "fp8", "activation_scheme": activations[0]}
    config = text
    if encoder := part("vision_encoder"):
        config = {
            # SGLang has "pixtral" here, and makes objects of the parts itself; transformers does so for this type.
            "model_type": "mistral3",
            "architectures": ["PixtralForConditionalGeneration"],
            "image_token_index": encoder.get("image_token_id", 10),
            "spatial_merge_size": encoder.get("spatial_merge_size", 1),
            "tie_word_embeddings": text["tie_word_embeddings"],
            "text_config": text,
            "vision_config": {"model_type": "pixtral", **encoder},
        }
    return config if quantization is None else {**config, "quantization_config": quantization}


def processor_of(config: Mapping[str, object]) -> dict[str, object] | None:
    """The ``processor_config.json`` beside a ``config.json`` of :func:`config_of`; None without an encoder of images.

    For releases without one, of which SGLang makes the same by itself (``wrap_as_pixtral`` there).
    """
    encoder = config.get("vision_config")
    if not isinstance(encoder, Mapping):
        return None
    patch, merged, size = encoder.get("patch_size"), encoder.get("spatial_merge_size", 1), encoder.get("image_size")
    if type(patch) is not int or type(merged) is not int or type(size) is not int:
        return None
    side = {"height": patch * merged, "width": patch * merged}
    return {
        "processor_class": "PixtralProcessor",
        "patch_size": patch,
        "spatial_merge_size": merged,
        "image_processor": {
            "image_processor_type": "PixtralImageProcessor",
            "do_resize": True,
            "size": {"longest_edge": size},
            "patch_size": side,
        },
    }
