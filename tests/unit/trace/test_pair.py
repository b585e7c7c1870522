"""Two traces of one text: up to where they are compared."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
from traces import assert_same, cut, some_trace, split

from kara_sglang.trace import viewer
from kara_sglang.trace.format import TraceError
from kara_sglang.trace.pair import pair


def test_a_pair_of_one_text_is_compared_to_its_end() -> None:
    left, right = some_trace(), some_trace(seed=1, selector="recent")
    both = pair(left, right)
    assert (both.end, both.note, both.whole) == (65, "", (left, right))
    for common, whole in zip(both.common, both.whole, strict=True):
        assert_same(common, whole)


@pytest.mark.parametrize(
    ("parts_at", "windows", "end"), [(64, 2, 64), (52, 2, 52), (51, 1, 32), (33, 1, 32), (30, 1, 30)]
)
def test_a_pair_is_compared_up_to_where_its_texts_part(parts_at: int, windows: int, end: int) -> None:
    """Behind it the page has no text; a window that is not common to both in full is left out."""
    both = pair(some_trace(), cut(some_trace(seed=1), parts_at))
    assert both.end == end
    for common, whole in zip(both.common, both.whole, strict=True):
        assert len(common.prompt_ids) + len(common.output_ids) == parts_at
        assert np.array_equal(common.windows, whole.windows[:windows])
        assert np.array_equal(common.bits, whole.bits[:windows])
    assert f"up to token {parts_at}, where they part" in both.note
    assert ("not compared" in both.note) == (end < parts_at)
    html = viewer.render_pair(both, [f"[{i}]" for i in range(parts_at)])
    assert both.note in html
    for side in (0, 1):
        sections = re.findall(rf"<section class=\S+ data-side={side}>.*?</section>", html, re.DOTALL)
        shown = re.findall(r"\[(\d+)\]", "".join(sections))
        assert shown == [str(i) for i in range(parts_at)]
        assert ("not compared" in sections[-1]) == (end < parts_at)


def test_a_pair_of_which_one_text_goes_on() -> None:
    left, right = some_trace(), some_trace(output=70)
    assert "up to token 65, where the left one ends" in pair(left, right).note
    assert "up to token 65, where the right one ends" in pair(right, left).note


def test_a_window_of_the_other_side_may_end_the_comparison() -> None:
    """Windows at other places: nothing is compared from where any cut window begins."""
    left, other = some_trace(), some_trace(seed=1)
    right = dataclasses.replace(other, windows=other.windows + np.array([3, 0, 0, 0, 0]))
    both = pair(left, cut(right, 53))
    # The text parts in the right side's second window, which began inside the left side's.
    assert both.end == 32 and [len(trace.windows) for trace in both.common] == [1, 1]


def test_pairs_that_cannot_be_compared() -> None:
    trace = some_trace()
    fewer_layers = dataclasses.replace(trace, bits=trace.bits[:, 1:])
    for other in (fewer_layers, split(trace, [[0], [1]])[0]):
        with pytest.raises(TraceError, match="--with compares requests of one model"):
            pair(trace, other)
    for parts_at in (5, 27):
        with pytest.raises(TraceError, match=f"part at token {parts_at}, before both have compressed"):
            pair(trace, cut(trace, parts_at))
