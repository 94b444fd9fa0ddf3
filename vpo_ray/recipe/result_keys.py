"""Which keys of a recipe change what it computes, and which only how it runs.

The first are its fingerprint, and cannot differ between two runs of one run directory. A key that is
not known to be of the second kind is of the first, in the mappings that are handed on to engines too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

# Keys that change how a run is executed but not what it computes. Of `engine_kwargs` and `env` a part is:
# see `engine_arguments`.
OPERATIONAL = frozenset({
    "out", "pool", "limits", "serve", "env", "device", "engine_kwargs", "workers", "use_gpu",
    "resources_per_worker", "labels", "max_failures", "batch_size", "max_num_seqs", "max_concurrent_batches",
    "tensor_parallel_size", "vae_slicing", "offload", "context_parallel", "time_limit_s", "store",
    "track", "guard", "keep_checkpoints", "license",
    "concurrency", "timeout_s", "retries", "requests_per_minute", "tokens_per_minute", "prompt_price",
    "completion_price", "video_price", "second_price", "form", "api_key_env", "answers",
})  # fmt: skip

# Keys that are so in one place: a video is the same whoever serves its model, and a run whatever is measured
# of it.
OPERATIONAL_PATHS = frozenset({("render", "endpoint", "base_url"), ("evaluate",)})

# Mappings whose keys are no keys of ours: one that has such a name is not operational for that.
FREE = frozenset({
    "request", "call_options", "scheduler_options", "cache_options", "dimensions", "chat_template_kwargs",
    "options", "terms", "gates", "least", "fitness", "thresholds", "profiles",
})  # fmt: skip

# Arguments of vLLM's engine that say where and how fast it runs: memory, parallelism, scheduling, caches,
# compilation, logs, and where weights are loaded from. Precision, length, attention, tokenizer, templates,
# speculation and all that a later vLLM adds change what it writes.
_RUNS = frozenset({
    # memory
    "gpu_memory_utilization", "kv_cache_memory_bytes", "swap_space", "cpu_offload_gb", "cpu_offload_params",
    "offload_backend", "offload_group_size", "offload_num_in_group", "offload_prefetch_step",
    "offload_params", "kv_offloading_size", "kv_offloading_backend", "block_size", "num_gpu_blocks_override",
    "enable_sleep_mode", "enable_cumem_allocator", "watermark", "disable_hybrid_kv_cache_manager",
    # parallelism
    "tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "data_parallel_rank",
    "data_parallel_start_rank", "data_parallel_size_local", "data_parallel_address",
    "data_parallel_rpc_port", "data_parallel_hybrid_lb", "data_parallel_external_lb",
    "data_parallel_backend", "prefill_context_parallel_size", "decode_context_parallel_size",
    "dcp_comm_backend", "enable_expert_parallel", "enable_eplb", "eplb_config", "expert_placement_strategy",
    "all2all_backend", "distributed_executor_backend", "distributed_timeout_seconds",
    "cpu_distributed_timeout_seconds", "disable_custom_all_reduce", "max_parallel_loading_workers",
    "worker_use_ray", "device_ids", "master_addr", "master_port", "nnodes", "node_rank", "numa_bind",
    "numa_bind_nodes", "numa_bind_cpus",
    # scheduling and caches
    "max_num_seqs", "max_num_batched_tokens", "max_num_scheduled_tokens", "max_num_partial_prefills",
    "max_long_partial_prefills", "long_prefill_token_threshold", "max_num_queued_reqs",
    "max_num_queued_tokens", "enable_chunked_prefill", "scheduling_policy", "scheduler_reserve_full_isl",
    "prefill_schedule_interval", "preemption_mode", "num_scheduler_steps", "async_scheduling",
    "stream_interval", "enable_prefix_caching", "prefix_caching_hash_algo",
    "prefix_cache_retention_interval",
    # compilation
    "enforce_eager", "compilation_config", "optimization_level", "performance_mode",
    "cudagraph_capture_sizes", "max_cudagraph_capture_size", "max_seq_len_to_capture",
    "enable_flashinfer_autotune",
    # adapters: how many may be loaded
    "max_loras", "max_lora_rank", "max_cpu_loras", "fully_sharded_loras",
    # loading, logs and metrics
    "download_dir", "safetensors_load_strategy", "safetensors_prefetch_num_threads",
    "safetensors_prefetch_block_size", "pt_load_map_location", "use_tqdm_on_load", "hf_token",
    "served_model_name", "max_logprobs", "disable_log_stats", "disable_log_requests", "enable_log_requests",
    "max_log_len", "aggregate_engine_logging", "show_hidden_metrics_for_version", "otlp_traces_endpoint",
    "collect_detailed_traces", "kv_cache_metrics", "kv_cache_metrics_sample", "cudagraph_metrics",
    "enable_layerwise_nvtx_tracing", "enable_mfu_metrics", "enable_logging_iteration_details",
    "jit_monitor_mode", "jit_monitor_verbose", "profiler_config", "ray_workers_use_nsight",
    "kv_events_config", "shutdown_timeout", "allowed_local_media_path", "allowed_media_domains",
})  # fmt: skip

# Variables of an engine's process that choose other kernels, precisions, lengths or weights. Most others
# are about places, networks, caches and logs.
_COMPUTES = re.compile(
    r"VLLM_\w*(?:ATTENTION|ATTN|FLASH|FP4|FP8|F16|BF16|INT4|INT8|W4A8|QUANT|NVFP|GEMM|MARLIN|MLA|MOE|AITER|AWQ"
    r"|RMSNORM|KERNEL|SAMPLER|MATMUL|INVARIANT|LONG_MAX_MODEL_LEN|MODELSCOPE|LOAD_FORMAT|HARMONY|MODEL_REDIRECT"
    r"|MODEL_RUNNER|USE_V1|FASTOKENS|PLUGINS)\w*"
    r"|NVIDIA_TF32_OVERRIDE|TORCH_ALLOW_TF32\w*"
)


def engine_arguments(kwargs: Mapping[str, Any], env: Mapping[str, str]) -> dict[str, Any]:
    """What of an engine's `engine_kwargs` and `env` changes its answers; what is unset is left out."""
    arguments = {k: v for k, v in kwargs.items() if k not in _RUNS and not _unset(v)}
    variables = {k: v for k, v in env.items() if _COMPUTES.fullmatch(k) and not _unset(v)}
    return arguments | variables


