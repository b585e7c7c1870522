"""Attention scores: Triton and the torch reference against a float64 brute force."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ring_pages import pages_of

from kara_sglang.kernels import record
from kara_sglang.kernels.backend import LayerPool
from kara_sglang.kernels.record import FP4, FP8, PAGE, Ring
from kara_sglang.kernels.rope_shift import RopeShift
from kara_sglang.kernels.score import LEAST_SCORE, MOST_SCORE, NEIGHBOURS_SHARE, AttentionRule
from kara_sglang.kernels.score import attention_scores as reference_scores
from kara_sglang.kernels.score import blend_neighbours as reference_blend
from kara_sglang.kernels.select import ChunkRule
from kara_sglang.kernels.triton.pool import PoolTables
from kara_sglang.kernels.triton.score import Scratch, Voters, attention_scores, recorders_of
from kara_sglang.kernels.triton.select import select

pytestmark = pytest.mark.usefixtures("interpreted")

E5M2 = torch.float8_e5m2
SUM, BEST = (
    AttentionRule(),
    AttentionRule(squared=True, value_norm=4, key_distance=True, neighbours=13, delay_votes=False),
)

AHEAD = dataclasses.replace(BEST, ahead=True)


def triton_scores(
    pool: LayerPool,
    slots: torch.Tensor,
    members: torch.Tensor,
    starts: list[int],
    count: int,
    rule: AttentionRule,
    capability: tuple[int, int] = (9, 0),
) -> torch.Tensor:
    """``(num_layers, num_jobs, num_kv_heads, W)``, as they are when they have been selected by."""
    tables = dataclasses.replace(PoolTables.of(pool), capability=capability)
    voting = rule.voters(count, slots.shape[1])
    recorders = recorders_of(jobs_of(pool, members, starts, count))
    voters = Voters(recorders, members.shape[1], voting.start, len(voting))
    heads = (tables.num_layers, slots.shape[0], tables.num_kv_heads)
    out = torch.full((*heads, slots.shape[1]), float("nan"))
    regions = Scratch.regions(heads, slots.shape[1], tables.head_dim, voters.rows, tables.dot)
    launches = attention_scores(
        tables,
        range(tables.num_layers),
        slots,
        voters,
        rule=rule,
        scratch=Scratch(*(torch.full(shape, float("nan"), dtype=dtype) for shape, dtype in regions)),
        out=out,
    )
    kept = torch.empty((*heads, 1), dtype=torch.int32)
    select_by = select(out, 1, ChunkRule(), kept, neighbours=rule.neighbours, shared=rule.per_layer)
    for launch in (*launches, select_by):
        launch()
    return out


def num_pages(pool: LayerPool) -> int:
    return len(pool.rings[0].queries) // PAGE if pool.rings else 8  # of a ring that is not there


def jobs_of(
    pool: LayerPool, members: torch.Tensor, starts: list[int], count: int
) -> list[SimpleNamespace]:
    """As far as ``recorders_of`` looks at jobs."""
    return [
        SimpleNamespace(
            query_start=start, query_count=count, pages=pages_of(num_pages(pool), of, start, count)
        )
        for start, of in zip(starts, members.tolist(), strict=True)
    ]


def stored_queries(pool: LayerPool) -> list[torch.Tensor]:
    """The numbers that the rings stand for, float64."""
    return [stored_numbers(ring) for ring in pool.rings]


def stored_numbers(ring: Ring) -> torch.Tensor:
    if ring.scales is None:
        return ring.queries.double()
    if ring.queries.dtype == FP8:
        return ring.queries.double() * 2.0 ** ring.scales.double()[..., None]
    sizes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    bits = ring.queries.long()
    first = sizes[bits >> 1 & 7] * (1 - 2 * (bits >> 7))
    second = sizes[bits >> 4 & 7] * (1 - 2 * (bits & 1))
    scales = (ring.scales.to(torch.int16) << 7).view(torch.float16).double() / 16
    return torch.cat([first, second], -1) * scales.repeat_interleave(
        ring.head_dim // scales.shape[-1], -1
    )


def brute_force(
    pool: LayerPool,
    slots: torch.Tensor,
    members: torch.Tensor,
    starts: list[int],
    count: int,
    rule: AttentionRule,
) -> np.ndarray:
    """One query at a time, float64, from the definition; moved ahead pair by pair."""
    num_heads = pool.keys[0].shape[1]
    num_jobs, width = slots.shape
    out = np.zeros((len(pool.keys), num_jobs, num_heads, width))
    for layer, (keys, values, queries) in enumerate(
        zip(pool.keys, pool.values, stored_queries(pool), strict=True)
    ):
        keys, values, queries = (x.double().numpy() for x in (keys, values, queries))
        for job in range(num_jobs):
            window = slots[job].numpy()
            for head in range(num_heads):
                newest = count if rule.delay_votes else width
                for token in range(newest):
                    if rule.last_queries is not None and token < newest - rule.last_queries:
                        continue
                    visible = min(token + 1, width) if rule.causal else width
                    block, place = divmod(starts[job] % PAGE + token, PAGE)
                    for pages in pages_of(num_pages(pool), members[job].tolist(), starts[job], count):
                        query = queries[pages[block] * PAGE + place, head]
                        if rule.ahead:
                            query = moved(query, pool.rope_shift, layer)
                        logits = keys[window[:visible], head] @ query * pool.scales[layer]
                        weights = np.exp(logits - logits.max())
                        weights /= weights.sum()
                        out[layer, job, head, :visible] += weights**2 if rule.squared else weights
                if rule.value_norm:
                    out[layer, job, head] *= (
                        np.linalg.norm(values[window, head], axis=-1) ** rule.value_norm
                    )
                if rule.key_distance:
                    every = keys[window, head]
                    mean = every.mean(axis=0)
                    lengths = np.linalg.norm(every, axis=-1) * np.linalg.norm(mean)
                    out[layer, job, head] *= 1 - every @ mean / lengths
                out[layer, job, head] = blended(out[layer, job, head], rule.neighbours)
    return out


def blended(scores: np.ndarray, neighbours: int) -> np.ndarray:
    """One token at a time."""
    reach = neighbours // 2
    powers = np.clip(scores, LEAST_SCORE, MOST_SCORE) if reach else scores
    around = [powers[max(0, at - reach) : at + reach + 1] for at in range(len(scores))]
    means = np.array([np.prod(near ** (1 / len(near))) for near in around])
    return powers ** (1 - NEIGHBOURS_SHARE) * means**NEIGHBOURS_SHARE if reach else scores


def moved(query: np.ndarray, turn: RopeShift, layer: int) -> np.ndarray:
    """Each pair as a complex number, times one on the unit circle."""
    out = query.copy()
    for first, second in enumerate(turn.partner[layer].tolist()):
        if first < second:
            angle = complex(turn.cos[layer, first].item(), turn.sin[layer, second].item())
            pair = complex(query[first], query[second]) * angle
            out[first], out[second] = pair.real, pair.imag
    return out


def check(pool, slots, members, starts, count, rule, tolerance=2e-5):
    expected = brute_force(pool, slots, members, starts, count, rule)
    ours = triton_scores(pool, slots, members, starts, count, rule).double().numpy()
    np.testing.assert_allclose(ours, expected, rtol=tolerance, atol=1e-7)
    for layer in range(len(pool.keys)):
        for job, window in enumerate(slots.long()):
            pages = pages_of(num_pages(pool), members[job].tolist(), starts[job], count)
            queries = record.recorded(pool.rings[layer], starts[job], count, pages)
            if rule.ahead:
                queries = pool.rope_shift.moved(queries, layer)
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


@pytest.mark.parametrize("dim", [64, 80, 256])
@pytest.mark.parametrize("ring_dtype", [torch.float32, FP8, FP4], ids=str)
def test_queries_moved_ahead(make, dim, ring_dtype):
    """In halves, in part and in neighbours, and not at all: the pool's layers differ."""
    pool = make.pool(dim, layers=3, heads=1, dim=dim, tokens=64, ring_dtype=ring_dtype)
    slots = make.windows(2, 48, slots=256, seed=dim, page=16)
    arguments = (slots, torch.tensor([[0, 3], [2, 1]]), [16, 777], 57)
    check(pool, *arguments, AHEAD)
    apart = triton_scores(pool, *arguments, AHEAD) / triton_scores(pool, *arguments, BEST) - 1
    assert (apart[:2].abs().amax(dim=-1) > 0.05).all() and apart[2].abs().max() < 1e-5


