"""Running the cells: rows take turns, and each result is kept at once, so that a run can be resumed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import requests

from kara_sglang.benchmarks.ring import ring_of
from kara_sglang.benchmarks.serving.load import drive
from kara_sglang.benchmarks.serving.peers import PEERS
from kara_sglang.benchmarks.serving.residents import Servers, Start
from kara_sglang.benchmarks.serving.rows import STOCK, Row, rows
from kara_sglang.benchmarks.serving.scenarios import Cell
from kara_sglang.benchmarks.serving.server import Server
from kara_sglang.benchmarks.serving.setup import Setup

CLIENT_METRICS = (
    *("duration", "completed", "total_input_tokens", "total_output_tokens"),
    *("output_throughput", "request_throughput"),
    *("median_ttft_ms", "p99_ttft_ms", "median_itl_ms", "p99_itl_ms", "median_e2e_latency_ms"),
)


GROUP = 1000
"""Repetitions of a point's second group of rows begin with this number, of the third with twice it."""


class Journal:
    """Results of a run directory, one JSON line each; what is there is not measured again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.results: list[dict[str, Any]] = []
        if path.exists():
            # A line that was cut off while it was written is measured again.
            for line in path.read_text().splitlines():
                try:
                    self.results.append(json.loads(line))
                except json.JSONDecodeError:
                    continue

    def has(self, cell: Cell, repetition: int) -> bool:
        return any(r["key"] == cell.key and r["repetition"] == repetition for r in self.results)

    def add(self, result: dict[str, Any]) -> None:
        self.results.append(result)
        with self.path.open("a") as file:
            print(json.dumps(result), file=file)


def schedule(cells: list[Cell], repetitions: int, resident: int) -> Iterator[tuple[Cell, int]]:
    """The order of the runs: rows that are compared take turns, and each repetition begins with
    another one.

    Where fewer servers than rows can stay up, a point's rows are taken in groups that fit, stock SGLang
    in each of them. The repetitions of each group have numbers of their own (:data:`GROUP`), so a row
    is compared with what stock did among the row's group. ``resident`` 1 means a start per run.
    """
    points: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        points.setdefault((cell.scenario, cell.point), []).append(cell)
    for point in points.values():
        stock = [cell for cell in point if cell.row == STOCK]
        others = [cell for cell in point if cell.row != STOCK]
        size = resident - len(stock) if resident > 1 else len(point)
        for group, first in enumerate(range(0, max(1, len(others)), size)):
            members = stock + others[first : first + size]
            for repetition in range(repetitions):
                turn = repetition % len(members)
                for cell in members[turn:] + members[:turn]:
                    yield cell, group * GROUP + repetition


def start_of(cell: Cell, setup: Setup) -> Start:
    """The server that a cell is measured on."""
    row = rows(setup.window)[cell.row]
    changes: dict[str, Any] = {"pool": cell.pool, "expects": cell.expects}
    if cell.recorders is not None:
        ring = ring_of(setup.model, {"window": setup.window, "delay": setup.delay} | row.settings)
        # Whole pages are taken of it.
        changes["query_mem_gb"] = (cell.recorders + 0.5) * ring.request_bytes(1) / 2**30
    return PEERS[row.peer], row, dataclasses.replace(setup, **changes)


def run(
    cell: Cell,
    repetition: int,
    setup: Setup,
    servers: Servers,
    folder: Path,
    then: Sequence[Cell] = (),
) -> dict[str, Any]:
    """Measure one cell once; ``then`` are the cells that come next, so that servers start together."""
    peer, row, setup_here = start_of(cell, setup)
    seed = 1000 + repetition % GROUP  # all groups see the same requests
    work = folder / "clients" / cell.key.replace("/", "-").replace(" ", "-")
    result: dict[str, Any] = {
        "key": cell.key,
        "scenario": cell.scenario,
        "point": cell.point,
        "row": cell.row,
        "repetition": repetition,
        "pool": cell.pool,
        "requests": cell.load.requests,
    }
    server = servers.get((peer, row, setup_here), [start_of(one, setup) for one in then])
    # Of all rows, also those that have to differ, so that all are as warm.
    probe = _probe(server) if cell.scenario == "ample" and row.peer == "sglang" else None
    if row.peer == "sglang":
        server.post("/flush_cache", {})
        time.sleep(0.2)  # the log of what came before is written
    mark, cpu = peer.mark(server), server.cpu_seconds()
    client = drive(
        cell.load,
        backend=peer.backend,
        url=server.url,
        model=setup.model,
        tokenizer=setup.model,
        seed=seed,
        folder=work,
    )
    time.sleep(0.5)
    cpu = server.cpu_seconds() - cpu
    counters = peer.counters(server, mark)
    return result | {
        "client": {name: client[name] for name in CLIENT_METRICS},
        "counters": dataclasses.asdict(counters),
        "cpu_seconds": cpu,
        "cpu_seconds_per_output_token": cpu / client["total_output_tokens"],
        "probe": probe,
    }


def _probe(server: Server) -> str:
    """Digest of a fixed batch's greedy tokens and of every bit of their log-probabilities."""
    rng = random.Random(7)
    batch = [[rng.randrange(3, 500) for _ in range(40)] for _ in range(2)]
    sampling = {"max_new_tokens": 150, "temperature": 0, "ignore_eos": True}
    body = {"input_ids": batch, "sampling_params": sampling, "return_logprob": True}
    server.post("/flush_cache", {})
    answers = server.post("/generate", body).json()
    seen = [[pair[:2] for pair in a["meta_info"]["output_token_logprobs"]] for a in answers]
    return hashlib.sha256(json.dumps(seen).encode()).hexdigest()[:16]


def missing(row: Row, setup: Setup) -> str | None:
    """Why a row cannot be run here, or None."""
    return PEERS[row.peer].missing(setup)


def failure(error: Exception) -> str:
    """One line on a run that failed."""
    if isinstance(error, (subprocess.SubprocessError, requests.RequestException, RuntimeError)):
        return str(error).splitlines()[0]
    raise error
