"""What the log says when a server starts with compression."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from kara_sglang.config import KaraConfig
from kara_sglang.kernels.backend import TorchKernels
from kara_sglang.radix_integration.row import Geometry
from kara_sglang.scheduler.graphs import FLAG, Graphs
from kara_sglang.scheduler.ring.recorder import AttentionShape, QueryRecorder
from kara_sglang.scheduler.runtime import Parts, described


def said(budget: int, **settings: Any) -> str:
    config = KaraConfig(**settings)
    shape = AttentionShape(2, 4, 2, 64, torch.bfloat16, torch.device("meta"))
    recorder = QueryRecorder(shape, 512, 64, budget, torch.bfloat16)
    scheduler = SimpleNamespace(page_size=16, max_total_num_tokens=10**6, max_running_requests=500)
    coordinator = SimpleNamespace(
        scheduler=scheduler,
        graphs=Graphs([1, 2, 160]),
        geometry=Geometry(16, 512, 64),
        longer=SimpleNamespace(answers=lambda kept: (9000, 9000 * 512 // kept)),
    )
    return described(Parts(config, TorchKernels(), "a test", recorder, {}, 0, None), coordinator)


def test_the_log_names_ring_and_decode_graphs() -> None:
    text = said(1 << 26)
    assert "kara, window 512, kept 256, delay 64 tokens, torch kernels (a test)" in text
    assert "query ring 0.06 GiB (as set) for " in text and "requests with all query heads" in text
    assert "decode graphs for up to 160 of 500 requests" in text and FLAG in text
    assert "no query ring" in said(0)


def test_the_log_says_how_long_an_answer_may_be() -> None:
    assert ", answers of up to 18,000 tokens (beyond 9,000 one at a time); " in said(0)
    assert ", answers of up to 9,000 tokens; " in said(0, retain=1.0)


def test_the_log_says_when_compression_begins() -> None:
    """So that nobody takes an idle server, of which all counts are 0, for a broken one."""
    begins = "; compression begins when "
    assert said(0, policy="periodic").endswith(f"{begins}an answer is longer than 576 tokens")
    threshold = said(0, policy="threshold", threshold=900)
    assert threshold.endswith(
        f"{begins}an answer is longer than 576 tokens and its request holds 900 KV slots"
    )
    pressure = said(0, policy="pressure", min_pool_usage=0.75)
    mark = "running and waiting requests need 75 % of the KV pool"
    assert pressure.endswith(f"{begins}{mark}, and an answer is longer than 576 tokens")
