"""The CPU engine's attention for window layers with a pool of their own, against a plain account."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cpu_site import load
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from swa_pools import swa_pool

plugin = load("kara_cpu_windows")
HEADS, KV_HEADS, DIM = 4, 2, 8


def plain(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: list[int],
    window: int | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """A request's newest tokens, one number after the other; shapes as in ``attention``."""
    out = torch.zeros(len(q), HEADS, DIM)
    for new in range(len(q)):
        place = len(slots) - len(q) + new
        first = 0 if window is None else max(0, place - window)
        seen = slots[first : place + 1]
        for head in range(HEADS):
            kv = head // (HEADS // KV_HEADS)
            logits = [float(q[new, head] @ keys[slot, kv]) * 0.3 for slot in seen]
            rest = 0.0 if sinks is None else math.exp(sinks[head])
            total = sum(math.exp(logit) for logit in logits) + rest
            for logit, slot in zip(logits, seen, strict=True):
                out[new, head] += math.exp(logit) / total * values[slot, kv]
    return out.flatten(1)


@pytest.mark.parametrize("window", [None, -1, 0, 3])
@pytest.mark.parametrize("sinks", [None, torch.tensor([0.5, -1.0, 3.0, 0.0])])
def test_attention(window: int | None, sinks: torch.Tensor | None) -> None:
    torch.manual_seed(0)
    keys, values = torch.randn(2, 40, KV_HEADS, DIM)
    rows = torch.randperm(40)[:27].view(3, 9).int()
    lengths, news = [7, 9, 1], [1, 4, 1]
    q = torch.randn(sum(news), HEADS, DIM)
    got = plugin.attention(q, keys, values, rows, lengths, news, 0.3, window=window, sinks=sinks)
    reach, first = (window if window is not None and window >= 0 else None), 0
    for row, length, new in zip(rows.tolist(), lengths, news, strict=True):
        expected = plain(q[first : first + new], keys, values, row[:length], reach, sinks)
        torch.testing.assert_close(got[first : first + new], expected, atol=1e-5, rtol=1e-5)
        first += new


def step(layer_id: int, mode: ForwardMode) -> tuple[Any, Any, Any]:
    """A backend with a pool whose layer 0 has a window of 3 before a token, a layer, and a step in
    which one request of five tokens computes its last."""
    pool = swa_pool(40, 1, heads=KV_HEADS, windowed=[0], full=[1])
    mapping = torch.zeros(42, dtype=torch.int64)
    row = torch.tensor([30, 11, 25, 38, 9])
    mapping[row[1:]] = torch.tensor([4, 17, 2, 8])  # the first token has left the window
    pool.register_mapping(mapping)
    for one in (pool.full_kv_pool, pool.swa_kv_pool):
        for buffer in (*one.k_buffer, *one.v_buffer):
            buffer.normal_()
    backend = SimpleNamespace(
        token_to_kv_pool=pool,
        use_sliding_window_kv_pool=True,
        swa_out_cache_loc=torch.tensor([8]),
        req_to_token_pool=SimpleNamespace(req_to_token=torch.stack((row, row.flip(0)))),
    )
    layer = SimpleNamespace(
        layer_id=layer_id,
        tp_q_head_num=HEADS,
        qk_head_dim=DIM,
        scaling=0.3,
        sliding_window_size=3 if layer_id == 0 else -1,
    )
    batch = SimpleNamespace(
        forward_mode=mode,
        out_cache_loc=torch.tensor([9]),
        req_pool_indices=torch.tensor([0]),
        seq_lens=torch.tensor([5]),
        extend_seq_lens=torch.tensor([1]),
    )
    return backend, layer, batch


@pytest.mark.parametrize("mode", [ForwardMode.DECODE, ForwardMode.EXTEND])
@pytest.mark.parametrize(("layer_id", "slots"), [(0, [0, 4, 17, 2, 8]), (1, [30, 11, 25, 38, 9])])
def test_each_pool_is_written_and_read_by_its_own_slots(
    layer_id: int, slots: list[int], mode: ForwardMode
) -> None:
    backend, layer, batch = step(layer_id, mode)
    q, sinks = torch.randn(1, HEADS * DIM), torch.randn(HEADS)
    k, v = torch.randn(2, 1, KV_HEADS, DIM)
    got = plugin.forward(None, backend, q, k, v, layer, batch, True, sinks=sinks)
    pool = backend.token_to_kv_pool
    keys, values = pool.get_key_buffer(layer_id), pool.get_value_buffer(layer_id)
    assert torch.equal(keys[slots[-1]], k[0]) and torch.equal(values[slots[-1]], v[0])
    window = 3 if layer_id == 0 else None
    expected = plain(q.view(1, HEADS, DIM), keys, values, slots, window, sinks)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_all_else_is_sglangs() -> None:
    """A full layer without sinks, and a step without tokens; drafts are not verified here."""

    def original(*args: Any) -> tuple[Any, ...]:
        return args

    for layer_id, mode in (
        (1, ForwardMode.DECODE),
        (1, ForwardMode.TARGET_VERIFY),
        (0, ForwardMode.IDLE),
    ):
        backend, layer, batch = step(layer_id, mode)
        given = (backend, "q", "k", "v", layer, batch, False)
        assert plugin.forward(original, *given) == given
    backend, layer, batch = step(0, ForwardMode.TARGET_VERIFY)
    with pytest.raises(NotImplementedError, match="TARGET_VERIFY"):
        plugin.forward(original, backend, "q", "k", "v", layer, batch)


def test_experts_compile_nothing_and_gpt_oss_may_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the checks of a model are told of another backend."""
    from sglang.srt.arg_groups import model_hook, model_override_base
    from sglang.srt.layers.moe import fused_moe_native
    from sglang.srt.plugins.hook_registry import HookRegistry

    name = "swiglu_gpt_oss_sigmoid_alpha"
    monkeypatch.setattr(fused_moe_native, name, getattr(fused_moe_native, name))
    told = model_override_base.attention_backends_of
    monkeypatch.setattr(model_hook, "attention_backends_of", told)
    targets: list[str] = []
    monkeypatch.setattr(HookRegistry, "register", lambda target, *_: targets.append(target))
    plugin.register()
    assert targets == [f"{plugin.BACKEND}.forward"]
    settings = SimpleNamespace(
        attention_backend="torch_native", prefill_attention_backend=None, decode_attention_backend="fa3"
    )
    assert model_hook.attention_backends_of(settings) == ("intel_amx", "fa3")
    assert model_override_base.attention_backends_of is told
    activation = getattr(fused_moe_native, name)
    assert not hasattr(activation, "_torchdynamo_orig_callable")
    gate, up = torch.tensor([0.5, 9.0]), torch.tensor([-8.0, 0.25])
    expected = [0.5 * math.exp(0.85) / (1 + math.exp(0.85)) * -6, 7 / (1 + math.exp(-11.9)) * 1.25]
    got = activation(torch.stack((gate, up), -1).flatten(), 1.7, 7.0)
    torch.testing.assert_close(got, torch.tensor(expected))
