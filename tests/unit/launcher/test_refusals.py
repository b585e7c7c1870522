"""What compression refuses: flags, environment, model config, attention layers, real objects."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.model_executor.cuda_graph_config import Backend, CudaGraphConfig, PhaseConfig

from kara_sglang.compat import versions
from kara_sglang.compat.flags import NEWER_FLAGS, Flags
from kara_sglang.config import KaraConfig
from kara_sglang.hooks import CACHE_BACKEND
from kara_sglang.launcher import refusals

Resolved = Callable[..., SimpleNamespace]

DRAFTS = {
    "speculative_algorithm": "EAGLE",
    "speculative_eagle_topk": 1,
    "speculative_num_draft_tokens": 4,
    "speculative_num_steps": 3,
}
"""As SGLang resolves a chain of drafts."""

DECODE = {"disaggregation_mode": "decode", "disaggregation_decode_retraction_backup": "none"}
"""A decode server that keeps nothing of whom it retracts."""

EAGER_PREFILLS = CudaGraphConfig(prefill=PhaseConfig(Backend.DISABLED))
"""What --disable-prefill-cuda-graph makes of SGLang's defaults."""


@pytest.fixture(autouse=True)
def newest(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an older SGLang lacks is told in ``test_versions.py``."""
    monkeypatch.setattr(versions, "version", lambda _name: versions.NEWEST)


def test_a_supported_server_is_not_refused(resolved: Resolved) -> None:
    """SGLang's defaults, and what the design says must work beside compression."""
    assert refusals.of_flags(resolved()) == []
    for changes in (
        {"tp_size": 8, "ep_size": 8},
        {"dp_size": 2},
        {"disable_overlap_schedule": True},
        {"disable_radix_cache": True},
        {"disable_cuda_graph": True, "chunked_prefill_size": 4096},
        {"enable_priority_scheduling": True},
        {"enable_lora": True, "lora_paths": ["a=b"]},
        {"enable_metrics": True, "skip_tokenizer_init": True, "stream_interval": 8},
        {"kv_cache_dtype": "bfloat16", "page_size": 1, "device": "cpu"},
        {"schedule_conservativeness": 0.3, "mem_fraction_static": 0.7},
        DRAFTS | {"speculative_algorithm": "NGRAM", "speculative_eagle_topk": 4, "page_size": 1},
        DRAFTS | {"speculative_algorithm": "NGRAM"},
        {"prefill_attention_backend": "fa4"},
        DRAFTS | {"prefill_attention_backend": "fa4", "speculative_attention_mode": "decode"},
        DRAFTS | {"speculative_algorithm": "EAGLE3"},
        DRAFTS | {"attention_backend": "flashinfer"},
        DRAFTS | {"speculative_draft_attention_backend": "triton"},
        DRAFTS | {"speculative_eagle_topk": 4, "page_size": 1},
        DRAFTS | {"speculative_algorithm": "STANDALONE", "disable_overlap_schedule": True},
        {"enable_mixed_chunk": True, "cuda_graph_config": EAGER_PREFILLS},
        {"tokenizer_worker_num": 4},
        DECODE,
        DECODE | {"disable_radix_cache": True},
        {"tp_size": 4, "attn_dp_size": 2, "cuda_graph_config": EAGER_PREFILLS},
        {"enable_hierarchical_cache": True},
        {"enable_hierarchical_cache": True, "hicache_write_policy": "write_back"}
        | {"hicache_mem_layout": "layer_first", "hicache_io_backend": "direct"},
    ):
        assert refusals.of_flags(resolved(**changes)) == [], changes


# What a user would type, and how SGLang's resolved settings then look.
REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("--speculative-algorithm", DRAFTS | {"speculative_algorithm": "DFLASH"}),
    ("--speculative-algorithm", DRAFTS | {"speculative_algorithm": "DSPARK"}),
    ("--speculative-algorithm", DRAFTS | {"speculative_algorithm": "FROZEN_KV_MTP"}),
    ("--speculative-algorithm", DRAFTS | {"speculative_algorithm": "UNO"}),
    ("--speculative-eagle-topk", DRAFTS | {"speculative_eagle_topk": 4, "page_size": 16}),
    (
        "--speculative-eagle-topk or --speculative-ngram-max-bfs-breadth",
        DRAFTS | {"speculative_algorithm": "NGRAM", "speculative_eagle_topk": 4},
    ),
    ("--speculative-num-draft-tokens", DRAFTS | {"speculative_num_draft_tokens": 1}),
    ("--speculative-adaptive", DRAFTS | {"speculative_adaptive": True}),
    ("--enable-multi-layer-eagle", DRAFTS | {"enable_multi_layer_eagle": True}),
    ("--speculative-use-rejection-sampling", DRAFTS | {"speculative_use_rejection_sampling": True}),
    ("--prefill-attention-backend", DRAFTS | {"prefill_attention_backend": "trtllm_mha"}),
    (
        "--decode-attention-backend",
        DRAFTS | {"decode_attention_backend": "fa4", "speculative_attention_mode": "decode"},
    ),
    (
        "--speculative-draft-attention-backend",
        DRAFTS | {"speculative_draft_attention_backend": "trtllm_mha"},
    ),
    ("--disaggregation-mode", DRAFTS | DECODE),
    (
        "--disaggregation-decode-enable-radix-cache",
        DECODE | {"disaggregation_decode_enable_radix_cache": True},
    ),
    (
        "--disaggregation-decode-enable-offload-kvcache",
        DECODE | {"disaggregation_decode_enable_offload_kvcache": True},
    ),
    ("--enable-pd-role-switch", DECODE | {"enable_pd_role_switch": True}),
    ("--pp-size", {"pp_size": 2}),
    ("--attn-cp-size", {"attn_cp_size": 2}),
    ("--dcp-size", {"dcp_size": 2}),
    (
        "--attn-dp-size (or --enable-dp-attention, with --speculative-algorithm)",
        DRAFTS | {"attn_dp_size": 2, "cuda_graph_config": EAGER_PREFILLS},
    ),
    (
        "--enable-mixed-chunk (with --speculative-algorithm)",
        DRAFTS | {"enable_mixed_chunk": True, "cuda_graph_config": EAGER_PREFILLS},
    ),
    ("--enable-two-batch-overlap", {"enable_two_batch_overlap": True}),
    ("--enable-single-batch-overlap", {"enable_single_batch_overlap": True}),
    ("--enable-pdmux", {"enable_pdmux": True}),
    ("--enable-torch-compile", {"enable_torch_compile": True}),
    ("--enable-streaming-session", {"enable_streaming_session": True}),
    ("--enable-session-radix-cache", {"enable_session_radix_cache": True}),
    ("--strip-thinking-cache", {"strip_thinking_cache": True}),
    ("--hicache-storage-backend", {"hicache_storage_backend": "file"}),
    (
        "--hicache-io-backend",
        {"enable_hierarchical_cache": True, "hicache_io_backend": "kernel_ascend"},
    ),
    (
        "--hicache-mem-layout",
        {"enable_hierarchical_cache": True, "hicache_mem_layout": "page_first_direct"},
    ),
    ("--hicache-mem-layout", {"enable_hierarchical_cache": True, "hicache_mem_layout": "page_head"}),
    ("--enable-hisparse", {"enable_hisparse": True}),
    ("--enable-lmcache", {"enable_lmcache": True}),
    ("--enable-flexkv", {"enable_flexkv": True}),
    ("--enable-unified-cache-external-linker", {"enable_unified_cache_external_linker": True}),
    ("--radix-cache-backend", {"radix_cache_backend": "mine"}),
    ("--enable-unified-memory", {"enable_unified_memory": True}),
    ("--enable-page-major-kv-layout", {"enable_page_major_kv_layout": True}),
    ("--kv-cache-dtype", {"kv_cache_dtype": "mxfp8"}),
    ("--kv-cache-dtype", {"kv_cache_dtype": "nvfp4"}),
    ("--kv-cache-dtype", {"kv_cache_dtype": "fp4_mx_block16"}),
    ("--kv-canary", {"kv_canary": "log"}),
    ("--kv-canary", {"kv_canary": "raise"}),
    ("--enable-deterministic-inference", {"enable_deterministic_inference": True}),
    ("--use-ray", {"use_ray": True}),
    ("--grpc-mode", {"grpc_mode": True}),
    ("--grpc-mode", {"smg_grpc_mode": True}),
    ("--grpc-port", {"grpc_port": 40000}),
    ("--dllm-algorithm", {"dllm_algorithm": "LowConfidence"}),
    ("--elastic-ep-backend", {"elastic_ep_backend": "mooncake"}),
    ("--device", {"device": "npu"}),
    ("--device", {"device": "xpu"}),
    ("--attention-backend", {"attention_backend": "flex_attention"}),
    ("--attention-backend", {"attention_backend": "fa4"}),
    ("--decode-attention-backend", {"decode_attention_backend": "trtllm_mha"}),
    ("--enable-return-routed-experts", {"enable_return_routed_experts": True}),
    ("--enable-return-indexer-topk", {"enable_return_indexer_topk": True}),
    # Decode steps that never reach RadixAttention.forward: no query would be recorded.
    ("--enable-nvidia-megakernel", {"enable_nvidia_megakernel": True}),
    ("--enable-amd-monokernel", {"enable_amd_monokernel": True}),
]


