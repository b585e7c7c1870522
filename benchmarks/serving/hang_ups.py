"""Clients that leave in the middle of an answer, so that the server cannot know how long it becomes.

SGLang's load generator has none. What is measured is named as in its result.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(slots=True)
class Answer:
    """What one client saw: when it asked, and when each chunk came."""

    asked: float
    chunks: list[float] = field(default_factory=list)  # seconds
    tokens: int = 0


def lengths(requests: int, shortest: int, longest: int) -> list[int]:
    """Tokens after which each client leaves: evenly spread, in an order of no meaning."""
    step = (longest - shortest) / max(1, requests - 1)
    spread = [round(shortest + step * number) for number in range(requests)]
    random.Random(requests).shuffle(spread)
    return spread


def drive(
    url: str,
    *,
    prompt: int,
    most: int,
    leave_after: list[int],
    end_of_text: list[int],
    seed: int,
) -> dict[str, Any]:
    """Send one request per entry of ``leave_after``, all at once.

    Parameters
    ----------
    url : str
        Of an SGLang server.
    prompt : int
        Random tokens in front of each answer.
    most : int
        ``max_new_tokens``: all that the server is told.
    leave_after : list of int
        Tokens after which each client closes its connection.
    end_of_text : list of int
        Tokens that must not end an answer earlier.
    seed : int

    Raises
    ------
    RuntimeError
        Where an answer was cut short by the server.
    """
    rng = random.Random(seed)
    bodies = [
        {
            "input_ids": [rng.randrange(3, 500) for _ in range(prompt)],
            "sampling_params": {
                "max_new_tokens": most,
                "temperature": 0,
                "logit_bias": {str(token): -100 for token in end_of_text},
            },
            "stream": True,
        }
        for _ in leave_after
    ]
    started = time.perf_counter()
    answers = asyncio.run(_all(url, bodies, leave_after))
    duration = time.perf_counter() - started
    tokens = sum(answer.tokens for answer in answers)
    first = [1e3 * (answer.chunks[0] - answer.asked) for answer in answers]
    whole = [1e3 * (answer.chunks[-1] - answer.asked) for answer in answers]
    between = [1e3 * gap for answer in answers for gap in np.diff(answer.chunks)]
    return {
        "duration": duration,
        "completed": len(answers),
        "total_input_tokens": prompt * len(answers),
        "total_output_tokens": tokens,
        "output_throughput": tokens / duration,
        "request_throughput": len(answers) / duration,
        "median_ttft_ms": float(np.median(first)),
        "p99_ttft_ms": float(np.percentile(first, 99)),
        "median_e2e_latency_ms": float(np.median(whole)),
        "median_itl_ms": float(np.median(between)),
        "p99_itl_ms": float(np.percentile(between, 99)),
    }


async def _all(url: str, bodies: list[dict[str, Any]], leave_after: list[int]) -> list[Answer]:
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(timeout=timeout, read_bufsize=1 << 24) as session:
        clients = [
            _one(session, url + "/generate", body, tokens)
            for body, tokens in zip(bodies, leave_after, strict=True)
        ]
        return await asyncio.gather(*clients)


async def _one(session: Any, url: str, body: dict[str, Any], leave_after: int) -> Answer:
    answer = Answer(time.perf_counter())
    async with session.post(url, json=body) as response:
        response.raise_for_status()
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            answer.chunks.append(time.perf_counter())
            said = json.loads(line[len("data: ") :])
            if "meta_info" not in said:
                raise RuntimeError(f"the server said {said}")
            answer.tokens = said["meta_info"]["completion_tokens"]
            if answer.tokens >= leave_after:
                response.close()  # SGLang notices, and aborts the request
                return answer
    raise RuntimeError(f"an answer ended after {answer.tokens} tokens, not {leave_after}")
