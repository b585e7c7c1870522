"""Answers of servers that verify drafts: told step by step, and followed by transformers."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from exactness import PROMPTS, RetainedCache, logprobs
from server import Server


def ngram(drafts: int, breadth: int) -> tuple[str, ...]:
    return (
        *("--speculative-algorithm", "NGRAM", "--speculative-num-draft-tokens", str(drafts)),
        *("--speculative-ngram-max-bfs-breadth", str(breadth)),
    )


def draft_model(algorithm: str, topk: int = 1, drafts: int = 4) -> tuple[str, ...]:
    return (
        *("--speculative-algorithm", algorithm, "--speculative-num-steps", "3"),
        *("--speculative-eagle-topk", str(topk), "--speculative-num-draft-tokens", str(drafts)),
    )


def accepted_lengths(server: Server, options: Sequence[Any]) -> tuple[list[float], list[dict]]:
    """Tokens that a step accepts in the mean of :data:`PROMPTS`, for each of the ``kv_compress`` asked
    for; and the answers to the last."""
    rates, answers = [], []
    for option in options:
        server.flush()
        answers = server.generate(PROMPTS, kv_compress=option)
        rates.append(statistics.fmean(one["meta_info"]["spec_accept_length"] for one in answers))
    return rates, answers


def step_by_step(
    server: Server, ids: list[int], *, again: bool = False, selector: str = "recent", **more: Any
) -> tuple[dict, list[int]]:
    """A streamed answer, and how many of its tokens there were behind the prefill and each step;
    ``again`` asks for it behind another one to the same prompt.

    Repeated where the server has sent two steps in one part, as it does for a slow client.
    """
    for _ in range(8):
        server.flush()
        if again:
            server.generate(ids, kv_compress=False, **more)
        parts = _streamed(server, ids, selector, more)
        counts = [part["meta_info"]["completion_tokens"] for part in parts]
        if len(counts) == parts[-1]["meta_info"]["spec_verify_ct"] + 1:
            return parts[-1], counts
    raise AssertionError("the server never sent each step by itself")


def _streamed(server: Server, ids: list[int], selector: str, more: dict[str, Any]) -> list[dict]:
    sampling = {"max_new_tokens": 300, "temperature": 0, "ignore_eos": True}
    sampling["custom_params"] = {"kv_compress": {"selector": selector}}
    body = {"input_ids": ids, "stream": True, "return_logprob": True, "sampling_params": sampling}
    with server.post("/generate", body | more, stream=True) as response:
        lines = [line[6:] for line in response.iter_lines() if line.startswith(b"data: {")]
    return [json.loads(line) for line in lines]


def assert_follows(
    truth: RetainedCache,
    ids: list[int],
    answer: dict,
    counts: list[int],
    behind: int,
    close: float = 2e-4,
    keeps: np.ndarray | None = None,
) -> None:
    """Each token, and its probability, is that of transformers with the same retained K/V at true
    positions, the newest of each window or what ``keeps`` says (:meth:`RetainedCache.prune`). A pass
    ahead of a step knows all results but those of the ``behind`` last steps."""
    expected = truth.feed(ids)
    for step, count in enumerate(counts):
        if step:
            truth.prune(len(ids) + counts[max(0, step - 1 - behind)] - 1, keeps)
        for place in range(counts[step - 1] if step else 0, count):
            if place:
                expected = truth.feed([answer["output_ids"][place - 1]])
            check(expected, answer, place, close)


def check(expected: torch.Tensor, answer: dict, place: int, close: float = 2e-4) -> None:
    """A token of a greedy answer, the likeliest one up to a tie, and its probability."""
    chance, said = expected[answer["output_ids"][place]].item(), logprobs(answer)[place]
    assert chance > expected.max().item() - close, f"token {place}"
    assert abs(said - chance) < close, f"token {place}: {said}, not {chance}"