@pytest.mark.parametrize("flag,changes", REFUSED, ids=lambda value: str(value))
def test_refused_flags(flag: str, changes: dict[str, Any], resolved: Resolved) -> None:
    """Exactly one line, that begins with the flag and says what to do."""
    lines = refusals.of_flags(resolved(**changes))
    assert len(lines) == 1, lines
    assert lines[0].startswith(flag) and "does not work with --kv-compress" in lines[0]
    assert "\n" not in lines[0] and ("remove one of them" in lines[0] or "use one of" in lines[0])


@pytest.mark.parametrize("backup", [None, "cpu_tensor", "host_pool"])
def test_a_decode_server_keeps_nothing_of_whom_it_retracts(
    backup: str | None, resolved: Resolved
) -> None:
    """SGLang would copy slots by the logical length."""
    changes = DECODE | {"disaggregation_decode_retraction_backup": backup}
    [line] = refusals.of_flags(resolved(**changes))
    assert "use --disaggregation-decode-retraction-backup none" in line
    assert refusals.of_flags(resolved(**changes | {"disaggregation_mode": "null"})) == []


@pytest.mark.parametrize("backend", [Backend.BREAKABLE, Backend.FULL])
def test_prefills_that_others_decode_beside_run_without_graphs(
    backend: str, resolved: Resolved
) -> None:
    """A replay shows nobody the queries."""
    graphs = CudaGraphConfig(prefill=PhaseConfig(backend))
    for flag, setting in (
        ("--enable-mixed-chunk", {"enable_mixed_chunk": True}),
        ("--attn-dp-size", {"attn_dp_size": 2}),
    ):
        [line] = refusals.of_flags(resolved(cuda_graph_config=graphs, **setting))
        assert line.startswith(flag) and line.endswith("--disable-prefill-cuda-graph")
    assert refusals.of_flags(resolved(cuda_graph_config=graphs)) == []


