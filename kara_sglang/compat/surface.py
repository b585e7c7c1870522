"""The one table of what the plugin uses of SGLang beside its hooks: attributes, keywords, registries.

An entry is a name, or a signature in Python's syntax for what is called or overridden: its leading
parameters by name and, behind ``*``, those that are passed as keywords. ``f(a, *, b)`` fits where f
begins with ``a``, takes ``b``, and asks for nothing else; with ``**rest`` it may ask for more. Each
entry is checked against SGLang's source before anything starts, and the tests in ``tests/unit/compat``
find what the code uses and this table lacks.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass

from kara_sglang.compat.source import Definition, Source, parameters, required


@dataclass(frozen=True, slots=True)
class Used:
    """Names of one class or module of SGLang.

    Attributes
    ----------
    owner
        Dotted path below ``sglang.srt``.
    names
        What is used of it.
    sharing
        Whether only compressed prefixes need it.
    beside
        A hook's target: the names are needed only where SGLang has it.
    """

    owner: str
    names: tuple[str, ...]
    sharing: bool = False
    beside: str = ""

    def problems(self, source: Source) -> Iterator[str]:
        """What ``source`` lacks, one line each."""
        if self.beside and source.find(self.beside) is None:
            return
        if source.find(self.owner) is None:
            yield f"sglang.srt.{self.owner} is missing"
            return
        for entry in self.names:
            name = bare(entry)
            path = f"sglang.srt.{self.owner}.{name}"
            found = source.find(f"{self.owner}.{name}")
            if found is None:
                yield f"{path} is missing"
            elif entry != name and (text := _misfit(found, entry)) is not None:
                yield f"{path} {text}"


def bare(entry: str) -> str:
    """The name in an entry."""
    return entry.partition("(")[0]


def signature(entry: str) -> tuple[list[str], list[str], bool]:
    """Leading parameters, keywords, and whether there may be more, of an entry with parentheses."""
    function = ast.parse(f"def {entry}: ...").body[0]
    assert isinstance(function, ast.FunctionDef)
    arguments = function.args
    leading = [argument.arg for argument in arguments.args]
    return leading, [a.arg for a in arguments.kwonlyargs], arguments.kwarg is not None


def _misfit(found: Definition, entry: str) -> str | None:
    function = found.function
    if function is None:
        return "is no function"
    skipped = 1 if found.method else 0
    takes = parameters(function)[skipped:]
    leading, keywords, more = signature(entry)
    unknown = set(keywords) - set(takes) if function.args.kwarg is None else set()
    if takes[: len(leading)] != leading or unknown:
        return f"takes ({', '.join(takes)}), expected {entry}"
    asked = [name for name in required(function) if name in takes and name not in (*leading, *keywords)]
    if asked and not more:
        return f"asks for {', '.join(asked)} as well, expected {entry}"
    return None


_SCHEDULER = "managers.scheduler.Scheduler"
_CONTROLLER = "managers.data_parallel_controller.DataParallelController"
_MEDIUM = "managers.schedule_batch.MultimodalDataItem"

# Without NEWER_FLAGS, which not every tested SGLang has (flags.py).
_FLAGS = (
    "attention_backend",
    "attn_cp_size",
    "attn_dp_size",
    "cuda_graph_config",
    "dcp_size",
    "decode_attention_backend",
    "device",
    "disable_overlap_schedule",
    "disable_radix_cache",
    "disaggregation_decode_enable_offload_kvcache",
    "disaggregation_decode_enable_radix_cache",
    "disaggregation_decode_retraction_backup",
    "disaggregation_mode",
    "dllm_algorithm",
    "elastic_ep_backend",
    "enable_deterministic_inference",
    "enable_flexkv",
    "enable_hierarchical_cache",
    "enable_hisparse",
    "enable_lmcache",
    "enable_mixed_chunk",
    "enable_multi_layer_eagle",
    "enable_page_major_kv_layout",
    "enable_pd_role_switch",
    "enable_pdmux",
    "enable_return_indexer_topk",
    "enable_return_routed_experts",
    "enable_session_radix_cache",
    "enable_single_batch_overlap",
    "enable_streaming_session",
    "enable_torch_compile",
    "enable_two_batch_overlap",
    "enable_unified_cache_external_linker",
    "enable_unified_memory",
    "grpc_mode",
    "grpc_port",
    "hicache_io_backend",
    "hicache_mem_layout",
    "hicache_storage_backend",
    "kv_cache_dtype",
    "kv_canary",
    "kv_events_config",
    "max_running_requests",
    "max_total_tokens",
    "mem_fraction_static",
    "model_path",
    "page_size",
    "pp_size",
    "prefill_attention_backend",
    "radix_cache_backend",
    "retraction_policy",
    "smg_grpc_mode",
    "speculative_adaptive",
    "speculative_algorithm",
    "speculative_attention_mode",
    "speculative_draft_attention_backend",
    "speculative_eagle_topk",
    "speculative_num_draft_tokens",
    "speculative_num_steps",
    "speculative_use_rejection_sampling",
    "strip_thinking_cache",
    "swa_full_tokens_ratio",
    "tokenizer_path",
    "tokenizer_worker_num",
    "use_ray",
)

SURFACE = (
    # -- plugins and settings ----------------------------------------------------------------------
    Used("plugins", ("load_plugins()",)),
    Used(
        "plugins.hook_registry.HookRegistry",
        ("_hooks", "apply_hooks()", "register(target, hook, hook_type, *, source)"),
    ),
    Used("plugins.hook_registry", ("HookSource",)),
    Used("plugins.hook_registry.HookType", ("AFTER", "AROUND", "BEFORE")),
    Used("server_args.ServerArgs", _FLAGS),
    Used("server_args.ServerArgs", ("resolve_once()",)),
    Used(
        "arg_groups.model_override_base",
        (
            "get_default_attn_backend(server_args, use_mla_backend, model_config)",
            "model_config_of(server_args)",
        ),
    ),
    Used(
        "arg_groups.overrides",
        (
            "declare_resolution(server_args, source, **fields)",
            "record_of(view)",
            "resolution_result(server_args, field)",
            "resolving_view(server_args)",
        ),
    ),
    Used("model_executor.cuda_graph_config.CudaGraphConfig", ("decode", "prefill")),
    Used("model_executor.cuda_graph_config.PhaseConfig", ("backend", "max_bs")),
    Used("model_executor.cuda_graph_config.Backend", ("DISABLED",)),
    Used("environ", ("envs",)),
    Used(
        "environ.Envs",
        (
            "SGLANG_ENABLE_OVERLAP_PLAN_STREAM",
            "SGLANG_RADIX_FORCE_MISS",
            "SGLANG_RUST_SERVER",
            "SGLANG_SWA_EVICTION_INTERVAL",
            "SGLANG_USE_HND_KVCACHE",
        ),
    ),
    Used("environ.EnvField", ("get()",)),
    # -- the model ---------------------------------------------------------------------------------
    Used(
        "configs.model_config.ModelConfig",
        (
            "attention_arch",
            "attention_chunk_size",
            "context_len",
            "dtype",
            "get_total_num_kv_heads()",
            "head_dim",
            "hf_config",
            "hf_text_config",
            "is_encoder_decoder",
            "is_generation",
            "is_hybrid_swa",
            "num_attention_heads",
            "num_hidden_layers",
            "quantization",
            "sliding_window_size",
            "vocab_size",
        ),
    ),
    Used(
        "model_loader.weight_utils",
        ("get_quant_config(model_config, load_config, packed_modules_mapping)",),
    ),
    Used("configs.load_config", ("LoadConfig",)),
    Used(
        "mem_cache.kv_cache_dtype",
        (
            "configure_kv_cache_dtype(*, server_args_kv_cache_dtype, model, model_dtype, "
            "is_draft_worker, is_dflash, speculative_draft_attention_backend)",
        ),
    ),
    Used("configs.model_config.AttentionArch", ("MHA",)),
    Used(
        "model_executor.model_runner.ModelRunner",
        (
            "device",
            "dtype",
            "is_draft_worker",
            "memory_saver_adapter",
            "model",
            "model_config",
            "pre_model_load_memory",
            "req_to_token_pool",
            "server_args",
            "token_to_kv_pool",
        ),
    ),
    Used("model_executor.runner_utils.capture_mode", ("get_is_capture_mode()",)),
    Used("constants", ("GPU_MEMORY_TYPE_KV_CACHE",)),
    Used(
        "utils.torch_memory_saver_adapter.TorchMemorySaverAdapter",
        ("region(tag)",),
    ),
    Used(
        "layers.radix_attention.RadixAttention",
        (
            "attn_type",
            "is_cross_attention",
            "k_scale",
            "k_scale_float",
            "layer_id",
            "qk_head_dim",
            "scaling",
            "sliding_window_size",
            "tp_k_head_num",
            "tp_q_head_num",
            "v_head_dim",
        ),
    ),
    Used(
        "layers.rotary_embedding.base.RotaryEmbedding",
        ("cos_sin_cache", "is_neox_style", "position_start"),
    ),
    # One model for all those whose attention keeps its embedding under this name.
    Used("models.llama.LlamaAttention", ("rotary_emb",)),
    Used("models.hunyuan.HunYuanAttention", ("query_layernorm",)),
    Used("models.gemma3_causal.Gemma3TextModel", ("rotary_emb", "rotary_emb_local")),
    Used("models.gemma3_causal.Gemma3RotaryEmbedding", ("original_inv_freq", "rope_type")),
    Used(
        "model_executor.forward_batch_info.ForwardBatch",
        ("forward_mode", "mrope_positions", "positions", "req_pool_indices"),
    ),
    Used(
        "model_executor.forward_batch_info.ForwardMode",
        ("is_decode()", "is_draft_extend_v2()", "is_extend()", "is_mixed()", "is_target_verify()"),
    ),
    # -- the scheduler -----------------------------------------------------------------------------
    Used(
        _SCHEDULER,
        (
            "_release_aborted_request(req)",
            "attn_tp_group",
            "chunked_req",
            "device_module",
            "disagg_decode_prealloc_queue",
            "enable_hierarchical_cache",
            "enable_overlap",
            "enable_priority_preemption",
            "forward_stream",
            "forward_stream_ctx",
            "get_num_allocatable_reqs(running_bs, *, running_batch)",
            "ipc_channels",
            "last_batch",
            "max_new_tokens_limit",
            "max_running_requests",
            "max_total_num_tokens",
            "metrics_collector_context",
            "model_config",
            "new_token_ratio_tracker",
            "page_size",
            "req_to_token_pool",
            "running_batch",
            "server_args",
            "token_to_kv_pool_allocator",
            "tp_worker",
            "tree_cache",
            "waiting_queue",
        ),
    ),
    Used("distributed.parallel_state.GroupCoordinator", ("cpu_group", "rank_in_group", "world_size")),
    Used("managers.scheduler_components.ipc_channels.SchedulerIpcChannels", ("send_to_tokenizer",)),
    Used(
        "managers.scheduler_components.ipc_channels.SenderWrapper", ("send_output(output, recv_obj)",)
    ),
    Used("managers.scheduler", ("_make_abort_req(req, *, finished_reason)",)),
    Used("managers.tp_worker.TpModelWorker", ("get_decode_cuda_graph_bs()",)),
    Used(
        "observability.metrics_collector.SchedulerMetricsCollectorContext",
        ("collector", "current_scheduler_metrics_enabled"),
    ),
    Used("observability.metrics_collector.SchedulerMetricsCollector", ("labels",)),
    Used("managers.scheduler_components.new_token_ratio_tracker.NewTokenRatioTracker", ("current",)),
    Used("managers.tokenizer_manager.TokenizerManager", ("model_config",)),
    Used("managers.io_struct.GenerateReqInput", ("input_ids", "session_params")),
    Used("managers.io_struct.GetInternalStateReqOutput", ("internal_state",)),
    Used("managers.schedule_policy", ("CLIP_MAX_NEW_TOKENS",)),
    Used(
        "managers.schedule_policy.PrefillAdder",
        (
            "_commit_prefill_admission(req, admission, mamba_gap_reserve)",
            "_get_running_request_total_token_offset(req)",
            "_select_prefill_admission(req, *, total_tokens, **rest)",
            "add_one_req(req, has_chunked_req, truncation_align_size)",
            "can_run_list",
            "running_batch",
        ),
    ),
    Used("managers.schedule_policy.AddReqResult", ("NO_TOKEN",)),
    Used("managers.schedule_policy._PrefillAdmission", ("max_new_tokens",)),
    Used(
        "managers.scheduler_components.output_streamer.SchedulerOutputStreamer",
        (
            "build_additional_customized_info(reqs)",
            "has_additional_customized_info",
            "is_request_level_customized_info_key(key)",
            "should_build_additional_customized_info()",
        ),
    ),
    Used(_CONTROLLER, ("_scheduler_init_infos",), beside=f"{_CONTROLLER}.get_init_info"),
    Used(_CONTROLLER, ("startup_time",)),
    # -- requests and batches ----------------------------------------------------------------------
    Used(
        "managers.schedule_batch.Req",
        (
            "beam_group",
            "finished()",
            "finished_reason",
            "host_hit_length",
            "input_embeds",
            "is_retracted",
            "kv",
            "logprob",
            "multimodal_inputs",
            "next_output_finishes_by_length()",
            "origin_input_ids",
            "output_ids",
            "output_ids_through_stop",
            "prefix_len",
            "retracted_stain",
            "retraction_count",
            "return_hidden_states",
            "return_logprob",
            "rid",
            "sampling_params",
            "session",
            "set_finish_with_abort(error_msg)",
            "skip_radix_cache_insert",
            "to_finish",
        ),
    ),
    Used(
        "managers.schedule_batch.Req",
        (
            "cache_salt",
            "extra_key",
            "full_untruncated_fill_ids",
            "last_node",
        ),
        sharing=True,
    ),
    Used("managers.schedule_batch.MultimodalInputs", ("mm_items",), sharing=True),
    Used(_MEDIUM, ("pad_value",), sharing=True),
    Used(_MEDIUM, ("pad_values",), sharing=True, beside=f"{_MEDIUM}.padding_values"),
    Used(
        "managers.schedule_batch.ReqKvInfo",
        (
            "cache_protected_len",
            "holds_kv",
            "kv_allocated_len",
            "kv_committed_len",
            "req_pool_idx",
        ),
    ),
    Used("managers.schedule_batch.ReqLogprob", ("input_token_logprobs_val",)),
    Used("managers.schedule_batch.BaseFinishReason", ("to_json()",)),
    Used(
        "managers.schedule_batch.ScheduleBatch",
        (
            "batch_is_full",
            "decoding_reqs",
            "extend_lens",
            "forward_mode",
            "prefix_lens",
            "req_pool_indices",
            "req_to_token_pool",
            "reqs",
            "seq_lens",
            "seq_lens_cpu",
            "seq_lens_sum",
            "tree_cache",
        ),
    ),
    Used(
        "sampling.sampling_params.SamplingParams",
        ("custom_params", "ignore_eos", "max_new_tokens", "n"),
    ),
    # -- memory ------------------------------------------------------------------------------------
    Used("mem_cache.memory_pool.MHATokenToKVPool", ("dtype", "k_buffer", "start_layer", "v_buffer")),
    Used("mem_cache.memory_pool.ReqToTokenPool", ("req_generation", "req_to_token")),
    Used("disaggregation.decode", ("DecodeReqToTokenPool",)),
    Used("disaggregation.decode.DecodePreallocQueue", ("queue",)),
    Used("disaggregation.decode.DecodeRequest", ("req",)),
    Used("mem_cache.common", ("evict_from_tree_cache(tree_cache, num_tokens)",)),
    *(
        Used(
            f"mem_cache.allocator.{allocator}",
            (
                "alloc(need_size)",
                "available_size()",
                "free_group_begin()",
                "free_group_end()",
                "free_segment(free_index, *, start_pos)",
                "get_kvcache()",
            ),
        )
        for allocator in ("paged.PagedTokenToKVPoolAllocator", "token.TokenToKVPoolAllocator")
    ),
    Used(
        "mem_cache.unified_radix_cache.UnifiedRadixCache",
        ("cache_controller", "disable", "evictable_size()", "prefix_device_indices(req)"),
    ),
    Used("managers.cache_controller.HiCacheController", ("load_fence_stream",)),
    # A pool of sliding-window layers.
    Used("mem_cache.swa_memory_pool.SWAKVPool", ("full_kv_pool", "full_to_swa_index_mapping")),
    Used("mem_cache.swa_memory_pool.SWAKVPool", ("layers_mapping",)),
    Used(
        "mem_cache.allocator.swa.SWATokenToKVPoolAllocator",
        (
            "free_full_segment(free_index, *, start_pos)",
            "free_group_begin()",
            "free_group_end()",
            "free_segment(free_index, *, start_pos)",
            "full_available_size()",
            "get_kvcache()",
            "swa_req_ring",
        ),
    ),
    Used(
        "managers.schedule_batch.ReqKvInfo",
        (
            "get_evicted_seqlen(component_type)",
            "set_evicted_seqlen(component_type, length)",
        ),
    ),
    Used("mem_cache.unified_cache.component_type.ComponentType", ("SWA",)),
    Used("mem_cache.unified_radix_cache.UnifiedRadixCache", ("full_evictable_size()",)),
    Used("managers.io_struct.AttachHiCacheStorageReqOutput", ("message", "success")),
    # -- compressed prefixes -----------------------------------------------------------------------
    Used(
        "mem_cache.registry",
        (
            "TreeCacheBuildContext",
            "create_unified_radix_cache(ctx, *, cache_class)",
            "get_radix_cache_factory(name)",
            "register_radix_cache_backend(name, factory)",
        ),
        sharing=True,
    ),
    Used("mem_cache.base_prefix_cache.InitLoadBackParams", ("req",), sharing=True),
    Used("mem_cache.base_prefix_cache.MatchPrefixParams", ("key", "req"), sharing=True),
    Used(
        "mem_cache.base_prefix_cache.MatchResult",
        (
            "cache_actions",
            "cache_protected_len",
            "device_prefix_len",
            "full_kv_hit_length",
            "host_hit_length",
        ),
        sharing=True,
    ),
    Used(
        "mem_cache.radix_cache.RadixKey",
        (
            "__init__(token_ids, extra_key, *, cache_salt)",
            "cache_salt",
            "extra_key",
            "token_ids",
        ),
        sharing=True,
    ),
    Used(
        "mem_cache.unified_radix_cache.UnifiedRadixCache",
        (
            "__init__(params)",
            "_apply_cache_actions(actions)",
            "checkpoint_into_tree(req, *, up_to, **rest)",
            "init_load_back(params)",
            "match_prefix(params)",
            "page_size",
            "path_device_indices(node)",
            "reset()",
            "touch_prefix(key)",
            "tree_core",
        ),
        sharing=True,
    ),
    Used(
        "mem_cache.unified_cache.unified_tree_core_interface.UnifiedTreeCoreInterface",
        ("match_full_device_prefix(key)", "match_prefix(params)"),
        sharing=True,
    ),
)


def problems(source: Source, *, sharing: bool = True) -> list[str]:
    """What ``source`` lacks of the table, one line each.

    Parameters
    ----------
    source : Source
    sharing : bool
        Whether what only compressed prefixes need is looked at as well.
    """
    return [line for used in SURFACE if sharing or not used.sharing for line in used.problems(source)]
