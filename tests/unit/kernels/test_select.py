"""Selection and Token2Chunk against a slow reading of the documented rule."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kara_sglang.kernels.select import ChunkRule, select


def slow_select(
    scores: list[float], kept: int, alpha: Fraction, gamma: int, quantile: Fraction
) -> list[int]:
    """The four steps of ``kernels/select.py``'s docstring for one head, in plain Python."""
    width = len(scores)
    ranking = sorted(range(width), key=lambda i: (-scores[i], i))
    extra = math.floor(alpha * kept)
    strong = set(ranking[: math.ceil((1 - quantile) * width)])

    anchors = sorted(ranking[: kept - extra])
    chunks = []
    for left, right in itertools.pairwise(anchors):
        gap = list(range(left + 1, right))
        if gap and len(gap) + 2 <= gamma and left in strong and right in strong:
            with np.errstate(over="ignore"):
                value = float(np.float32(scores[left]) + np.float32(scores[right]))
            chunks.append((-value, right, gap))
    chosen = set(anchors)
    left_over = extra
    for _, _, gap in sorted(chunks, key=lambda chunk: chunk[:2]):
        if len(gap) > left_over:
            break
        left_over -= len(gap)
        chosen.update(gap)
    for token in ranking:
        if len(chosen) == kept:
            break
        chosen.add(token)
    return sorted(chosen)


def check(scores: torch.Tensor, kept: int, alpha: Fraction, gamma: int, q: Fraction) -> torch.Tensor:
    """``select`` equals the slow rule in every row; returns what was kept."""
    before = scores.clone()
    got = select(scores, kept, ChunkRule(float(alpha), gamma, float(q)))
    assert torch.equal(scores, before)
    assert got.dtype == torch.int64 and got.shape == (*scores.shape[:-1], kept)
    rows = scores.reshape(-1, scores.shape[-1]).tolist()
    expected = [slow_select(row, kept, alpha, gamma, q) for row in rows]
    assert got.reshape(-1, kept).tolist() == expected
    return got


def floats32(*values: float) -> list[float]:
    return [float(np.float32(value)) for value in values]


# Few different scores make ties; the others reach from nothing to the ends of float32.
few = st.sampled_from(floats32(0, 1, 2, 3))
extreme = st.sampled_from(floats32(0, 1e-45, 1e-38, 1e-3, 1, 1e30, 3e38)) | st.just(-math.inf)
ordinary = st.floats(0, 100, width=32)
share = st.integers(0, 20).map(lambda n: Fraction(n, 20))


@st.composite
def heads(draw: st.DrawFn) -> tuple[torch.Tensor, int]:
    """Scores of shape (W,), (H, W) or (L, H, W), and R."""
    width = draw(st.integers(1, 40))
    batch = draw(st.sampled_from([(), (1,), (3,), (2, 2)]))
    kind = draw(st.sampled_from([few, extreme, ordinary]))
    rows = [draw(st.lists(kind, min_size=width, max_size=width)) for _ in range(math.prod(batch))]
    kept = draw(st.integers(1, width) | st.just(width) | st.just(1))
    return torch.tensor(rows, dtype=torch.float32).reshape(*batch, width), kept


@settings(max_examples=250)
@given(heads(), share, st.integers(2, 12), share)
@example((torch.ones(2, 16), 8), Fraction(1, 2), 8, Fraction(0))
@example((torch.full((16,), -math.inf), 7), Fraction(1), 12, Fraction(0))
def test_select_is_the_documented_rule(window, alpha, gamma, quantile) -> None:
    """Anchors, chunks in order of their ends until one does not fit, then single tokens."""
    scores, kept = window
    check(scores, kept, alpha, gamma, quantile)


