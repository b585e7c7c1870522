"""How a plan divides memory: as SGLang and the pass do it with the same flags."""

from __future__ import annotations

import contextlib
import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kara_sglang import plugin
from kara_sglang.benchmarks.models import MODELS
from kara_sglang.plan import memory
from kara_sglang.plan.launch import read
from kara_sglang.scheduler import runtime

KV_DTYPES = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}


@pytest.mark.parametrize("gib", [30, 45, 80, 141])
@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--tp-size", "4", "--page-size", "64"),
        ("--max-total-tokens", "5000"),
        ("--kv-cache-dtype", "fp8_e4m3"),
        ("--kv-cache-dtype", "fp8_e5m2"),
    ],
)
def test_the_pool_is_what_sglang_makes_of_the_same_memory(qwen, monkeypatch, gib, flags):
    """SGLang's own code sizes the pool from what is free before and after the weights."""
    found = sized(qwen, monkeypatch, gib, flags)
    if "--max-total-tokens" in flags:
        assert found.stock_pool == found.pool == 5000
    else:
        assert found.pool < found.stock_pool


@pytest.mark.parametrize(
    "flags", [(), ("--tp-size", "4"), ("--swa-full-tokens-ratio", "0.25", "--page-size", "64")]
)
def test_so_it_is_where_window_layers_have_a_pool_of_their_own(gpt_oss, monkeypatch, flags):
    found = sized(gpt_oss, monkeypatch, 80, ("--attention-backend", "fa3", *flags))
    assert found.pool < found.stock_pool


def sized(model: str, monkeypatch: pytest.MonkeyPatch, gib: int, flags: tuple[str, ...]) -> Any:
    """The plan's pools, compared with SGLang's."""
    from sglang.srt import runtime_context
    from sglang.srt.arg_groups.overrides import record_of
    from sglang.srt.mem_cache import kv_cache_configurator
    from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

    launch = read(["--model-path", model, "--kv-compress", "kara", *flags], gib * 1024)
    rank = memory.Rank.of(launch)
    weights = memory.weight_bytes(model, launch.model)
    ring = memory.ring_of(launch, rank, weights)
    found = memory.divide(launch, rank, ring, weights)
    before = found.total - found.context
    configurator = object.__new__(kv_cache_configurator.KVCacheConfigurator)
    of_a_server = {
        "device": "cuda",
        "gpu_id": 0,
        "model_config": launch.model,
        "server_args": record_of(launch.resolved),
        "kv_cache_dtype": KV_DTYPES.get(launch.resolved.kv_cache_dtype, torch.bfloat16),
        "kv_cache_dtype_str": launch.resolved.kv_cache_dtype,
        "layer_info": SimpleNamespace(
            num_effective_layers=launch.model.num_hidden_layers,
            start_layer=0,
            end_layer=launch.model.num_hidden_layers,
            full_attention_layer_ids=launch.model.full_attention_layer_ids,
            swa_attention_layer_ids=launch.model.swa_attention_layer_ids,
        ),
        "spec_algorithm": SpeculativeAlgorithm.from_string(None),
        "is_draft_worker": False,
        "spec_aux_config": None,
        "is_hybrid_swa": launch.model.is_hybrid_swa,
        "sliding_window_size": launch.model.sliding_window_size,
        "page_size": launch.resolved.page_size,
        "use_mla_backend": False,
        "mambaish_config": None,
        "post_capture_kv_active": False,
        "attn_dp_size": 1,
        "kv_shard_spec": None,
    }
    for name, value in of_a_server.items():
        setattr(configurator, name, value)
    one_rank = {"launch_world_size": 1, "world_group": SimpleNamespace(cpu_group=None)}
    context = runtime_context.create_context(record_of(launch.resolved), role="scheduler")
    sizes = []
    for taken in (0, found.ring + found.scratch):
        free = (before - found.weights - taken) / 2**30
        monkeypatch.setattr(
            kv_cache_configurator, "get_available_gpu_memory", lambda *_a, free=free, **_k: free
        )
        with runtime_context.use_context(context), context.parallel.override(**one_rank):
            sizes.append(configurator._resolve_memory_pool_config(before / 2**30).max_total_num_tokens)
    # SGLang reckons in GiB, so the last token may fall to either side.
    page = launch.resolved.page_size
    assert sizes == pytest.approx([found.stock_pool, found.pool], abs=page)
    return found


