"""Attention scores of the torch reference against loops over queries, keys and heads in float64."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kara_sglang.kernels import score
from kara_sglang.kernels.score import AttentionRule, WeightRule, attention_scores, weight_scores

DTYPES = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)


def brute_force(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    *,
    squared: bool,
    value_norm: int,
    key_distance: bool,
    causal: bool,
    delay_votes: bool,
    last_queries: int | None,
) -> torch.Tensor:
    """The paper's score, one query, one key and one number at a time."""
    q, k, v = (tensor.to(torch.float64).tolist() for tensor in (queries, keys, values))
    num_queries, num_heads, group = len(q), len(q[0]), len(q[0][0])
    voters = [i for i in range(num_queries) if delay_votes or i < len(k)]
    if last_queries is not None:
        voters = voters[-last_queries:]
    collected = [[0.0] * len(k) for _ in range(num_heads)]
    for head in range(num_heads):
        for i in voters:
            for member in range(group):
                visible = [j for j in range(len(k)) if not causal or j <= i]
                logits = [
                    scale * sum(a * b for a, b in zip(q[i][head][member], k[j][head], strict=True))
                    for j in visible
                ]
                top = max(logits)
                weights = [math.exp(logit - top) for logit in logits]
                total = sum(weights)
                for j, weight in zip(visible, weights, strict=True):
                    share = weight / total
                    collected[head][j] += share * share if squared else share
        if value_norm:
            for j in range(len(k)):
                collected[head][j] *= math.sqrt(sum(x * x for x in v[j][head])) ** value_norm
        if key_distance:
            mean = [sum(key[head][x] for key in k) / len(k) for x in range(len(k[0][head]))]
            for j, key in enumerate(k):
                along = sum(a * b for a, b in zip(key[head], mean, strict=True))
                lengths = math.hypot(*key[head]) * math.hypot(*mean)
                collected[head][j] *= 1 - (along / lengths if lengths else 0.0)
    return torch.tensor(collected, dtype=torch.float64)


rules = st.fixed_dictionaries(
    {
        "squared": st.booleans(),
        "value_norm": st.integers(0, 4),
        "key_distance": st.booleans(),
        "causal": st.booleans(),
        "delay_votes": st.booleans(),
        "last_queries": st.none() | st.integers(1, 24),
    }
)


@st.composite
def windows(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
    """Queries, keys, values and a scale whose products are exact in float32, so that extreme logits
    and ties compare as tightly as ordinary ones."""
    width = draw(st.integers(1, 9))
    num_queries = width + draw(st.integers(0, 5))
    heads = draw(st.integers(1, 3))
    group = draw(st.sampled_from([1, 2, 3, 4, 12]))
    dim = draw(st.sampled_from([1, 2, 4]))
    largest = draw(st.integers(0, 4))  # few different values make many ties
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)

    def whole_numbers(*shape: int) -> torch.Tensor:
        numbers = torch.randint(-largest, largest + 1, shape, generator=generator)
        return numbers.to(draw(st.sampled_from(DTYPES)))

    scale = 2.0 ** draw(st.integers(-6, 8))
    queries = whole_numbers(num_queries, heads, group, dim)
    keys, values = whole_numbers(width, heads, dim), whole_numbers(width, heads, dim)
    return queries, keys, values, scale


