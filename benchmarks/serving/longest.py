"""One answer that is longer than the KV pool, beside others: with and without the plugin.

``python -m kara_sglang.benchmarks.serving.longest`` asks a server with a small pool for one long
answer, and meanwhile for short ones, one after the other. SGLang ends the long one where the request
would no longer fit the pool uncompressed. How many short ones there are depends on the machine.
"""

from __future__ import annotations

import concurrent.futures
import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

from kara_sglang.benchmarks import command_line
from kara_sglang.benchmarks.machine import origin
from kara_sglang.benchmarks.markdown import grid
from kara_sglang.benchmarks.output import write_json
from kara_sglang.benchmarks.serving.peers import PEERS, start
from kara_sglang.benchmarks.serving.rows import STOCK, Row, rows
from kara_sglang.benchmarks.serving.server import Server, end_on_sigterm
from kara_sglang.benchmarks.serving.setup import Setup, resolve_model

PROMPT = 64  # tokens


def main(argv: list[str] | None = None) -> int:
    parser = command_line.parser(__spec__, __doc__)
    whole = command_line.whole()
    parser.add_argument(
        "--model", type=command_line.model, default="tiny", help="tiny, smollm2, a folder or a hub name"
    )
    parser.add_argument("--pool", type=whole, default=4096, help="KV slots; default: %(default)s")
    parser.add_argument(
        "--answer", type=whole, default=12_000, help="tokens of the long one; default: %(default)s"
    )
    parser.add_argument(
        "--short", type=whole, default=100, help="tokens of the others; default: %(default)s"
    )
    parser.add_argument(
        "--retain", type=command_line.share, default=0.25, help="R / W; default: %(default)s"
    )
    parser.add_argument("--window", type=whole, default=64, help="tokens; default: %(default)s")
    parser.add_argument("--delay", type=whole, default=16, help="tokens; default: %(default)s")
    parser.add_argument("--out", type=Path, help="JSON file")
    options = parser.parse_args(argv)
    end_on_sigterm()
    kara = Row(
        "kara",
        "Kara with the default policy",
        selector="kara",
        retain=options.retain,
        settings={"policy": "pressure"},
    )
    found = {}
    with tempfile.TemporaryDirectory(prefix="kara-longest-") as name:
        folder = Path(name)
        setup = Setup(
            model=resolve_model(options.model, folder, context=2 * options.answer),
            dtype="float32" if options.model == "tiny" else "bfloat16",
            window=options.window,
            delay=options.delay,
            query_mem_gb=0.25,
            page_size=16,
            pool=options.pool,
        )
        for row in (rows(options.window)[STOCK], kara):
            server = start(PEERS["sglang"], row, setup, folder / f"{row.name}.log").wait()
            try:
                found[row.name] = measure(server, options.answer, options.short)
            finally:
                server.stop()
    answer = {
        **origin("kara_sglang.benchmarks.serving.longest", argv or sys.argv[1:]),
        "model": options.model,
        "pool": options.pool,
        "asked": options.answer,
        "rows": found,
    }
    print(json.dumps(answer, indent=1))
    write_json(options.out, answer, indent=1)
    return 0


def measure(server: Server, tokens: int, short: int) -> dict[str, Any]:
    """What became of one answer of so many tokens, and of short ones beside it."""
    mark = PEERS["sglang"].mark(server)
    others: list[dict[str, Any]] = []
    # Not as a context, which would wait for an answer of a server that is to be stopped.
    pool = concurrent.futures.ThreadPoolExecutor(1)
    long = pool.submit(_ask, server, tokens, 0)
    while not long.done():
        others.append(_ask(server, short, 1 + len(others)))
    about = long.result()["meta_info"]
    counters = PEERS["sglang"].counters(server, mark)
    report = about.get("kv_compress") or {}
    return {
        "tokens": about["completion_tokens"],
        "finish": about["finish_reason"]["type"],
        "kv_slots_held": report.get("kv_slots_held"),
        "windows": report.get("windows"),
        "others": len(others),
        "others_whole": sum(one["meta_info"]["completion_tokens"] == short for one in others),
        "retractions": counters.retractions,
        "decode_steps": counters.decode_steps,
    }


def table(result: dict[str, Any]) -> str:
    """Markdown of a result."""
    head = ("row", "tokens", "ended by", "KV slots at its end", "retractions", "others whole")
    lines = []
    for name, row in result["rows"].items():
        held = row["kv_slots_held"]
        others = f"{row['others_whole']} of {row['others']}"
        slots = "-" if held is None else f"{held:,}"
        lines.append(
            [name, f"{row['tokens']:,}", row["finish"], slots, str(row["retractions"]), others]
        )
    return grid(head, lines)


def _ask(server: Server, tokens: int, seed: int) -> dict[str, Any]:
    """A greedy answer of exactly so many tokens, unless the server ends it, to random ones."""
    rng = random.Random(seed)
    params = {"max_new_tokens": tokens, "temperature": 0, "ignore_eos": True}
    body = {"input_ids": [rng.randrange(3, 500) for _ in range(PROMPT)], "sampling_params": params}
    answer: dict[str, Any] = server.post("/generate", body, timeout=None).json()
    return answer


if __name__ == "__main__":
    raise SystemExit(main())
