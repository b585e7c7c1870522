"""Compare SGLang with and without the plugin, and other engines, under load.

``python -m kara_sglang.benchmarks.serving --help`` lists the options; README.md beside this file says
what the scenarios and rows are.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

from kara_sglang import cpu_engine
from kara_sglang.benchmarks import command_line
from kara_sglang.benchmarks.machine import heading, origin
from kara_sglang.benchmarks.output import write_json
from kara_sglang.benchmarks.serving import scenarios
from kara_sglang.benchmarks.serving.rows import rows
from kara_sglang.benchmarks.serving.setup import GPU_SCALE, Setup, resolve_model
from kara_sglang.embedded_model import EmbeddedModelMissing


def parser() -> argparse.ArgumentParser:
    names, all_rows = ", ".join(scenarios.SCENARIOS), ", ".join(rows(64))
    p = command_line.parser(__spec__, __doc__)
    p.add_argument(
        "--model", type=command_line.model, default="tiny", help="tiny, smollm2, a folder or a hub name"
    )
    p.add_argument(
        "--dtype", choices=command_line.DTYPES, help="default: float32 for tiny, else bfloat16"
    )
    p.add_argument(
        "--scenarios", default="scarce", help=f"comma-separated: {names}, or NAME/POINT; or all"
    )
    p.add_argument("--rows", help=f"only these: {all_rows}; stock is always run")
    p.add_argument("--repetitions", type=command_line.whole(), default=3, help="default: %(default)s")
    p.add_argument("--quick", action="store_true", help="the headline figures only, under 10 minutes")
    p.add_argument("--out", type=Path, help="JSON file; a .md file and plots are written beside it")
    p.add_argument("--dir", type=Path, help="run directory; an interrupted run in it is resumed")
    p.add_argument(
        "--resident",
        type=command_line.whole(),
        help="servers that stay up and take turns; default: 4 on a CPU, 6 with --quick; 1 on a "
        "GPU, that is, a start per run",
    )
    p.add_argument(
        "--peer",
        action="append",
        default=[],
        metavar="NAME=PYTHON",
        help="interpreter of a peer's own environment: vllm=...",
    )
    p.add_argument(
        "--query-mem-gb", type=command_line.positive, help="default: 0.25 on a CPU, 2 on a GPU"
    )
    p.add_argument("--server-args", default="", help="more flags for every SGLang server, as one word")
    for field in dataclasses.fields(scenarios.Scale):
        kind = command_line.positive if field.type == "float" else command_line.whole()
        flag = "--" + field.name.replace("_", "-")
        p.add_argument(flag, type=kind, help=f"default: {field.default}")
    return p


def main(argv: list[str] | None = None) -> int:
    p = parser()
    options = p.parse_args(argv)
    try:
        # The load generator belongs to SGLang, its data sets and the plots do not.
        import datasets  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        p.error(f"{error.name} is needed: pip install 'kara-sglang[benchmarks]'")
    from kara_sglang.benchmarks.serving.measure import missing
    from kara_sglang.benchmarks.serving.peers import PEERS

    cpu = cpu_engine.is_installed()
    scale = scenarios.Scale() if cpu else GPU_SCALE
    given = {f.name: getattr(options, f.name) for f in dataclasses.fields(scale)}
    scale = dataclasses.replace(scale, **{k: v for k, v in given.items() if v is not None})
    if scale.window % scale.page_size:
        p.error(f"--window {scale.window} is no multiple of --page-size {scale.page_size}")
    pythons = {}
    for word in options.peer:
        name, _, python = word.partition("=")
        if name not in PEERS or not Path(python).is_file():
            p.error(f"--peer {word}: give NAME=PYTHON, NAME one of {', '.join(PEERS)}")
        pythons[name] = Path(python)

    folder = options.dir or Path(tempfile.mkdtemp(prefix="kara-serving-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        model = resolve_model(options.model, folder)
    except EmbeddedModelMissing as error:
        p.error(f"--model smollm2: {error}")
    setup = Setup(
        model=model,
        dtype=options.dtype or ("float32" if options.model == "tiny" else "bfloat16"),
        window=scale.window,
        delay=scale.delay,
        query_mem_gb=options.query_mem_gb or (0.25 if cpu else 2.0),
        page_size=scale.page_size,
        server_args=tuple(shlex.split(options.server_args)),
        pythons=pythons,
    )

    if options.quick:
        cells = list(scenarios.quick(scale))
    else:
        wanted = options.scenarios.split(",") if options.scenarios != "all" else scenarios.SCENARIOS
        cells = []
        for word in wanted:
            name, _, point = word.partition("/")
            if name not in scenarios.SCENARIOS:
                p.error(f"--scenarios: {name} unknown; use {', '.join(scenarios.SCENARIOS)}")
            found = list(scenarios.SCENARIOS[name](scale))
            points = list(dict.fromkeys(cell.point for cell in found))
            if point and point not in points:
                p.error(f"--scenarios: {name} has no point {point!r}; it has {', '.join(points)}")
            cells += [cell for cell in found if cell.point == (point or cell.point)]
    known = rows(scale.window)
    if options.rows:
        wanted = {"stock", *options.rows.split(",")}
        if unknown := wanted - set(known):
            p.error(f"--rows: {', '.join(unknown)} unknown; use {', '.join(known)}")
        cells = [cell for cell in cells if cell.row in wanted]
    not_run = {cell.row: why for cell in cells if (why := missing(known[cell.row], setup))}
    cells = [cell for cell in cells if cell.row not in not_run]

    for peer in sorted({known[row].peer for row in not_run}):
        print(f"{peer} is not run; to have it:\n{PEERS[peer].install}", file=sys.stderr)

    # The quick run's six are of the tiny model; starting all of them together saves a start's wait.
    resident = options.resident or ((6 if options.quick else 4) if cpu else 1)
    about = origin("kara_sglang.benchmarks.serving", argv or sys.argv[1:])
    return execute(cells, options, setup, scale, resident, folder, not_run, about)


def execute(
    cells: list[scenarios.Cell],
    options: argparse.Namespace,
    setup: Any,
    scale: scenarios.Scale,
    resident: int,
    folder: Path,
    not_run: dict[str, str],
    about: dict[str, Any],
) -> int:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from kara_sglang.benchmarks.serving.measure import Journal, failure, run, schedule
    from kara_sglang.benchmarks.serving.plots import draw
    from kara_sglang.benchmarks.serving.report import headline, markdown
    from kara_sglang.benchmarks.serving.residents import Servers
    from kara_sglang.benchmarks.serving.server import end_on_sigterm

    console = Console(stderr=True)
    settings = {
        "model": options.model,
        "dtype": setup.dtype,
        "scale": dataclasses.asdict(scale),
        "server_args": setup.server_args,
    }
    journal = Journal(folder / "runs.jsonl")
    marker = folder / "settings.json"
    if marker.exists() and json.loads(marker.read_text()) != json.loads(json.dumps(settings)):
        console.print(f"--dir {folder} holds runs with other settings; name another directory")
        return 2
    marker.write_text(json.dumps(settings))

    runs = [job for job in schedule(cells, options.repetitions, resident) if not journal.has(*job)]
    end_on_sigterm()
    failed: dict[str, str] = {}
    columns = (
        TextColumn("{task.description}", markup=False),
        *(BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()),
    )
    with Servers(resident, folder / "logs") as servers, Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=len(runs))
        for number, (cell, repetition) in enumerate(runs):
            then = [later for later, _ in runs[number + 1 :] if later.key not in failed]
            bar.update(task, description=f"{cell.key} #{repetition + 1}")
            if cell.key not in failed:
                try:
                    journal.add(run(cell, repetition, setup, servers, folder, then))
                except Exception as error:
                    failed[cell.key] = failure(error)
                    console.print(f"{cell.key}: {failed[cell.key]}", markup=False)
            bar.advance(task)

    keys = {cell.key for cell in cells}
    results = [r for r in journal.results if r["key"] in keys]
    answer = {
        **about,
        **settings,
        **headline(results),
        "not_run": not_run,
        "failed": failed,
        "runs": results,
    }
    tables = markdown(results, not_run | failed)
    print(tables)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(options.out, answer, indent=1)
        options.out.with_suffix(".md").write_text(heading(about) + tables)
        draw(results, options.out.with_suffix(""))
    return 1 if failed else 0
