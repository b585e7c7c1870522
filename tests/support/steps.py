"""Steps of a program, as servers of each kind report them."""

from __future__ import annotations

from kara_sglang.frontend.records import Step


def meta_info(**report: int) -> dict:
    info = {
        "prompt_tokens": 100,
        "completion_tokens": 51,
        "cached_tokens": 96,
        "finish_reason": {"type": "length"},
    }
    return info | ({"kv_compress": report} if report else {})


def step(**report: int) -> Step:
    ids = {"prompt_ids": (1, 2), "output_ids": (3,)}
    return Step.of("gen", "plan", "s", meta_info(**report), seconds=2.0, **ids)
