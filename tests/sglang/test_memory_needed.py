"""What ``--gpus`` computes is what SGLang computes: its default fraction, its cells, its states."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import sglang
import torch
from support.hollow import hollow_config

from mixprec_build.families.cache import CacheFacts
from mixprec_build.families.facts import ModelFacts
from mixprec_build.report.memory import reserve_of

if sglang.__version__ != "0.5.17":
    pytest.skip("the formulae are those of SGLang 0.5.17", allow_module_level=True)

from sglang.srt import server_args
from sglang.srt.configs.mamba_utils import Mamba2CacheParams, Mamba2StateShape
from sglang.srt.model_executor import pool_configurator
from sglang.srt.model_executor.cuda_graph_config import CudaGraphConfig


def settings(mib: int, tp: int, latent: bool, encoder: tuple[int, int] | None) -> Any:
    """SGLang's own arguments after it looked at a GPU, with as little of them as that takes."""
    vision = None if encoder is None else SimpleNamespace(hidden_size=encoder[1])
    model = SimpleNamespace(is_multimodal=encoder is not None, hf_config=SimpleNamespace(vision_config=vision))
    arguments = SimpleNamespace(
        cuda_graph_config=CudaGraphConfig(),
        chunked_prefill_size=None,
        tp_size=tp,
        pp_size=1,
        dp_size=1,
        device="cuda",
        use_mla_backend=lambda: latent,
        max_total_tokens=None,
        max_running_requests=None,
        model_path="model",
        mem_fraction_static=None,
        disaggregation_mode="null",
        speculative_num_draft_tokens=None,
        speculative_algorithm=None,
        disable_cuda_graph_padding=False,
        language_only=False,
        enable_symm_mem=False,
        max_prefill_tokens=16384,
        get_model_config=lambda: model,
        post_capture_kv_sizing_planned=lambda: False,
        reserve_for_deepep_a2a_mb=lambda: 0,
        _resolved=lambda: SimpleNamespace(enable_dp_attention=False),
    )
    for name in (
        "_generate_decode_cuda_graph_batch_sizes",
        "_generate_prefill_cuda_graph_batch_sizes",
        "reserve_for_graph_mb",
        "adjust_mem_fraction_for_vlm",
    ):
        setattr(arguments, name, partial(getattr(server_args.ServerArgs, name), arguments))
    server_args.ServerArgs._handle_gpu_memory_settings(arguments, mib)
    return arguments


@pytest.mark.parametrize("mib", [15360, 24564, 32607, 46068, 81559, 97887, 143771, 183359])
def test_the_default_fraction(mib: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_args, "resolved_view", lambda _: SimpleNamespace(moe_a2a_backend="none"))
    for tp in (1, 2, 4, 8, 16):
        for latent, encoder in ((False, None), (True, None), (False, (24, 1152)), (False, (24, 4096))):
            theirs, ours = settings(mib, tp, latent, encoder), reserve_of(mib * 2**20, tp, latent, encoder)
            assert ours.prefill_tokens == theirs.chunked_prefill_size
            assert ours.graph_batch == theirs.cuda_graph_config.decode.max_bs
            assert ours.mem_fraction_static == pytest.approx(theirs.mem_fraction_static, abs=1e-9), (tp, latent)


@pytest.mark.parametrize(
    "model", ["Qwen3-235B-A22B", "GLM-4.5-Air", "Llama-3.3-70B-Instruct", "DeepSeek-V3", "Qwen3.6-35B-A3B"]
)
def test_cells(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = hollow_config(model, "bf16")
    text = config.get("text_config", config)
    cache = ModelFacts.of(config).cache
    assert isinstance(cache, CacheFacts)
    latent = "kv_lora_rank" in text
    for tp in (1, 2, 4, 8, 16):
        monkeypatch.setattr(pool_configurator, "get_parallel", lambda tp=tp: SimpleNamespace(attn_tp_size=tp))
        head = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
        theirs = SimpleNamespace(
            model_config=SimpleNamespace(
                hf_config=SimpleNamespace(architectures=config["architectures"], index_topk=None),
                get_num_kv_heads=lambda ranks: max(1, text["num_key_value_heads"] // ranks),
                head_dim=head,
                v_head_dim=head,
                kv_lora_rank=text.get("kv_lora_rank"),
                qk_rope_head_dim=text.get("qk_rope_head_dim"),
            ),
            use_mla_backend=latent,
            kv_cache_dtype_str="auto",
            server_args=SimpleNamespace(),
            layer_info=SimpleNamespace(start_layer=0, end_layer=cache.layers),
        )
        monkeypatch.setattr(
            "sglang.srt.layers.cp.utils.get_glm_dsa_layer_split_effective_num_layers", lambda _, layers: layers
        )
        for dtype, item in ((torch.bfloat16, 2), (torch.float8_e4m3fn, 1)):
            theirs.kv_cache_dtype = dtype
            configurator = object.__new__(pool_configurator.DefaultPoolConfigurator)
            configurator.kv_cache_dtype_str = "auto"
            assert configurator._compute_cell_size(theirs, cache.layers) == cache.bytes_per_token(tp, item)


@pytest.mark.parametrize("model", ["Qwen3.6-35B-A3B", "Qwen3-Next-80B-A3B-Instruct"])
def test_states_of_a_sequence(model: str) -> None:
    config = hollow_config(model, "bf16")
    text = config.get("text_config", config)
    cache = ModelFacts.of(config).cache
    assert isinstance(cache, CacheFacts) and cache.states is not None
    for tp in (1, 2, 4, 8, 16, 32):
        shape = Mamba2StateShape.create(
            tp_world_size=tp,
            intermediate_size=text["linear_value_head_dim"] * text["linear_num_value_heads"],
            n_groups=text["linear_num_key_heads"],
            num_heads=text["linear_num_value_heads"],
            head_dim=text["linear_value_head_dim"],
            state_size=text["linear_key_head_dim"],
            conv_kernel=text["linear_conv_kernel_dim"],
        )
        layers = [n for n in range(text["num_hidden_layers"]) if (n + 1) % text["full_attention_interval"]]
        theirs = Mamba2CacheParams(shape=shape, layers=layers)
        assert cache.bytes_per_sequence(tp) == theirs.mamba_cache_per_req
        assert cache.layers == text["num_hidden_layers"] - len(layers)
