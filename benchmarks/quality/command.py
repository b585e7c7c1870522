"""What compression costs the answers, measured through the real engine.

    python -m kara_sglang.benchmarks.quality --quick --out quality.json

Without ``--model`` it measures the embedded SmolLM2-135M-Instruct. Everything lies in a run folder
(``--folder``, by default beside ``--out``); the same command goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from kara_sglang import __version__, cpu_engine
from kara_sglang.benchmarks import command_line
from kara_sglang.benchmarks.machine import command, kind
from kara_sglang.benchmarks.output import write_json
from kara_sglang.benchmarks.quality import campaign, report, rows, texts
from kara_sglang.benchmarks.quality.engine import EngineFailed, engine_arguments
from kara_sglang.config import PRESETS, KaraConfig
from kara_sglang.embedded_model import EmbeddedModelMissing, embedded_model_path


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = command_line.parser(__spec__, __doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the figures")
    parser.add_argument("--quick", action="store_true", help="the main rows on few texts, in minutes")
    parser.add_argument(
        "--part", help="only this part of the full programme: main, windows, ring or kv"
    )
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="only these, beside the full cache")
    parser.add_argument(
        "--shares", nargs="+", type=command_line.share, metavar="R", help="only rows that keep these"
    )
    parser.add_argument(
        "--delay",
        type=command_line.whole(),
        metavar="N",
        help="in all rows; at least the sliding window of a model that has one",
    )
    parser.add_argument("--model", type=command_line.model_folder, help="default: the embedded one")
    parser.add_argument(
        "--split", choices=texts.SPLITS, default="held_out", help="texts; default: %(default)s"
    )
    parser.add_argument("--texts", type=command_line.whole(), help="at most so many texts")
    parser.add_argument("--folder", type=Path, help="run folder; by default --out without its suffix")
    parser.add_argument(
        "--jobs",
        type=command_line.whole(),
        help="engines side by side; default: 1 on a GPU, 2 on a CPU with cores for both",
    )
    parser.add_argument("--plot", type=Path, help="draw KL and recall into this file")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    parts = rows.quick() if options.quick else rows.full()
    if options.part:
        names = [part.name for part in parts]
        if options.part not in names:
            print(f"--part {options.part}: there is {' and '.join(names)}", file=sys.stderr)
            return 2
        parts = [part for part in parts if part.name == options.part]
    try:
        parts = rows.only(parts, options.rows, options.shares)
        if options.delay is not None:
            parts = rows.delayed(parts, options.delay)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    try:
        model = options.model or str(embedded_model_path())
        shown = command("kara_sglang.benchmarks.quality", arguments)
        for result in measure(options, parts, model, shown):
            write_json(options.out, result)
            options.out.with_suffix(".md").write_text(report.markdown(result))
            if options.plot:
                report.plot(result, options.plot)
    except (EmbeddedModelMissing, EngineFailed) as error:
        print(f"quality: {error}", file=sys.stderr)
        return 1
    print(f"figures in {options.out}, tables in {options.out.with_suffix('.md')}")
    return 0


def measure(
    options: argparse.Namespace, parts: list[rows.Part], model: str, shown: str
) -> Iterator[dict[str, Any]]:
    """Fill the run folder's cells and reduce them; yields all figures so far after each part."""
    from transformers import AutoTokenizer

    folder = (options.folder or options.out.with_suffix(".run")).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    campaign.same_run(
        folder, _defaults() | {"model": model, "split": options.split, "delay": options.delay}
    )
    on_cpu = cpu_engine.is_installed()
    jobs = options.jobs or (min(2, len(os.sched_getaffinity(0))) if on_cpu else 1)
    threads = max(1, len(os.sched_getaffinity(0)) // jobs)
    tokenizer = AutoTokenizer.from_pretrained(model)
    meta = {
        "command": shown,
        "model": Path(model).name,
        "split": options.split,
        "machine": kind(),
        "kara_sglang": __version__,
        "sglang": importlib.metadata.version("sglang"),
        "torch": importlib.metadata.version("torch"),
        "python": platform.python_version(),
        "dtype": engine_arguments().get("dtype", "model"),
    }
    results: list[dict[str, Any]] = []
    found: dict[str, Any] = {}
    for part in parts:
        started = time.monotonic()
        if options.texts:
            part.texts = min(options.texts, part.texts or options.texts)
        scripts = campaign.scripts_of(part, tokenizer, options.split)
        for script in scripts:
            script.save(folder)
        stages = campaign.orders(part.rows, scripts, folder, model, jobs)
        total = len(part.rows) * len(scripts)
        left = sum(len(order.requests) for stage in stages for order in stage)
        with tqdm(total=total, initial=total - left, desc=part.name, unit="cell") as bar:
            campaign.carry_out(stages, folder, part.name, threads, bar.update)
        results += report.figures(part, scripts, folder)
        found = found or report.goals(part, scripts, folder)
        seconds = _spent(folder, time.monotonic() - started)
        yield {"meta": meta | {"seconds": seconds}, "results": results, "goals": found}


def _defaults() -> dict[str, str]:
    """What rows mean that leave settings out, by preset."""
    return {name: KaraConfig.from_settings({"preset": name}).to_json() for name in PRESETS}


def _spent(folder: Path, seconds: float) -> float:
    """Seconds that this run has taken in all, interruptions not counted."""
    path = folder / "seconds.json"
    total = seconds + (json.loads(path.read_text()) if path.is_file() else 0.0)
    write_json(path, total)
    return total