@pytest.mark.parametrize("kv", [(), ("--kv-cache-dtype", "fp8_e5m2")])
@pytest.mark.parametrize(
    ("name", "heads", "dim", "windows"),
    [
        ("qwen", (16, 4), 128, [None] * 36),
        ("gemma", (8, 4), 256, ([1023] * 5 + [None]) * 8),
        ("gpt_oss", (32, 4), 64, [127, None] * 12),
    ],
)
def test_ring_and_scratch_are_those_that_the_pass_allocates(
    request, monkeypatch, kv, name, heads, dim, windows
):
    """By the hook behind ``ModelRunner.load_model``, on a rank of two; also where a pass works over
    some layers only, and its delay is the others' window."""
    from sglang.srt.arg_groups.overrides import record_of
    from sglang.srt.layers.radix_attention import RadixAttention

    flags = ["--kv-compress", "kara", "--kv-compress-window", "8192", "--tp-size", "2", *kv]
    flags += ["--attention-backend", "fa3"]
    folder = request.getfixturevalue(name)
    launch = read(["--model-path", folder, *flags], 80 * 1024)
    rank = memory.Rank.of(launch)
    asked = []

    class Kernels:
        name = "asked"

        def reserve(self, _device: torch.device, largest: Any) -> int:
            asked.append(largest)
            return 0

    monkeypatch.setattr(runtime, "runtime", fresh := runtime.Runtime())
    monkeypatch.setattr(plugin, "active", lambda: launch.config)
    monkeypatch.setattr(runtime, "pick", lambda _device: (Kernels(), "a test"))
    monkeypatch.setattr(runtime, "rope_shift_of", lambda *_, **__: None)
    layers = [
        RadixAttention(heads[0], dim, 0.1, heads[1], layer_id=i, sliding_window_size=window)
        for i, window in enumerate(windows)
    ]
    weights = memory.weight_bytes(folder, launch.model)
    total, share, _, _ = memory._left(launch, weights)
    before = total - memory.CONTEXT_BYTES
    runner = SimpleNamespace(
        model=torch.nn.ModuleList(layers),
        device="meta",
        dtype=torch.bfloat16,
        memory_saver_adapter=SimpleNamespace(region=lambda _tag: contextlib.nullcontext()),
        model_config=launch.model,
        server_args=record_of(launch.resolved),
        pre_model_load_memory=before / 2**30,
        is_draft_worker=False,
    )
    taken = share + memory.scratch_bytes(launch, rank)
    monkeypatch.setattr(runtime, "free_bytes", lambda _device: before - taken)
    runtime.after_load_model(None, runner)
    assert fresh.refused == []
    ring = memory.ring_of(launch, rank, weights)
    monkeypatch.setattr("kara_sglang.kernels.triton.TritonKernels", Kernels)
    memory.scratch_bytes(launch, rank)
    assert asked[0] == asked[1]
    ours = fresh.parts.recorder
    assert fresh.parts.config == launch.config
    assert launch.config.delay == {"qwen": 64, "gemma": 1024, "gpt_oss": 128}[name]
    assert launch.config.prefix_reuse == ("exact" if name == "gpt_oss" else "auto")
    assert ours.shape.num_layers == windows.count(None) == rank.full_layers
    assert (ring.why, ring.num_pages, ring.page_bytes) == (ours.why, ours.num_pages, ours.page_bytes)
    assert runtime.room_of(runner, layers).slot_bytes == rank.token_bytes
    # A checkpoint may choose fp8, where no flag does.
    runner.model.quant_config = SimpleNamespace(kv_cache_quant_algo="FP8")
    per_slot = rank.token_bytes // rank.kv_itemsize
    assert runtime.room_of(runner, layers).slot_bytes == pytest.approx(per_slot, abs=1)


def test_weights_are_counted_from_files_or_from_the_config(qwen, tmp_path):
    from safetensors.torch import save_file

    model = read(["--model-path", qwen, "--kv-compress", "kara"], 80 * 1024).model
    counted = memory.weight_bytes(qwen, model)
    assert counted == pytest.approx(MODELS[0].parameters * 2e9, rel=1e-3)
    tensors = {"a": torch.zeros(10, 3), "b": torch.zeros(7, dtype=torch.bfloat16)}
    save_file(tensors, tmp_path / "a.safetensors")
    save_file({"c": torch.zeros(5)}, tmp_path / "b.safetensors")
    assert memory.weight_bytes(str(tmp_path), model) == 120 + 14 + 20
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 77}}))
    assert memory.weight_bytes(str(tmp_path), model) == 77
