"""Attention scores: Triton and the torch reference against a float64 brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from kara_sglang.kernels import record as ring
from kara_sglang.kernels.backend import LayerPool
from kara_sglang.kernels.score import AttentionRule
from kara_sglang.kernels.score import attention_scores as reference_scores
from kara_sglang.kernels.triton.pool import PoolTables
from kara_sglang.kernels.triton.score import Voters, attention_scores, dot_dtype

pytestmark = pytest.mark.usefixtures("interpreted")

FP8, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
SUM, BEST = AttentionRule(), AttentionRule(squared=True, value_norm=4)


def triton_scores(
    pool: LayerPool,
    slots: torch.Tensor,
    units: torch.Tensor,
    starts: list[int],
    count: int,
    rule: AttentionRule,
) -> torch.Tensor:
    """``(num_layers, num_jobs, num_kv_heads, W)``."""
    tables = PoolTables.of(pool)
    first = max(0, count - (rule.last_queries or count))
    voters = Voters(units, torch.tensor(starts), first, count - first)
    shape = (tables.num_layers, slots.shape[0], tables.num_kv_heads)
    out = torch.full((*shape, slots.shape[1]), float("nan"))
    sums = torch.full((math.prod(shape) * voters.rows,), float("nan"))
    attention_scores(
        tables,
        range(tables.num_layers),
        slots,
        voters,
        ring_len=pool.ring_len,
        rule=rule,
        sums=sums,
        out=out,
    )
    return out


def brute_force(
    pool: LayerPool,
    slots: torch.Tensor,
    units: torch.Tensor,
    starts: list[int],
    count: int,
    rule: AttentionRule,
) -> np.ndarray:
    """One query at a time, float64, from the definition."""
    num_heads = pool.keys[0].shape[1]
    num_jobs, width = slots.shape
    out = np.zeros((len(pool.keys), num_jobs, num_heads, width))
    for layer, (keys, values, queries) in enumerate(
        zip(pool.keys, pool.values, pool.rings, strict=True)
    ):
        keys, values, queries = (x.double().numpy() for x in (keys, values, queries))
        for job in range(num_jobs):
            window = slots[job].numpy()
            for head in range(num_heads):
                for token in range(count):
                    if rule.last_queries is not None and token < count - rule.last_queries:
                        continue
                    visible = min(token + 1, width) if rule.causal else width
                    place = (starts[job] + token) % pool.ring_len
                    for unit in units[job].tolist():
                        query = queries[unit * pool.ring_len + place, head]
                        logits = keys[window[:visible], head] @ query * pool.scales[layer]
                        weights = np.exp(logits - logits.max())
                        weights /= weights.sum()
                        out[layer, job, head, :visible] += weights**2 if rule.squared else weights
                if rule.value_norm:
                    out[layer, job, head] *= (
                        np.linalg.norm(values[window, head], axis=-1) ** rule.value_norm
                    )
    return out


def check(pool, slots, units, starts, count, rule, tolerance=2e-5):
    expected = brute_force(pool, slots, units, starts, count, rule)
    ours = triton_scores(pool, slots, units, starts, count, rule).double().numpy()
    np.testing.assert_allclose(ours, expected, rtol=tolerance, atol=1e-7)
    for layer in range(len(pool.keys)):
        for job, window in enumerate(slots.long()):
            queries = ring.recorded(pool.rings[layer], starts[job], count, units[job], pool.ring_len)
            theirs = reference_scores(
                queries,
                pool.keys[layer].float()[window],
                pool.values[layer].float()[window],
                scale=pool.scales[layer],
                rule=rule,
            )
            np.testing.assert_allclose(
                theirs.double().numpy(), expected[layer, job], rtol=tolerance, atol=1e-7
            )


@pytest.mark.parametrize("dim", [64, 80, 96, 128, 192, 256])
def test_head_dims(make, dim):
    pool = make.pool(dim, dim=dim, ring_len=64, dtype=torch.bfloat16, ring_dtype=torch.bfloat16)
    slots = make.windows(2, 48, slots=256, seed=dim, page=16)
    check(pool, slots, torch.tensor([[0, 3], [2, 1]]), [16, 777], 57, BEST)


@pytest.mark.parametrize("group", [1, 3, 5, 7, 12])
@pytest.mark.parametrize("num_jobs", [1, 3])
def test_groups_and_jobs(make, group, num_jobs):
    pool = make.pool(group, heads=3, units=num_jobs * group, ring_len=51)
    slots = make.windows(num_jobs, 48, slots=256, seed=group)
    units = torch.randperm(num_jobs * group).view(num_jobs, group)
    starts = [int(start) for start in torch.randint(0, 10_000, (num_jobs,))]
    check(pool, slots, units, starts, 51, SUM)


def test_seven_jobs_with_rotating_recorders(make):
    pool = make.pool(7, heads=2, units=9, ring_len=70, slots=512)
    slots = make.windows(7, 48, slots=512, seed=7, page=16, dtype=torch.int64)
    units = torch.randperm(9)[:7].view(7, 1)
    check(pool, slots, units, [3 + 1001 * job for job in range(7)], 64, BEST)


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("last", [None, 1, 20], ids=["all", "last1", "last20"])
@pytest.mark.parametrize("count", [176, 205])
def test_rules_over_several_blocks(make, causal, last, count):
    """W = 176 is two and three quarters blocks of 64 keys; 205 queries include a delay's."""
    pool = make.pool(3, layers=2, heads=1, dim=64, slots=256, units=2, ring_len=205)
    slots = make.windows(1, 176, slots=256, seed=5, page=16)
    rule = AttentionRule(squared=count == 205, value_norm=1, causal=causal, last_queries=last)
    check(pool, slots, torch.tensor([[1, 0]]), [100], count, rule)


