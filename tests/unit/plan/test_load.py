"""What a load of equal requests holds, against requests that decode step by step."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kara_sglang.config import KaraConfig
from kara_sglang.plan.load import Load, compressed, uncompressed
from kara_sglang.radix_integration.row import Geometry, RequestState


@given(
    prompt=st.integers(1, 60),
    answer=st.integers(1, 400),
    page=st.sampled_from([1, 4]),
    delay=st.integers(0, 20),
    kept=st.sampled_from([0.25, 0.5]),
)
def test_a_request_holds_what_the_plan_says(prompt, answer, page, delay, kept):
    """Step by step, with the states of the pass."""
    config = KaraConfig(window=16, retain=kept, delay=delay)
    geometry = Geometry(page, config.window, delay)
    state = RequestState(selector=None, kept=config.kept(page), seed=0, base=-(-prompt // page) * page)
    length, lengths = prompt, []
    for written in range(1, answer):  # the last token's KV is never computed
        # A token is on its way; whoever ends with it is left alone.
        if length >= state.due_at(geometry) and written + 1 < answer:
            length -= state.commit(geometry).freed
        length += 1
        lengths.append(length)
    load = Load(prompt, answer, 1)
    held = compressed(load, config, page)
    assert held.windows <= len(state.windows) <= held.windows + 1
    assert held.most + page >= max(lengths, default=prompt)
    assert held.most <= max(lengths, default=prompt) + config.window + 3 * page
    if lengths:
        assert held.mean == pytest.approx(sum(lengths) / len(lengths), abs=8)
    assert uncompressed(load, page).most >= prompt + answer


def test_what_is_never_compressed_is_planned_as_stock():
    load = Load(100, 1000, 4)
    stock = uncompressed(load, 1)
    assert compressed(load, KaraConfig(selector="identity", window=64), 1).most == stock.most
    assert (
        compressed(load, KaraConfig(policy="threshold", threshold=5000, window=64), 1).most
        == stock.most
    )
    # Passes that fall behind leave what they cannot take.
    slow = KaraConfig(window=64, period=64, max_requests_per_pass=1)
    assert compressed(load, slow, 1).most > compressed(load, KaraConfig(window=64), 1).most
