"""Scores without queries: Triton and the torch reference against a float64 brute force."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from kara_sglang.kernels.backend import LayerPool
from kara_sglang.kernels.score import LEAST_SCORE, NEIGHBOURS_SHARE, WeightRule
from kara_sglang.kernels.score import weight_scores as reference_scores
from kara_sglang.kernels.select import ChunkRule
from kara_sglang.kernels.triton.pool import PoolTables
from kara_sglang.kernels.triton.prepare import weight_scores
from kara_sglang.kernels.triton.select import select

pytestmark = pytest.mark.usefixtures("interpreted")

FP8, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
KEYS = WeightRule(value_norm=4, key_distance=True, neighbours=13)


def triton_scores(
    pool: LayerPool, slots: torch.Tensor, rule: WeightRule, layers: range | None = None
) -> torch.Tensor:
    """``(len(layers), num_jobs, num_kv_heads, W)``, as they are when they have been selected by; the
    pool has no ring."""
    tables = PoolTables.of(dataclasses.replace(pool, rings=[], rope_shift=None))
    layers = range(tables.num_layers) if layers is None else layers
    out = torch.full((len(layers), len(slots), tables.num_kv_heads, slots.shape[1]), float("nan"))
    weight_scores(tables, layers, slots, rule=rule, out=out)()
    kept = torch.empty((*out.shape[:-1], 1), dtype=torch.int32)
    select(out, 1, ChunkRule(), kept, neighbours=rule.neighbours, shared=rule.per_layer)()
    return out[:, :, :1] if rule.per_layer else out


def brute_force(pool: LayerPool, slots: torch.Tensor, rule: WeightRule) -> np.ndarray:
    """One head at a time, float64, from the definition."""
    num_heads = pool.keys[0].shape[1]
    out = np.ones((len(pool.keys), len(slots), num_heads, slots.shape[1]))
    for layer, (keys, values) in enumerate(zip(pool.keys, pool.values, strict=True)):
        keys, values = keys.double().numpy(), values.double().numpy()
        for job, window in enumerate(slots.numpy()):
            for head in range(num_heads):
                score = np.linalg.norm(values[window, head], axis=-1) ** rule.value_norm
                if rule.key_distance:
                    every = keys[window, head]
                    mean = every.mean(axis=0)
                    lengths = np.linalg.norm(every, axis=-1) * np.linalg.norm(mean)
                    score = score * (1 - every @ mean / lengths)
                out[layer, job, head] = blended(score, rule.neighbours)
            if rule.per_layer:
                out[layer, job, :1] = out[layer, job].sum(axis=0)
    return out[:, :, :1] if rule.per_layer else out


def blended(scores: np.ndarray, neighbours: int) -> np.ndarray:
    """One token at a time."""
    reach = neighbours // 2
    if not reach:
        return scores
    scores = np.maximum(scores, LEAST_SCORE)
    around = [scores[max(0, at - reach) : at + reach + 1] for at in range(len(scores))]
    means = np.array([np.prod(near ** (1 / len(near))) for near in around])
    return scores ** (1 - NEIGHBOURS_SHARE) * means**NEIGHBOURS_SHARE


def check(pool: LayerPool, slots: torch.Tensor, rule: WeightRule) -> None:
    expected = brute_force(pool, slots, rule)
    ours = triton_scores(pool, slots, rule).double().numpy()
    np.testing.assert_allclose(ours, expected, rtol=5e-5)
    for layer, (keys, values) in enumerate(zip(pool.keys, pool.values, strict=True)):
        for job, window in enumerate(slots.long()):
            # 8-bit floats have no index of their own on a CPU.
            theirs = reference_scores(keys.float()[window], values.float()[window], rule)
            theirs = theirs[: expected.shape[2]]
            np.testing.assert_allclose(theirs.double().numpy(), expected[layer, job], rtol=5e-5)


@pytest.mark.parametrize("dim", [64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, FP8], ids=str)
def test_head_dims(make, dim, dtype):
    pool = make.pool(dim, layers=2, dim=dim, dtype=dtype)
    check(pool, make.windows(2, 48, slots=256, seed=dim, page=16), KEYS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, E5M2], ids=str)
def test_types(make, dtype):
    check(make.pool(5, dtype=dtype), make.windows(2, 48, slots=256, seed=1), KEYS)


@pytest.mark.parametrize("value_norm", [0, 1, 4])
@pytest.mark.parametrize("key_distance", [False, True])
@pytest.mark.parametrize("neighbours", [1, 41])
@pytest.mark.parametrize("per_layer", [False, True])
def test_rules(make, value_norm, key_distance, neighbours, per_layer):
    pool = make.pool(3, layers=2, heads=3, dim=32)
    rule = WeightRule(value_norm, key_distance, neighbours, per_layer)
    check(pool, make.windows(2, 40, slots=256, seed=2, page=8), rule)


@pytest.mark.parametrize("width", [1, 5, 63, 64, 65, 176, 700])
def test_windows_of_several_blocks(make, width):
    """One key is the mean key itself, so that its distance is 0 up to rounding: see below."""
    pool = make.pool(width, heads=1, dim=32, slots=1024)
    rule = KEYS if width > 1 else WeightRule(value_norm=4)
    check(pool, make.windows(1, width, slots=1024, seed=3), rule)


def test_seven_jobs_and_slots_of_64_bits(make):
    pool = make.pool(7, heads=2, slots=512)
    check(pool, make.windows(7, 48, slots=512, seed=7, page=16, dtype=torch.int64), KEYS)


def test_values_of_another_width(make):
    check(make.pool(5, dim=64, value_dim=40), make.windows(1, 48, slots=256, seed=1), KEYS)


def test_some_of_the_layers(make):
    """Scores of layers in the middle are those that they have among all."""
    pool = make.pool(5, layers=4, heads=2, dim=32)
    slots = make.windows(2, 48, slots=256, seed=1)
    every = triton_scores(pool, slots, KEYS)
    assert torch.equal(triton_scores(pool, slots, KEYS, range(1, 3)), every[1:3])


@pytest.mark.parametrize("kind", ["common part", "equal", "zero"])
def test_distances_of_keys_that_are_alike(make, kind):
    """Close to the mean key float32 has few digits left; without a direction the distance is 1."""
    pool = make.pool(17, heads=2, dim=80, slots=128)
    slots = make.windows(1, 48, slots=128, seed=4, page=16)
    if kind == "common part":
        pool.keys[0] += 5
    else:
        pool.keys[0].fill_(kind == "equal")
    far = triton_scores(pool, slots, WeightRule(key_distance=True))[0, 0]
    every = pool.keys[0].double()[slots[0].long()]
    cosine = torch.cosine_similarity(every, every.mean(dim=0, keepdim=True), dim=-1)
    torch.testing.assert_close(far.double(), 1 - cosine.T, rtol=1e-3, atol=1e-6)


def test_only_the_windows_own_slots_are_read(make):
    """NaN everywhere else does not show, nor what lies behind a head of 80 in a tile of 128."""
    pool = make.pool(9, dim=80)
    slots = make.windows(2, 48, slots=256, seed=2)
    clean = triton_scores(pool, slots, KEYS)
    used = torch.zeros(256, dtype=torch.bool)
    used[slots.flatten().long()] = True
    for buffer in (*pool.keys, *pool.values):
        buffer[~used] = float("nan")
    assert torch.equal(triton_scores(pool, slots, KEYS), clean)


@pytest.mark.parametrize("part", ["keys", "values"])
def test_nan_stays_nan(make, part):
    """As in torch: a key spoils the mean and so its head's window, a value its neighbours."""
    pool = make.pool(9, heads=2, dim=32)
    slots = make.windows(1, 48, slots=256, seed=2)
    window = slots[0].long()
    getattr(pool, part)[0][window[20], 1] = float("nan")
    ours = triton_scores(pool, slots, KEYS)[0, 0]
    theirs = reference_scores(pool.keys[0][window], pool.values[0][window], KEYS)
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert ours.isnan().sum() == (48 if part == "keys" else 13)
    torch.testing.assert_close(ours, theirs, equal_nan=True, rtol=5e-5, atol=0)


def test_what_does_not_fit_is_refused(make):
    pool = make.pool(5)
    tables = PoolTables.of(pool)
    slots = make.windows(1, 48, slots=256, seed=1)
    out = torch.empty(1, 1, 2, 48)
    with pytest.raises(ValueError, match=r"scores of shape \(1, 1, 2, 48\) for 2 layers"):
        weight_scores(tables, range(2), slots, rule=KEYS, out=out)
    with pytest.raises(ValueError, match="must be contiguous"):
        weight_scores(tables, range(1), slots[:, ::2], rule=KEYS, out=out[..., ::2])
