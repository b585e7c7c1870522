"""Compares selectors on texts without a server, by replay: for the search, not for the report.

    python -m kara_sglang.benchmarks.research.search --window 128 --retain 0.5 --out sweep.json \\
        kara:chunks=0 kara:value=2

Rows are ``paper`` (the paper's preset), ``kara`` (the defaults), any other selector, or a point of the
space of ``variants.py``; with ``@mean`` behind it the mean query of each group votes (``query_heads``),
else all heads do. Development texts by default: look at the held-out ones once, at the end. With
``--part`` the scripts are those of the report's tables, so that a row can be put beside theirs.
``--show sweep.json`` prints the table of a finished search again.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from kara_sglang.benchmarks import command_line, marked
from kara_sglang.benchmarks.markdown import grid
from kara_sglang.benchmarks.output import write_json
from kara_sglang.benchmarks.quality import campaign, rows, tasks, texts, variants
from kara_sglang.benchmarks.quality.engine import PAGE_SIZE
from kara_sglang.benchmarks.quality.estimates import Estimate, mean, observe
from kara_sglang.benchmarks.quality.script import Script
from kara_sglang.benchmarks.quality.tasks import Layout
from kara_sglang.benchmarks.research import tables
from kara_sglang.benchmarks.research.replay import Plan, Replay
from kara_sglang.embedded_model import embedded_model_path
from kara_sglang.kernels import selectors

MEAN = "@mean"


def plan_of(name: str, window: int, retain: float) -> Plan:
    """What a server with default settings (``paper``: with that preset) would do for a request."""
    (row,) = rows.selectors([name.removesuffix(MEAN)], window, [retain])
    if name.endswith(MEAN):
        row = dataclasses.replace(row, settings=row.settings | {"query_heads": "mean"})
    return tables.plan_of(row)


def scripts_of(tokenizer: Any, split: str, limit: int | None, window: int, seeds: int) -> list[Script]:
    """Per text: one script of running text and ``seeds`` scripts with facts."""
    encode = tasks.encoder(tokenizer)
    facts = max(2, min(4, window // 42))
    scripts = []
    for text in texts.load(split, limit):
        scripts.append(tasks.text_script(encode, text, Layout(window, 1, tail=window, stride=2)))
        for seed in range(seeds):
            layout = Layout(window, 2, facts=facts)
            scripts.append(tasks.recall_script(encode, text, layout, 100 + seed))
    return scripts


def scripts_of_part(tokenizer: Any, name: str, split: str, limit: int | None) -> list[Script]:
    """Those that the rows of one of the report's tables perform."""
    part = next(part for part in (*rows.quick(), *rows.full()) if part.name == name)
    return campaign.scripts_of(dataclasses.replace(part, texts=limit or part.texts), tokenizer, split)


def sweep(
    replay: Replay, scripts: list[Script], names: list[str], window: int, retain: float
) -> dict[str, dict[str, list[float]]]:
    """Per row: KL, recall and log-probability of answers, each a list with one value per text."""
    plans = {name: plan_of(name, window, retain) for name in names}
    raw: dict[str, dict[str, dict[str, list[float]]]] = {name: {} for name in ("full", *names)}
    for script in tqdm(scripts, unit="script"):
        cells = {"full": replay.full(script)}
        cells |= {name: replay.run(script, plan) for name, plan in plans.items()}
        replay.forget()
        for name, cell in cells.items():
            seen = observe(script, cell)
            per_text = raw[name].setdefault(script.source, {"kl": [], "recall": [], "logprob": []})
            if seen.nll is not None:
                per_text["kl"].append(seen.kl or 0.0)
            else:
                per_text["recall"].append(seen.recall or 0.0)
                per_text["logprob"].append(seen.recall_logprob or 0.0)
    return {
        name: {
            key: [math.fsum(values[key]) / len(values[key]) for values in by_text.values()]
            for key in ("kl", "recall", "logprob")
        }
        for name, by_text in raw.items()
    }


