"""Choosing exactly R of W: Triton, the torch reference, and the four rules in plain Python."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kara_sglang.kernels.select import ChunkRule
from kara_sglang.kernels.select import select as reference
from kara_sglang.kernels.triton.select import select

pytestmark = pytest.mark.usefixtures("interpreted")

OFF = ChunkRule()
DEFAULT = ChunkRule(budget=0.1)
WIDE = ChunkRule(budget=0.3, width=8, quantile=0.5)
GREEDY = ChunkRule(budget=1.0, width=64, quantile=0.0)


def triton_select(scores: torch.Tensor, kept: int, chunks: ChunkRule) -> torch.Tensor:
    out = torch.full((*scores.shape[:-1], kept), -7, dtype=torch.int32)
    select(scores, kept, chunks, out)()
    return out.long()


def plain(scores: list[float], kept: int, chunks: ChunkRule) -> list[int]:
    """The rules of ``kernels/select.py``, word by word; scores without NaN."""
    width = len(scores)
    by_score = sorted(range(width), key=lambda i: (-scores[i], i))
    extra = math.floor(chunks.budget * kept + 1e-9)
    anchors = sorted(by_score[: kept - extra])
    best = set(by_score[: math.ceil((1 - chunks.quantile) * width - 1e-9)])
    possible = [
        (left, right)
        for left, right in itertools.pairwise(anchors)
        if right - left > 1 and right - left + 1 <= chunks.width and left in best and right in best
    ]
    sums = torch.tensor(scores, dtype=torch.float32)
    possible.sort(key=lambda pair: (-float(sums[pair[0]] + sums[pair[1]]), pair[1]))
    chosen = set(anchors)
    spent = 0
    for left, right in possible:
        spent += right - left - 1
        if spent > extra:
            break
        chosen.update(range(left, right))
    for token in by_score:
        if len(chosen) == kept:
            break
        chosen.add(token)
    return sorted(chosen)


def check(scores: torch.Tensor, kept: int, chunks: ChunkRule) -> None:
    ours = triton_select(scores, kept, chunks)
    assert torch.equal(ours, reference(scores, kept, chunks))
    for row, chosen in zip(scores.tolist(), ours.tolist(), strict=True):
        assert chosen == plain(row, kept, chunks)


@pytest.mark.parametrize("chunks", [OFF, DEFAULT, WIDE, GREEDY], ids=repr)
@pytest.mark.parametrize(("width", "page"), [(48, 16), (176, 16), (176, 1)])
@pytest.mark.parametrize("pages_left_out", ["all but one", "one", "none"])
def test_counts_and_rules(width, page, pages_left_out, chunks):
    kept = {"all but one": page, "one": width - page, "none": width}[pages_left_out]
    torch.manual_seed(width + kept)
    check(torch.randn(2, width), kept, chunks)


@pytest.mark.parametrize("chunks", [OFF, WIDE], ids=repr)
def test_ties_go_to_the_earlier_token(chunks):
    """Few distinct scores, and negative zeros, which are equal to positive ones."""
    torch.manual_seed(1)
    scores = torch.randint(-1, 3, (3, 100)).float()
    scores[0, ::3] *= -1.0  # makes some of the zeros negative
    check(scores, 60, chunks)  # the cut lies among the zeros
    everything_equal = torch.zeros(1, 70)
    assert triton_select(everything_equal, 30, chunks).tolist() == [list(range(30))]


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_scores(data):
    width = data.draw(st.integers(1, 40))
    kept = data.draw(st.integers(1, width))
    number = st.one_of(
        st.integers(0, 3).map(float),
        st.floats(width=32, allow_nan=False, min_value=-(2.0**100), max_value=2.0**100),
    )
    scores = data.draw(st.lists(number, min_size=width, max_size=width))
    chunks = ChunkRule(
        budget=data.draw(st.sampled_from([0.0, 0.1, 0.5, 1.0])),
        width=data.draw(st.integers(2, 12)),
        quantile=data.draw(st.sampled_from([0.0, 0.3, 0.8, 1.0])),
    )
    check(torch.tensor([scores]), kept, chunks)


@pytest.mark.parametrize("chunks", [OFF, WIDE], ids=repr)
@pytest.mark.parametrize(("width", "kept"), [(1000, 496), (2048, 2047), (3000, 16), (4096, 2048)])
def test_windows_of_thousands(width, kept, chunks):
    torch.manual_seed(4)
    check(torch.rand(1, width), kept, chunks)


@pytest.mark.parametrize("chunks", [OFF, WIDE], ids=repr)
def test_scores_with_nan_are_still_an_order(chunks):
    """A broken model must not break the pool: R positions, ascending, the reference's."""
    inf, nan = float("inf"), float("nan")
    scores = torch.rand(2, 64)
    scores[0, [3, 9, 30, 31]] = torch.tensor([nan, inf, -inf, -nan])
    scores[1] = nan
    for kept in (3, 32, 64):
        assert torch.equal(triton_select(scores, kept, chunks), reference(scores, kept, chunks))


def test_leading_dimensions_are_rows():
    scores = torch.rand(2, 3, 1, 48)
    chosen = triton_select(scores, 16, OFF)
    assert chosen.shape == (2, 3, 1, 16)
    assert torch.equal(chosen, reference(scores, 16, OFF))


def test_what_does_not_fit_is_refused():
    scores, out = torch.rand(2, 48), torch.zeros(2, 16, dtype=torch.int32)
    for message, wrong in (
        ("float32 and positions int32", (scores, 16, OFF, out.long())),
        ("float32 and positions int32", (scores.double(), 16, OFF, out)),
        ("for 8 of", (scores, 8, OFF, out)),
        ("must be contiguous", (scores.repeat(1, 2)[:, ::2], 16, OFF, out)),
    ):
        with pytest.raises(ValueError, match=message):
            select(*wrong)


@pytest.mark.parametrize("kept", [0, 49])
def test_impossible_counts_are_refused(kept):
    with pytest.raises(ValueError, match=f"cannot keep {kept} of 48 tokens"):
        triton_select(torch.rand(1, 48), kept, OFF)
