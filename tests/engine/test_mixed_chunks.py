"""Mixed chunks: requests decode beside others' prefills. SGLang mixes nobody who asks for logprobs, so
greedy tokens are compared with transformers."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from exactness import PROMPTS, RetainedCache
from server import PAGE_16, WINDOW, Server, in_parallel, launch, prompt

FLAGS = (
    *("--skip-tokenizer-init", *PAGE_16, "--kv-compress", "kara", *WINDOW, "--enable-mixed-chunk"),
    *("--chunked-prefill-size", "64", "--decode-log-interval", "1"),
)
OPTIONS = ({"selector": "recent"}, {"selector": "identity"}, False, None)
TOKENS = 300


@pytest.fixture(scope="module")
def mixed(tiny_model: Path, logs: Path) -> Iterator[Server]:
    with launch(tiny_model, logs / "mixed.log", *FLAGS) as server:
        yield server


def test_positions_and_passes_beside_prefills(mixed: Server, tiny_model: Path) -> None:
    """Each token is the likeliest one for transformers with the same K/V, which is all of it for
    identity and who opts out. Windows are compressed in their very step. With `debug_checks` the ring
    must hold the queries of all steps."""
    ended = threading.Event()

    def prefills() -> int:
        count = 0
        while not ended.is_set():
            ask(mixed, prompt(500, 100 + count), None, 2)
            count += 1
        return count

    def answers() -> list[dict]:
        try:
            return in_parallel(
                [
                    lambda ids=ids, option=option: ask(mixed, ids, option, TOKENS)
                    for ids, option in zip(PROMPTS, OPTIONS, strict=True)
                ]
            )
        finally:
            ended.set()

    told, _ = in_parallel([answers, prefills])
    steps = mixed.log_text().count("Decode batch")
    assert steps < TOKENS / 2, f"{steps} steps without a prefill: nearly all of them mix"
    reports = [answer["meta_info"]["kv_compress"] for answer in told]
    assert [report["windows"] for report in reports] == [4, 4, 0, 4]
    assert [report["without_queries"] for report in reports] == [0] * 4
    for ids, option, answer in zip(PROMPTS[:3], OPTIONS[:3], told[:3], strict=True):
        kept = 32 if option == {"selector": "recent"} else 64
        truth = RetainedCache(tiny_model, window=64, kept=kept, delay=16, page_size=16)
        expected = truth.feed(ids)
        for step, token in enumerate(answer["output_ids"]):
            assert expected[token] > expected.max() - 1e-3, f"{option}, step {step}"
            truth.prune_recent()
            expected = truth.feed([token])
    mixed.assert_nothing_leaked()


def ask(server: Server, ids: list[int], option: object, tokens: int) -> dict:
    """A greedy answer without logprobs, which would keep it out of mixed steps."""
    return server.generate(ids, kv_compress=option, tokens=tokens, return_logprob=False)
