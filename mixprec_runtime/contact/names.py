"""The names of SGLang's that mixprec uses, and how.

Each was found in all releases from ``OLDEST`` to ``NEWEST`` (:mod:`mixprec_build.versions`) but where ``since`` or
``until`` says otherwise. ``tests/sglang/test_contact.py`` compares the table with the imports of this package, and
edits copies of SGLang's modules.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = [
    "ANY",
    "ASKING",
    "CANARY",
    "CHAINS",
    "COUNTING",
    "CPU",
    "DEEPEP",
    "DEEPSEEK_V4",
    "GROUPS",
    "KERNELS",
    "NAMES",
    "PLUGIN",
    "SERVER",
    "SESSIONS_SINCE",
    "Name",
]


PLUGIN = "registering the plugin"
ANY = "any checkpoint that mixprec built"
SERVER = "a server"
GROUPS = "experts of one layer in several formats"
CHAINS = "kernels of experts of one layer in several formats"
KERNELS = "kernels of experts, where there is a GPU"
DEEPEP = "experts behind DeepEP"
COUNTING = "expert activity"
CPU = "serving without a GPU"
CANARY = "the comparison of kernels"
ASKING = "mixprec doctor with a checkpoint"
DEEPSEEK_V4 = "DeepSeek-V4"
SESSIONS_SINCE = "0.5.21"
"""The first release with requests that begin and end an update of weights."""


@dataclass(frozen=True, slots=True)
class Name:
    """A name of SGLang's."""

    where: str
    """``module:name``; members follow after dots."""
    use: str
    """What uses it: a constant above, or the name of a format."""
    call: str | None = None
    """How it is called, or SGLang calls mixprec's own: parameters by name, ``_`` for one that may have any name, and
    ``name=`` where it is passed by name. None where it is not called."""
    fields: str = ""
    """Attributes of a class that are used."""
    result: str = ""
    """Attributes that are used of what the function returns."""
    since: str = ""
    """The first release that has it; empty for all."""
    until: str = ""
    """The first release without it; empty for none."""

    @property
    def text(self) -> str:
        """The name as Python code would write it."""
        return self.where.replace(":", ".")


_Q = "sglang.srt.layers.quantization"
_MOE = "sglang.srt.layers.moe"
_LAYER = f"{_MOE}.fused_moe_triton.layer"
_BASE = f"{_Q}.base_config"
_UPDATER = "sglang.srt.managers.scheduler_components.weight_updater:SchedulerWeightUpdaterManager"
_SCHEDULER = "sglang.srt.managers.scheduler:Scheduler"
_IO = "sglang.srt.managers.io_struct"
_FUSED = f"{_MOE}.moe_runner.triton_utils.fused_moe"
_MARLIN = f"{_MOE}.fused_moe_triton.fused_marlin_moe"
_CT = f"{_Q}.compressed_tensors"
_FLA = "sglang.kernels.ops.attention.fla"
_FLA_BEFORE = "sglang.srt.layers.attention.fla"

_CREATE_LINEAR = "self layer input_size_per_partition output_partition_sizes input_size output_size params_dtype="
_CREATE_EXPERTS = "self layer num_experts hidden_size intermediate_size_per_partition params_dtype"

