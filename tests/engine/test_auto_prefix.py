"""Prefix reuse ``auto:N`` on real SGLang: a chat whose turns gain too little, then enough."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from exactness import logprobs
from server import Server, launch_small, prompt

PAGE, N = 16, 150


@pytest.fixture(scope="module")
def auto(tiny_model: Path, logs: Path) -> Iterator[Server]:
    with launch_small(tiny_model, logs, PAGE, f"auto:{N}") as server:
        yield server


def test_a_chat_takes_compressed_rows_where_they_reach_far_enough(auto: Server) -> None:
    text = prompt(100, 71)
    first = auto.generate(text, tokens=120)
    assert first["meta_info"]["kv_compress"]["windows"] == 3
    text += first["output_ids"] + prompt(10, 72)

    second = auto.generate(text, tokens=200)
    told = second["meta_info"]
    assert told["cached_tokens"] == 112, "up to its first window the row is exact"
    assert told["kv_compress"]["reused_tokens"] == 0
    again = auto.state()["tokens_computed_again"]
    assert again == 208 - 112, "what the compressed row would have held beyond"
    assert told["kv_compress"]["computed_again"] == again
    any_gain = auto.generate(text, tokens=1, kv_compress={"prefix": "compressed"})["meta_info"]
    assert any_gain["cached_tokens"] >= 224, "by now the whole text is there exactly"

    auto.flush()
    alone = auto.generate(text, tokens=200)
    # Then its own first window is compressed, and rounding may choose another token.
    same = 240 - len(text) + 32 + 8
    assert second["output_ids"][:same] == alone["output_ids"][:same]
    assert logprobs(second)[:same] == pytest.approx(logprobs(alone)[:same], abs=2e-4)

    text += second["output_ids"] + prompt(10, 73)
    third = auto.generate(text, tokens=40)["meta_info"]
    assert third["kv_compress"]["reused_tokens"] > N and third["kv_compress"]["computed_again"] == 0
    assert third["cached_tokens"] >= 224 + N
    assert auto.state()["tokens_computed_again"] == again
    auto.assert_nothing_leaked()
