"""Throughput on a GPU at equal memory: stock SGLang beside the compressed server, row by row in turn.

    python -m kara_sglang.benchmarks.gpu.throughput --output throughput.json

Two servers stay up on one GPU, stock SGLang and one with compression, whose requests name their
selector and share themselves, so that all rows meet the same two processes and take turns within
seconds. The compressed server's KV pool is smaller by its query ring and its scratch, so both hold the
same bytes. Weights are dummies of a published shape, answers end after a fixed number of tokens (equal
work), prompts are random ids. Further groups of servers (``--groups``) compare policies, which are
settings of a server. With ``--model tiny`` it runs without a GPU, too, as a rehearsal.

Points: ``scarce``, where stock SGLang runs a third of the requests at once, and ``ample``, where all
fit.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import itertools
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
from kara_sglang.benchmarks.gpu.dummy import CONFIGS, kv_bytes, write_config
from kara_sglang.benchmarks.gpu.profiled import profile
from kara_sglang.benchmarks.gpu.report import write
from kara_sglang.benchmarks.machine import command, machine
from kara_sglang.benchmarks.serving.peers import PEERS, Setup
from kara_sglang.benchmarks.serving.rows import STOCK, rows
from kara_sglang.benchmarks.serving.server import Server, end_on_sigterm
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


@dataclass(slots=True)
class Answer:
    """When the tokens of one answer came, in seconds; ``kv_compress`` is the server's report."""

    sent: float
    times: list[float]
    tokens: int
    kv_compress: dict[str, Any] | None


async def _ask(
    session: aiohttp.ClientSession, url: str, ids: list[int], output: int, options: Any
) -> Answer:
    sampling: dict[str, Any] = {"max_new_tokens": output, "temperature": 0, "ignore_eos": True}
    if options is not None:
        sampling["custom_params"] = {"kv_compress": options}
    body = {"input_ids": ids, "sampling_params": sampling, "stream": True}
    answer = Answer(time.perf_counter(), [], 0, None)
    async with session.post(f"{url}/generate", json=body) as response:
        if response.status != 200:
            raise RuntimeError(f"HTTP {response.status}: {(await response.text())[:300]}")
        async for line in response.content:
            if not line.startswith(b"data:") or line.startswith(b"data: [DONE]"):
                continue
            answer.times.append(time.perf_counter())
            last = line
    meta = json.loads(last[5:])["meta_info"]
    answer.tokens, answer.kv_compress = meta["completion_tokens"], meta.get("kv_compress")
    if answer.tokens != output:
        raise RuntimeError(f"an answer has {answer.tokens} tokens, not {output}")
    return answer


async def _load(url: str, prompts: list[list[int]], output: int, options: Any) -> list[Answer]:
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(
        timeout=timeout, connector=aiohttp.TCPConnector(limit=0), read_bufsize=1 << 20
    ) as session:
        return await asyncio.gather(*(_ask(session, url, ids, output, options) for ids in prompts))


def prompts(count: int, length: int, vocabulary: int, seed: int) -> list[list[int]]:
    """Random ids; every repetition has its own, so that nothing is found in the prefix cache."""
    rng = random.Random(seed)
    return [[rng.randrange(10, vocabulary) for _ in range(length)] for _ in range(count)]


def measure(server: Server, row: Row, asked: list[list[int]], output: int) -> dict[str, Any]:
    """One run of one row: rates by the client's clock, counts from the server's log."""
    peer = PEERS["sglang"]
    server.post("/flush_cache", {})
    time.sleep(0.3)
    mark = peer.mark(server)
    started = time.perf_counter()
    answers = asyncio.run(_load(server.url, asked, output, row.options))
    duration = time.perf_counter() - started
    time.sleep(0.3)
    counters = dataclasses.asdict(peer.counters(server, mark))
    schedule = counters.pop("schedule")
    first = sorted(answer.times[0] - answer.sent for answer in answers)
    gaps = sorted(b - a for answer in answers for a, b in itertools.pairwise(answer.times))
    reports = [answer.kv_compress or {} for answer in answers]
    return {
        "duration": duration,
        "output_tokens_per_s": len(asked) * output / duration,
        "ttft_s": {"median": _at(first, 0.5), "p99": _at(first, 0.99)},
        "itl_ms": {
            "median": 1e3 * _at(gaps, 0.5),
            "p99": 1e3 * _at(gaps, 0.99),
            "p99.9": 1e3 * _at(gaps, 0.999),
            "largest": 1e3 * gaps[-1],
        },
        "windows": sum(report.get("windows", 0) for report in reports),
        "without_queries": sum(report.get("without_queries", 0) for report in reports),
        "retained": statistics.fmean(report.get("retained", 1.0) for report in reports),
        "counters": counters,
        "schedule": {str(running): list(found) for running, found in schedule.items()},
    }


