"""The hook behind ``ModelRunner.load_model`` takes all memory of a pass before the KV pool is sized."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.server_args import ServerArgs

from kara_sglang import plugin
from kara_sglang.config import KaraConfig
from kara_sglang.kernels.selectors import REGISTRY
from kara_sglang.kernels.triton import TritonKernels, backend
from kara_sglang.scheduler import runtime

HEADS, GROUP, DIM = 2, 16, 16


class Attention(torch.nn.Module):
    """As in SGLang's models: what rotates queries stands beside the layer that attends."""

    def __init__(self, layer: int, reach: int = -1) -> None:
        super().__init__()
        heads = HEADS * GROUP
        self.attn = RadixAttention(heads, DIM, 0.25, HEADS, layer_id=layer, sliding_window_size=reach)
        self.rotary_emb = SimpleNamespace(cos_sin_cache=torch.ones(300, DIM), is_neox_style=True)


def loaded(monkeypatch: pytest.MonkeyPatch, config: KaraConfig, *layers: Attention) -> runtime.Runtime:
    """What the process has built once SGLang has loaded a model with these layers."""
    fresh = runtime.Runtime()
    monkeypatch.setattr(runtime, "runtime", fresh)
    monkeypatch.setattr(plugin, "active", lambda: config)
    monkeypatch.setattr(runtime, "pick", lambda device: (TritonKernels(), "a test"))
    runner = SimpleNamespace(
        model=torch.nn.ModuleList(layers),
        device="cpu",
        dtype=torch.bfloat16,
        memory_saver_adapter=SimpleNamespace(region=lambda _tag: contextlib.nullcontext()),
        model_config=SimpleNamespace(hf_text_config=SimpleNamespace()),
        server_args=ServerArgs(model_path="none"),
        is_draft_worker=False,
    )
    runtime.after_load_model(None, runner)
    assert fresh.refused == []
    return fresh


@pytest.mark.parametrize(("asked", "delay"), [(0, 41), (16, 41), (41, 41), (64, 64)])
def test_the_delay_covers_what_a_step_in_flight_sees_of_a_sliding_window(monkeypatch, asked, delay):
    """Its newest token was the last one when it began: 40 tokens before that, and itself. Whatever the
    model's config calls its window."""
    config = KaraConfig(selector="random", window=256, delay=asked)
    fresh = loaded(monkeypatch, config, Attention(0, reach=40), Attention(1))
    assert fresh.parts.config.delay == delay
    assert loaded(monkeypatch, config, Attention(0)).parts.config.delay == asked


@pytest.mark.parametrize("query_mem_gb", [0.01, 0])
def test_whatever_a_request_asks_for_fits(monkeypatch, query_mem_gb):
    """Also where one window of one layer takes more than the usual scratch."""
    selector = "kara" if query_mem_gb else "random"
    config = KaraConfig(selector=selector, window=256, delay=16, query_mem_gb=query_mem_gb)
    monkeypatch.setattr(backend, "SCRATCH_BYTES", 0)
    fresh = loaded(monkeypatch, config, *(Attention(i) for i in range(2)))
    kernels, shift = fresh.parts.kernels, fresh.parts.rope_shift
    assert shift is None if not query_mem_gb else shift.cos.shape == (2, DIM)
    assert bool(fresh.parts.recorder.num_pages) == bool(query_mem_gb)
    assert isinstance(kernels, TritonKernels)
    for kind in REGISTRY.values():
        if kind.needs_queries and not query_mem_gb:
            continue
        for voices in (1, GROUP) if kind.needs_queries else (0,):
            shape = backend.WindowShape(2, HEADS, DIM, torch.float16, 256, 256, voices, 256 + 16)
            assert kernels._layers_at_once(shape, kernels._at_once(shape)) >= 1
    voices = GROUP if query_mem_gb else 0
    too_wide = backend.WindowShape(2, HEADS, DIM, torch.float16, 1024, 256, voices, 1024)
    with pytest.raises(RuntimeError, match="bytes of scratch"):
        kernels._layers_at_once(too_wide, 1)