def ones(num_queries: int, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
    return torch.ones(num_queries, 1, 1, 1), torch.ones(width, 1, 1), torch.ones(width, 1, 1), 1.0


@settings(max_examples=100)
@given(windows(), rules)
@example(
    ones(1, 1),
    {
        "squared": False,
        "value_norm": 0,
        "key_distance": False,
        "causal": True,
        "delay_votes": True,
        "last_queries": 1,
    },
)
@example(
    ones(7, 3),
    {
        "squared": True,
        "value_norm": 1,
        "key_distance": True,
        "causal": True,
        "delay_votes": False,
        "last_queries": 2,
    },
)
@example(
    ones(7, 3),
    {
        "squared": False,
        "value_norm": 0,
        "key_distance": False,
        "causal": True,
        "delay_votes": True,
        "last_queries": 2,
    },
)
def test_scores_equal_brute_force(window, rule) -> None:
    """Every rule on every shape, with ties and logits up to thousands."""
    queries, keys, values, scale = window
    got = attention_scores(queries, keys, values, scale=scale, rule=AttentionRule(**rule))
    assert got.dtype == torch.float32 and got.shape == (keys.shape[1], keys.shape[0])
    expected = brute_force(queries, keys, values, scale, **rule)
    torch.testing.assert_close(got.double(), expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("score_name", ["sum", "sum_v", "l2", "l2_v", "l2_v4", "l2_v4_k"])
def test_scores_of_ordinary_numbers(dtype: torch.dtype, score_name: str) -> None:
    """A realistic head dimension and delay; the inputs' own rounding is no excuse."""
    torch.manual_seed(0)
    queries, keys, values = torch.randn(25, 2, 3, 32), torch.randn(20, 2, 32), torch.randn(20, 2, 32)
    queries, keys, values = (tensor.to(dtype) for tensor in (queries, keys, values))
    rule = {
        "squared": score_name.startswith("l2"),
        "value_norm": {"sum": 0, "l2": 0, "l2_v4": 4, "l2_v4_k": 4}.get(score_name, 1),
        "key_distance": score_name.endswith("_k"),
        "causal": False,
        "delay_votes": True,
        "last_queries": None,
    }
    got = attention_scores(queries, keys, values, scale=32**-0.5, rule=AttentionRule(**rule))
    expected = brute_force(queries, keys, values, 32**-0.5, **rule)
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-6)


@settings(max_examples=100)
@given(
    st.integers(1, 40).flatmap(
        lambda width: st.lists(
            st.lists(
                st.just(0.0) | st.floats(2.0**-120, 2.0**120, width=32), min_size=width, max_size=width
            ),
            min_size=1,
            max_size=3,
        )
    ),
    st.integers(0, 30).map(lambda reach: 2 * reach + 1),
    st.floats(0, 1),
)
def test_neighbours_by_hand(rows: list[list[float]], neighbours: int, share: float) -> None:
    """One token at a time, in float64; a score of 0 spoils its neighbours no more than a tiny one."""
    scores = torch.tensor(rows, dtype=torch.float32)
    before = scores.clone()
    blended = score.blend_neighbours(scores, neighbours, share)
    assert torch.equal(scores, before) and blended.dtype == torch.float32
    for got, row in zip(blended.tolist(), scores.tolist(), strict=True):
        logs = [math.log(min(max(x, score.LEAST_SCORE), score.MOST_SCORE)) for x in row]
        for place, own in enumerate(logs):
            near = logs[max(0, place - neighbours // 2) : place + neighbours // 2 + 1]
            expected = (1 - share) * own + share * sum(near) / len(near)
            assert math.log(got[place]) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("neighbours", [0, 2, -1])
def test_neighbours_are_an_odd_number(neighbours: int) -> None:
    """The token itself and as many on each side."""
    with pytest.raises(
        ValueError, match=f"neighbours must be an odd number of tokens, got {neighbours}"
    ):
        AttentionRule(neighbours=neighbours)


@pytest.mark.parametrize("per_layer", [False, True])
def test_neighbours_come_after_everything_else_of_a_head(per_layer: bool) -> None:
    """What a head would select by is blended, and heads of a layer add up what is blended."""
    torch.manual_seed(7)
    queries, keys, values = torch.randn(25, 2, 3, 8), torch.randn(20, 2, 8), torch.randn(20, 2, 8)
    rule = AttentionRule(squared=True, value_norm=4, key_distance=True)
    alone = attention_scores(queries, keys, values, scale=0.3, rule=rule)
    expected = score.blend_neighbours(alone, 5)
    assert not torch.allclose(expected, alone, rtol=0.1)
    if per_layer:
        expected = expected.sum(dim=0).expand_as(expected)
    rule = dataclasses.replace(rule, neighbours=5, per_layer=per_layer)
    got = attention_scores(queries, keys, values, scale=0.3, rule=rule)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("norm", [0, 1, 4])
@pytest.mark.parametrize("far", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_are_factors_of_a_score(norm: int, far: bool, dtype: torch.dtype) -> None:
    """Without votes a score is what votes would be multiplied by; each factor by its definition."""
    torch.manual_seed(8)
    queries = torch.randn(25, 2, 3, 8)
    keys, values = torch.randn(20, 2, 8).to(dtype), torch.randn(20, 2, 8).to(dtype)
    weights = weight_scores(keys, values, WeightRule(value_norm=norm, key_distance=far))
    assert weights.shape == (2, 20) and weights.dtype == torch.float32
    for head in range(2):
        every = keys[:, head].double()
        mean = every.mean(dim=0)
        for token in range(20):
            expected = math.sqrt(sum(v**2 for v in values[token, head].double().tolist())) ** norm
            if far:
                lengths = every[token].norm() * mean.norm()
                expected *= 1 - float(every[token] @ mean / lengths)
            assert float(weights[head, token]) == pytest.approx(expected, rel=1e-4)
    rule = AttentionRule(squared=True, value_norm=norm, key_distance=far)
    votes = attention_scores(queries, keys, values, scale=0.3, rule=AttentionRule(squared=True))
    got = attention_scores(queries, keys, values, scale=0.3, rule=rule)
    torch.testing.assert_close(got, votes * weights)


@pytest.mark.parametrize("per_layer", [False, True])
def test_weights_are_blended_and_shared_as_scores_are(per_layer: bool) -> None:
    torch.manual_seed(9)
    keys, values = torch.randn(20, 3, 8), torch.randn(20, 3, 8)
    rule = WeightRule(value_norm=4, key_distance=True)
    expected = score.blend_neighbours(weight_scores(keys, values, rule), 5)
    if per_layer:
        expected = expected.sum(dim=0).expand_as(expected)
    rule = dataclasses.replace(rule, neighbours=5, per_layer=per_layer)
    torch.testing.assert_close(weight_scores(keys, values, rule), expected)


def test_dtypes_may_differ() -> None:
    """fp8 queries against bfloat16 keys, as the recorder and the pool store them."""
    torch.manual_seed(1)
    queries = torch.randn(6, 2, 2, 8).to(torch.float8_e4m3fn)
    keys, values = torch.randn(5, 2, 8).bfloat16(), torch.randn(5, 2, 8).half()
    rule = {
        "squared": True,
        "value_norm": 1,
        "key_distance": True,
        "causal": False,
        "delay_votes": True,
        "last_queries": None,
    }
    got = attention_scores(queries, keys, values, scale=0.3, rule=AttentionRule(**rule))
    expected = brute_force(queries, keys, values, 0.3, **rule)
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-6)


def test_bidirectional_attention_is_conserved() -> None:
    """Each query hands out exactly one unit of attention; under the mask the first key starves none."""
    torch.manual_seed(2)
    queries, keys = torch.randn(40, 3, 4, 16), torch.randn(32, 3, 16)
    scores = attention_scores(queries, keys, keys, scale=0.25, rule=AttentionRule())
    torch.testing.assert_close(scores.sum(dim=1), torch.full((3,), 40 * 4.0))
    first_only = attention_scores(
        queries[:32, :, :1], keys, keys, scale=0.0, rule=AttentionRule(causal=True)
    )
    harmonic = torch.tensor([sum(1 / n for n in range(j + 1, 33)) for j in range(32)])
    torch.testing.assert_close(first_only, harmonic.expand(3, 32))


def test_equal_keys_have_bitwise_equal_scores() -> None:
    """Ties must be exact, or the tie rule (the earlier token wins) would mean nothing."""
    torch.manual_seed(3)
    keys = torch.randn(4, 2, 8).repeat(8, 1, 1)
    queries = torch.randn(40, 2, 3, 8)
    rule = AttentionRule(squared=True, value_norm=1)
    scores = attention_scores(queries, keys, keys, scale=0.35, rule=rule)
    assert (scores.view(2, 8, 4) == scores[:, None, :4]).all()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads_at_once", [1, 2, 3, 5])
def test_bounded_scratch_changes_nothing(
    causal: bool, heads_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """KV heads are taken in groups that fit SCRATCH_BYTES, also where the last group is smaller."""
    torch.manual_seed(4)
    queries, keys, values = torch.randn(20, 5, 2, 8), torch.randn(16, 5, 8), torch.randn(16, 5, 8)
    rule = AttentionRule(squared=True, value_norm=1, causal=causal)
    whole = attention_scores(queries, keys, values, scale=0.35, rule=rule)

    sizes = []
    bmm = torch.bmm

    def measured(*args: torch.Tensor) -> torch.Tensor:
        result = bmm(*args)
        sizes.append(result.numel() * result.element_size())
        return result

    one_head = 4 * 2 * 20 * 16
    monkeypatch.setattr(score, "SCRATCH_BYTES", heads_at_once * one_head + one_head // 2)
    monkeypatch.setattr(torch, "bmm", measured)
    parts = attention_scores(queries, keys, values, scale=0.35, rule=rule)
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=0)
    assert max(sizes) <= score.SCRATCH_BYTES and sum(sizes) == 5 * one_head
    assert len(sizes) == -(-5 // heads_at_once)


def test_scratch_bounds_a_single_head_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A window of 4096 with four query heads per KV head needs four times SCRATCH_BYTES for one KV
    head alone; the softmax is per query, so the bound can hold there as well."""
    torch.manual_seed(5)
    queries, keys = torch.randn(40, 3, 2, 8), torch.randn(32, 3, 8)
    rule = AttentionRule(squared=True, causal=True)
    whole = attention_scores(queries, keys, keys, scale=0.35, rule=rule)

    sizes = []
    bmm = torch.bmm

    def measured(*args: torch.Tensor) -> torch.Tensor:
        result = bmm(*args)
        sizes.append(result.numel() * result.element_size())
        return result

    monkeypatch.setattr(score, "SCRATCH_BYTES", 4 * 2 * 40 * 32 // 4)
    monkeypatch.setattr(torch, "bmm", measured)
    parts = attention_scores(queries, keys, keys, scale=0.35, rule=rule)
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=1e-7)
    assert max(sizes) <= score.SCRATCH_BYTES


def test_inputs_are_left_alone() -> None:
    """The keys are the pool's and the queries the ring's."""
    torch.manual_seed(6)
    tensors = torch.randn(9, 2, 2, 4), torch.randn(8, 2, 4), torch.randn(8, 2, 4)
    copies = [tensor.clone() for tensor in tensors]
    rule = AttentionRule(squared=True, value_norm=1, causal=True, last_queries=3)
    attention_scores(*tensors, scale=0.5, rule=rule)
    weight_scores(*tensors[1:], dataclasses.replace(rule, key_distance=True, neighbours=3))
    assert all(torch.equal(*pair) for pair in zip(tensors, copies, strict=True))
