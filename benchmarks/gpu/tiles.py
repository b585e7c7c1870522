"""Times tile sizes of the score's kernels on a GPU, so that ``tiles_for`` can be set by time.

Needs torch, triton and this package, no SGLang; about a minute::

    python -m kara_sglang.benchmarks.gpu.tiles --output tiles.json

For Qwen3-8B, all layers and heads. Each size is timed with one window, as a pass over one request has
it, and with several at once; its scores are compared with the float32 reference. Sizes that do not
compile, do not fit or compute something else are reported and left out of the tables.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton

from kara_sglang.benchmarks import command_line
from kara_sglang.benchmarks.arithmetic import Settings
from kara_sglang.benchmarks.gpu.case import RULE, Case
from kara_sglang.benchmarks.gpu.checks import expected_scores, relative
from kara_sglang.benchmarks.gpu.timing import launch_times, versions
from kara_sglang.benchmarks.models import MODELS
from kara_sglang.benchmarks.output import write_json
from kara_sglang.kernels.triton import prepare, score
from kara_sglang.kernels.triton.score import Tile, Tiles

LARGEST_ERROR = 5e-3
PREPARE = (
    (2048, 4, 4),
    (2048, 4, 2),
    (2048, 4, 8),
    (2048, 4, 1),
    (4096, 4, 4),
    (4096, 4, 2),
    (4096, 8, 4),
    (4096, 8, 8),
    (8192, 8, 4),
    (8192, 8, 2),
)
"""Numbers of K at once, warps, and parts of a window."""
LOG_SUM_EXP = (
    Tile(128, 128, 8, 2),
    Tile(128, 128, 8, 3),
    Tile(128, 64, 8, 3),
    Tile(128, 64, 8, 4),
    Tile(256, 64, 8, 3),
    Tile(256, 128, 16, 2),
    Tile(256, 128, 16, 3),
    Tile(256, 64, 16, 3),
    Tile(128, 64, 4, 3),
    Tile(64, 128, 4, 3),
    Tile(64, 64, 4, 3),
    Tile(256, 32, 8, 4),
    Tile(128, 256, 16, 2),
)
COLUMN_SUM = (
    Tile(64, 256, 8, 3),
    Tile(64, 256, 8, 4),
    Tile(64, 128, 4, 3),
    Tile(64, 128, 4, 4),
    Tile(64, 128, 8, 3),
    Tile(32, 256, 8, 3),
    Tile(32, 256, 8, 5),
    Tile(32, 128, 4, 4),
    Tile(128, 128, 8, 3),
    Tile(128, 256, 8, 3),
    Tile(128, 64, 4, 3),
    Tile(64, 256, 16, 3),
    Tile(128, 256, 16, 3),
    Tile(64, 512, 16, 3),
)


@dataclasses.dataclass(frozen=True, slots=True)
class Candidate:
    """One size of one kernel, and what makes the launches use it."""

    kernel: str
    label: str
    used: Callable[[], Any]


def candidates(chosen: Tiles) -> Iterator[Candidate]:
    """The most promising first; the other kernels stay as ``chosen``."""

    def tiles(**changed: Tile) -> Callable[[], Any]:
        found = chosen._replace(**changed)
        return lambda: patch.object(score, "tiles_for", lambda *arguments: found)

    for name, sizes in (("log_sum_exp", LOG_SUM_EXP), ("column_sum", COLUMN_SUM)):
        for size in sizes:
            label = "{} queries, {} keys, {} warps, {} stages".format(*size)
            yield Candidate(f"{name}_kernel", label, tiles(**{name: size}))
    for numbers, warps, parts in PREPARE:
        used = functools.partial(patch.multiple, prepare, NUMBERS=numbers, WARPS=warps, PARTS=parts)
        yield Candidate("prepare_kernel", f"{numbers} numbers, {warps} warps, {parts} programs", used)


def measure(cases: list[Case], expected: list[torch.Tensor], candidate: Candidate) -> dict[str, Any]:
    """Microseconds per window for each case, and the largest error; ``failed`` where there is none."""
    found: dict[str, Any] = {"kernel": candidate.kernel, "label": candidate.label, "us_per_window": []}
    for case, theirs in zip(cases, expected, strict=True):
        case.scores.fill_(float("nan"))
        try:
            with candidate.used():
                case.score()
                times = launch_times(case.score, repeats=5)
        except Exception as error:  # whatever the compiler or the driver says
            found["failed"] = f"{type(error).__name__}: {str(error).strip().splitlines()[-1][:120]}"
            return found
        found["error"] = relative(case.scores, theirs)
        if not found["error"] < LARGEST_ERROR:  # NaN fails, too
            found["failed"] = f"relative error {found['error']:.4f}"
            return found
        if candidate.kernel not in times:
            found["failed"] = f"the profiler saw {', '.join(times)} only"
            return found
        found["us_per_window"].append(times[candidate.kernel] / case.num_jobs)
    return found


def show(results: list[dict[str, Any]], jobs: list[int]) -> None:
    """A table for each kernel, the fastest first."""
    for kernel in dict.fromkeys(result["kernel"] for result in results):
        print(f"\n{kernel}: us per window with", ", ".join(map(str, jobs)), "at once; error")
        done = [each for each in results if each["kernel"] == kernel and "failed" not in each]
        for each in sorted(done, key=lambda each: each["us_per_window"][0]):
            times = "".join(f"{took:9.1f}" for took in each["us_per_window"])
            print(f"{times}  {each['error']:.4f}  {each['label']}")


def main() -> None:
    parser = command_line.parser(__spec__, __doc__)
    parser.add_argument(
        "--window", type=command_line.whole(), default=512, help="tokens; default: %(default)s"
    )
    parser.add_argument("--jobs", type=int, nargs="+", default=[1, 8], help="windows at once")
    parser.add_argument("--kernels", nargs="+", help="only these, such as prepare_kernel")
    parser.add_argument("--seconds", type=float, default=120, help="begin nothing after this long")
    parser.add_argument("--output", type=Path, help="write the results there as JSON")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("tiles.py: no CUDA GPU here, nothing was timed")

    start = time.monotonic()
    model = MODELS[0]
    settings = Settings(window=arguments.window, kept=arguments.window // 2)
    cases = [Case(model, settings, jobs, layers=model.layers) for jobs in arguments.jobs]
    expected = [expected_scores(case, RULE) for case in cases]
    tables = cases[0].tables
    chosen = score.tiles_for(tables, RULE.causal)
    print(f"{torch.cuda.get_device_name()}, triton {triton.__version__}, W {settings.window}: {chosen}")
    report = {
        "gpu": torch.cuda.get_device_name(),
        "versions": versions(),
        "settings": dataclasses.asdict(settings),
        "jobs": arguments.jobs,
        "chosen": repr(chosen),
        "results": [],
    }
    for candidate in candidates(chosen):
        if arguments.kernels and candidate.kernel not in arguments.kernels:
            continue
        if time.monotonic() - start > arguments.seconds:
            print(
                f"{candidate.kernel}, {candidate.label}: not begun, {arguments.seconds:.0f} s are over"
            )
            continue
        found = measure(cases, expected, candidate)
        report["results"].append(found)
        times = ", ".join(f"{took:.1f}" for took in found["us_per_window"])
        outcome = found.get("failed") or f"{times} us per window, error {found['error']:.4f}"
        print(
            f"{time.monotonic() - start:5.1f} s {candidate.kernel}, {candidate.label}: {outcome}",
            flush=True,
        )
        write_json(arguments.output, report, indent=2)
    show(report["results"], arguments.jobs)


if __name__ == "__main__":
    main()