@pytest.mark.parametrize(
    "flag,changes",
    [
        ("--disable-radix-cache", {"disable_radix_cache": True}),
        ("--tokenizer-worker-num", {"tokenizer_worker_num": 2}),
        ("--disaggregation-mode decode", DECODE | {"disable_radix_cache": True}),
        ("--kv-events-config", {"kv_events_config": "{}"}),
        ("--speculative-algorithm (other than NGRAM)", DRAFTS),
        (
            "--speculative-algorithm (other than NGRAM)",
            DRAFTS | {"speculative_algorithm": "STANDALONE"},
        ),
    ],
)
def test_flags_refused_with_compressed_prefixes_only(
    flag: str, changes: dict[str, Any], resolved: Resolved
) -> None:
    shares, exact = KaraConfig(prefix_reuse="compressed"), KaraConfig()
    [line] = refusals.of_sharing(resolved(**changes), shares)
    assert line == (
        f"{flag} does not work with --kv-compress-prefix-reuse compressed; remove one of them"
    )
    assert refusals.of_sharing(resolved(**changes), exact) == []
    assert refusals.of_sharing(resolved(), shares) == refusals.of_flags(resolved(**changes)) == []
    [line] = refusals.of_sharing(resolved(**changes), KaraConfig(prefix_reuse="auto:64"))
    assert line == f"{flag} does not work with --kv-compress-prefix-reuse auto:64; remove one of them"
    # The launcher's own choice, on a record that is checked again.
    assert refusals.of_flags(resolved(radix_cache_backend=CACHE_BACKEND)) == []


