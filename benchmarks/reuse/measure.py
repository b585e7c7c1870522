"""Programs of several steps, and forks of one chain of thought, on servers that keep other things."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import random
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

from kara_sglang.benchmarks.serving.counters import Counters
from kara_sglang.benchmarks.serving.peers import PEERS, start
from kara_sglang.benchmarks.serving.rows import STOCK, Row
from kara_sglang.benchmarks.serving.server import Server
from kara_sglang.benchmarks.serving.setup import Setup

REUSE = "--kv-compress-prefix-reuse"
ROWS = (
    Row(STOCK, "SGLang as installed: every answer is kept exactly", plugin=False),
    Row("exact", "Kara at 0.5, prompts are reused", selector="kara", flags=(REUSE, "exact")),
    Row("compressed", "Kara at 0.5, answers are reused", selector="kara", flags=(REUSE, "compressed")),
)


@dataclass(frozen=True, slots=True)
class Sizes:
    """All in tokens, requests or steps."""

    window: int = 64
    delay: int = 16
    page_size: int = 16
    programs: int = 6
    steps: int = 4
    prompt: int = 64
    more: int = 16
    answer: int = 256
    chain: int = 2048
    forks: int = 18
    fork_answer: int = 1024
    repetitions: int = 3

    @property
    def program(self) -> int:
        """Tokens of a whole program."""
        return self.prompt + self.steps * self.answer + (self.steps - 1) * self.more

    @property
    def ample(self) -> int:
        return 4 * self.programs * self.program

    @property
    def scarce(self) -> int:
        """Half of what all programs would keep, in whole pages."""
        return self.programs * self.program // 2 // self.page_size * self.page_size

    @property
    def fork_pool(self) -> int:
        """The chain and six forks, uncompressed, in whole pages."""
        tokens = self.prompt + self.chain + 6 * (self.fork_answer + 2 * self.page_size)
        return tokens // self.page_size * self.page_size


class Client:
    """Sends token ids and keeps them."""

    def __init__(self, server: Server) -> None:
        self._server = server

    def generate(
        self, ids: list[int], tokens: int, **sampling: Any
    ) -> tuple[list[int], dict[str, Any], float]:
        """Generated ids, ``meta_info``, and seconds to the first token."""
        params = {"max_new_tokens": tokens, "temperature": 0, "ignore_eos": True} | sampling
        body: Any = {"input_ids": ids, "sampling_params": params, "stream": True}
        started, first, last = time.perf_counter(), 0.0, None
        with requests.post(
            self._server.url + "/generate", json=body, stream=True, timeout=1800
        ) as response:
            response.raise_for_status()
            for line in response.iter_lines():
                if line.startswith(b"data: {"):
                    first = first or time.perf_counter() - started
                    last = json.loads(line[len(b"data: ") :])
        if last is None or len(last["output_ids"]) != tokens:
            raise RuntimeError(f"{tokens} tokens were asked for, the answer was {last}")
        return last["output_ids"], last["meta_info"], first


def words(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(3, 500) for _ in range(count)]


def run_steps(client: Client, sizes: Sizes, seed: int) -> list[dict[str, float]]:
    """All programs side by side; per step the means over the programs."""

    def program(number: int) -> list[tuple[int, int, float]]:
        rng = random.Random(f"{seed} {number}")
        ids, seen = words(rng, sizes.prompt), []
        for step in range(sizes.steps):
            if step:
                ids = ids + words(rng, sizes.more)
            answer, meta, first = client.generate(ids, sizes.answer)
            seen.append((len(ids), meta["cached_tokens"], first))
            ids = ids + answer
        return seen

    with concurrent.futures.ThreadPoolExecutor(sizes.programs) as pool:
        programs = list(pool.map(program, range(sizes.programs)))
    return [
        {
            "prompt_tokens": statistics.mean(p[step][0] for p in programs),
            "cached_tokens": statistics.mean(p[step][1] for p in programs),
            "ttft_ms": 1e3 * statistics.median(p[step][2] for p in programs),
        }
        for step in range(sizes.steps)
    ]


def run_forks(server: Server, client: Client, sizes: Sizes) -> dict[str, float]:
    """One chain of thought, then all its forks at once."""
    rng = random.Random(11)
    ids = words(rng, sizes.prompt)
    answer, _, _ = client.generate(ids, sizes.chain)
    ids = ids + answer
    position = server.log_position()
    with concurrent.futures.ThreadPoolExecutor(sizes.forks) as pool:
        forks = [
            pool.submit(client.generate, ids + words(rng, sizes.more), sizes.fork_answer)
            for _ in range(sizes.forks)
        ]
        metas = [fork.result()[1] for fork in forks]
    time.sleep(0.5)
    counted = Counters.of(server.log_since(position))
    return {
        "peak_running": counted.peak_running,
        "mean_running": counted.mean_running,
        "decode_steps": counted.decode_steps,
        "retractions": counted.retractions,
        "cached_tokens": statistics.mean(meta["cached_tokens"] for meta in metas),
    }


def measure(setup: Setup, sizes: Sizes, folder: Path) -> dict[str, Any]:
    """All rows in all pools; where repetitions are timed, the rows take turns."""
    found: dict[str, Any] = {"steps": {}, "forks": {}}
    for pool_name, pool in (("ample", sizes.ample), ("scarce", sizes.scarce)):
        servers: dict[str, Server] = {}
        try:
            for row in ROWS:
                servers[row.name] = start_row(row, setup, pool, folder)
            runs: dict[str, list[list[dict[str, float]]]] = {row.name: [] for row in ROWS}
            for repetition in range(sizes.repetitions):
                for name, server in servers.items():
                    server.post("/flush_cache", {})
                    runs[name].append(run_steps(Client(server), sizes, repetition))
            found["steps"][pool_name] = runs
        finally:
            for server in servers.values():
                server.stop()
    for row in ROWS:
        server = start_row(row, setup, sizes.fork_pool, folder)
        try:
            found["forks"][row.name] = run_forks(server, Client(server), sizes)
        finally:
            server.stop()
    return found


def start_row(row: Row, setup: Setup, pool: int, folder: Path) -> Server:
    """A row's server with a pool of so many slots, which answers."""
    print(f"starting {row.name}, pool {pool} slots", file=sys.stderr)
    log = folder / "logs" / f"{row.name}-{pool}.log"
    return start(PEERS["sglang"], row, dataclasses.replace(setup, pool=pool), log).wait()
