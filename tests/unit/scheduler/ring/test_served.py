"""How many requests a query ring serves, as the start-up line, the doctor and the plan say it."""

from __future__ import annotations

import pytest
import torch

from kara_sglang.config import KaraConfig
from kara_sglang.scheduler.reserved import query_ring
from kara_sglang.scheduler.ring.recorder import AttentionShape
from kara_sglang.scheduler.ring.served import Served

SHAPE = AttentionShape(36, 32, 8, 128, torch.bfloat16, torch.device("meta"))  # Qwen3-8B


@pytest.mark.parametrize(
    ("heads", "requests", "each"), [("auto", 12, 10), ("all", 3, 40), ("mean", 12, 10)]
)
def test_in_words(heads: str, requests: int, each: int) -> None:
    served = Served(120, "as set", 3, 12, 40, 10, heads)
    assert (served.requests, served.request_bytes) == (requests, each)
    assert (
        served.in_words()
        == {
            "auto": "3 requests with all query heads or 12 with their mean",
            "all": "3 requests with all query heads",
            "mean": "12 requests with the mean of their query heads",
        }[heads]
        + "; windows of others are chosen without queries"
    )


def test_it_is_what_the_recorder_says() -> None:
    recorder = query_ring(SHAPE, KaraConfig(query_mem_gb=1.5))
    served = Served.of(recorder, "auto")
    assert (served.bytes, served.why) == (recorder.num_bytes, "as set")
    assert (served.all_heads, served.mean) == (recorder.room(SHAPE.group), recorder.room(1))
    assert served.all_heads_bytes == recorder.request_bytes(SHAPE.group)
    assert served.mean_bytes == recorder.request_bytes(1)
    assert 0 < served.all_heads < served.mean
