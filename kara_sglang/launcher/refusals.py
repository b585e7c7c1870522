"""What compression does not support, as far as flags and the model's config decide it.

Said in one line each, before any model is loaded; each names the flag or the feature and the way out.
What only the real objects can tell is ``scheduler/refusals.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import TYPE_CHECKING, Any

from kara_sglang import prefix_reuse
from kara_sglang.compat import attention_backends, kv_cache, versions
from kara_sglang.compat.flags import Flags
from kara_sglang.compat.sliding_window import SLIDING
from kara_sglang.hooks import CACHE_BACKEND

if TYPE_CHECKING:
    from kara_sglang.config import KaraConfig

# Other ways into a server, which do not pass ``check_server_args``.
_ENTRIES: tuple[tuple[str, Callable[[Any], bool]], ...] = (
    ("--use-ray", lambda c: c.use_ray),
    ("--grpc-mode", lambda c: c.grpc_mode or c.smg_grpc_mode),
)

SPECULATION = ("NGRAM", "EAGLE", "EAGLE3", "STANDALONE")
"""Kinds of speculation whose verification is understood; SGLang calls MTP and NEXTN EAGLE."""

# Group -> (flag or feature, does the resolved configuration use it?). Field names:
# sglang/srt/arg_groups/fields.
FLAGS: dict[str, tuple[tuple[str, Callable[[Any], bool]], ...]] = {
    "Speculation": (
        (
            f"--speculative-algorithm (other than {', '.join(SPECULATION)})",
            lambda c: c.speculative_algorithm not in (None, *SPECULATION),
        ),
        (
            # SGLang sets the one to the other.
            "--speculative-eagle-topk or --speculative-ngram-max-bfs-breadth (above 1 with --page-size "
            "above 1)",
            lambda c: (
                c.speculative_algorithm is not None and c.speculative_eagle_topk > 1 and c.page_size > 1
            ),
        ),
        (
            "--speculative-num-draft-tokens (below 2, as --speculative-num-steps 0 makes it)",
            lambda c: c.speculative_algorithm is not None and c.speculative_num_draft_tokens < 2,
        ),
        ("--speculative-adaptive", lambda c: c.speculative_adaptive),
        (
            "--enable-multi-layer-eagle (SGLang sets it for some models)",
            lambda c: c.enable_multi_layer_eagle,
        ),
        (
            "--speculative-use-rejection-sampling (--speculative-use-block-verification sets it)",
            lambda c: c.speculative_use_rejection_sampling,
        ),
        ("--dllm-algorithm", lambda c: c.dllm_algorithm is not None),
    ),
    "Parallelism": (
        (
            "--disaggregation-decode-enable-radix-cache",
            lambda c: c.disaggregation_decode_enable_radix_cache,
        ),
        (
            "--disaggregation-decode-enable-offload-kvcache",
            lambda c: c.disaggregation_decode_enable_offload_kvcache,
        ),
        (
            "--disaggregation-mode decode (with --speculative-algorithm)",
            lambda c: c.disaggregation_mode == "decode" and c.speculative_algorithm is not None,
        ),
        ("--enable-pd-role-switch", lambda c: c.enable_pd_role_switch),
        ("--pp-size", lambda c: c.pp_size > 1),
        (
            "--attn-dp-size (or --enable-dp-attention, with --speculative-algorithm)",
            lambda c: c.attn_dp_size > 1 and c.speculative_algorithm is not None,
        ),
        ("--attn-cp-size", lambda c: c.attn_cp_size > 1),
        ("--dcp-size", lambda c: c.dcp_size > 1),
        ("--elastic-ep-backend", lambda c: c.elastic_ep_backend is not None),
    ),
    "Batches cut in two or mixed": (
        (
            "--enable-mixed-chunk (with --speculative-algorithm)",
            lambda c: c.enable_mixed_chunk and c.speculative_algorithm is not None,
        ),
        ("--enable-two-batch-overlap", lambda c: c.enable_two_batch_overlap),
        ("--enable-single-batch-overlap", lambda c: c.enable_single_batch_overlap),
        ("--enable-pdmux", lambda c: c.enable_pdmux),
    ),
    "Compiled model steps": (
        ("--enable-torch-compile", lambda c: c.enable_torch_compile),
        ("--enable-nvidia-megakernel", lambda c: c.enable_nvidia_megakernel),
        ("--enable-amd-monokernel", lambda c: c.enable_amd_monokernel),
    ),
    "Other prefix caches and sessions": (
        ("--hicache-storage-backend", lambda c: c.hicache_storage_backend is not None),
        (
            "--hicache-io-backend kernel_ascend",
            lambda c: c.enable_hierarchical_cache and c.hicache_io_backend == "kernel_ascend",
        ),
        ("--enable-hisparse", lambda c: c.enable_hisparse),
        ("--enable-lmcache", lambda c: c.enable_lmcache),
        ("--enable-flexkv", lambda c: c.enable_flexkv),
        (
            "--enable-unified-cache-external-linker",
            lambda c: c.enable_unified_cache_external_linker,
        ),
        ("--radix-cache-backend", lambda c: c.radix_cache_backend not in (None, CACHE_BACKEND)),
        ("--enable-streaming-session", lambda c: c.enable_streaming_session),
        ("--enable-session-radix-cache", lambda c: c.enable_session_radix_cache),
        ("--strip-thinking-cache", lambda c: c.strip_thinking_cache),
    ),
    "Other forms of the KV pool": (
        ("--enable-unified-memory", lambda c: c.enable_unified_memory),
        ("--enable-page-major-kv-layout", lambda c: c.enable_page_major_kv_layout),
        ("--kv-canary", lambda c: c.kv_canary not in (None, "none")),
        ("--device (other than cuda and cpu)", lambda c: c.device not in (None, "cuda", "cpu")),
    ),
    "Returns for each token": (
        ("--enable-return-routed-experts", lambda c: c.enable_return_routed_experts),
        ("--enable-return-indexer-topk", lambda c: c.enable_return_indexer_topk),
    ),
    "Other": (
        *_ENTRIES,
        ("--grpc-port", lambda c: c.grpc_port is not None),
        ("--enable-deterministic-inference", lambda c: c.enable_deterministic_inference),
    ),
}

ENVIRONMENT = (
    "SGLANG_ENABLE_OVERLAP_PLAN_STREAM",
    "SGLANG_RUST_SERVER",
    "SGLANG_USE_HND_KVCACHE",
)

KV_CACHE_DTYPES = (kv_cache.AUTO, *kv_cache.NAMED)
"""What K and V may be kept in. Other choices have a scale for every few numbers, which would have to
move with them."""

ATTENTION_BACKENDS = ("flashinfer", "triton", "fa3", "torch_native", "intel_amx")
"""Backends that read K/V through ``req_to_token[row, :seq_len]`` and nothing else."""

HOST_LAYOUTS = ("layer_first", "page_first")
"""Memory layouts of HiCache's host tier that are tested; the latter with I/O backend ``kernel``."""


