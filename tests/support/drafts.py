"""Small releases of models with draft layers (MTP), with the names of DeepSeek, GLM, Qwen, Step, MiMo and ERNIE.

write_release(folder, MODELS["glm4_moe"], FP8_BLOCK, drafts=FP8_BLOCK)
write_release(folder, MODELS["qwen3_next"], GPTQ_G128, drafts=None)           # a quantizer lost them
write_release(folder, MODELS["kimi_k2"], BF16, lost="*.eh_proj")
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from support import formats
from support.families import TINY, tensors_of
from support.producers import BF16, FP8_BLOCK, GPTQ_G128, Checkpoint, Part, Skeleton, Storage

__all__ = ["MODELS", "DraftModel", "write_release"]

Config = dict[str, Any]

_DECLARED = {id(FP8_BLOCK): formats.fp8_config(), id(GPTQ_G128): formats.gptq_config()}
_HIDDEN = 256
_LATENT = ("kv_a_proj_with_mqa", "kv_b_proj", "q_a_proj", "q_b_proj")


@dataclass(frozen=True)
class DraftModel:
    """A tiny model with draft layers."""

    config: Config
    parts: tuple[tuple[Part, bool], ...]
    """Each module, and whether quantizers quantize it."""
    drafts: str
    """A glob of the modules of its draft layers."""
    plain: str
    """The linear of them that SGLang makes without quantization."""
    needed: tuple[str, ...]
    """Some modules of them that SGLang's class for draft layers needs."""
    experts: str = ""
    """A glob of all experts of the model and of its draft layers; empty for dense ones."""
    key: tuple[str, ...] = ("num_nextn_predict_layers",)
    """The path of the key that declares them in ``config.json``; empty where none does."""
    layers: int = 1
    dense: tuple[str, ...] = ()
    """Endings of linears that Int4 releases do not quantize."""
    kept: tuple[str, ...] = ()
    """Endings of those that no release does."""


def _parts(config: Config) -> Iterator[tuple[Part, bool]]:
    biased = {tensor.name.removesuffix(".bias") for tensor in tensors_of(config) if tensor.name.endswith(".bias")}
    for tensor in tensors_of(config):
        name, _, leaf = tensor.name.rpartition(".")
        if leaf == "bias":
            continue
        bare = leaf != "weight"
        name = tensor.name if bare else name
        yield Part(name, tensor.shape, bare=bare, bias=name in biased), tensor.linear


def _of_family(name: str, drafts: str, plain: str, *needed: str, **more: Any) -> DraftModel:
    config = _with_two_experts(TINY[name].config)
    dense = (*TINY[name].dense, "shared_experts.gate_proj", "shared_experts.up_proj", "in_proj_qkvz")
    return DraftModel(config, tuple(_parts(config)), drafts, plain, needed, dense=dense, kept=_LATENT, **more)


def _with_two_experts(config: Config) -> Config:
    counts = {key: 2 for key in ("num_experts", "n_routed_experts") if key in config}
    inner = {key: _with_two_experts(value) for key, value in config.items() if key == "text_config"}
    return {**config, **counts, **inner}


def _linears(at: str, *names: str) -> Iterator[tuple[Part, bool]]:
    for name in names:
        yield Part(f"{at}.{name}", (_HIDDEN, _HIDDEN)), True


def _norms(at: str, *names: str) -> Iterator[tuple[Part, bool]]:
    for name in names:
        yield Part(f"{at}.{name}", (_HIDDEN,)), False


def _decoder_layer(at: str, experts: int = 0, norm: str = "post_attention_layernorm") -> Iterator[tuple[Part, bool]]:
    yield from _linears(f"{at}.self_attn", "q_proj", "k_proj", "v_proj", "o_proj")
    if experts:
        yield Part(f"{at}.mlp.gate", (experts, _HIDDEN)), False
    for block in (f"{at}.mlp.experts.{n}" for n in range(experts)) if experts else (f"{at}.mlp",):
        yield from _linears(block, "gate_proj", "up_proj", "down_proj")
    yield from _norms(at, "input_layernorm", norm)


