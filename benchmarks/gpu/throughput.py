"""Throughput on a GPU at equal memory: stock SGLang beside the compressed server, row by row in turn.

    python -m kara_sglang.benchmarks.gpu.throughput --output throughput.json

Two servers stay up on one GPU, stock SGLang and one with compression, whose requests name their
selector and share themselves, so that all rows meet the same two processes and take turns within
seconds. The compressed server's KV pool is smaller by its query ring and its scratch, so both hold the
same bytes. Weights are dummies of a published shape, prompts are random ids. Further groups of servers
(``--groups``) compare policies, which are settings of a server. With ``--model tiny`` it runs without a
GPU, too, as a rehearsal.

A fixed number of clients each send a request as soon as their last one has ended. The lengths of the
answers are drawn between half and one and a half of ``--tokens``, in the same order in every row, so
that requests come and go one by one. What is measured begins ``--ramp`` seconds later, when the first
answers have made room for others, and is cut into parts, whose spread is the range in the table.
Profiles come first. A run that was cut off goes on where its ``--output`` ends.

Points: ``scarce`` has three times as many clients as stock SGLang can run at once; at ``ample`` all
fit.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import random
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from kara_sglang import cpu_engine
from kara_sglang.benchmarks import command_line
from kara_sglang.benchmarks.gpu.dummy import CONFIGS, kv_bytes, write_config
from kara_sglang.benchmarks.gpu.profiled import profile
from kara_sglang.benchmarks.machine import origin
from kara_sglang.benchmarks.markdown import grid
from kara_sglang.benchmarks.output import write_json
from kara_sglang.benchmarks.serving.peers import PEERS, start
from kara_sglang.benchmarks.serving.rows import STOCK, rows
from kara_sglang.benchmarks.serving.server import Server, end_on_sigterm
from kara_sglang.benchmarks.serving.setup import Setup
from kara_sglang.kernels.selectors import REGISTRY
from kara_sglang.kernels.triton.backend import SCRATCH_BYTES

MODULE = "kara_sglang.benchmarks.gpu.throughput"
DELAY = 64


@dataclass(frozen=True, slots=True)
class Row:
    """One way to serve.

    Attributes
    ----------
    name
        In the table.
    server
        Row of ``benchmarks.serving.rows`` that its server is started as.
    options
        The requests' ``kv_compress``; None: nothing is said.
    """

    name: str
    server: str
    options: Any = None


def _options(selector: str, retain: float) -> dict[str, Any]:
    return {"selector": selector, "retain": retain}


GROUPS: dict[str, tuple[Row, ...]] = {
    "requests": (
        Row(STOCK, STOCK),
        Row("off", "kara-0.5", False),
        Row("identity", "kara-0.5", _options("identity", 1.0)),
        Row("kara-0.5", "kara-0.5", _options("kara", 0.5)),
        Row("kara-0.25", "kara-0.5", _options("kara", 0.25)),
        Row("keys-0.5", "kara-0.5", _options("keys", 0.5)),
        Row("keys-0.25", "kara-0.5", _options("keys", 0.25)),
        Row("random-0.5", "kara-0.5", _options("random", 0.5)),
    ),
    "kvllm": (Row(STOCK, STOCK), Row("kvllm", "kvllm")),
    "pressure": (Row(STOCK, STOCK), Row("pressure", "pressure")),
}
"""Rows that take turns on two servers that are up together."""

SCARCE = (STOCK, "kara-0.5", "kara-0.25", "keys-0.5", "keys-0.25", "random-0.5", "kvllm", "pressure")
AMPLE = (STOCK, "off", "identity", "kara-0.5", "keys-0.5", "kvllm", "pressure")
POINTS = {"scarce": SCARCE, "ample": AMPLE}


PARTS = 3
"""Of the measured time."""
START_SECONDS, TURN_SECONDS, PROFILE_SECONDS = 90, 4, 30
"""What servers take until they are warm, a run beside its ramp and what is measured, and a profile with
its ramp: estimates for an H100."""


class Clients:
    """Clients that ask again and again, and what came when.

    Parameters
    ----------
    url
        Of the server.
    row
        Names the requests' options.
    prompt, tokens
        Of a prompt, and mean of an answer.
    vocabulary
        Prompts are made of ids below it.
    seed
        Of prompts and lengths.
    """

    def __init__(
        self, url: str, row: Row, prompt: int, tokens: int, vocabulary: int, seed: int
    ) -> None:
        self._url, self._row = url, row
        self._prompt, self._tokens, self._vocabulary = prompt, tokens, vocabulary
        self._rng = random.Random(seed)
        self.came: list[tuple[float, int]] = []
        """When a chunk came, and its tokens."""
        self.gaps: list[tuple[float, float]] = []
        """When a chunk came, and the seconds since the answer's last one."""
        self.reports: list[dict[str, Any]] = []
        """``meta_info`` of the answers that have ended."""

    async def run(self, count: int, seconds: float) -> None:
        """Let ``count`` clients ask for so long; what is still open then is given up."""
        timeout = aiohttp.ClientTimeout(total=None)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
            clients = [asyncio.create_task(self._client(session)) for _ in range(count)]
            done, _ = await asyncio.wait(clients, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
            for client in done:
                client.result()  # a client ends by an error only
            for client in clients:
                client.cancel()
            await asyncio.gather(*clients, return_exceptions=True)

    async def _client(self, session: aiohttp.ClientSession) -> None:
        while True:
            ids = [self._rng.randrange(10, self._vocabulary) for _ in range(self._prompt)]
            await self._ask(session, ids, self._rng.randint(self._tokens // 2, self._tokens * 3 // 2))

    async def _ask(self, session: aiohttp.ClientSession, ids: list[int], output: int) -> None:
        sampling: dict[str, Any] = {"max_new_tokens": output, "temperature": 0, "ignore_eos": True}
        if self._row.options is not None:
            sampling["custom_params"] = {"kv_compress": self._row.options}
        body = {"input_ids": ids, "sampling_params": sampling, "stream": True}
        last, meta = 0.0, {}
        async with session.post(f"{self._url}/generate", json=body) as response:
            if response.status != 200:
                raise RuntimeError(f"HTTP {response.status}: {(await response.text())[:300]}")
            async for line in response.content:
                if not line.startswith(b"data: {"):
                    continue
                now, chunk = time.perf_counter(), json.loads(line[6:])
                if "error" in chunk:
                    raise RuntimeError(f"a request failed: {chunk['error']}")
                meta = chunk["meta_info"]
                self.came.append((now, len(chunk["output_ids"])))
                if last:
                    self.gaps.append((now, now - last))
                last = now
        if meta.get("completion_tokens") != output:
            raise RuntimeError(f"an answer has {meta.get('completion_tokens')} tokens, not {output}")
        self.reports.append(meta)


def measure(
    server: Server, clients: Clients, count: int, ramp: float, seconds: float
) -> dict[str, Any]:
    """One run of one row: rates by the client's clock, counts from the server's log."""
    peer = PEERS["sglang"]
    server.post("/flush_cache", {})
    time.sleep(0.3)
    marks: list[Any] = []

    async def both() -> None:
        running = asyncio.create_task(clients.run(count, ramp + seconds))
        await asyncio.sleep(ramp)
        marks.append(peer.mark(server))
        await running

    began = time.perf_counter()
    asyncio.run(both())
    counters = dataclasses.asdict(peer.counters(server, marks[0]))
    schedule = counters.pop("schedule")
    _wait_until_idle(server)
    start, stop = began + ramp, began + ramp + seconds
    gaps = sorted(gap for when, gap in clients.gaps if start <= when < stop)
    part = seconds / PARTS
    rates = [
        sum(n for when, n in clients.came if start + i * part <= when < start + (i + 1) * part) / part
        for i in range(PARTS)
    ]
    reports = [report.get("kv_compress") or {} for report in clients.reports]
    return {
        "output_tokens_per_s": statistics.fmean(rates),
        "parts": rates,
        "itl_ms": {
            "median": 1e3 * _at(gaps, 0.5),
            "p99": 1e3 * _at(gaps, 0.99),
            "p99.9": 1e3 * _at(gaps, 0.999),
            "largest": 1e3 * gaps[-1],
        },
        "ended": len(reports),
        "windows": sum(report.get("windows", 0) for report in reports),
        "without_queries": sum(report.get("without_queries", 0) for report in reports),
        "retained": statistics.fmean([report.get("retained", 1.0) for report in reports] or [1.0]),
        "counters": counters,
        "schedule": {str(running): list(found) for running, found in schedule.items()},
    }


def _wait_until_idle(server: Server) -> None:
    """Until requests whose clients have gone are gone, too: a cache that is in use is not flushed."""
    deadline = time.monotonic() + 30
    while server.post("/flush_cache", {}, check=False).status_code != 200:
        if time.monotonic() > deadline:
            raise RuntimeError("the server still runs requests 30 s after their clients have gone")
        time.sleep(0.2)


def profile_row(
    server: Server, clients: Clients, count: int, ramp: float, folder: Path, steps: int
) -> dict[str, Any]:
    """Kernels by name while ``count`` clients are served."""
    found: dict[str, Any] = {}

    async def both() -> None:
        running = asyncio.create_task(clients.run(count, 3600))
        await asyncio.sleep(ramp)
        found.update(await asyncio.to_thread(profile, server, folder, steps))
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    asyncio.run(both())
    _wait_until_idle(server)
    return found


def _at(ordered: list[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per point and row: its ratios to what stock SGLang did in the same repetition."""
    found = []
    stock = {(r["group"], r["point"], r["repetition"]): r for r in runs if r["row"] == STOCK}
    for group, point, row in dict.fromkeys((r["group"], r["point"], r["row"]) for r in runs):
        mine = [r for r in runs if (r["group"], r["point"], r["row"]) == (group, point, row)]
        pairs = [
            (r, stock[group, point, r["repetition"]])
            for r in mine
            if (group, point, r["repetition"]) in stock
        ]
        if not pairs:
            continue
        ratios = [a["output_tokens_per_s"] / b["output_tokens_per_s"] for a, b in pairs]
        # Parts of a row against the mean of stock's: how much a rate moves within one run.
        parts = [rate / b["output_tokens_per_s"] for a, b in pairs for rate in a["parts"]]
        found.append(
            {
                "group": group,
                "point": point,
                "row": row,
                "repetitions": len(pairs),
                "tokens_per_s": statistics.fmean(a["output_tokens_per_s"] for a, _ in pairs),
                "over_stock": statistics.fmean(ratios),
                "over_stock_range": [min(parts), max(parts)],
                "held": statistics.fmean(a["counters"]["held"] for a, _ in pairs),
                "mean_running": statistics.fmean(a["counters"]["mean_running"] for a, _ in pairs),
                "peak_running": max(a["counters"]["peak_running"] for a, _ in pairs),
                "retractions": sum(a["counters"]["retractions"] for a, _ in pairs),
                "itl_median_over_stock": statistics.fmean(
                    a["itl_ms"]["median"] / b["itl_ms"]["median"] for a, b in pairs
                ),
                "itl_p99_over_stock": statistics.fmean(
                    a["itl_ms"]["p99"] / b["itl_ms"]["p99"] for a, b in pairs
                ),
                "retained": statistics.fmean(a["retained"] for a, _ in pairs),
            }
        )
    return found


def table(rows_: list[dict[str, Any]]) -> str:
    """The summary in Markdown."""
    lines = []
    for r in rows_:
        low, high = r["over_stock_range"]
        gaps = f"{r['itl_median_over_stock']:.2f}, {r['itl_p99_over_stock']:.2f}"
        speed = f"{r['over_stock']:.2f} ({low:.2f} to {high:.2f})"
        held = [f"{r['mean_running']:.1f}", gaps, f"{r['held']:.2f}", str(r["retractions"])]
        lines.append([r["point"], r["row"], speed, *held])
    gaps = "time between tokens: median, p99"
    columns = ["point", "row", "tok/s over stock (range)", "mean running", gaps]
    return grid([*columns, "KV held", "retracted"], lines)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = command_line.parser(__spec__, __doc__)
    parser.add_argument("--output", type=Path, required=True, help="JSON, rewritten after every run")
    parser.add_argument(
        "--model", default="Qwen3-8B", choices=CONFIGS, help="shape of the model; default: %(default)s"
    )
    parser.add_argument(
        "--groups",
        nargs="+",
        default=["requests", "kvllm"],
        choices=GROUPS,
        help="rows to compare; default: requests kvllm",
    )
    parser.add_argument(
        "--points", nargs="+", default=list(POINTS), choices=POINTS, help="loads; default: all"
    )
    parser.add_argument("--rows", nargs="+", help="only these; stock is always run")
    parser.add_argument(
        "--repetitions", type=command_line.whole(), default=3, help="default: %(default)s"
    )
    parser.add_argument(
        "--window", type=command_line.whole(), default=512, help="tokens; default: %(default)s"
    )
    parser.add_argument(
        "--prompt", type=command_line.whole(), default=256, help="tokens; default: %(default)s"
    )
    parser.add_argument("--tokens", type=int, default=2048, help="of an answer, on average")
    parser.add_argument("--fit", type=int, default=40, help="average requests that fit stock's pool")
    parser.add_argument("--ramp", type=float, default=25, help="seconds before what is measured")
    parser.add_argument("--measured", type=float, default=30, help="seconds that are measured")
    parser.add_argument(
        "--query-mem-gb", type=command_line.positive, default=2.0, help="default: %(default)s"
    )
    parser.add_argument(
        "--profiled",
        nargs="*",
        default=[STOCK, "kara-0.5", "keys-0.5"],
        metavar="ROW",
        help="under a profiler as well",
    )
    parser.add_argument(
        "--profile-steps",
        type=command_line.whole(),
        default=64,
        help="decode steps; default: %(default)s",
    )
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no run after so long")
    parser.add_argument("--server-args", default="", help="more flags for every server, as one word")
    parser.add_argument("--folder", type=Path, help="for logs; default: a temporary one")
    return parser.parse_args(arguments)


def members(options: argparse.Namespace, group: str) -> list[Row]:
    """The rows of a group that are asked for; selectors that this version lacks are left out."""
    return [
        row
        for row in GROUPS[group]
        if (row.name == STOCK or not options.rows or row.name in options.rows)
        and (not isinstance(row.options, dict) or row.options["selector"] in REGISTRY)
    ]


def at_point(rows_: list[Row], point: str) -> list[Row]:
    """Those that are measured there."""
    return [row for row in rows_ if row.name in POINTS[point]]


def expected_seconds(options: argparse.Namespace) -> float:
    """How long a run with these options takes at most on an H100."""
    total = 0.0
    for group in options.groups:
        mine = members(options, group)
        runs = options.repetitions * sum(len(at_point(mine, point)) for point in options.points)
        profiles = sum(row.name in options.profiled for row in mine)
        total += START_SECONDS + PROFILE_SECONDS * profiles
        total += runs * (options.ramp + options.measured + TURN_SECONDS)
    return total


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    began = time.monotonic()
    end_on_sigterm()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="kara-throughput-"))
    model = write_config(folder, options.model)
    page = 16
    per_request = -(-(options.prompt + options.tokens) // page) * page
    pool = options.fit * per_request
    longest = options.prompt + options.tokens * 3 // 2 + 2 * page
    ring = round(options.query_mem_gb * 2**30) + (0 if cpu_engine.is_installed() else SCRATCH_BYTES)
    smaller = pool - -(-ring // (kv_bytes(options.model) * page)) * page
    counts = {"scarce": 3 * options.fit, "ample": smaller // longest}
    report: dict[str, Any] = {
        **origin(MODULE, arguments),
        "pool": {"stock": pool, "compressed": smaller, "ring_bytes": ring},
        "clients": counts,
        "summary": [],
        "runs": [],
        "profiles": [],
    }
    if options.output.is_file():
        before = json.loads(options.output.read_text())
        if before["command"] != report["command"]:
            raise SystemExit(f"--output {options.output} holds another run; name another file")
        report |= {key: before[key] for key in ("summary", "runs", "profiles")}
    done = {(run["group"], run["point"], run["row"], run["repetition"]) for run in report["runs"]}
    profiled = {(found["group"], found["row"]) for found in report["profiles"]}

    def setup(row: str) -> Setup:
        args = ["--skip-tokenizer-init", "--incremental-streaming-output", "--load-format", "dummy"]
        args += ["--mem-fraction-static", "0.95", "--context-length", str(longest + page)]
        args += ["--cuda-graph-max-bs-decode", str(counts["scarce"])]
        return Setup(
            model=str(model),
            dtype="bfloat16",
            window=options.window,
            delay=DELAY,
            query_mem_gb=options.query_mem_gb,
            page_size=page,
            pool=pool if row == STOCK else smaller,
            server_args=(*args, *options.server_args.split()),
        )

    def clients(row: Row, seed: int) -> Clients:
        vocabulary = CONFIGS[options.model]["vocab_size"]
        url = running[row.server].url
        return Clients(url, row, options.prompt, options.tokens, vocabulary, seed)

    known = rows(options.window)
    running: dict[str, Server] = {}
    try:
        for group in options.groups:
            mine = members(options, group)
            profiles = [
                row
                for row in mine
                if row.name in options.profiled and (group, row.name) not in profiled
            ]
            todo = []
            for repetition in range(options.repetitions):
                for point in options.points:
                    here = at_point(mine, point)
                    turn = repetition % len(here) if here else 0
                    todo += [(repetition, point, row) for row in here[turn:] + here[:turn]]
            todo = [
                (repetition, point, row)
                for repetition, point, row in todo
                if (group, point, row.name, repetition) not in done
            ]
            if not todo and not profiles:
                continue
            wanted = {row.server for row in mine}
            for name in [name for name in running if name not in wanted]:
                running.pop(name).stop()
            fresh = sorted(wanted - set(running))
            for name in fresh:
                log = folder / f"{name}.log"
                running[name] = start(PEERS["sglang"], known[name], setup(name), log)
            for name in fresh:
                running[name].wait()
                # What is compiled at first use is compiled here.
                measure(running[name], clients(Row(name, name), 0), 8, 8, 2)
            for row in profiles:
                found = profile_row(
                    running[row.server],
                    clients(row, 99),
                    counts["ample"],
                    10,
                    folder / f"{group}-{row.name}",
                    options.profile_steps,
                )
                report["profiles"].append({"group": group, "row": row.name} | found)
                write_json(options.output, report, indent=2)
            for repetition, point, row in todo:
                if time.monotonic() - began > options.seconds:
                    print(f"{options.seconds:.0f} s are over: {row.name} and later are not run")
                    return 0
                found = measure(
                    running[row.server],
                    clients(row, 1000 + repetition),
                    counts[point],
                    options.ramp,
                    options.measured,
                )
                report["runs"].append(
                    {"group": group, "point": point, "row": row.name, "repetition": repetition} | found
                )
                report["summary"] = summary(report["runs"])
                write_json(options.output, report, indent=2)
                print(
                    f"{time.monotonic() - began:.0f} s: {group} {point} {row.name} "
                    f"#{repetition}: {found['output_tokens_per_s']:.0f} tok/s, "
                    f"{found['counters']['mean_running']:.1f} running",
                    flush=True,
                )
    finally:
        for server in running.values():
            server.stop()
        print(table(report["summary"]), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
