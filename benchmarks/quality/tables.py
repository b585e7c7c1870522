"""From rows and texts to a result: a run folder whose cells somebody fills, figures, tables.

Everything lies in a run folder (``--folder``, by default beside ``--out``); the same command goes on
where it was interrupted.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from kara_sglang import __version__
from kara_sglang.benchmarks import command_line
from kara_sglang.benchmarks.machine import kind
from kara_sglang.benchmarks.output import write_json
from kara_sglang.benchmarks.quality import campaign, report, rows, texts
from kara_sglang.benchmarks.quality.engine import EngineFailed
from kara_sglang.benchmarks.quality.script import Script
from kara_sglang.embedded_model import EmbeddedModelMissing, embedded_model_path


class Performers(Protocol):
    """Who performs the scripts of a part.

    Attributes
    ----------
    meta
        What the figures are due to: versions and dtype.
    """

    meta: dict[str, Any]

    def perform(self, part: rows.Part, scripts: list[Script], folder: Path) -> None:
        """Fill the cells that the run folder lacks."""


def parser(spec: Any, description: str) -> argparse.ArgumentParser:
    """What every way to perform the scripts can be told."""
    parser = command_line.parser(spec, description)
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
    parser.add_argument(
        "--texts", type=command_line.whole(), help="how many texts, at most as there are"
    )
    parser.add_argument("--folder", type=Path, help="run folder; by default --out with the suffix .run")
    parser.add_argument("--plot", type=Path, help="draw KL and recall into this file")
    return parser


def make(
    options: argparse.Namespace, shown: str, performers: Callable[[str], Performers], **how: Any
) -> int:
    """Measure what ``options`` ask for and write it; returns the exit status.

    Parameters
    ----------
    options
        Of :func:`parser`.
    shown
        The command line, for the tables.
    performers
        From the model's folder.
    how
        What a run folder's cells have in common beside the model and the texts.
    """
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
        for result in _measure(options, parts, model, performers(model), shown, how):
            write_json(options.out, result)
            options.out.with_suffix(".md").write_text(report.markdown(result))
            if options.plot:
                report.plot(result, options.plot)
    except (EmbeddedModelMissing, EngineFailed) as error:
        print(f"quality: {error}", file=sys.stderr)
        return 1
    print(f"figures in {options.out}, tables in {options.out.with_suffix('.md')}")
    return 0


def _measure(
    options: argparse.Namespace,
    parts: list[rows.Part],
    model: str,
    performers: Performers,
    shown: str,
    how: dict[str, Any],
) -> Iterator[dict[str, Any]]:
    """Fill the run folder's cells and reduce them; yields all figures so far after each part."""
    from transformers import AutoTokenizer

    folder = (options.folder or options.out.with_suffix(".run")).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    campaign.same_run(
        folder, rows.defaults() | {"model": model, "split": options.split, "delay": options.delay} | how
    )
    tokenizer = AutoTokenizer.from_pretrained(model)
    meta = {
        "command": shown,
        "model": Path(model).name,
        "split": options.split,
        "machine": kind(),
        "kara_sglang": __version__,
        "torch": importlib.metadata.version("torch"),
        "python": platform.python_version(),
    } | performers.meta
    results: list[dict[str, Any]] = []
    found: dict[str, Any] = {}
    for part in parts:
        started = time.monotonic()
        if options.texts:
            part.texts = options.texts
        scripts = campaign.scripts_of(part, tokenizer, options.split)
        for script in scripts:
            script.save(folder)
        performers.perform(part, scripts, folder)
        results += report.figures(part, scripts, folder)
        found = found or report.goals(part, scripts, folder)
        seconds = _spent(folder, time.monotonic() - started)
        yield {"meta": meta | {"seconds": seconds}, "results": results, "goals": found}


def _spent(folder: Path, seconds: float) -> float:
    """Seconds that this run has taken in all, interruptions not counted."""
    path = folder / "seconds.json"
    total = seconds + (json.loads(path.read_text()) if path.is_file() else 0.0)
    write_json(path, total)
    return total
