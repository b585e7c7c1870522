"""Where the GPU's time goes while a server decodes: kernels by name, from SGLang's own profiler."""

from __future__ import annotations

import gzip
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

from kara_sglang.benchmarks.serving.server import Server

OURS = (
    *("record_kernel", "prepare_kernel", "log_sum_exp_kernel", "column_sum_kernel"),
    *("select_kernel", "compact_kernel"),
)
LONGEST = 15
"""Kernels that are named one by one."""


def profile(server: Server, folder: Path, steps: int) -> dict[str, Any]:
    """Profile the next ``steps`` steps of a busy server.

    Returns
    -------
    dict
        ``steps``, ``span_us`` from the first kernel's start to the last one's end, ``busy_us`` the
        sum of all kernels, and per kernel name its ``us`` and its ``calls``.

    Raises
    ------
    RuntimeError
        Where no trace is written within a minute.
    """
    folder.mkdir(parents=True, exist_ok=True)
    body = {"output_dir": str(folder), "num_steps": steps, "activities": ["GPU"]}
    server.post("/start_profile", body)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        time.sleep(1)
        for path in folder.glob("*.trace.json.gz"):
            try:
                with gzip.open(path, "rt") as file:
                    return reduced(json.load(file)["traceEvents"], steps)
            except (EOFError, json.JSONDecodeError):
                continue  # it is still being written
    raise RuntimeError(f"the server wrote no trace into {folder}")


def reduced(events: list[dict[str, Any]], steps: int) -> dict[str, Any]:
    """Sums of a trace's GPU events: kernels, and copies by their kind."""
    on_gpu = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    if not on_gpu:
        raise RuntimeError("the trace holds no kernel")
    took: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for event in on_gpu:
        name = event["name"][:80]
        took[name] += event["dur"]
        calls[name] += 1
    named = [name for name, _ in took.most_common(LONGEST)]
    named += [name for name in OURS if name in took and name not in named]
    return {
        "steps": steps,
        "span_us": max(e["ts"] + e["dur"] for e in on_gpu) - min(e["ts"] for e in on_gpu),
        "busy_us": sum(took.values()),
        "kernels": {name: {"us": took[name], "calls": calls[name]} for name in named},
    }
