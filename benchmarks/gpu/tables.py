"""Renders a GPU's committed results into documents: their marked tables are made anew.

    python -m kara_sglang.benchmarks.gpu.tables docs/kernels.md

A mark is ``gpu:RESULT VIEW``. RESULT is a file of ``benchmarks/results/gpu`` that ``kernels.py`` wrote,
without its ending; VIEW is ``kernels`` (each over several windows beside its floor) or ``passes`` (what
the launches of a whole pass take, and the pass as the host sees it).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kara_sglang.benchmarks import command_line, marked
from kara_sglang.benchmarks.markdown import grid

RESULTS = Path(__file__).parents[1] / "results" / "gpu"
_NAME = re.compile(r"(?P<result>\S+) (?P<view>\S+)")
_LAUNCHES = ("prepare", "log_sum_exp", "column_sum", "select", "compact")


def settings_of(run: dict[str, Any]) -> str:
    settings = run["settings"]
    heads = "mean" if settings["mean"] else "all heads"
    stored = {4: "fp4", 8: "fp8", 16: "16 bit"}[settings["query_bits"]]
    return f"{run['model']}, W {settings['window']}, {heads}, {stored}"


def kernels(result: dict[str, Any]) -> str:
    """Time of each kernel over all layers and windows, and the share of its floor that it reaches."""
    names = ("record", "weights", "score", "select", "compact")
    rows = []
    for run in result["runs"]:
        took = [run["kernels"][name] for name in names]
        cells = [f"{each['us']:.0f} ({each['of_floor']:.0%})" for each in took]
        rows.append([settings_of(run), str(run["jobs"]), *cells])
    return grid(["settings", "windows", *names], rows)


def passes(result: dict[str, Any]) -> str:
    """What each kernel of a pass takes, what all of them and the copies take, and the whole pass."""
    rows = []
    for run in result["runs"]:
        for name, label in (("pass", ""), ("pass without queries", ", `keys`")):
            done = run["kernels"][name]
            for prefix, windows in (("one_window_", 1), ("", run["jobs"])):
                launches = done[f"{prefix}launches_us"]
                took = [launches.get(f"{kernel}_kernel", 0.0) for kernel in _LAUNCHES]
                cells = (*took, sum(launches.values()), done[f"{prefix}us"])
                rows.append([settings_of(run) + label, str(windows), *(f"{us:.0f}" for us in cells)])
    return grid(["settings", "windows", *_LAUNCHES, "all on the GPU", "from the host"], rows)


VIEWS: dict[str, Callable[[dict[str, Any]], str]] = {"kernels": kernels, "passes": passes}


def render(document: str, folder: Path = RESULTS) -> str:
    """``document`` with every marked table made anew.

    Raises
    ------
    ValueError
        Where a mark names no view.
    FileNotFoundError
        Where ``folder`` lacks a mark's result.
    """

    def body(name: str) -> str:
        match = _NAME.fullmatch(name)
        if match is None or match["view"] not in VIEWS:
            raise ValueError(f"a mark is gpu:RESULT VIEW with {' or '.join(VIEWS)}, not gpu:{name}")
        return VIEWS[match["view"]](json.loads((folder / f"{match['result']}.json").read_text()))

    return marked.fill(document, "gpu", body)


def main() -> None:
    parser = command_line.parser(__spec__, __doc__)
    parser.add_argument(
        "documents", nargs="+", type=command_line.file, help="documents with marked tables"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="default: the committed ones")
    arguments = parser.parse_args()
    marked.rewrite(arguments.documents, lambda text: render(text, arguments.results), parser)


if __name__ == "__main__":
    main()
