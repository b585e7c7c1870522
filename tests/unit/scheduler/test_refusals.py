"""What only the real objects can tell is refused in one line that names it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from swa_pools import swa_allocator, swa_pool

from kara_sglang.config import KaraConfig
from kara_sglang.scheduler import refusals


def layer(**changes: Any) -> SimpleNamespace:
    fields = {
        "layer_id": 0,
        "is_cross_attention": False,
        "sliding_window_size": -1,
        "attn_type": SimpleNamespace(value="decoder"),
        "tp_q_head_num": 8,
        "tp_k_head_num": 2,
        "qk_head_dim": 64,
        "v_head_dim": 64,
    }
    return SimpleNamespace(**(fields | changes))


def test_plain_attention_layers_pass() -> None:
    """Whatever a model says for "no sliding window", and beside layers that have one."""
    for none in (-1, None):
        layers = [layer(layer_id=i, sliding_window_size=none) for i in range(3)]
        assert refusals.of_attention_layers(layers) == []
        layers.insert(0, layer(layer_id=0, sliding_window_size=128))
        for number, one in enumerate(layers):
            one.layer_id = number
        assert refusals.of_attention_layers(layers) == []


@pytest.mark.parametrize(
    "layers,kind",
    [
        ([], "has no RadixAttention layer"),
        ([layer(), layer(layer_id=1, is_cross_attention=True)], "cross-attention layers"),
        ([layer(sliding_window_size=4096)], "sliding-window attention layers only"),
        ([layer(attn_type=SimpleNamespace(value="encoder_only"))], "encoder attention layers"),
        ([layer(), layer(layer_id=1, tp_k_head_num=4)], "differ in shape"),
        ([layer(v_head_dim=32)], "differ in shape"),
        ([layer(), layer(layer_id=1, qk_head_dim=128, v_head_dim=128)], "differ in shape"),
        ([layer(layer_id=1)], "not numbered 0, 1, 2"),
        ([layer(), layer()], "not numbered 0, 1, 2"),
        ([layer(), layer(layer_id=2)], "not numbered 0, 1, 2"),
    ],
)
def test_refused_attention_layers(layers: list[Any], kind: str) -> None:
    """What the config could not tell, the layers do."""
    lines = refusals.of_attention_layers(layers)
    assert len(lines) == 1 and kind in lines[0] and "--kv-compress does not support" in lines[0]


def test_the_layers_fields_are_sglangs() -> None:
    """A real RadixAttention has every attribute that is read, and a plain one passes."""
    from sglang.srt.layers.radix_attention import AttentionType, RadixAttention

    real = RadixAttention(num_heads=8, head_dim=64, scaling=0.125, num_kv_heads=2, layer_id=0)
    for name in vars(layer()):
        assert hasattr(real, name), name
    assert refusals.of_attention_layers([real]) == []
    assert {"decoder", "encoder_only"} <= {kind.value for kind in AttentionType}
    windowed = RadixAttention(
        num_heads=8, head_dim=64, scaling=1.0, num_kv_heads=2, layer_id=0, sliding_window_size=64
    )
    assert refusals.of_attention_layers([windowed])


LAYERS = [0, 1]  # that a pass works over

# -- real objects --------------------------------------------------------------------------------------


@pytest.fixture
def scheduler() -> SimpleNamespace:
    """A scheduler's pools and allocator, as SGLang builds them for page size 16."""
    from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, ReqToTokenPool

    pool = MHATokenToKVPool(
        size=256,
        page_size=16,
        dtype=torch.bfloat16,
        head_num=2,
        head_dim=8,
        layer_num=2,
        device="cpu",
        enable_memory_saver=False,
    )
    allocator = PagedTokenToKVPoolAllocator(256, 16, torch.bfloat16, "cpu", pool, need_sort=False)
    rows = ReqToTokenPool(4, 64, "cpu", False)
    return SimpleNamespace(
        token_to_kv_pool_allocator=allocator,
        req_to_token_pool=rows,
        max_total_num_tokens=256,
        tree_cache=SimpleNamespace(cache_controller=None),
        forward_stream=object(),
    )


def test_real_pools_pass(scheduler: SimpleNamespace) -> None:
    """The classes that the pass was written for."""
    assert refusals.of_scheduler(scheduler, KaraConfig(window=128, delay=128), LAYERS) == []


def test_draft_models_with_other_pools_are_refused(scheduler: SimpleNamespace) -> None:
    """One line each, by the pool's class."""
    pool = scheduler.token_to_kv_pool_allocator.get_kvcache()

    class OtherPool(type(pool)):
        pass

    other = object.__new__(OtherPool)
    assert refusals.of_drafts([]) == refusals.of_drafts([pool, pool]) == []
    [line] = refusals.of_drafts([pool, other])
    assert line.startswith(
        "the draft model's KV pool is a OtherPool, --kv-compress supports MHATokenTo"
    )
    assert line.endswith("or serve without --kv-compress")


