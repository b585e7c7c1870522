"""K and V in 8 bits: SGLang's pool, its scales, and the scores that a pass gives to what it stores."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.layers.quantization.kv_cache import BaseKVCacheMethod
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.mem_cache.memory_pool import KVWriteLoc, MHATokenToKVPool

from kara_sglang.config import KaraConfig
from kara_sglang.kernels import selectors
from kara_sglang.kernels.backend import LayerPool, TorchKernels, WindowJob, reference_scores
from kara_sglang.kernels.record import PAGE, Ring
from kara_sglang.scheduler.compaction import Compaction
from kara_sglang.scheduler.ring.recorder import AttentionShape, QueryRecorder
from kara_sglang.scheduler.scales import softmax_scales

LAYERS, HEADS, DIM, WIDTH = 2, 2, 16, 48
TYPES = [torch.float8_e4m3fn, torch.float8_e5m2]
SCALES = [(0.037, 2.9), (3.1, 0.21)]  # k_scale and v_scale of each layer
CONFIG = KaraConfig(window=WIDTH, delay=0, ahead=False)


class Checkpoint(RadixAttention):
    """A layer with scales, or with none, as SGLang loads them."""

    def __init__(self, layer_id: int, scales: tuple[float, float] | None) -> None:
        super().__init__(HEADS, DIM, 0.25, HEADS, layer_id)
        if scales is not None:
            method = BaseKVCacheMethod(None)
            method.create_weights(self)
            for scale, loaded in zip((self.k_scale, self.v_scale), scales, strict=True):
                scale.data.fill_(loaded)
            method.process_weights_after_loading(self)


def layers(*scales: tuple[float, float] | None) -> list[Checkpoint]:
    return [Checkpoint(number, pair) for number, pair in enumerate(scales)]


def pool_of(dtype: torch.dtype) -> MHATokenToKVPool:
    return MHATokenToKVPool(64, 16, dtype, HEADS, DIM, LAYERS, "cpu", enable_memory_saver=False)


def compaction_of(pool: MHATokenToKVPool, model: list[Checkpoint], backend: str) -> Compaction:
    """The real one, over as much of a scheduler as it looks at before a pass."""
    scheduler = SimpleNamespace(
        page_size=16,
        token_to_kv_pool_allocator=SimpleNamespace(get_kvcache=lambda: pool),
        req_to_token_pool=SimpleNamespace(req_to_token=torch.zeros(2, WIDTH, dtype=torch.int32)),
    )
    shape = AttentionShape(LAYERS, HEADS, HEADS, DIM, torch.float32, torch.device("cpu"))
    recorder = QueryRecorder(shape, WIDTH, 0, 0, torch.float32)
    return Compaction(
        scheduler,
        CONFIG,
        recorder,
        TorchKernels(),
        lambda: softmax_scales(model, pool.dtype, backend),
        None,
    )


def written(
    dtype: torch.dtype, model: list[Checkpoint], *, scaled: bool, backend: str = "triton"
) -> tuple[LayerPool, LayerPool, torch.Tensor]:
    """What a pass reads of a window that a backend has stored, and the same dequantised; its slots."""
    pool, slots = pool_of(dtype), torch.randperm(64)[:WIDTH] + 16
    keys, values = [], []
    for layer in model:
        k, v = torch.randn(2, WIDTH, HEADS, DIM)
        scales = (layer.k_scale, layer.v_scale) if scaled else ()
        # In place: SGLang divides what it is given.
        pool.set_kv_buffer(layer, KVWriteLoc(slots, None), k.clone(), v.clone(), *scales)
        k_scale, v_scale = (layer.k_scale_float, layer.v_scale_float) if scaled else (1, 1)
        keys.append(pool.get_key_buffer(layer.layer_id).double() * (k_scale or 1))
        values.append(pool.get_value_buffer(layer.layer_id).double() * (v_scale or 1))
        torch.testing.assert_close(keys[-1][slots].float(), k, rtol=0.2, atol=0.1)
    rings = [Ring(torch.randn(PAGE + 1, HEADS, DIM)) for _ in model]
    read = dataclasses.replace(compaction_of(pool, model, backend)._pool(), rings=rings)
    return read, LayerPool(keys, values, rings, [0.25] * LAYERS), slots


def job(name: str, slots: torch.Tensor) -> WindowJob:
    selector = selectors.build(name, CONFIG)
    pages = ((0,),) if selector.needs_queries else None
    return WindowJob(slots, 16, selector, 7, 0, WIDTH, pages)


@pytest.mark.parametrize("name", sorted(set(selectors.REGISTRY) - {"identity"}))
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("loaded", [True, False], ids=["scales", "no scales"])
def test_scores_are_those_of_dequantised_k_and_v(dtype: torch.dtype, name: str, loaded: bool) -> None:
    """In float64, from K and V as attention takes them; up to a factor per layer, which ranks nothing:
    the same tokens are kept. They are moved byte by byte."""
    torch.manual_seed(3)
    read, dequantised, slots = written(
        dtype, layers(*(SCALES if loaded else (None, None))), scaled=True
    )
    one = job(name, slots)
    for layer in range(LAYERS):
        ours = reference_scores(read, one, layer).double()
        true = reference_scores(dequantised, one, layer).double()
        torch.testing.assert_close(ours / ours.max(), true / true.max(), rtol=2e-4, atol=0)
    before = [buffer.clone() for buffer in (*read.keys, *read.values)]
    (kept,) = TorchKernels().compress(read, [one], positions=True)
    (expected,) = TorchKernels().compress(dequantised, [one], positions=True)
    assert torch.equal(kept, expected)
    for number, (buffer, old) in enumerate(zip((*read.keys, *read.values), before, strict=True)):
        for head in range(HEADS):
            sources = slots[kept[number % LAYERS, head]]
            moved, still = buffer.view(torch.uint8), old.view(torch.uint8)
            assert torch.equal(moved[slots[:16], head], still[sources, head])


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_a_scale_that_is_not_seen_would_show(dtype: torch.dtype) -> None:
    """The test above can fail: without `k_scale` other tokens are kept."""
    torch.manual_seed(3)
    read, dequantised, slots = written(dtype, layers(*SCALES), scaled=True)
    one = job("kara", slots)
    (kept,) = TorchKernels().compress(
        dataclasses.replace(read, scales=dequantised.scales), [one], positions=True
    )
    (expected,) = TorchKernels().compress(dequantised, [one], positions=True)
    assert not torch.equal(kept, expected)


def test_torch_native_stores_k_and_v_unscaled() -> None:
    """Whatever scales a checkpoint has (``layers/attention/torch_native_backend.py``)."""
    model = layers(*SCALES)
    read, dequantised, _ = written(TYPES[0], model, scaled=False, backend="torch_native")
    assert read.scales == dequantised.scales
    assert softmax_scales(model, TYPES[0], "intel_amx") == pytest.approx([0.25 * 0.037, 0.25 * 3.1])


def test_which_scale_counts() -> None:
    model = layers(SCALES[0], None)
    loaded = pytest.approx(0.25 * 0.037)
    assert softmax_scales(model, torch.float8_e5m2, "fa3") == [loaded, 0.25]
    # A 16-bit pool keeps K as it is, also where the checkpoint has scales.
    assert softmax_scales(model, torch.bfloat16, "flashinfer") == [0.25, 0.25]
    # As --quantization-param-path leaves a layer (``load_kv_cache_scales`` of SGLang's models).
    model[1].k_scale = model[1].v_scale = 0.5
    assert softmax_scales(model, torch.float8_e4m3fn, "flashinfer") == [loaded, 0.125]


def test_other_weights_bring_other_scales() -> None:
    """SGLang can load others while it serves; the next pass reads theirs."""
    model = layers(*SCALES)
    compaction = compaction_of(pool_of(TYPES[0]), model, "triton")
    before = compaction._pool()
    assert compaction._pool() is before
    model[1].k_scale_float = 8.0
    after = compaction._pool()
    assert after is not before and after.scales == [before.scales[0], 2.0]


@pytest.mark.parametrize("dtype", [*TYPES, torch.bfloat16], ids=str)
def test_a_pass_sees_numbers_where_sglang_keeps_bytes(dtype: torch.dtype) -> None:
    pool = pool_of(dtype)
    assert pool.k_buffer[0].dtype == (torch.uint8 if dtype in TYPES else dtype)
    read = compaction_of(pool, layers(None, None), "triton")._pool()
    for views, buffers in ((read.keys, pool.k_buffer), (read.values, pool.v_buffer)):
        for view, buffer in zip(views, buffers, strict=True):
            assert view.dtype == dtype and view.data_ptr() == buffer.data_ptr()