def _around(layers: Iterator[tuple[Part, bool]]) -> tuple[tuple[Part, bool], ...]:
    table = (512, _HIDDEN)
    ends = [(Part(name, table), False) for name in ("model.embed_tokens", "lm_head")]
    return (*ends, *layers, *_norms("model", "norm"))


_SIZES: Config = {
    "hidden_size": _HIDDEN, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 512,
    "intermediate_size": _HIDDEN, "num_hidden_layers": 2, "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip


def _step() -> Iterator[tuple[Part, bool]]:
    """Step-3.5: three layers follow the last one, each with a head of its own."""
    for layer in range(5):
        at = f"model.layers.{layer}"
        yield from _decoder_layer(at)
        if layer >= 2:
            yield Part(f"{at}.eh_proj", (_HIDDEN, 2 * _HIDDEN)), False
            yield Part(f"{at}.shared_head.output", (512, _HIDDEN)), False
            yield from _norms(at, "enorm", "hnorm", "shared_head.norm")


def _mimo_v2() -> Iterator[tuple[Part, bool]]:
    """MiMo-V2: dense layers below ``model.mtp``, whose second norm has another name than in the model's."""
    for layer in range(2):
        yield from _decoder_layer(f"model.layers.{layer}", experts=2)
    for layer in range(3):
        at = f"model.mtp.layers.{layer}"
        yield from _decoder_layer(at, norm="pre_mlp_layernorm")
        yield Part(f"{at}.eh_proj", (_HIDDEN, 2 * _HIDDEN)), False
        yield from _norms(at, "enorm", "hnorm", "final_layernorm")


def _mimo() -> Iterator[tuple[Part, bool]]:
    """MiMo-7B."""
    for layer in range(2):
        yield from _decoder_layer(f"model.layers.{layer}")
    yield from _decoder_layer("model.mtp_layers.0")
    yield Part("model.mtp_layers.0.input_proj", (_HIDDEN, 2 * _HIDDEN)), False
    yield from _norms("model.mtp_layers.0", "token_layernorm", "hidden_layernorm", "final_layernorm")


def _ernie() -> Iterator[tuple[Part, bool]]:
    """ERNIE-4.5: the number of the layer comes last in names of some modules."""
    for layer in range(2):
        yield from _decoder_layer(f"model.layers.{layer}")
    yield from _decoder_layer("model.mtp_block.0")
    yield Part("model.mtp_linear_proj.0", (_HIDDEN, 2 * _HIDDEN)), False
    yield from _norms("model", "mtp_emb_norm.0", "mtp_hidden_norm.0")


def _own(parts: Iterator[tuple[Part, bool]], drafts: str, plain: str, *needed: str, **more: Any) -> DraftModel:
    config = {**_SIZES, **more.pop("config")}
    return DraftModel(config, _around(parts), drafts, plain, needed, **more)


_IN_TEXT = ("text_config", "mtp_num_hidden_layers")
_QWEN = ("mtp.*", "mtp.fc", "mtp.norm", "mtp.pre_fc_norm_hidden", "mtp.layers.0.self_attn.k_proj")

MODELS: Mapping[str, DraftModel] = {
    "kimi_k2": _of_family(
        "kimi_k2", "model.layers.3.*", "model.layers.3.eh_proj", "model.layers.3.shared_head.norm",
        "model.layers.3.mlp.shared_experts.up_proj", experts="*.mlp.experts.*",
    ),
    "glm4_moe": _of_family(
        "glm4_moe", "model.layers.3.*", "model.layers.3.eh_proj", "model.layers.3.hnorm",
        "model.layers.3.mlp.experts.1.down_proj", "model.layers.3.input_layernorm", experts="*.mlp.experts.*",
    ),
    "qwen3_5": _of_family("qwen3_5", *_QWEN, key=_IN_TEXT),
    "qwen3_5_moe": _of_family(
        "qwen3_5_moe", *_QWEN, "mtp.layers.0.mlp.experts.1.up_proj", experts="*.mlp.experts.*", key=_IN_TEXT
    ),
    "qwen3_next": _of_family(
        "qwen3_next", *_QWEN, "mtp.layers.0.mlp.gate", experts="*.mlp.experts.*", key=("mtp_num_hidden_layers",)
    ),
    "ernie4_5": _own(
        _ernie(), "model.mtp_*", "model.mtp_linear_proj.0", "model.mtp_emb_norm.0", "model.mtp_block.0.mlp.up_proj",
        config={
            "model_type": "ernie4_5", "architectures": ["Ernie4_5_ForCausalLM"], "num_nextn_predict_layers": 1
        },
    ),
    "step3p5": _own(
        _step(), "model.layers.[234].*", "model.layers.3.eh_proj", "model.layers.4.enorm",
        config={
            "model_type": "step3p5", "architectures": ["Step3p5ForCausalLM"], "num_nextn_predict_layers": 3
        },
        layers=3,
    ),
    "mimo_v2": _own(
        _mimo_v2(), "model.mtp.*", "model.mtp.layers.1.eh_proj", "model.mtp.layers.2.final_layernorm",
        config={
            "model_type": "mimo_v2_flash", "architectures": ["MiMoV2FlashForCausalLM"], "num_experts": 2
        },
        layers=3, key=(), experts="*.mlp.experts.*",
    ),
    "mimo": _own(
        _mimo(), "model.mtp_layers.*", "model.mtp_layers.0.input_proj", "model.mtp_layers.0.hidden_layernorm",
        config={"model_type": "mimo", "architectures": ["MiMoForCausalLM"], "num_nextn_predict_layers": 1},
    ),
}  # fmt: skip


def write_release(
    folder: Path,
    model: DraftModel,
    storage: Storage = BF16,
    *,
    drafts: Storage | None = BF16,
    lost: str | None = None,
    plain: bool = False,
    beside: str | None = None,
    declared: int | None = None,
) -> Path:
    """Writes a release of ``model`` to ``folder``.

    Args:
        storage: of the linears that quantizers quantize, outside of draft layers.
        drafts: the same within draft layers; None for a release that has lost them.
        lost: a glob of further modules that it lacks.
        plain: whether the linear of draft layers that SGLang makes without quantization is quantized, too.
        beside: a file that has the draft layers, which the index does not list.
        declared: the number of draft layers in its ``config.json``, if that is another one; -1 for no key.
    """
    parts, stored = [], {}
    for part, linear in model.parts:
        is_draft = fnmatchcase(part.name, model.drafts)
        if (is_draft and drafts is None) or (lost is not None and fnmatchcase(part.name, lost)):
            continue
        parts.append(part)
        stays = (*model.kept, *(model.dense if (drafts if is_draft else storage) is GPTQ_G128 else ()))
        quantized = linear and not any(map(part.name.endswith, stays))
        if quantized or (plain and part.name == model.plain):
            stored[part.name] = (drafts or BF16) if is_draft else storage

    def configure(files: Config) -> None:
        config: Config = {**model.config}
        if declared is not None and model.key:
            *above, key = model.key
            inner: Config = config
            for part in above:
                inner[part] = {**inner[part]}
                inner = inner[part]
            if declared < 0:
                inner.pop(key, None)
            else:
                inner[key] = declared
        for used in (storage, drafts):
            if id(used) in _DECLARED:
                config["quantization_config"] = _DECLARED[id(used)]
                break
        files["config"].clear()
        files["config"].update(config)

    skeleton = Skeleton(parts, {}, layers=2)
    files = {beside: model.drafts} if beside else {}
    return Checkpoint(skeleton, stored, beside=files, edit=configure).write(folder)
