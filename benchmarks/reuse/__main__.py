"""What the reuse of a chain of thought saves: prefill, time to first token, and room for forks.

``python -m kara_sglang.benchmarks.reuse`` compares stock SGLang, which keeps every answer exactly, the
plugin with exact reuse, which keeps prompts only, and the plugin with compressed reuse, in one run:

* **steps**: programs of several steps run side by side; each step sends all tokens so far and some
  more, and generates. Counted per step: prompt tokens that had to be computed; measured: time to
  first token.
  In an ample pool everybody could keep everything; in a scarce one what is kept must be small.
* **forks**: one long chain of thought, then more forks of it than fit. Counted: forks that ran at once.
"""

from __future__ import annotations

import concurrent.futures
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

import requests

from kara_sglang import cpu_engine
from kara_sglang.benchmarks import command_line
from kara_sglang.benchmarks.machine import command, machine
from kara_sglang.benchmarks.output import write_json
from kara_sglang.benchmarks.serving.counters import Counters
from kara_sglang.benchmarks.serving.peers import PEERS, start
from kara_sglang.benchmarks.serving.rows import STOCK, Row
from kara_sglang.benchmarks.serving.server import Server, end_on_sigterm
from kara_sglang.benchmarks.serving.setup import Setup, resolve_model

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

    def generate(self, ids: list[int], tokens: int) -> tuple[list[int], dict[str, Any], float]:
        """Generated ids, ``meta_info``, and seconds to the first token."""
        body: Any = {
            "input_ids": ids,
            "sampling_params": {"max_new_tokens": tokens, "temperature": 0, "ignore_eos": True},
            "stream": True,
        }
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
                servers[row.name] = _start(row, setup, pool, folder)
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
        server = _start(row, setup, sizes.fork_pool, folder)
        try:
            found["forks"][row.name] = run_forks(server, Client(server), sizes)
        finally:
            server.stop()
    return found


def _start(row: Row, setup: Setup, pool: int, folder: Path) -> Server:
    print(f"starting {row.name}, pool {pool} slots", file=sys.stderr)
    log = folder / "logs" / f"{row.name}-{pool}.log"
    return start(PEERS["sglang"], row, dataclasses.replace(setup, pool=pool), log).wait()


def over_repetitions(runs: list[list[dict[str, float]]], step: int, key: str) -> float:
    return statistics.median(run[step][key] for run in runs)


def markdown(found: dict[str, Any], sizes: Sizes) -> str:
    lines = []
    for pool, rows in found["steps"].items():
        lines += [
            f"### Steps, {pool} pool ({getattr(sizes, pool)} slots)",
            "",
            "| step | " + " | ".join(f"{row}: computed | {row}: TTFT ms" for row in rows) + " |",
            "|---|" + "---|" * 2 * len(rows),
        ]
        for step in range(sizes.steps):
            cells = []
            for runs in rows.values():
                prompt = over_repetitions(runs, step, "prompt_tokens")
                cached = over_repetitions(runs, step, "cached_tokens")
                cells.append(f"{prompt - cached:.0f} of {prompt:.0f}")
                cells.append(f"{over_repetitions(runs, step, 'ttft_ms'):.0f}")
            lines.append(f"| {step + 1} | " + " | ".join(cells) + " |")
        lines.append("")
    lines += [
        f"### {sizes.forks} forks of a chain of {sizes.chain} tokens, {sizes.fork_pool} slots",
        "",
        "| row | at once (peak) | at once (mean) | to stock (peak) | decode steps | cached |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in found["forks"].items():
        ratio = row["peak_running"] / found["forks"][STOCK]["peak_running"]
        lines.append(
            f"| {name} | {row['peak_running']} | {row['mean_running']:.1f} | {ratio:.2f} | "
            f"{row['decode_steps']} | {row['cached_tokens']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def draw(found: dict[str, Any], sizes: Sizes, path: Path) -> None:
    """Prompt tokens computed per step, one panel per pool."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(8, 3.2), sharey=True, layout="constrained")
    steps = range(1, sizes.steps + 1)
    for panel, (pool, rows) in zip(panels, found["steps"].items(), strict=True):
        for name, runs in rows.items():
            computed = [
                over_repetitions(runs, step - 1, "prompt_tokens")
                - over_repetitions(runs, step - 1, "cached_tokens")
                for step in steps
            ]
            # Lines that lie on each other must all be seen.
            style = {STOCK: "s-", "exact": "^:", "compressed": "o--"}[name]
            panel.plot(steps, computed, style, label=name)
        panel.set_title(f"{pool} pool")
        panel.set_xlabel("step")
        panel.set_xticks(list(steps))
    panels[0].set_ylim(bottom=0)  # of both, when both are drawn
    panels[0].set_ylabel("prompt tokens computed")
    panels[0].legend(frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = command_line.parser(__spec__, __doc__)
    parser.add_argument(
        "--model", type=command_line.model, default="tiny", help="tiny, smollm2, a folder or a hub name"
    )
    parser.add_argument(
        "--dtype", choices=command_line.DTYPES, help="default: float32 for tiny, else bfloat16"
    )
    parser.add_argument("--out", type=Path, help="JSON file; .md and .png are written beside it")
    parser.add_argument("--dir", type=Path, help="for logs and the tiny model; default: a new one")
    for field in dataclasses.fields(Sizes):
        flag = "--" + field.name.replace("_", "-")
        parser.add_argument(flag, type=command_line.whole(), help=f"default: {field.default}")
    options = parser.parse_args(argv)
    given = {f.name: getattr(options, f.name) for f in dataclasses.fields(Sizes)}
    sizes = Sizes(**{name: value for name, value in given.items() if value is not None})
    folder = options.dir or Path(tempfile.mkdtemp(prefix="kara-reuse-"))
    cpu = cpu_engine.is_installed()
    setup = Setup(
        model=resolve_model(options.model, folder),
        dtype=options.dtype or ("float32" if options.model == "tiny" else "bfloat16"),
        window=sizes.window,
        delay=sizes.delay,
        query_mem_gb=0.25 if cpu else 2.0,
        page_size=sizes.page_size,
    )
    end_on_sigterm()
    found = measure(setup, sizes, folder)
    forks = found["forks"]
    shown = command("kara_sglang.benchmarks.reuse", argv or sys.argv[1:])
    answer = {
        "command": shown,
        "machine": machine(),
        "model": options.model,
        "sizes": dataclasses.asdict(sizes),
        "forks_ratio": forks["compressed"]["peak_running"] / forks[STOCK]["peak_running"],
        **found,
    }
    text = markdown(found, sizes)
    print(text)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(options.out, answer, indent=1)
        head = f"`{shown}` on a {answer['machine']['kind']}\n\n"
        options.out.with_suffix(".md").write_text(head + text)
        draw(found, sizes, options.out.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