def of_flags(resolved: Any) -> list[str]:
    """Refusals that SGLang's resolved settings decide, one line each.

    Parameters
    ----------
    resolved
        ``resolving_view(server_args)``.
    """
    from sglang.srt.environ import envs
    from sglang.srt.model_executor.cuda_graph_config import Backend

    lines = versions.of_speculation(resolved)
    lines += _used(tuple(chain.from_iterable(FLAGS.values())), resolved)
    lines += [
        f"{name}=1 does not work with --kv-compress; unset it"
        for name in ENVIRONMENT
        if getattr(envs, name).get()
    ]
    if (
        resolved.disaggregation_mode == "decode"
        and resolved.disaggregation_decode_retraction_backup != "none"
    ):
        # A backup copies as many slots as the request has tokens.
        lines.append(
            "--disaggregation-mode decode keeps no compressed KV of a retracted request with "
            "--kv-compress; use --disaggregation-decode-retraction-backup none, with which SGLang ends "
            "it with status 503"
        )
    graphs = resolved.cuda_graph_config  # None where no model has been looked at yet
    if graphs is not None and graphs.prefill.backend != Backend.DISABLED:
        # Requests may decode in a step that prefills others, and a replay shows nobody their queries.
        beside = (
            ("--enable-mixed-chunk", resolved.enable_mixed_chunk),
            ("--attn-dp-size", resolved.attn_dp_size > 1),
        )
        lines += [
            f"{flag} does not work with --kv-compress and CUDA graphs for prefills; use "
            "--disable-prefill-cuda-graph"
            for flag, used in beside
            if used
        ]
    if resolved.kv_cache_dtype not in KV_CACHE_DTYPES:
        lines.append(
            f"--kv-cache-dtype {resolved.kv_cache_dtype} does not work with --kv-compress; use one of "
            + ", ".join(KV_CACHE_DTYPES)
        )
    backends = ["attention_backend", "decode_attention_backend"]
    if resolved.speculative_algorithm is not None:
        backends.append("speculative_draft_attention_backend")
        if not attention_backends.decode_verifies(resolved):
            backends.append("prefill_attention_backend")
    for flag in backends:
        backend = getattr(resolved, flag)
        if backend is not None and backend not in ATTENTION_BACKENDS:
            lines.append(
                f"--{flag.replace('_', '-')} {backend} does not work with --kv-compress; use one of "
                + ", ".join(ATTENTION_BACKENDS)
            )
    layout = resolved.hicache_mem_layout
    if resolved.enable_hierarchical_cache and layout not in HOST_LAYOUTS:
        lines.append(
            f"--hicache-mem-layout {layout} does not work with --kv-compress; use one of layer_first, "
            "or page_first with --hicache-io-backend kernel"
        )
    return lines


