"""What is measured: for each scenario the points, the load at each, and the rows compared there."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kara_sglang.benchmarks.serving.load import Load

TRACE = Path(__file__).parent / "data" / "azure_llm_2023_conv_500.csv"


@dataclass(frozen=True, slots=True)
class Scale:
    """Sizes that suit a model and a machine; all in tokens or requests.

    Attributes
    ----------
    window, delay, page_size
        Of the compressed rows.
    prompt, output
        Tokens per request.
    requests
        Per run. A multiple of what stock SGLang and ``kara`` at 0.5 run at once in the scarce pool (3
        and 5), so that neither ends with a round of a few.
    scarce
        Requests that stock SGLang can run at once in the scarce pool.
    slowdown
        Factor on the arrivals' times.
    """

    window: int = 64
    delay: int = 16
    page_size: int = 16
    prompt: int = 64
    output: int = 1024
    requests: int = 15
    scarce: int = 3
    slowdown: float = 1.0

    def pool(self, requests: int) -> int:
        """KV slots in which stock SGLang runs so many requests at once, and not one more."""
        pages = -(-(self.prompt + self.output) // self.page_size) + 1
        # It reserves a page per request on top, and wants the sum below the pool's size.
        return requests * pages * self.page_size + self.page_size * (requests + 1)

    @property
    def load(self) -> Load:
        return Load(self.requests, self.prompt, self.output)


@dataclass(frozen=True, slots=True)
class Cell:
    """One place in the result: a row under a load in a pool.

    Attributes
    ----------
    scenario, point
        Where it stands; all rows of a point are compared with each other.
    row
        Name of the row.
    pool
        KV slots of the server.
    load
        What the clients do.
    recorders
        Requests that the query ring has room for, by the mean of their heads; None: by its size in GiB.
    expects
        Tokens of an answer for which SGLang reserves room at most; None: its own bound.
    """

    scenario: str
    point: str
    row: str
    pool: int
    load: Load
    recorders: int | None = None
    expects: int | None = None

    @property
    def key(self) -> str:
        return f"{self.scenario}/{self.point}/{self.row}"


MAIN = ("stock", "kara-0.5", "kara-0.25")
ALL = (
    *("stock", "off", "identity", "kara-0.5", "kara-0.25", "threshold", "pressure"),
    *("keys-0.5", "keys-0.25", "random", "recent", "kvllm"),
    *("radixless", "vllm"),
)


def scarce(scale: Scale) -> Iterator[Cell]:
    """The main table: a scarce pool, with equal work and with answers that end by themselves."""
    pool = scale.pool(scale.scarce)
    for row in ALL:
        yield Cell("scarce", "equal work", row, pool, scale.load)
    for row in (*MAIN, "pressure", "kvllm"):
        yield Cell("scarce", "real EOS", row, pool, dataclasses.replace(scale.load, ignore_eos=False))


def pool(scale: Scale) -> Iterator[Cell]:
    """Where is the crossover: the same load in pools from scarce to ample."""
    for requests in sorted({2, scale.scarce, 2 * scale.scarce, scale.requests}):
        for row in MAIN:
            yield Cell("pool", f"{requests} fit", row, scale.pool(requests), scale.load)


def concurrency(scale: Scale) -> Iterator[Cell]:
    """A scarce pool, and ever more clients."""
    for clients in (2, 4, 8, 16):
        load = dataclasses.replace(
            scale.load, concurrency=clients, requests=max(scale.requests, clients)
        )
        for row in MAIN:
            yield Cell("concurrency", f"{clients} clients", row, scale.pool(scale.scarce), load)


def prefix(scale: Scale) -> Iterator[Cell]:
    """Prompts that share a prefix: the compressed server keeps the stock server's hit rate."""
    load = Load(
        scale.requests, 4 * scale.prompt, scale.output // 4, concurrency=4, kind="shared-prefix"
    )
    for row in ("stock", "off", "kara-0.5"):
        yield Cell("prefix", "shared prefix", row, scale.pool(2 * scale.scarce), load)


def ample(scale: Scale) -> Iterator[Cell]:
    """Memory for everybody: what compression costs when it is not needed."""
    for row in ("stock", "off", "identity", "kara-0.5", "pressure", "radixless"):
        yield Cell("ample", "equal work", row, 2 * scale.pool(scale.requests), scale.load)


def arrivals(scale: Scale) -> Iterator[Cell]:
    """Arrival times and prompt lengths of a real service, with long answers."""
    load = Load(
        2 * scale.requests,
        8 * scale.prompt,
        scale.output,
        kind="arrivals",
        trace=TRACE,
        slowdown=scale.slowdown,
    )
    for row in MAIN:
        yield Cell("arrivals", "trace", row, scale.pool(scale.scarce), load)


def ring(scale: Scale) -> Iterator[Cell]:
    """A query ring with room for a quarter of the running requests."""
    clients = max(16, scale.requests // 2)
    load = dataclasses.replace(scale.load, requests=2 * clients, concurrency=clients)
    for row in ("stock", "kara-0.5", "small-ring", "keys-0.5"):
        recorders = clients // 4 if row == "small-ring" else None
        # Room for all of them at a half, and for five eighths without compression.
        yield Cell("ring", "ring for a quarter", row, scale.pool(clients * 5 // 8), load, recorders)


def unknown(scale: Scale) -> Iterator[Cell]:
    """Long answers that may become as long as the pool, and end earlier: nobody knows when."""
    pool = 8 * scale.output
    for row in ("stock", "identity", "kara-0.5", "kara-0.25", "pressure"):
        yield Cell("unknown", "long answers, unknown length", row, pool, _unknown(scale, pool))


def _unknown(scale: Scale, pool: int) -> Load:
    return Load(
        requests=10,
        prompt=scale.prompt,
        output=pool * 7 // 8,
        ignore_eos=False,
        kind="hang-up",
        shortest=scale.output * 3 // 2,
        longest=3 * scale.output,
    )


def retractions(scale: Scale) -> Iterator[Cell]:
    """The same answers on a server that expects short ones: it lets in more than the pool can hold."""
    pool = 8 * scale.output
    for row in ("stock", "recomputed", "kara-0.5", "pressure"):
        yield Cell(
            "retractions",
            "answers longer than expected",
            row,
            pool,
            _unknown(scale, pool),
            expects=scale.output // 4,
        )


SCENARIOS = {
    function.__name__: function
    for function in (scarce, pool, concurrency, prefix, ample, arrivals, ring, unknown, retractions)
}


def quick(scale: Scale) -> Iterator[Cell]:
    """What ``--quick`` runs: the headline figures, and no more."""
    small = dataclasses.replace(next(prefix(scale)).load, output=scale.output // 16)
    for row in ("stock", "kara-0.5", "kara-0.25"):
        yield Cell("scarce", "equal work", row, scale.pool(scale.scarce), scale.load)
    short = dataclasses.replace(scale.load, output=scale.output // 4)
    enough = 2 * scale.pool(scale.requests)
    for row in ("stock", "off", "kara-0.5"):
        yield Cell("ample", "equal work", row, enough, short)
    for row in ("stock", "kara-0.5"):
        yield Cell("prefix", "shared prefix", row, enough, small)