def test_ngram_goes_with_compressed_prefixes(resolved: Resolved) -> None:
    """Its prefix tree has one id for a token, that of draft models two."""
    ngram = resolved(**DRAFTS | {"speculative_algorithm": "NGRAM", "speculative_eagle_topk": 4})
    assert refusals.of_sharing(ngram, KaraConfig(prefix_reuse="compressed")) == []


def test_every_entry_of_the_table_is_tried(resolved: Resolved) -> None:
    """And every field that it reads is one of the installed SGLang's, with another default."""
    tried = {flag.split()[0] for flag, _ in REFUSED}
    for flag, used in chain.from_iterable(refusals.FLAGS.values()):
        assert flag.split()[0] in tried, flag
        assert not used(Flags(resolved()))


def test_flags_are_spelled_as_sglang_spells_them() -> None:
    """A user must find the named flag in --help."""
    import argparse

    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    known = {option for action in parser._actions for option in action.option_strings}
    named = {flag.split()[0] for group in refusals.FLAGS.values() for flag, _ in group}
    newer = {f"--{flag.replace('_', '-')}" for flag in NEWER_FLAGS}
    assert named - known <= newer, named - known


def test_every_type_of_the_kv_cache_is_decided(resolved: Resolved) -> None:
    """The allowed ones are SGLang's and are read as SGLang reads them; its others are refused."""
    import argparse

    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    [action] = [one for one in parser._actions if "--kv-cache-dtype" in one.option_strings]
    others = set(action.choices) - set(refusals.KV_CACHE_DTYPES)
    assert others == {"mxfp8", "nvfp4", "fp4_mx_block16"}
    assert len(action.choices) == len(refusals.KV_CACHE_DTYPES) + len(others)
    for dtype in others:
        [line] = refusals.of_flags(resolved(kv_cache_dtype=dtype))
        assert line.startswith(f"--kv-cache-dtype {dtype} does not work") and "fp8_e4m3" in line
    for dtype in refusals.KV_CACHE_DTYPES:
        assert refusals.of_flags(resolved(kv_cache_dtype=dtype)) == []


def test_every_attention_backend_is_decided(resolved: Resolved) -> None:
    """The allowed ones exist in this SGLang; all others of its list are refused."""
    from sglang.srt.arg_groups.choices import ATTENTION_BACKEND_CHOICES

    assert set(refusals.ATTENTION_BACKENDS) <= set(ATTENTION_BACKEND_CHOICES)
    for backend in ATTENTION_BACKEND_CHOICES:
        for field in ("attention_backend", "decode_attention_backend"):
            lines = refusals.of_flags(resolved(**{field: backend}))
            assert bool(lines) == (backend not in refusals.ATTENTION_BACKENDS)
            if lines:
                assert backend in lines[0] and "torch_native" in lines[0]


