"""What one token and one sequence take in the caches of SGLang, by ``config.json``.

As SGLang 0.5.17 sizes its pools: ``_compute_cell_size`` and ``HybridSWAPoolConfigurator`` of
``model_executor/pool_configurator.py``, ``calculate_mla_kv_cache_dim`` of ``mem_cache/kv_cache_configurator.py``,
``Mamba2StateShape`` of ``configs/mamba_utils.py``. Numbers are those of one tensor-parallel rank, in bytes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace

from ..text import counted
from .names import last_word

__all__ = ["CACHE_KEYS", "CacheFacts", "States", "UnknownCache", "Windows", "cache_facts"]

CACHE_KEYS = (
    "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "v_head_dim",
    "kv_lora_rank", "qk_rope_head_dim", "index_topk", "index_head_dim", "layer_types", "full_attention_interval",
    "linear_num_key_heads", "linear_key_head_dim", "linear_num_value_heads", "linear_value_head_dim",
    "linear_conv_kernel_dim", "mamba_ssm_dtype",
)  # fmt: skip

# With these, SGLang has pools of other kinds: other recurrent states, compressed or sparse caches, shared layers.
_OTHERWISE = (
    "mamba_num_heads", "mamba_n_heads", "mamba_d_state", "mamba_d_conv", "ssm_state_size", "conv_L_cache", "ssm_cfg",
    "linear_attn_config", "hybrid_override_pattern", "hybrid_layer_pattern", "compress_ratios", "local_layer_ids",
    "sparse_attention_config", "num_kv_shared_layers", "block_configs", "attn_config", "global_head_dim",
)  # fmt: skip
_OTHER_CLASSES = (
    "DeepseekV4", "MiniMaxM3", "MiniMaxText01", "MiniMaxM1", "MiMoV2", "Step3p", "Gemma4", "Gemma3n", "Laguna",
    "Mellum", "Inkling", "UnlimitedOCR", "BailingMoeV2_5", "JetNemotron", "JetVLM", "Lfm2", "Zaya", "NemotronH",
    "FalconH1", "GraniteMoeHybrid", "KimiLinear", "KimiK3", "Jamba",
)  # fmt: skip
# is_hybrid_swa_model of configs/model_config.py; classes of other models store all tokens in all layers.
_WINDOWED = ("GptOssForCausalLM", "Llama4ForConditionalGeneration")
_WINDOW_SHARE = 0.8  # swa_full_tokens_ratio
_FULL_IN_LLAMA4 = 4
_DSA = ("DeepseekV3", "DeepseekV32", "MistralLarge3", "GlmMoeDsa", "LongcatFlash", "Pixtral")
_SCALE_BLOCK = 128  # DSATokenToKVPool.quant_block_size
_COPIED = "kv_b_proj"
_STATE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class UnknownCache:
    """The cache of a model that is not computed, and why."""

    reason: str


@dataclass(frozen=True, slots=True)
class States:
    """The states of gated delta nets, which a sequence has instead of keys and values of each token."""

    layers: int
    key_heads: int
    key_width: int
    value_heads: int
    value_width: int
    kernel: int
    """Inputs of the convolution; one fewer is stored."""
    item: int
    """Bytes of one number of the recurrent state."""

    def bytes_on(self, tp: int) -> int:
        """Bytes of one sequence on a rank: the convolution's inputs in 16 bits, ``[V, D_v, D_k]`` of each layer."""
        # extra_groups_for_head_shards: with fewer key heads than ranks, each rank has one
        key_heads = self.key_heads if self.key_heads % tp == 0 else tp
        channels = (self.value_heads * self.value_width + 2 * key_heads * self.key_width) // tp
        state = self.value_heads // tp * self.value_width * self.key_width
        return self.layers * (channels * (self.kernel - 1) * 2 + state * self.item)


@dataclass(frozen=True, slots=True)
class Windows:
    """Layers of sliding windows or chunks that have a pool of their own."""

    layers: int
    share: float
    """Their tokens, as a share of those of the other layers."""