def of_sharing(resolved: Any, config: KaraConfig) -> list[str]:
    """Refusals that concern compressed prefixes only, one line each."""
    if not config.shares_prefixes:
        return []
    return _used(prefix_reuse.FLAGS, resolved, f"--kv-compress-prefix-reuse {config.prefix_reuse}")


def of_entry(record: Any) -> list[str]:
    """Refusals of ways to start a server that the raw flags decide, one line each."""
    return _used(_ENTRIES, record)


def _used(
    table: tuple[tuple[str, Callable[[Any], bool]], ...], config: Any, ours: str = "--kv-compress"
) -> list[str]:
    flags = Flags(config)
    return [
        f"{flag} does not work with {ours}; remove one of them" for flag, used in table if used(flags)
    ]


WINDOW_POOL_MODELS = {"GptOssForCausalLM"}
"""Models with a KV pool of sliding-window layers that are tested."""


def of_model_config(model: Any) -> list[str]:
    """Refusals that the model's config decides, one line each.

    Parameters
    ----------
    model
        SGLang's ``ModelConfig``.
    """
    kinds = []
    if not model.is_generation:
        kinds.append("does not generate text")
    if model.is_encoder_decoder:
        kinds.append("is an encoder-decoder")
    if model.attention_arch.name != "MHA":
        kinds.append(f"uses {model.attention_arch.name} attention")
    layer_types = getattr(model.hf_text_config, "layer_types", None) or ()
    if model.is_hybrid_swa and not set(model.hf_config.architectures) <= WINDOW_POOL_MODELS:
        kinds.append("keeps layers in a KV pool of their own")
    for other in sorted(set(layer_types) - {"full_attention", "attention", SLIDING}):
        kinds.append(f"has {other} layers")
    if set(layer_types) == {SLIDING}:
        kinds.append("has no layer with full attention")
    if model.attention_chunk_size is not None:
        kinds.append("uses chunked attention")
    name = ", ".join(model.hf_config.architectures)
    return [
        f"model {name} {kind}, which --kv-compress does not support; serve it without --kv-compress"
        for kind in kinds
    ]


WITHOUT_WINDOW_POOL: tuple[tuple[str, Callable[[Any], bool]], ...] = (
    ("--speculative-algorithm", lambda c: c.speculative_algorithm is not None),
    ("--enable-hierarchical-cache", lambda c: c.enable_hierarchical_cache),
    ("--disaggregation-mode decode", lambda c: c.disaggregation_mode == "decode"),
)
"""What is not tested with a KV pool of sliding-window layers."""


def of_window_pool(resolved: Any, model: Any, config: KaraConfig) -> list[str]:
    """Refusals of flags where sliding-window layers have a KV pool of their own, one line each.

    Parameters
    ----------
    resolved
        ``resolving_view(server_args)``.
    model
        SGLang's ``ModelConfig``.
    config : KaraConfig
    """
    if not model.is_hybrid_swa:
        return []
    pool = f"--kv-compress and {prefix_reuse.WINDOW_POOL}"
    lines = [
        f"{flag} does not work with {pool}; remove it"
        for flag, used in WITHOUT_WINDOW_POOL
        if used(resolved)
    ]
    if config.shares_prefixes:
        lines.append(
            f"--kv-compress-prefix-reuse {config.prefix_reuse} does not work with {pool}; use exact"
        )
    return lines


def of_rotary(model: Any, config: KaraConfig) -> list[str]:
    """Refusals that the model's config decides about ``ahead``; the rest of them needs the real objects
    (``scheduler/rotary.py``).

    Parameters
    ----------
    model
        SGLang's ``ModelConfig``.
    config : KaraConfig
    """
    text = model.hf_text_config
    scaling = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    # Phi3LongRoPEScaledRotaryEmbedding
    long = "longrope" in (scaling.get("rope_type"), scaling.get("type"))
    if not (long and config.ahead and config.keeps_queries):
        return []
    return [
        "this model's rotary embedding (longrope) has two tables, and a text's length says which "
        "counts, so queries cannot be moved ahead; start with --kv-compress-config '{\"ahead\": false}'"
    ]