@pytest.mark.parametrize("name", refusals.ENVIRONMENT)
def test_refused_environment(name: str, resolved: Resolved, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every spelling that SGLang takes for true, and none that it takes for false."""
    from sglang.srt.environ import EnvBool, envs

    field = getattr(envs, name)
    assert isinstance(field, EnvBool)
    for value in ("1", "true", "TRUE", "yes", "y", "Y", "0", "false", "no", "n"):
        monkeypatch.setenv(name, value)
        lines = refusals.of_flags(resolved())
        assert bool(lines) == field.get(), (name, value)
        if lines:
            assert lines[0].startswith(name) and "unset it" in lines[0]


def model(**changes: Any) -> SimpleNamespace:
    """SGLang's ModelConfig of a plain Llama, with some fields changed."""
    fields = {
        "is_generation": True,
        "is_encoder_decoder": False,
        "attention_arch": SimpleNamespace(name="MHA"),
        "is_hybrid_swa": False,
        "attention_chunk_size": None,
        "hf_config": SimpleNamespace(architectures=["TinyForCausalLM"]),
        "hf_text_config": SimpleNamespace(layer_types=["full_attention", "full_attention"]),
    }
    return SimpleNamespace(**(fields | changes))


@pytest.mark.parametrize(
    "changes,kind",
    [
        ({"is_generation": False}, "does not generate text"),
        ({"is_encoder_decoder": True}, "is an encoder-decoder"),
        ({"attention_arch": SimpleNamespace(name="MLA")}, "uses MLA attention"),
        ({"attention_arch": SimpleNamespace(name="SSM")}, "uses SSM attention"),
        ({"is_hybrid_swa": True}, "keeps layers in a KV pool of their own,"),
        ({"attention_chunk_size": 8192}, "uses chunked attention"),
        (
            {"hf_text_config": SimpleNamespace(layer_types=["linear_attention", "full_attention"])},
            "has linear_attention layers",
        ),
        (
            {"hf_text_config": SimpleNamespace(layer_types=["sliding_attention"])},
            "has no layer with full attention",
        ),
    ],
)
def test_refused_models(changes: dict[str, Any], kind: str) -> None:
    """The line names the architecture, the reason and the way out."""
    assert refusals.of_model_config(model()) == []
    mixed = SimpleNamespace(layer_types=["sliding_attention", "full_attention"])
    assert refusals.of_model_config(model(hf_text_config=mixed)) == []
    gpt_oss = SimpleNamespace(architectures=["GptOssForCausalLM"])
    tested = model(hf_text_config=mixed, is_hybrid_swa=True, hf_config=gpt_oss)
    assert refusals.of_model_config(tested) == []
    [line] = refusals.of_model_config(model(**changes))
    assert "model TinyForCausalLM " + kind in line and line.endswith("without --kv-compress")


@pytest.mark.parametrize(
    "changes,settings,flag",
    [
        ({"speculative_algorithm": "NGRAM"}, {}, "--speculative-algorithm"),
        ({"enable_hierarchical_cache": True}, {}, "--enable-hierarchical-cache"),
        ({"disaggregation_mode": "decode"}, {}, "--disaggregation-mode decode"),
        ({}, {"prefix_reuse": "compressed"}, "--kv-compress-prefix-reuse compressed"),
        ({}, {"prefix_reuse": "auto:9"}, "--kv-compress-prefix-reuse auto:9"),
    ],
)
def test_flags_that_a_pool_of_window_layers_does_not_go_with(
    resolved: Any, changes: dict[str, Any], settings: dict[str, Any], flag: str
) -> None:
    """Other models may have them."""
    config, view = KaraConfig(**settings), resolved(**changes)
    assert refusals.of_window_pool(view, model(), config) == []
    [line] = refusals.of_window_pool(view, model(is_hybrid_swa=True), config)
    assert line.startswith(f"{flag} does not work with --kv-compress and a KV pool of sliding-window")
    assert refusals.of_window_pool(resolved(), model(is_hybrid_swa=True), KaraConfig()) == []


def test_a_rotary_embedding_of_two_tables_is_refused_in_the_launcher() -> None:
    """Unless nothing is moved ahead, or no queries are recorded."""
    for field in ("rope_scaling", "rope_parameters"):
        for key in ("type", "rope_type"):
            text = SimpleNamespace(**{field: {key: "longrope"}})
            [line] = refusals.of_rotary(model(hf_text_config=text), KaraConfig())
            assert line.endswith("""start with --kv-compress-config '{"ahead": false}'""")
            assert refusals.of_rotary(model(hf_text_config=text), KaraConfig(ahead=False)) == []
            assert refusals.of_rotary(model(hf_text_config=text), KaraConfig(selector="recent")) == []
    yarn = SimpleNamespace(rope_scaling={"rope_type": "yarn"})
    for text in (yarn, SimpleNamespace(rope_scaling=None), SimpleNamespace()):
        assert refusals.of_rotary(model(hf_text_config=text), KaraConfig()) == []


def test_the_models_fields_are_sglangs(tiny_config: Any) -> None:
    """A real ModelConfig has every attribute that is read, and a Llama passes."""
    from sglang.srt.configs.model_config import AttentionArch, ModelConfig

    real = ModelConfig(str(tiny_config))
    for name in vars(model()):
        assert hasattr(real, name), name
    assert {"MHA", "MLA", "SSM"} <= {arch.name for arch in AttentionArch}
    assert refusals.of_model_config(real) == []
    assert refusals.of_rotary(real, KaraConfig()) == []
