"""The set-ups that are compared: one row of the result table each."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

STOCK = "stock"
EXACT = ("off", "identity")
"""Rows whose answers have to be stock's, bit for bit."""


@dataclass(frozen=True, slots=True)
class Row:
    """One set-up.

    Attributes
    ----------
    name
        In the table, and what ``--rows`` takes.
    what
        One line for the reader.
    peer
        The adapter that starts it (``benchmarks/serving/peers``).
    selector
        ``--kv-compress``; None: the flag is not given.
    retain
        R / W.
    settings
        Further keys of ``--kv-compress-config``; the policy is the paper's unless they name another.
    flags
        Flags of the engine's own.
    plugin
        Whether the engine loads the plugin at all.
    """

    name: str
    what: str
    peer: str = "sglang"
    selector: str | None = None
    retain: float = 0.5
    settings: dict[str, Any] = field(default_factory=dict)
    flags: tuple[str, ...] = ()
    plugin: bool = True

    def compress_flags(self, window: int, delay: int, query_mem_gb: float) -> list[str]:
        """The plugin's flags of this row, for a window of so many tokens."""
        if self.selector is None:
            return []
        settings = {"delay": delay, "policy": "periodic"} | self.settings
        return [
            *("--kv-compress", self.selector),
            *("--kv-compress-window", str(window)),
            *("--kv-compress-retain", str(self.retain)),
            *("--kv-compress-query-mem-gb", str(query_mem_gb)),
            *("--kv-compress-config", json.dumps(settings)),
        ]


def rows(window: int) -> dict[str, Row]:
    """All rows by name; KvLLM's policy is scaled to a window of so many tokens."""
    # Published for a window of 4 x 256 tokens (nano-kvllm v0.2.0, config.py): half of it is kept, the
    # period is the window's length, 20 sequences a pass, the newest query votes for the whole layer.
    kvllm = {
        "delay": 0,
        "last_queries": 1,
        "granularity": "layer",
        "query_heads": "all",
        "period": window,
        "max_requests_per_pass": 20,
    }
    every = [
        Row(STOCK, "SGLang as installed, the plugin not loaded", plugin=False),
        Row("off", "the plugin installed, compression not switched on"),
        Row("identity", "every pass runs and keeps every token", selector="identity"),
        Row("kara-0.5", "Kara, half of each window kept", selector="kara"),
        Row("kara-0.25", "Kara, a quarter of each window kept", selector="kara", retain=0.25),
        Row(
            "threshold",
            "Kara at 0.5, each request as soon as its window is full",
            selector="kara",
            settings={"policy": "threshold"},
        ),
        Row(
            "pressure",
            "Kara at 0.5, only while requests need more than 80 % of the pool",
            selector="kara",
            settings={"policy": "pressure"},
        ),
        Row(
            "recomputed",
            "Kara at 0.5, retracted requests computed again",
            selector="kara",
            settings={"retracted_mem_gb": 0},
        ),
        Row("small-ring", "Kara at 0.5, room to record a quarter of the requests", selector="kara"),
        Row("keys-0.5", "no queries recorded, half of each window kept", selector="keys"),
        Row("keys-0.25", "no queries recorded, a quarter kept", selector="keys", retain=0.25),
        Row("random", "random tokens, half of each window kept", selector="random"),
        Row("recent", "the newest tokens, half of each window kept", selector="recent"),
        Row("kvllm", "KvLLM's policy in our engine, half kept", "sglang", "snapkv", 0.5, kvllm),
        Row(
            "radixless",
            "SGLang with the flags of other evictors: no prefix cache, no overlap",
            flags=("--disable-radix-cache", "--disable-overlap-schedule"),
            plugin=False,
        ),
        Row("vllm", "vLLM, another engine", peer="vllm", plugin=False),
    ]
    return {row.name: row for row in every}