def table(
    found: dict[str, dict[str, list[float]]], against: str, shown: list[str] | None = None
) -> str:
    """Means, and paired differences from the row ``against``, with standard errors over texts; of all
    rows or of those ``shown``."""
    lines = []
    base = found[against]
    for name in shown or found:
        values = found[name]
        log_ratio = mean(
            [math.log(a / b) if a and b else 0.0 for a, b in zip(values["kl"], base["kl"], strict=True)]
        )
        relative = Estimate(math.exp(log_ratio.value), math.exp(log_ratio.value) * log_ratio.error)
        more = mean([a - b for a, b in zip(values["logprob"], base["logprob"], strict=True)])
        cells = [mean(values["kl"]), mean(values["recall"]), mean(values["logprob"]), relative, more]
        digits = (4, 3, 3, 2, 3)
        figures = [f"{e.value:.{d}f} ± {e.error:.{d}f}" for e, d in zip(cells, digits, strict=True)]
        lines.append([name, *figures])
    columns = ["row", "KL", "recall", "log p of answers", f"KL / {against}", f"log p - {against}"]
    return grid(columns, lines)


def put_into(document: str, folder: Path) -> str:
    """``document`` with every table between ``<!-- search:NAME -->`` marks rendered from ``folder``;
    where rows are named behind NAME, of those only."""

    def body(mark: str) -> str:
        name, *shown = mark.split()
        return table(json.loads((folder / f"{name}.json").read_text())["rows"], "kara", shown)

    return marked.fill(document, "search", body)


def main() -> int:
    parser = command_line.parser(__spec__, __doc__)
    parser.add_argument(
        "rows",
        nargs="*",
        metavar="ROW",
        help="selectors, and points of the space of variants.py, beside paper and kara",
    )
    parser.add_argument("--model", type=command_line.model_folder, help="default: the embedded one")
    parser.add_argument(
        "--window", type=command_line.whole(), default=128, help="tokens; default: %(default)s"
    )
    parser.add_argument("--retain", type=command_line.share, default=0.5, help="default: %(default)s")
    parser.add_argument(
        "--split", choices=texts.SPLITS, default="development", help="texts; default: %(default)s"
    )
    parser.add_argument("--texts", type=command_line.whole(), help="only the first so many")
    parser.add_argument(
        "--seeds",
        type=command_line.whole(),
        default=1,
        help="scripts with facts per text; default: %(default)s",
    )
    parser.add_argument(
        "--part",
        choices=[part.name for part in (*rows.quick(), *rows.full())],
        help="the scripts of this part of the tables, instead of those laid out by --window",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of the model; default: %(default)s",
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--out", type=Path, help="JSON file, with one value per row and text")
    where.add_argument("--show", type=command_line.file, help="print the table of such a file")
    where.add_argument("--into", type=command_line.file, help="render the tables of a document anew")
    options = parser.parse_args()
    if options.show:
        try:
            print(table(json.loads(options.show.read_text())["rows"], "kara"))
        except (ValueError, KeyError, TypeError):
            parser.error(f"--show {options.show} is no file that --out has written")
        return 0
    if options.into:
        folder = Path(__file__).resolve().parents[1] / "results" / "quality"
        options.into.write_text(put_into(options.into.read_text(), folder))
        return 0
    from transformers import AutoTokenizer

    names = list(dict.fromkeys(["paper", "kara", *options.rows]))
    bare = [name.removesuffix(MEAN) for name in names]
    try:
        unknown = set(variants.register(bare)) - {rows.PAPER}
    except ValueError as error:
        parser.error(str(error))
    if unknown:
        parser.error(f"no row {', '.join(unknown)}; there are {', '.join(selectors.REGISTRY)}, paper")
    if options.window % PAGE_SIZE:
        parser.error(f"--window {options.window} is no multiple of {PAGE_SIZE}, the page size")
    model = options.model or str(embedded_model_path())
    tokenizer = AutoTokenizer.from_pretrained(model)
    if options.part:
        scripts = scripts_of_part(tokenizer, options.part, options.split, options.texts)
    else:
        try:
            scripts = scripts_of(tokenizer, options.split, options.texts, options.window, options.seeds)
        except ValueError as error:
            parser.error(f"--window {options.window}: {error}")
    with torch.no_grad():
        found = sweep(
            Replay(model, getattr(torch, options.dtype)), scripts, names, options.window, options.retain
        )
    settings = {
        key: getattr(options, key)
        for key in ("window", "retain", "split", "texts", "seeds", "part", "dtype")
    }
    write_json(options.out, {"meta": settings | {"model": Path(model).name}, "rows": found})
    print(json.dumps(settings))
    print(table(found, "kara"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