@dataclass(frozen=True, slots=True)
class CacheFacts:
    """The caches of a model."""

    layers: int
    """Layers that keep keys and values of all tokens."""
    heads: int
    """Key-value heads, which ranks share; with fewer heads than ranks, each rank has one."""
    width: int
    """Numbers of a token, layer and head: its key and its value."""
    latent: tuple[int, int] | None = None
    """Of latent attention (MLA), which every rank keeps complete: ranks of the latent and of the rotary part."""
    index: int = 0
    """The width of the keys of sparse attention's indexer (DSA)."""
    full_windows: int = 0
    """Layers of sliding windows all of whose tokens are kept, since SGLang has no pool of windows for the class."""
    windows: Windows | None = None
    states: States | None = None

    @property
    def kind(self) -> str:
        """The kind of attention, in words."""
        if self.latent is not None:
            return "latent attention (MLA)" + (" with an indexer (DSA)" if self.index else "")
        kind = f"attention with {counted(self.heads, 'key-value head')}"
        if self.states is not None:
            return f"{kind} in {self.layers} layers, delta nets in {self.states.layers}"
        if self.windows is not None:
            return f"{kind} in {self.layers} layers, sliding windows in {self.windows.layers}"
        if self.full_windows:
            return f"{kind}; all tokens of {self.full_windows} layers with sliding windows are kept, too"
        return kind

    def bytes_per_token(self, tp: int, item: int) -> int:
        """Bytes of one token on a rank, in all layers; ``item``: bytes of a number, 1 for an FP8 cache."""
        if self.latent is not None:
            rank, rope = self.latent
            width = (rank + rope) * item
            if self.index and item == 1:  # the rotary part stays in 16 bits, blocks of the latent have scales
                width = rank + rank // _SCALE_BLOCK * 4 + rope * 2
            scaled = self.index + self.index // _SCALE_BLOCK * 4
            return self.layers * (width + scaled)
        of_a_layer = max(1, self.heads // tp) * self.width * item
        windows = 0 if self.windows is None else self.windows.layers * self.windows.share
        return int(of_a_layer * (self.layers + windows))

    def bytes_per_sequence(self, tp: int) -> int:
        """Bytes of the states of one sequence on a rank; 0 for attention alone."""
        return 0 if self.states is None else self.states.bytes_on(tp)

    def copied(self, names: Iterable[str]) -> list[str]:
        """Those of a model's linears of which SGLang keeps a second, unquantized copy (``w_kc`` and ``w_vc``)."""
        return [] if self.latent is None else [name for name in names if last_word(name) == _COPIED]


def cache_facts(config: Mapping[str, object], classes: Collection[str]) -> CacheFacts | UnknownCache:
    """The caches of a decoder.

    Args:
        config: the decoder's part of ``config.json``.
        classes: ``architectures``, of the checkpoint or of its decoder.
    """
    other = [name for name in classes if name.startswith(_OTHER_CLASSES)]
    other += [key for key in _OTHERWISE if config.get(key)]
    if other:
        return UnknownCache(f"the cache that SGLang keeps for {other[0]} is not computed")
    layers, heads = _size(config, "num_hidden_layers"), _size(config, "num_attention_heads")
    head_dim = _size(config, "head_dim")
    hidden = _size(config, "hidden_size")
    if layers is None:
        return UnknownCache("config.json has no num_hidden_layers")
    latent = _size(config, "kv_lora_rank"), _size(config, "qk_rope_head_dim")
    if latent[0] is not None and latent[1] is not None:
        sparse = config.get("index_topk") is not None and any(name.startswith(_DSA) for name in classes)
        index = (_size(config, "index_head_dim") or 0) if sparse else 0
        return CacheFacts(layers, 1, 0, latent=(latent[0], latent[1]), index=index)
    if heads is None or (head_dim is None and hidden is None):
        return UnknownCache("config.json does not say which attention heads it has")
    head_dim = head_dim or (hidden or 0) // heads
    plain = CacheFacts(
        layers, _size(config, "num_key_value_heads") or heads, head_dim + (_size(config, "v_head_dim") or head_dim)
    )
    return _with_other_layers(plain, config, classes)


def _with_other_layers(
    plain: CacheFacts, config: Mapping[str, object], classes: Collection[str]
) -> CacheFacts | UnknownCache:
    """The caches of a model some of whose layers may have states, or a window's tokens only."""
    kinds = config.get("layer_types")
    types = [str(kind) for kind in kinds][: plain.layers] if isinstance(kinds, list) else []
    interval = _size(config, "full_attention_interval")
    if _size(config, "linear_num_value_heads") is not None or "linear_attention" in types:
        # configs/qwen3_next.py, layers_block_type: the interval counts, whatever the list says
        linear = plain.layers - plain.layers // interval if interval else types.count("linear_attention")
        keys, values = (
            _sizes(config, "num_key_heads", "key_head_dim"),
            _sizes(config, "num_value_heads", "value_head_dim"),
        )
        kernel = _size(config, "linear_conv_kernel_dim")
        if keys is None or values is None or kernel is None or not (types or interval):
            return UnknownCache("config.json does not say which layers have which linear attention")
        dtype = config.get("mamba_ssm_dtype")
        item = _STATE_BYTES.get(dtype, 4) if isinstance(dtype, str) else 4
        states = States(linear, *keys, *values, kernel, item)
        return CacheFacts(plain.layers - linear, plain.heads, plain.width, states=states)
    if any(name in _WINDOWED for name in classes):
        full = types.count("full_attention") if types else plain.layers // _FULL_IN_LLAMA4
        if not full or ("GptOssForCausalLM" in classes and not types):
            return UnknownCache("config.json does not say which layers have sliding windows")
        return CacheFacts(full, plain.heads, plain.width, windows=Windows(plain.layers - full, _WINDOW_SHARE))
    return replace(plain, full_windows=types.count("sliding_attention"))


def _sizes(config: Mapping[str, object], *words: str) -> tuple[int, int] | None:
    """The number and the size of a delta net's heads."""
    found = [_size(config, f"linear_{word}") for word in words]
    return None if found[0] is None or found[1] is None else (found[0], found[1])


def _size(config: Mapping[str, object], key: str) -> int | None:
    value = config.get(key)
    return value if type(value) is int and value >= 1 else None
