"""Requests that decode while others are prefilled, and what their answers must be."""

from __future__ import annotations

import threading
from pathlib import Path

from exactness import PROMPTS, assert_likeliest
from server import Server, in_parallel, prompt

OPTIONS = ({"selector": "recent"}, {"selector": "identity"}, False, None)
TOKENS = 300


def ask(server: Server, ids: list[int], option: object, tokens: int) -> dict:
    """A greedy answer without log-probabilities: SGLang mixes nobody who asks for them."""
    return server.generate(ids, kv_compress=option, tokens=tokens, return_logprob=False)


def answers_beside_prefills(server: Server, length: int) -> list[dict]:
    """Answers to :data:`PROMPTS` with :data:`OPTIONS`; all the time another prompt of so many tokens is
    computed."""
    ended = threading.Event()

    def answers() -> list[dict]:
        try:
            return in_parallel(
                [
                    lambda ids=ids, option=option: ask(server, ids, option, TOKENS)
                    for ids, option in zip(PROMPTS, OPTIONS, strict=True)
                ]
            )
        finally:
            ended.set()

    def prefills() -> None:
        seed = 100
        while not ended.is_set():
            ask(server, prompt(length, seed), None, 1)
            seed += 1

    told, _ = in_parallel([answers, prefills])
    return told


def assert_exact(model: Path, answers: list[dict]) -> None:
    """Tokens stood at their true positions behind the K/V that they should have seen, which is all of
    it for identity and who opted out; windows were compressed in their very step, and each one that
    asks for queries had them. That they are its own, `debug_checks` say."""
    reports = [answer["meta_info"]["kv_compress"] for answer in answers]
    assert [report["windows"] for report in reports] == [4, 4, 0, 4]
    assert [report["without_queries"] for report in reports] == [0] * 4
    for ids, kept, answer in zip(PROMPTS, (32, 64, 64), answers, strict=False):
        assert assert_likeliest(model, ids, answer["output_ids"], kept) == 4