def profile_row(
    server: Server, row: Row, asked: list[list[int]], output: int, folder: Path, steps: int
) -> dict[str, Any]:
    """Kernels by name while ``row`` decodes all of ``asked``, once passes have begun."""
    found: dict[str, Any] = {}

    async def both() -> None:
        load = asyncio.create_task(_load(server.url, asked, output, row.options))
        await asyncio.sleep(10)
        found.update(await asyncio.to_thread(profile, server, folder, steps))
        await load

    server.post("/flush_cache", {})
    asyncio.run(both())
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
        found.append(
            {
                "group": group,
                "point": point,
                "row": row,
                "repetitions": len(pairs),
                "tokens_per_s": statistics.fmean(a["output_tokens_per_s"] for a, _ in pairs),
                "over_stock": statistics.fmean(ratios),
                "over_stock_range": [min(ratios), max(ratios)],
                "decode_steps_over_stock": statistics.fmean(
                    a["counters"]["decode_steps"] / b["counters"]["decode_steps"] for a, b in pairs
                ),
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
    lines = [
        "| point | row | tok/s over stock (range) | decode steps | mean running | time between tokens: "
        "median, p99 | retained |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows_:
        low, high = r["over_stock_range"]
        lines.append(
            f"| {r['point']} | {r['row']} | {r['over_stock']:.2f} ({low:.2f} to {high:.2f}) | "
            f"{r['decode_steps_over_stock']:.2f} | {r['mean_running']:.1f} | "
            f"{r['itl_median_over_stock']:.2f}, {r['itl_p99_over_stock']:.2f} | {r['retained']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="JSON, rewritten after every run")
    parser.add_argument("--model", default="Qwen3-8B", choices=CONFIGS)
    parser.add_argument("--groups", nargs="+", default=["requests", "kvllm"], choices=GROUPS)
    parser.add_argument("--points", nargs="+", default=list(POINTS), choices=POINTS)
    parser.add_argument("--rows", nargs="+", help="only these; stock is always run")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=4096, help="of every answer")
    parser.add_argument("--fit", type=int, default=32, help="requests that stock SGLang runs at once")
    parser.add_argument("--requests", type=int, default=96, help="at the scarce point")
    parser.add_argument("--query-mem-gb", type=float, default=2.0)
    parser.add_argument("--profile-steps", type=int, default=64, help="0: no profile")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no run after so long")
    parser.add_argument("--server-args", default="", help="more flags for every server, as one word")
    parser.add_argument("--folder", type=Path, help="for logs; default: a temporary one")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    began = time.monotonic()
    end_on_sigterm()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="kara-throughput-"))
    model = write_config(folder, options.model)
    page = 16
    # As SGLang reserves: a page per request on top, and the sum below the pool's size.
    per_request = (-(-(options.prompt + options.tokens) // page) + 2) * page
    pool = options.fit * per_request + page
    ring = round(options.query_mem_gb * 2**30) + (0 if cpu_engine.is_installed() else SCRATCH_BYTES)
    smaller = pool - -(-ring // (kv_bytes(options.model) * page)) * page
    ample = smaller // per_request
    report: dict[str, Any] = {
        "command": command(MODULE, arguments),
        "machine": machine(),
        "pool": {"stock": pool, "compressed": smaller, "ring_bytes": ring},
        "requests": {"scarce": options.requests, "ample": ample},
        "summary": [],
        "runs": [],
        "profiles": [],
    }

    def setup(row: str) -> Setup:
        args = ["--skip-tokenizer-init", "--incremental-streaming-output", "--load-format", "dummy"]
        args += ["--mem-fraction-static", "0.95", "--context-length", str(per_request + page)]
        args += ["--cuda-graph-max-bs-decode", str(max(options.requests, ample))]
        return Setup(
            model=str(model),
            dtype="bfloat16",
            window=options.window,
            delay=DELAY,
            query_mem_gb=options.query_mem_gb,
            page_size=page,
            pool=pool if row == STOCK else smaller,
            server_args=(*args, *options.server_args.split()),
            pythons={},
            cpu=cpu_engine.is_installed(),
        )

    def asked(count: int, seed: int) -> list[list[int]]:
        return prompts(count, options.prompt, CONFIGS[options.model]["vocab_size"], seed)

    known = rows(options.window)
    running: dict[str, Server] = {}
    try:
        for group in options.groups:
            members = [
                row
                for row in GROUPS[group]
                if row.name == STOCK or not options.rows or row.name in options.rows
            ]
            members = [
                row
                for row in members
                if not isinstance(row.options, dict) or row.options["selector"] in REGISTRY
            ]
            wanted = {row.server for row in members}
            for name in [name for name in running if name not in wanted]:
                running.pop(name).stop()
            fresh = sorted(wanted - set(running))
            for name in fresh:
                log = folder / f"{name}.log"
                running[name] = Server(PEERS["sglang"], known[name], setup(name), log)
            for name in fresh:
                running[name].wait()
                # What is compiled at first use is compiled here.
                measure(running[name], Row(name, name), asked(8, 0), min(options.tokens, 1024))
            for repetition in range(options.repetitions):
                for point in options.points:
                    here = [row for row in members if row.name in POINTS[point]]
                    turn = repetition % len(here)
                    for row in here[turn:] + here[:turn]:
                        if time.monotonic() - began > options.seconds:
                            print(f"{options.seconds:.0f} s are over: {row.name} and later are not run")
                            return 0
                        load = asked(report["requests"][point], 1000 + repetition)
                        found = measure(running[row.server], row, load, options.tokens)
                        report["runs"].append(
                            {"group": group, "point": point, "row": row.name, "repetition": repetition}
                            | found
                        )
                        report["summary"] = summary(report["runs"])
                        write(report, options.output)
                        print(
                            f"{time.monotonic() - began:.0f} s: {group} {point} {row.name} "
                            f"#{repetition}: {found['output_tokens_per_s']:.0f} tok/s, "
                            f"{found['counters']['mean_running']:.1f} running",
                            flush=True,
                        )
            for row in members if options.profile_steps else ():
                if row.name in (STOCK, "kara-0.5", "keys-0.5", "kvllm"):
                    found = profile_row(
                        running[row.server],
                        row,
                        asked(ample, 99),
                        options.tokens,
                        folder / f"{group}-{row.name}",
                        options.profile_steps,
                    )
                    report["profiles"].append({"group": group, "row": row.name} | found)
                    write(report, options.output)
    finally:
        for server in running.values():
            server.stop()
        print(table(report["summary"]), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