@pytest.mark.parametrize("ring_dtype", [FP4, FP8, torch.bfloat16], ids=str)
def test_turned_keys_are_rounded_to_float16(make, ring_dtype):
    """Keys of 16 bits are turned in float32 and multiplied in float16; a score loses no more."""
    pool = make.pool(3, dtype=torch.bfloat16, ring_dtype=ring_dtype)
    slots = make.windows(2, 48, slots=256, seed=1)
    check(pool, slots, torch.tensor([[0, 3], [2, 1]]), [16, 777], 57, AHEAD, tolerance=0.005)


@pytest.mark.parametrize("dim", [64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("ring_dtype", [FP4, torch.bfloat16], ids=str)
def test_head_dims(make, dim, ring_dtype):
    pool = make.pool(dim, dim=dim, tokens=64, dtype=torch.bfloat16, ring_dtype=ring_dtype)
    slots = make.windows(2, 48, slots=256, seed=dim, page=16)
    check(pool, slots, torch.tensor([[0, 3], [2, 1]]), [16, 777], 57, BEST)


@pytest.mark.parametrize("group", [1, 3, 5, 7, 12, 16])
@pytest.mark.parametrize("num_jobs", [1, 3])
def test_groups_and_jobs(make, group, num_jobs):
    heads = 3 if num_jobs == 1 else 1
    pool = make.pool(group, heads=heads, voices=num_jobs * group, tokens=51)
    slots = make.windows(num_jobs, 48, slots=256, seed=group)
    members = torch.randperm(num_jobs * group).view(num_jobs, group)
    starts = [int(start) for start in torch.randint(0, 10_000, (num_jobs,))]
    check(pool, slots, members, starts, 51, SUM)


def test_seven_jobs_with_recorders_of_the_mean(make):
    pool = make.pool(7, heads=2, voices=9, tokens=70, slots=512)
    slots = make.windows(7, 48, slots=512, seed=7, page=16, dtype=torch.int64)
    members = torch.randperm(9)[:7].view(7, 1)
    check(pool, slots, members, [3 + 1001 * job for job in range(7)], 64, BEST)


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("last", [None, 1, 20], ids=["all", "last1", "last20"])
@pytest.mark.parametrize("count", [176, 205])
def test_rules_over_several_blocks(make, causal, last, count):
    """W = 176 is two and three quarters blocks of 64 keys; 205 queries include a delay's."""
    pool = make.pool(3, layers=2, heads=1, dim=64, slots=256, voices=2, tokens=205)
    slots = make.windows(1, 176, slots=256, seed=5, page=16)
    votes = last is None or count == 176  # of the delay
    far = last != 1
    near = 1 + 2 * (last or 0)  # 41 neighbours of a single query's keys, scratch for no more than W
    rule = AttentionRule(
        squared=count == 205,
        value_norm=1,
        key_distance=far,
        neighbours=near,
        causal=causal,
        delay_votes=votes,
        last_queries=last,
    )
    check(pool, slots, torch.tensor([[1, 0]]), [100], count, rule)


@pytest.mark.parametrize("kind", ["common part", "equal", "zero"])
def test_distances_of_keys_that_are_alike(make, kind):
    """Close to the mean key float32 has few digits left; without a direction the distance is 1."""
    pool = make.pool(17, heads=2, dim=80, slots=128, voices=1, tokens=64)
    slots = make.windows(1, 48, slots=128, seed=4, page=16)
    if kind == "common part":
        pool.keys[0] += 5
    else:
        pool.keys[0].fill_(kind == "equal")
    far = dataclasses.replace(BEST, neighbours=1)
    plain = dataclasses.replace(far, key_distance=False)
    scores, alone = (
        triton_scores(pool, slots, torch.tensor([[0]]), [9], 60, rule)[0, 0] for rule in (far, plain)
    )
    every = pool.keys[0].double()[slots[0].long()]
    cosine = torch.cosine_similarity(every, every.mean(dim=0, keepdim=True), dim=-1)
    torch.testing.assert_close((scores / alone).double(), 1 - cosine.T, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("width", [1, 5, 255, 256, 257, 700])
@pytest.mark.parametrize("neighbours", [3, 13, 61])
def test_neighbours_across_blocks(width, neighbours):
    """Rows do not see each other, blocks of a row do; scores of 0, infinity and none are among them."""
    generator = torch.Generator().manual_seed(width)
    sizes = 10.0 ** torch.tensor([[-20], [30]])  # of the two heads
    scores = torch.rand(2, 3, 2, width, generator=generator) ** 9 * sizes
    scores[torch.rand(scores.shape, generator=generator) < 0.1] = 0
    scores[0, 1, :, -1] = float("inf")
    scores[1, 2, :, width // 2] = float("nan")
    expected = np.stack([blended(row, neighbours) for row in scores.double().view(-1, width).numpy()])
    ours, kept = scores.clone(), torch.empty(2, 3, 2, 1, dtype=torch.int32)
    select(ours, 1, ChunkRule(), kept, neighbours=neighbours)()
    np.testing.assert_allclose(ours.double().view(-1, width).numpy(), expected, rtol=1e-4)
    theirs = torch.stack([reference_blend(of_head, neighbours) for of_head in scores.flatten(0, 1)])
    np.testing.assert_allclose(theirs.double().view(-1, width).numpy(), expected, rtol=1e-4)


def test_one_set_of_positions_per_layer(make):
    """All KV heads get the sum of the heads' scores, bit for bit the same."""
    pool = make.pool(13, layers=2, heads=3, slots=128, voices=2, tokens=64)
    slots = make.windows(2, 48, slots=128, seed=4, page=16)
    members, starts = torch.tensor([[0], [1]]), [0, 700]
    alone = triton_scores(pool, slots, members, starts, 60, BEST)
    shared = triton_scores(pool, slots, members, starts, 60, dataclasses.replace(BEST, per_layer=True))
    torch.testing.assert_close(shared[:, :, 0], alone.sum(dim=2))


def test_a_window_of_a_thousand(make):
    pool = make.pool(11, heads=1, dim=64, slots=1024, voices=1, tokens=1010)
    slots = make.windows(1, 1000, slots=1024, seed=3)
    rule = dataclasses.replace(SUM, neighbours=13)
    check(pool, slots, torch.tensor([[0]]), [123_456_789_012], 1010, rule, tolerance=1e-4)


@pytest.mark.parametrize(("width", "causal"), [(2048, True), (4096, False)])
def test_windows_of_thousands(make, width, causal):
    """The newest queries only, which keeps the interpreter busy for seconds instead of minutes."""
    pool = make.pool(12, heads=1, dim=16, slots=width, voices=1, tokens=width + 64)
    slots = make.windows(1, width, slots=width, seed=3, page=16)
    rule = AttentionRule(value_norm=1, causal=causal, last_queries=140)
    check(pool, slots, torch.tensor([[0]]), [1_000_003], width + 64, rule, tolerance=1e-4)


@pytest.mark.parametrize(
    ("key_dtype", "ring_dtype"),
    [
        (torch.float16, torch.float16),
        (torch.float16, FP8),
        (torch.float16, torch.bfloat16),
        (torch.bfloat16, FP8),
        (torch.bfloat16, torch.bfloat16),
        (FP8, torch.bfloat16),
        (FP8, FP8),
        (E5M2, FP8),
        (torch.float32, FP8),
        (torch.float32, FP4),
        (torch.bfloat16, FP4),
        (FP8, FP4),
        (torch.bfloat16, torch.float32),
    ],
    ids=str,
)
@pytest.mark.parametrize("capability", [(8, 0), (9, 0)], ids=["sm_80", "sm_90"])
def test_types(make, key_dtype, ring_dtype, capability):
    """float16 holds what narrower types and scaled bfloat16 hold, so nothing but the sums rounds."""
    pool = make.pool(5, dtype=key_dtype, ring_dtype=ring_dtype)
    slots = make.windows(2, 48, slots=256, seed=1)
    arguments = pool, slots, torch.tensor([[0, 3], [2, 1]]), [16, 777], 57, BEST
    expected = brute_force(*arguments)
    ours = triton_scores(*arguments, capability).double().numpy()
    np.testing.assert_allclose(ours, expected, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("key_dtype", [torch.bfloat16, FP8], ids=str)
@pytest.mark.parametrize(("ring_dtype", "most"), [(FP8, 0.03), (FP4, 0.09)], ids=["fp8", "fp4"])
def test_queries_far_beyond_what_8_bits_can_hold(make, key_dtype, ring_dtype, most):
    """Heads whose largest number is 2000, 20 and 0.002 in one ring, as in models with biases in q:
    the scores are those of the queries before they were stored, up to the numbers' own rounding."""
    pool = make.pool(5, heads=3, dtype=key_dtype, voices=1, tokens=50)
    queries = torch.randn(len(pool.rings[0].queries), 3, 64)
    queries *= (torch.tensor([2000, 20, 0.002]) / queries.abs().amax(-1).amax(0))[:, None]
    # Small keys, so that the softmax of the largest head is no single one.
    keys = [(key.float() * torch.tensor([0.002, 0.2, 16])[:, None]).to(key_dtype) for key in pool.keys]
    ring = Ring.of(queries, ring_dtype)
    if ring_dtype == FP8:
        assert ring.scales.amax(dim=0).tolist() == [3, -4, -17]
    stored = dataclasses.replace(pool, keys=keys, rings=[ring])
    slots, members = make.windows(1, 48, slots=256, seed=1), torch.tensor([[0]])
    check(stored, slots, members, [0], 50, BEST)

    def error(kept: Ring) -> float:
        others = dataclasses.replace(stored, rings=[kept])
        exact = dataclasses.replace(stored, rings=[Ring(queries)])
        ours, true = (brute_force(p, slots, members, [0], 50, SUM) for p in (others, exact))
        return abs(ours / true - 1).max()

    assert error(ring) < most < 0.1 < error(Ring(queries.clamp(-448, 448)))


@pytest.mark.parametrize("rule", [BEST, AHEAD], ids=["as they are", "turned"])
def test_keys_and_queries_far_beyond_what_float16_can_hold(make, rule):
    """bfloat16 keys of up to 3e8 against queries of 1e-8, and the other way round: both are divided by
    powers of two before they become float16, and nothing overflows or vanishes."""
    pool = make.pool(5, heads=3, dtype=torch.bfloat16, ring_dtype=torch.bfloat16, voices=1, tokens=50)
    sizes = torch.tensor([1e8, 1.0, 1e-7])[:, None]
    keys = [(key.float() * sizes).bfloat16() for key in pool.keys]
    rings = [Ring((ring.queries.float() / sizes).bfloat16()) for ring in pool.rings]
    assert keys[0].abs().max() > 1e3 * torch.finfo(torch.float16).max
    large = dataclasses.replace(pool, keys=keys, rings=rings)
    arguments = make.windows(1, 48, slots=256, seed=1), torch.tensor([[0]]), [0], 50, rule
    expected = brute_force(large, *arguments)
    ours = triton_scores(large, *arguments).double().numpy()
    np.testing.assert_allclose(ours, expected, rtol=5e-3 if rule.ahead else 2e-5)


@pytest.mark.parametrize("key_dtype", [FP8, E5M2], ids=str)
def test_a_scale_of_the_keys_folds_into_that_of_the_layer(make, key_dtype):
    """fp8 keys with k_scale: what is stored is K / k_scale, and the layer's scale takes k_scale."""
    pool = make.pool(5, layers=2, dtype=key_dtype, ring_dtype=FP8)
    k_scales = [0.03, 7.5]
    scaled = dataclasses.replace(
        pool, scales=[scale * k for scale, k in zip(pool.scales, k_scales, strict=True)]
    )
    true = dataclasses.replace(
        pool, keys=[key.double() * k for key, k in zip(pool.keys, k_scales, strict=True)]
    )
    slots, members = make.windows(2, 48, slots=256, seed=1), torch.tensor([[0, 3], [2, 1]])
    expected = brute_force(true, slots, members, [16, 777], 57, BEST)
    ours = triton_scores(scaled, slots, members, [16, 777], 57, BEST).double().numpy()
    np.testing.assert_allclose(ours, expected, rtol=2e-5, atol=1e-7)
    plain = triton_scores(pool, slots, members, [16, 777], 57, BEST).double().numpy()
    assert abs(plain / expected - 1).max() > 0.1


def test_what_does_not_fit_is_refused(make):
    pool = make.pool(5)
    slots, members = make.windows(1, 48, slots=256, seed=1), torch.tensor([[0, 3]])
    with pytest.raises(ValueError, match="130 queries asked of 2 pages of a ring"):
        tables = PoolTables.of(pool)
        attention_scores(
            tables,
            range(1),
            slots,
            Voters(recorders_of(jobs_of(pool, members, [16], 64)), 2, 0, 130),
            rule=SUM,
            scratch=None,
            out=torch.empty(1, 1, 2, 48),
        )
    with pytest.raises(ValueError, match=r"1 recorders of torch\.int32 for 2 windows"):
        triton_scores(pool, slots.repeat(2, 1), members, [16], 48, SUM)
    with pytest.raises(ValueError, match="must be contiguous"):
        triton_scores(pool, slots[:, ::2], members, [16], 48, SUM)
    with pytest.raises(ValueError, match="the pool has no RoPE shift"):
        triton_scores(dataclasses.replace(pool, rope_shift=None), slots, members, [16], 48, AHEAD)
    with pytest.raises(ValueError, match="no contiguous 1 layers of 64 numbers"):
        parts = (pool.rope_shift.cos, pool.rope_shift.sin, pool.rope_shift.partner)
        short = RopeShift(*(part[:, :32] for part in parts), pool.rope_shift.run)
        triton_scores(dataclasses.replace(pool, rope_shift=short), slots, members, [16], 48, AHEAD)
    with pytest.raises(ValueError, match="the pool has no ring"):
        triton_scores(dataclasses.replace(pool, rings=[]), slots, members, [16], 48, SUM)
    integers = dataclasses.replace(pool, keys=[key.int() for key in pool.keys], values=pool.keys)
    with pytest.raises(ValueError, match="K and V differ in dtype"):
        triton_scores(integers, slots, members, [16], 48, SUM)
    raw = [key.view(torch.uint8)[..., :64].contiguous() for key in pool.keys]
    with pytest.raises(ValueError, match="must be viewed as its own type"):
        triton_scores(dataclasses.replace(pool, keys=raw, values=raw), slots, members, [16], 48, SUM)


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
    pool = make.pool(9, dim=80, voices=3, tokens=64)
    slots = make.windows(2, 48, slots=256, seed=2)
    members, starts, count = torch.tensor([[2], [0]]), [40, 90], 57
    arguments = (slots, members, starts, count, AHEAD)
    clean = triton_scores(pool, *arguments)
    used = torch.zeros(256, dtype=torch.bool)
    used[slots.flatten().long()] = True
    recorded = torch.zeros(len(pool.rings[0].queries), dtype=torch.bool)
    for job in range(2):
        places = starts[job] % PAGE + torch.arange(count)
        (pages,) = pages_of(num_pages(pool), members[job].tolist(), starts[job], count)
        recorded[torch.tensor(pages)[places // PAGE] * PAGE + places % PAGE] = True
    for buffer in (*pool.keys, *pool.values):
        buffer[~used] = float("nan")
    pool.rings[0].queries[~recorded] = float("nan")
    assert torch.equal(triton_scores(pool, *arguments), clean)
