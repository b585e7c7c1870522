"""Traces that nothing has written, for tests."""

from __future__ import annotations

import dataclasses
import re
from html import unescape
from typing import Any

import numpy as np

from kara_sglang.config import KaraConfig
from kara_sglang.trace.format import About, Trace

LAYERS, HEADS, WIDTH, KEPT = 3, 2, 20, 8


def some_trace(prompt: int = 5, output: int = 60, seed: int = 0, **about: Any) -> Trace:
    """Two windows of 20 tokens with a gap of 4 before the second, 8 kept at random."""
    rng = np.random.default_rng(seed)
    chosen = np.zeros((2, LAYERS, HEADS, WIDTH), dtype=np.uint8)
    chosen[..., :KEPT] = 1
    chosen = rng.permuted(chosen, axis=-1)
    described = {
        "rid": "a-request",
        "finish": "length",
        "retractions": 0,
        "selector": "kara",
        "kept": KEPT,
        "settings": dataclasses.asdict(KaraConfig(window=WIDTH, delay=0)),
        "model": "/models/a-model",
        "tokenizer": "/models/nowhere",
        "tp_rank": 0,
        "tp_size": 1,
        "heads": list(range(HEADS)),
        "num_kv_heads": HEADS,
    }
    return Trace(
        About(**described | about),
        np.arange(prompt),
        np.arange(100, 100 + output),
        np.array([[8, 8, WIDTH, KEPT, 2], [32, 20, WIDTH, KEPT, 0]]),
        np.packbits(chosen, axis=-1, bitorder="little"),
    )


def assert_same(one: Trace, other: Trace) -> None:
    assert one.about == other.about
    for name in ("prompt_ids", "output_ids", "windows", "bits"):
        assert np.array_equal(getattr(one, name), getattr(other, name)), name


def split(trace: Trace, heads: list[list[int]]) -> list[Trace]:
    """What tensor-parallel ranks that hold these heads would have written."""
    return [
        dataclasses.replace(
            trace,
            about=dataclasses.replace(trace.about, tp_rank=rank, tp_size=len(heads), heads=mine),
            bits=trace.bits[:, :, mine],
        )
        for rank, mine in enumerate(heads)
    ]


def marks(html: str) -> list[list[tuple[int, str]]]:
    """Level and text of each token of each window."""
    windows = re.findall(r"<section class=window .*?</section>", html, re.DOTALL)
    spans = [re.findall(r"<span class=k(\d+)>(.*?)</span>", w, re.DOTALL) for w in windows]
    return [[(int(level), unescape(text)) for level, text in row] for row in spans]


def cut(trace: Trace, parts_at: int) -> Trace:
    """The same request with other tokens from position ``parts_at`` on."""
    output = trace.output_ids.copy()
    output[parts_at - len(trace.prompt_ids) :] += 1000
    return dataclasses.replace(trace, output_ids=output)