def test_a_host_tier_that_does_not_wait_for_passes(scheduler: SimpleNamespace) -> None:
    """Its loads must wait for the stream on which a pass runs."""
    config = KaraConfig(window=128, delay=128)
    controller = SimpleNamespace(load_fence_stream=scheduler.forward_stream)
    scheduler.tree_cache.cache_controller = controller
    assert refusals.of_scheduler(scheduler, config, LAYERS) == []
    for other in (None, object()):
        controller.load_fence_stream = other
        [line] = refusals.of_scheduler(scheduler, config, LAYERS)
        assert line.startswith("HiCache") and line.endswith("without --enable-hierarchical-cache")


def test_a_storage_backend_is_not_attached_later() -> None:
    """SGLang can attach one over HTTP; the answer says why not."""
    from kara_sglang.scheduler import runtime

    answer = runtime.attach_storage(None, None, None)
    assert not answer.success and "storage backend does not work with --kv-compress" in answer.message


def test_window_layers_with_a_pool_of_their_own(scheduler: SimpleNamespace) -> None:
    """They pass where the pools are SGLang's plain ones, and hold the layers that the model names."""
    pool = swa_pool(256, 16, dtype=torch.bfloat16, heads=2)
    allocator = swa_allocator(pool, 16)
    plain, scheduler.token_to_kv_pool_allocator = scheduler.token_to_kv_pool_allocator, allocator
    config = KaraConfig(window=128, delay=128)
    assert refusals.of_scheduler(scheduler, config, [1, 3]) == []
    [line] = refusals.of_scheduler(scheduler, config, [0, 2])
    assert line.startswith("SGLang chose a pool of sliding-window layers")
    part = pool.full_kv_pool
    pool.full_kv_pool = type("Packed", (type(part),), {"__init__": lambda self: None})()
    vars(pool.full_kv_pool).update(vars(part))
    [line] = refusals.of_scheduler(scheduler, config, [1, 3])
    assert "the KV pool Packed" in line
    # One that is no pair, with the pair's allocator.
    allocator._kvcache = plain.get_kvcache()
    [line] = refusals.of_scheduler(scheduler, config, LAYERS)
    assert "KV allocator SWATokenToKVPoolAllocator" in line


def test_a_pool_smaller_than_a_window(scheduler: SimpleNamespace) -> None:
    """Nothing would ever be compressed."""
    [line] = refusals.of_scheduler(scheduler, KaraConfig(window=128, delay=129), LAYERS)
    assert "holds 256 tokens" in line and "--kv-compress-window" in line


def test_other_classes_are_refused(scheduler: SimpleNamespace) -> None:
    """Subclasses too: they may lay K/V out differently."""
    kind = type(scheduler.req_to_token_pool)
    scheduler.req_to_token_pool = type("OtherPool", (kind,), {})(4, 64, "cpu", False)
    [line] = refusals.of_scheduler(scheduler, KaraConfig(window=128), LAYERS)
    assert "request pool OtherPool" in line and "ReqToTokenPool" in line
    allocator = scheduler.token_to_kv_pool_allocator
    pool = allocator._kvcache
    allocator._kvcache = type("SwaPool", (type(pool),), {"__init__": lambda self: None})()
    vars(allocator._kvcache).update(vars(pool))
    lines = refusals.of_scheduler(scheduler, KaraConfig(window=128), LAYERS)
    assert any("KV pool SwaPool" in line for line in lines)


def test_another_layout_or_dtype_is_refused(scheduler: SimpleNamespace) -> None:
    """What flags could not tell: a pipeline stage, a layout with another order, numbers of 4 bits."""
    pool = scheduler.token_to_kv_pool_allocator.get_kvcache()
    pool.start_layer = 3
    assert refusals.of_scheduler(scheduler, KaraConfig(window=128), LAYERS)
    pool.start_layer = 0
    pool.k_buffer[0] = pool.k_buffer[0][None]
    assert refusals.of_scheduler(scheduler, KaraConfig(window=128), LAYERS)
    pool.k_buffer[0] = pool.k_buffer[0][0]
    assert refusals.of_scheduler(scheduler, KaraConfig(window=128), LAYERS) == []
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.float32):
        pool.dtype = dtype
        assert refusals.of_scheduler(scheduler, KaraConfig(window=128), LAYERS) == []
    for dtype in (torch.float4_e2m1fn_x2, torch.float8_e4m3fnuz, torch.uint8):
        pool.dtype = dtype
        [line] = refusals.of_scheduler(scheduler, KaraConfig(window=128), LAYERS)
        assert str(dtype) in line and "\n" not in line