@settings(max_examples=150)
@given(st.integers(1, 300), st.integers(1, 300), share, st.integers(2, 20), st.integers(0, 2**31))
def test_wide_windows(width: int, kept: int, alpha: Fraction, gamma: int, seed: int) -> None:
    """Realistic widths, where many chunks compete for the budget."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(3, width, generator=generator) ** 4
    coarse = (torch.rand(2, width, generator=generator) * 5).floor()
    check(torch.cat([scores, coarse]), min(kept, width), alpha, gamma, Fraction(seed % 21, 20))


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.5, 1.0])
def test_equal_scores_keep_the_earliest(alpha: float) -> None:
    """Ties go to the earlier token, whatever the size of the window."""
    for width in (1, 2, 17, 64, 513, 4096):
        kept = max(1, width // 2)
        chosen = select(torch.zeros(2, width), kept, ChunkRule(alpha))
        assert torch.equal(chosen, torch.arange(kept).expand(2, kept))


def test_without_a_budget_it_is_the_top_r() -> None:
    """alpha = 0 leaves plain top-R, in ascending order."""
    torch.manual_seed(0)
    scores = torch.randn(4, 200)
    expected = scores.topk(60, dim=-1).indices.sort(dim=-1).values
    assert torch.equal(select(scores, 60, ChunkRule(0.0, 200, 0.0)), expected)
    # A budget that is less than one token is none.
    assert torch.equal(select(scores, 9, ChunkRule(0.1, 200, 0.0)), select(scores, 9, ChunkRule()))


def test_first_chunk_that_does_not_fit_ends_it() -> None:
    """Three gaps, a budget of three: the best takes one, the next needs three, the last never comes."""
    scores = torch.tensor([9.0, 0, 8.0, 0, 0, 0, 7.0, 0, 2.0, 1, 1, 1])
    # Anchors are 0, 2, 6, 8 and one more of the ones; chunk (2, 6) is worth more than (6, 8).
    chosen = check(scores, 8, Fraction(3, 8), 5, Fraction(0))
    assert 1 in chosen.tolist() and not {3, 4, 5, 7} & set(chosen.tolist())


def test_a_chunk_of_exactly_gamma_is_taken_and_one_wider_is_not() -> None:
    """gamma counts both ends."""
    scores = torch.tensor([9.0, 0, 0, 0, 8.0, 1, 1, 1, 1, 1])
    assert {1, 2, 3} <= set(check(scores, 6, Fraction(1, 2), 5, Fraction(0)).tolist())
    assert not {1, 2, 3} & set(check(scores, 6, Fraction(1, 2), 4, Fraction(0)).tolist())


def test_quantile_is_by_rank_and_not_by_value() -> None:
    """One outlier must not lift the bar for all others: 0.8 of 10 tokens leaves the best two."""
    scores = torch.tensor([1e30, 0, 2.0, 0, 1.5, 0, 1.0, 0, 0.5, 0])
    chosen = check(scores, 6, Fraction(1, 2), 8, Fraction(4, 5))
    assert 1 in chosen.tolist() and 3 not in chosen.tolist()


def test_shares_count_as_written() -> None:
    """0.3 of 10 is 3 and the best 0.1 of 10 is 1, whatever binary fractions say."""
    assert ChunkRule(0.3).extra(10) == 3
    assert ChunkRule(0.29).extra(100) == 29 and ChunkRule(0.57).extra(100) == 57
    assert ChunkRule(0.1).extra(30) == 3 and ChunkRule(0.7).extra(10) == 7
    assert ChunkRule(quantile=0.9).best(10) == 1 and ChunkRule(quantile=0.7).best(10) == 3
    assert ChunkRule(quantile=1.0).best(512) == 0 and ChunkRule(quantile=0.0).best(512) == 512


def test_every_head_for_itself() -> None:
    """A row's choice does not depend on the other rows."""
    torch.manual_seed(1)
    scores = torch.rand(3, 4, 64)
    rule = ChunkRule(0.4, 6, 0.5)
    together = select(scores, 24, rule)
    for layer in range(3):
        for head in range(4):
            assert torch.equal(select(scores[layer, head], 24, rule), together[layer, head])


def test_expanded_and_transposed_scores() -> None:
    """Scores may be views: ``recent`` hands out an expanded one."""
    ages = torch.arange(32.0).expand(3, 32)
    assert torch.equal(select(ages, 8, ChunkRule(0.5)), torch.arange(24, 32).expand(3, 8))
    torch.manual_seed(2)
    scores = torch.rand(32, 3)
    assert torch.equal(
        select(scores.T, 8, ChunkRule(0.5)), select(scores.T.contiguous(), 8, ChunkRule(0.5))
    )


@pytest.mark.parametrize("kept", [1, 7, 16])
@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_not_a_number_still_keeps_exactly_r(kept: int, alpha: float) -> None:
    """Lengths are settled before scores exist, so even broken scores must give R positions."""
    scores = torch.tensor([math.nan, 1.0, math.inf, -math.inf] * 4).repeat(2, 1)
    scores[1] = math.nan
    chosen = select(scores, kept, ChunkRule(alpha, 8, 0.0))
    assert chosen.shape == (2, kept)
    assert (chosen.diff(dim=-1) > 0).all() and chosen.min() >= 0 and chosen.max() < 16


def test_deterministic() -> None:
    """The same scores give the same choice, ties included, at every thread count."""
    torch.manual_seed(3)
    scores = (torch.rand(8, 2048) * 50).floor()
    rule = ChunkRule(0.3, 8, 0.5)
    threads = torch.get_num_threads()
    try:
        first = select(scores, 1024, rule)
        torch.set_num_threads(1)
        assert torch.equal(select(scores, 1024, rule), first)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("kept", [0, -1, 9])
def test_impossible_counts_are_refused(kept: int) -> None:
    """R outside 1..W is a bug of the caller."""
    with pytest.raises(ValueError, match=f"cannot keep {kept} of 8"):
        select(torch.zeros(2, 8), kept, ChunkRule())