def test_a_window_of_a_thousand(make):
    pool = make.pool(11, heads=1, dim=64, slots=1024, units=1, ring_len=1010)
    slots = make.windows(1, 1000, slots=1024, seed=3)
    check(pool, slots, torch.tensor([[0]]), [123_456_789_012], 1010, SUM, tolerance=1e-4)


@pytest.mark.parametrize(
    ("key_dtype", "ring_dtype", "expected"),
    [
        (torch.float16, torch.float16, torch.float16),
        (torch.float16, FP8, torch.float16),
        (torch.bfloat16, FP8, torch.bfloat16),
        (FP8, torch.bfloat16, torch.bfloat16),
        (FP8, FP8, torch.float16),
        (E5M2, FP8, torch.float16),
        (torch.float16, torch.bfloat16, torch.float32),
    ],
    ids=str,
)
def test_types(make, key_dtype, ring_dtype, expected):
    """Both operands become the type that holds each exactly, so nothing but the sums rounds."""
    assert dot_dtype(key_dtype, ring_dtype) == expected
    pool = make.pool(5, dtype=key_dtype, ring_dtype=ring_dtype)
    slots = make.windows(2, 48, slots=256, seed=1)
    check(pool, slots, torch.tensor([[0, 3], [2, 1]]), [16, 777], 57, BEST)


def test_values_of_another_width(make):
    pool = make.pool(5, dim=64, value_dim=40)
    slots = make.windows(1, 48, slots=256, seed=1)
    check(pool, slots, torch.tensor([[0, 3]]), [16], 48, BEST)


def test_large_logits_do_not_overflow(make):
    pool = make.pool(5)
    for keys in pool.keys:
        keys *= 60
    slots = make.windows(1, 48, slots=256, seed=1)
    check(pool, slots, torch.tensor([[0, 3]]), [16], 48, SUM, tolerance=1e-3)


def test_only_the_windows_own_slots_and_queries_are_read(make):
    """NaN everywhere else does not show, nor what lies behind a head of 80 in a tile of 128."""
    pool = make.pool(9, dim=80, units=3, ring_len=64)
    slots = make.windows(2, 48, slots=256, seed=2)
    units, starts, count = torch.tensor([[2], [0]]), [40, 90], 57
    arguments = (slots, units, starts, count, BEST)
    clean = triton_scores(pool, *arguments)
    used = torch.zeros(256, dtype=torch.bool)
    used[slots.flatten().long()] = True
    recorded = torch.zeros(len(pool.rings[0]), dtype=torch.bool)
    for job in range(2):
        places = torch.arange(starts[job], starts[job] + count) % 64
        recorded[units[job, 0] * 64 + places] = True
    for buffer in (*pool.keys, *pool.values):
        buffer[~used] = float("nan")
    pool.rings[0][~recorded] = float("nan")
    assert torch.equal(triton_scores(pool, *arguments), clean)