def result_keys(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves of a dumped recipe, by dotted key, without operational ones."""
    return dict(_leaves(tree, ()))


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Dotted keys that change results and differ between two dumped recipes, as `key: old -> new`."""
    a, b = result_keys(old), result_keys(new)
    return [
        f"{k}: {a.get(k, 'absent')!r} -> {b.get(k, 'absent')!r}"
        for k in sorted(a.keys() | b.keys())
        if a.get(k) != b.get(k)
    ]


def _leaves(tree: Mapping[str, Any], prefix: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        path = (*prefix, key)
        if isinstance(value, Mapping) and key in ("engine_kwargs", "env"):
            chosen = engine_arguments(*((value, {}) if key == "engine_kwargs" else ({}, value)))
            if chosen:
                yield from _all(chosen, path)
        elif key in OPERATIONAL or path in OPERATIONAL_PATHS:
            continue
        elif isinstance(value, Mapping) and value:
            yield from _all(value, path) if key in FREE else _leaves(value, path)
        else:
            yield ".".join(path), value


def _all(tree: Mapping[str, Any], prefix: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        path = (*prefix, str(key))
        if isinstance(value, Mapping) and value:
            yield from _all(value, path)
        else:
            yield ".".join(path), value


def _unset(value: Any) -> bool:
    return value is None or value == {} or value == [] or value == ""