NAMES = (
    # The plugin
    Name("sglang.version:__version__", PLUGIN),
    Name(f"{_Q}:BASE_QUANTIZATION_METHODS", PLUGIN),
    Name(f"{_Q}:QUANTIZATION_METHODS", PLUGIN),
    Name(f"{_Q}:CPU_QUANTIZATION_METHODS", PLUGIN),
    Name("sglang.srt.server_args:QUANTIZATION_CHOICES", PLUGIN),
    Name("sglang.srt.server_args:add_quantization_method_choices", PLUGIN, call="_"),
    Name("sglang.srt.plugins.hook_registry:HookRegistry.register", PLUGIN, call="cls target hook hook_type"),
    Name("sglang.srt.plugins.hook_registry:HookRegistry.apply_hooks", PLUGIN, call="cls"),
    Name("sglang.srt.plugins.hook_registry:HookRegistry", PLUGIN, fields="_hooks"),
    Name("sglang.srt.plugins.hook_registry:HookType", PLUGIN, fields="AFTER AROUND BEFORE"),
    # Loading
    Name("sglang.srt.model_loader.loader:_initialize_model", ANY, call="model_config load_config quant_config"),
    Name("sglang.srt.model_loader.utils:get_model_architecture", ANY, call="model_config"),
    Name(
        "sglang.srt.configs.model_config:ModelConfig",
        ANY,
        fields="quantization model_path revision is_draft_model hf_config dtype",
    ),
    Name("sglang.srt.configs.model_config:ModelConfig._verify_quantization", ANY, call="self"),
    Name("sglang.srt.configs.load_config:LoadConfig", ANY, fields="load_format download_dir"),
    Name("sglang.srt.models.deepseek_v4:_FP8_WO_A_GEMM", DEEPSEEK_V4),
    Name(f"{_BASE}:QuantizationConfig", ANY, fields="packed_modules_mapping"),
    Name(f"{_BASE}:QuantizationConfig.get_quant_method", ANY, call="self layer prefix"),
    Name(f"{_BASE}:QuantizeMethodBase.process_weights_after_loading", ANY, call="self layer"),
    Name(f"{_BASE}:QuantizeMethodBase", ANY, fields="create_weights apply"),
    Name(f"{_BASE}:LinearMethodBase.create_weights", ANY, call=_CREATE_LINEAR),
    Name(f"{_BASE}:LinearMethodBase.apply", ANY, call="self layer x bias"),
    Name(f"{_BASE}:FusedMoEMethodBase.create_weights", ANY, call=_CREATE_EXPERTS),
    Name(f"{_BASE}:FusedMoEMethodBase.create_moe_runner", ANY, call="self layer moe_runner_config"),
    Name(f"{_BASE}:FusedMoEMethodBase.apply", ANY, call="self layer dispatch_output"),
    Name(f"{_Q}.unquant:UnquantizedLinearMethod", ANY, call=""),
    Name("sglang.srt.utils:is_cpu", ANY, call=""),
    Name("sglang.srt.layers.linear:LinearBase", ANY, call="input_size output_size", fields="quant_method"),
    Name(
        f"{_LAYER}:FusedMoE",
        ANY,
        fields="quant_method hidden_size intermediate_size_per_partition moe_tp_size moe_ep_size num_experts "
        "num_local_experts num_fused_shared_experts layer_id top_k moe_runner_config",
    ),
    Name(f"{_LAYER}:FusedMoE._map_global_expert_id_to_local_expert_id", ANY, call="self expert_id"),
    Name(
        "sglang.srt.layers.vocab_parallel_embedding:VocabParallelEmbedding",
        ANY,
        fields="shard_indices org_vocab_size embedding_dim num_embeddings_padded tp_size",
    ),
    Name("sglang.srt.layers.vocab_parallel_embedding:ParallelLMHead", ANY),
    Name("sglang.srt.layers.logits_processor:LogitsProcessor._compute_lm_head", ANY, call="self hidden_states lm_head"),
    Name(
        "sglang.srt.layers.vocab_parallel_embedding:VocabParallelEmbeddingShardIndices",
        ANY,
        fields="org_vocab_start_index org_vocab_end_index num_org_elements",
    ),
    Name("sglang.srt.runtime_context:get_server_args", ANY, call=""),
    Name("sglang.srt.runtime_context:get_context", ANY, call=""),
    Name("sglang.srt.runtime_context:RuntimeContext", ANY, fields="config_leaf override", since="0.5.18"),
    Name(
        "sglang.srt.runtime_context:get_parallel",
        ANY,
        call="",
        result="tp_size tp_rank attn_tp_size attn_tp_rank attn_dp_size moe_tp_size moe_ep_size moe_ep_rank pp_size",
    ),
    Name("sglang.srt.eplb.expert_location:get_global_expert_location_metadata", ANY, call=""),
    Name("sglang.srt.eplb.expert_location:ExpertLocationMetadata", ANY, fields="physical_to_logical_map_cpu"),
    Name(
        "sglang.srt.eplb.expert_location:ExpertLocationMetadata.logical_to_all_physical",
        ANY,
        call="self layer_id logical_expert_id",
    ),
    Name(
        "sglang.srt.eplb.expert_location_updater:update_expert_weights_single_layer",
        ANY,
        call="routed_experts_weights temp_buffers old_physical_to_logical_map= new_physical_to_logical_map= "
        "num_local_physical_experts= num_gpu_per_node= rank=",
    ),
    Name("sglang.srt.eplb.expert_location_dispatch:ExpertLocationDispatchInfo.init_new", ANY, call="cls layer_id="),
    Name(
        f"{_MOE}.topk:TopK.forward_cuda", ANY, call="self hidden_states router_logits expert_location_dispatch_info="
    ),
    Name(f"{_MOE}.utils:MoeRunnerBackend", ANY, fields="AUTO DEEP_GEMM"),
    Name(f"{_MOE}.utils:MOE_RUNNER_BACKEND", ANY, until="0.5.16"),
    Name(f"{_MOE}.utils:SPECULATIVE_MOE_RUNNER_BACKEND", ANY, until="0.5.16"),
    Name("sglang.srt.runtime_context:get_flags", ANY, call=""),
    Name(
        "sglang.srt.runtime_context:MoeFlags", ANY, fields="runner_backend speculative_runner_backend", since="0.5.16"
    ),
    Name("sglang.srt.layers.deep_gemm_wrapper.configurer:ENABLE_JIT_DEEPGEMM", ANY),
    Name(f"{_MOE}.utils:get_moe_a2a_backend", ANY, call=""),
    Name(f"{_MOE}.ep_moe.layer:DeepEPMoE", DEEPEP, fields="deprecate_flag"),
    Name(
        f"{_MOE}.ep_moe.layer:DeepEPMoE.__init__",
        DEEPEP,
        call="self num_experts= top_k= hidden_size= intermediate_size= layer_id= quant_config= prefix=",
    ),
    Name(f"{_Q}.fp8:Fp8Config", DEEPEP, call="is_checkpoint_fp8_serialized= activation_scheme= weight_block_size="),
    Name(f"{_Q}.kv_cache:BaseKVCacheMethod", ANY, call="_"),
    Name(f"{_Q}.kv_cache:BaseKVCacheMethod.create_weights", ANY, call="self layer"),
    Name("sglang.srt.layers.radix_attention:RadixAttention", ANY, fields="k_scale quant_method"),
    # Requests
    Name(f"{_SCHEDULER}.__init__", SERVER),
    Name(_SCHEDULER, SERVER, fields="tp_worker"),
    Name(f"{_SCHEDULER}.get_internal_state", SERVER, call="self _"),
    Name(f"{_SCHEDULER}.expert_distribution_handle", SERVER, call="self _"),
    Name("sglang.srt.managers.tp_worker:TpModelWorker", SERVER, fields="model_runner"),
    Name(
        "sglang.srt.model_executor.model_runner:ModelRunner", SERVER, fields="model model_config device"
    ),
    Name("sglang.srt.model_executor.model_runner:ModelRunner.forward", SERVER, call="self forward_batch"),
    Name(_UPDATER, SERVER, fields="tp_worker"),
    Name(f"{_UPDATER}.update_weights_from_disk", SERVER, call="self _"),
    Name(f"{_UPDATER}.update_weights_from_distributed", SERVER, call="self _"),
    Name(f"{_UPDATER}.update_weights_from_tensor", SERVER, call="self _"),
    Name(f"{_UPDATER}.update_weights_from_ipc", SERVER, call="self _"),
    Name(f"{_UPDATER}.begin_weight_update", SERVER, call="self _", since=SESSIONS_SINCE),
    Name(f"{_UPDATER}.end_weight_update", SERVER, call="self _", since=SESSIONS_SINCE),
    Name(f"{_IO}:UpdateWeightFromDiskReqOutput", SERVER, call="success= message="),
    Name(f"{_IO}:UpdateWeightsFromDistributedReqOutput", SERVER, call="success= message="),
    Name(f"{_IO}:UpdateWeightsFromTensorReqOutput", SERVER, call="success= message="),
    Name(f"{_IO}:UpdateWeightsFromIPCReqOutput", SERVER, call="success= message="),
    Name(f"{_IO}:BeginWeightUpdateReqOutput", SERVER, call="success= message=", since=SESSIONS_SINCE),
    Name(f"{_IO}:EndWeightUpdateReqOutput", SERVER, call="success= message=", since=SESSIONS_SINCE),
    Name(f"{_IO}:GetInternalStateReqOutput", SERVER, fields="internal_state"),
    # Formats
    Name(f"{_Q}.fp8:Fp8Config", "FP8", call="is_checkpoint_fp8_serialized= activation_scheme= weight_block_size="),
    Name(f"{_Q}.fp8:Fp8LinearMethod", "FP8", fields="w8a8_block_fp8_linear"),
    Name(f"{_Q}.fp8_utils:dispatch_w8a8_block_fp8_linear", "FP8"),
    Name(f"{_Q}.fp8_utils:triton_w8a8_block_fp8_linear", "FP8"),
    Name(f"{_Q}.w8a8_fp8:W8A8Fp8Config", "FP8", call="is_checkpoint_fp8_serialized="),
    Name(f"{_MOE}:MoeRunner.run", "FP8", call="self dispatch_output quant_info"),
    Name(
        f"{_MOE}.moe_runner.triton:TritonMoeQuantInfo",
        "FP8",
        fields="w13_weight w2_weight w13_scale w2_scale per_channel_quant",
    ),
    Name(f"{_Q}.w8a8_int8:W8A8Int8Config", "Int8", call="_"),
    Name(
        f"{_Q}.blockwise_int8:BlockInt8Config",
        "Int8",
        call="is_checkpoint_int8_serialized= activation_scheme= weight_block_size=",
    ),
    *(
        Name(where, fmt, call, fields)
        for fmt in ("GPTQ", "AWQ", "compressed-tensors", "NVFP4", "MXFP4")
        for where, call, fields in (
            (f"{_MOE}:get_moe_runner_backend", "", ""),
            (f"{_MOE}:MoeRunner.run", "self dispatch_output quant_info", ""),
            (f"{_MOE}.moe_runner.marlin:MarlinMoeQuantInfo", None, "expert_map"),
            (
                f"{_Q}.marlin_utils:check_marlin_supports_shape",
                "output_size_per_partition input_size_per_partition input_size group_size",
                "",
            ),
        )
    ),
    *(
        Name(f"{_Q}.marlin_utils:{name}", fmt, call)
        for fmt in ("GPTQ", "AWQ", "compressed-tensors")
        for name, call in (
            ("check_moe_marlin_supports_layer", "layer group_size"),
            ("marlin_moe_permute_scales", "s size_k size_n group_size"),
        )
    ),
    Name(
        f"{_Q}.gptq:GPTQMarlinConfig",
        "GPTQ",
        call="weight_bits= group_size= desc_act= is_sym= lm_head_quantized= dynamic= full_config=",
    ),
    Name(f"{_Q}.gptq:GPTQConfig", "GPTQ", call="weight_bits group_size desc_act lm_head_quantized dynamic"),
    Name(f"{_Q}.gptq:GPTQConfig.get_linear_scheme", "GPTQ", call="self layer"),
    Name(
        f"{_Q}.awq:AWQMarlinConfig",
        "AWQ",
        call="weight_bits= group_size= zero_point= lm_head_quantized= modules_to_not_convert= full_config=",
        fields="TYPE_MAP",
    ),
    *(
        Name(where, fmt, call, fields)
        for fmt in ("FP8", "compressed-tensors")
        for where, call, fields in (
            (f"{_CT}.compressed_tensors:CompressedTensorsConfig", None, "target_scheme_map"),
            (f"{_CT}.compressed_tensors:CompressedTensorsConfig.from_config", "cls config", ""),
            (f"{_CT}.compressed_tensors:CompressedTensorsConfig._check_scheme_supported", "self _ _", ""),
            (f"{_CT}.compressed_tensors:CompressedTensorsConfig.get_linear_scheme", "self layer layer_name", ""),
            (f"{_CT}.schemes:CompressedTensorsW8A16Fp8", "strategy= is_static_input_scheme=", ""),
        )
    ),
    Name(
        f"{_Q}.modelopt_quant:ModelOptFp4Config",
        "NVFP4",
        call="is_checkpoint_nvfp4_serialized= group_size= exclude_modules=",
    ),
    Name(f"{_Q}.modelopt_quant:ModelOptNvFp4A16LinearMethod", "NVFP4", call="_"),
    Name(f"{_Q}.modelopt_quant:_SUPPORTED_ACT_STRS", "NVFP4"),
    Name(f"{_Q}.mxfp4:Mxfp4Config", "MXFP4", call="is_checkpoint_mxfp4_serialized="),
    Name(f"{_Q}.mxfp4_marlin_moe:Mxfp4MarlinMoEMethod", "MXFP4", call="fp8_method prefix"),
    Name(f"{_MOE}:MoeRunnerConfig", "MXFP4", fields="gemm1_alpha gate_up_interleaved"),
    Name(
        "sglang.srt.models.deepseek_v2:maybe_fuse_routed_scale_and_shared_add",
        "MXFP4",
        call="experts routed shared routed_scaling_factor",
    ),
    Name(f"{_Q}.w4afp8:W4AFp8Config", "W4AFP8", call=""),
    Name(
        f"{_MOE}.token_dispatcher.standard:StandardDispatchOutput",
        "W4AFP8",
        call="hidden_states hidden_states_scale topk_output",
    ),
    # Layers of several formats
    Name(
        f"{_LAYER}:FusedMoE",
        GROUPS,
        call="num_experts= hidden_size= intermediate_size= layer_id= top_k= params_dtype= quant_config= prefix= "
        "activation= inplace= routed_scaling_factor= gemm1_alpha= gemm1_clamp_limit= is_gated= "
        "swiglu_limit=",
    ),
    Name(
        f"{_LAYER}:FusedMoE._weight_loader_impl",
        GROUPS,
        call="self param= loaded_weight= weight_name= shard_id= expert_id=",
    ),
    Name(
        f"{_LAYER}:FusedMoE.weight_loader", GROUPS, call="self param loaded_weight weight_name= shard_id= expert_id="
    ),
    Name(
        f"{_MOE}:MoeRunnerConfig",
        GROUPS,
        fields="num_experts activation is_gated gemm1_alpha gemm1_clamp_limit apply_router_weight_on_input no_combine "
        "swiglu_limit routed_scaling_factor inplace",
    ),
    Name(f"{_MOE}.token_dispatcher:StandardCombineInput", GROUPS, call="hidden_states="),
    Name(
        f"{_MOE}.token_dispatcher.standard:StandardDispatchOutput",
        GROUPS,
        call="hidden_states hidden_states_scale topk_output",
    ),
    Name(f"{_MOE}.topk:StandardTopKOutput", GROUPS, call="topk_weights= topk_ids= router_logits="),
    Name("sglang.srt.layers.zero_copy_context:set_moe_output", GROUPS, call="_", since="0.5.17"),
    Name("sglang.srt.runtime_context:get_parallel", GROUPS, call="", result="_overrides"),
    Name(f"{_MOE}:MoeRunner", CHAINS, fields="fused_func runner_backend"),
    Name(
        f"{_MOE}.moe_runner.marlin:MarlinMoeQuantInfo",
        CHAINS,
        fields="w13_qweight w13_scales w13_global_scale w13_qzeros w13_g_idx w13_g_idx_sort_indices w2_qweight "
        "w2_scales w2_global_scale w2_qzeros w2_g_idx w2_g_idx_sort_indices weight_bits is_k_full w13_bias w2_bias",
    ),
    Name(
        f"{_MOE}.moe_runner.triton:TritonMoeQuantInfo",
        CHAINS,
        fields="w13_weight w2_weight b13 b2 use_mxfp8 use_fp8_w8a8 use_int8_w8a8 use_int8_w8a16 use_int4_w4a16 "
        "per_channel_quant w13_scale w2_scale w13_zp w2_zp a13_scale a2_scale block_shape",
    ),
    Name(f"{_FUSED}:get_config_dtype_str", CHAINS, call="dtype= use_fp8_w8a8= use_int8_w8a8="),
    Name(
        f"{_FUSED}:try_get_optimal_moe_config",
        CHAINS,
        call="w1_shape w2_shape top_k dtype M block_shape= per_channel_quant=",
    ),
    Name(
        f"{_FUSED}:invoke_fused_moe_kernel",
        CHAINS,
        call="A B bias C A_scale B_scale B_zp topk_weights topk_ids sorted_token_ids expert_ids num_tokens_post_padded "
        "mul_routed_weight top_k config compute_type= use_fp8_w8a8= use_int8_w8a8= use_int8_w8a16= use_int4_w4a16= "
        "per_channel_quant= block_shape= filter_expert=",
    ),
    Name(f"{_FUSED}:silu_and_mul", KERNELS, call="input out expert_ids= expert_step="),
    Name(f"{_MARLIN}:get_scalar_type", CHAINS, call="num_bits has_zp scales global_scale"),
    Name(
        f"{_MARLIN}:moe_wna16_marlin_gemm",
        KERNELS,
        call="a c_or_none b_q_weight b_bias_or_none b_scales global_scale_or_none b_zeros_or_none g_idx_or_none "
        "perm_or_none workspace sorted_token_ids expert_ids num_tokens_post_padded topk_weights moe_block_size= top_k= "
        "mul_topk_weights= is_ep= b_q_type= size_m= size_n= size_k= is_k_full= use_atomic_add= use_fp32_reduce= "
        "is_zp_float=",
    ),
    # Expert activity
    Name(f"{_LAYER}:FusedMoE.forward_impl", COUNTING, call="self hidden_states topk_output"),
    Name("sglang.srt.eplb.expert_distribution:get_global_expert_distribution_recorder", COUNTING, call=""),
    Name(f"{_IO}:ExpertDistributionReqOutput", COUNTING, call=""),
    Name(f"{_IO}:ExpertDistributionReqType", COUNTING, fields="START_RECORD STOP_RECORD DUMP_RECORD"),
    # Without a GPU
    Name(f"{_Q}.marlin_utils:get_device_capability", CPU),
    Name(f"{_Q}.modelopt_quant:get_device_capability", CPU),
    Name(f"{_Q}.modelopt_quant:is_cuda", CPU),
    Name(f"{_Q}.modelopt_quant:swizzle_blockscale", CPU, call="_"),
    Name("sglang.srt.models.qwen2_moe:fused_gate_sigmoid_mul_add", CPU, call="_ _ _ _"),
    *(
        Name(f"{home}.{name}", CPU, call, since=since, until=until)
        for home, since, until in ((_FLA, "0.5.16", ""), (_FLA_BEFORE, "", "0.5.16"))
        for name, call in (
            (
                "layernorm_gated:layernorm_fn",
                "x weight bias z= eps= group_size= norm_before_gate= is_rms_norm= activation=",
            ),
            (
                "fused_norm_gate:rms_norm_gated",
                "x g weight bias activation residual= eps= prenorm= residual_in_fp32=",
            ),
        )
    ),
    Name(f"{_Q}.unquant:UnquantizedFusedMoEMethod", CPU, call=""),
    Name(f"{_MOE}.token_dispatcher:StandardCombineInput", CPU, call="hidden_states="),
    # The canary
    Name(
        "sglang.srt.layers.linear:ReplicatedLinear",
        CANARY,
        call="input_size output_size bias= params_dtype= quant_config= prefix=",
    ),
    # mixprec doctor
    Name("sglang.srt.server_args:ServerArgs", ASKING, call="model_path= device= load_format="),
    Name("sglang.srt.server_args:set_global_server_args_for_scheduler", ASKING, call="_"),
    Name("sglang.srt.configs.model_config:ModelConfig.from_server_args", ASKING, call="_"),
    Name(f"{_MOE}:initialize_moe_config", ASKING),
    Name(
        "sglang.srt.distributed:init_distributed_environment",
        ASKING,
        call="world_size= rank= local_rank= distributed_init_method= backend=",
    ),
    Name("sglang.srt.distributed:initialize_model_parallel", ASKING, call=""),
)  # fmt: skip
