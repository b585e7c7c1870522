"""The GPU programme: every step in order of value, each with a time limit and a result of its own.

    python -m kara_sglang.benchmarks.gpu.run_all --out gpu-results
    python -m kara_sglang.benchmarks.gpu.run_all --list

A step writes its JSON as it goes, so a run that is cut off has kept what it has; a step whose
result is there already is not run again. ``status.json`` says of every step whether it ran, how
long, and how it ended. Steps that need a model take the folders that ``--smollm2`` and ``--coder``
name; without them they are left out, and the status says why. With ``--rehearse`` everything is
small and runs without a GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kara_sglang.benchmarks.gpu.report import write
from kara_sglang.benchmarks.machine import machine
from kara_sglang.benchmarks.processes import end_group
from kara_sglang.benchmarks.serving.server import end_on_sigterm

BENCHMARKS = "kara_sglang.benchmarks"
SERVER = "--attention-backend fa3 --sampling-backend pytorch --grammar-backend none"


@dataclass(frozen=True, slots=True)
class Step:
    """One program with its arguments.

    Attributes
    ----------
    name
        Of the result's file.
    what
        One line for the table.
    minutes
        That it is given at most.
    module
        Below ``kara_sglang.benchmarks``.
    arguments
        ``{coder}`` and ``{smollm2}`` stand for the folders of the models.
    rehearsal
        Arguments that make it small and need no GPU; None: it is not rehearsed.
    output
        The flag that takes the result's file; None: what it prints is its result.
    needs
        Names of what it cannot run without, see :data:`NEEDS`.
    """

    name: str
    what: str
    minutes: float
    module: str
    arguments: tuple[str, ...]
    rehearsal: tuple[str, ...] | None = None
    output: str | None = "--output"
    needs: tuple[str, ...] = ()

    @property
    def result(self) -> str:
        """Its file's name."""
        return f"{self.name}.json" if self.output else f"{self.name}.log"


_TINY = ("--model", "tiny", "--tokens", "160", "--window", "64", "--prompt", "32", "--fit", "6")
_SCALES = ("--retain", "0.5", "0.25")

STEPS = (
    Step(
        "kernels",
        "each kernel: correctness, 2,000 worst moves, time and share of its floor",
        5,
        "gpu.kernels",
        ("--models", "Qwen3-8B"),
        needs=("gpu",),
    ),
    Step(
        "identity",
        "a real server, greedy tokens against stock SGLang's, three attention backends",
        7,
        "gpu.identity",
        (
            *("--model", "{coder}", "--backends", "triton", "fa3", "flashinfer"),
            *("--window", "256", "--pool", "32768", "--server-args"),
            "--sampling-backend pytorch --grammar-backend none --cuda-graph-max-bs-decode 16 "
            "--context-length 8192",
        ),
        ("--model", "tiny"),
        needs=("coder", "flashinfer"),
    ),
    Step(
        "paged_decode",
        "FlashInfer itself over the page table that a pass leaves",
        2,
        "gpu.paged_decode",
        (),
        output=None,
        needs=("gpu", "flashinfer"),
    ),
    Step(
        "throughput",
        "Qwen3-8B's shape at equal memory, scarce and ample, with a profile",
        15,
        "gpu.throughput",
        ("--server-args", SERVER),
        (
            *_TINY,
            *("--query-mem-gb", "0.0003", "--ramp", "4", "--measured", "6", "--repetitions", "1"),
            *("--groups", "requests", "--rows", "kara-0.5", "--profiled"),
        ),
    ),
    Step(
        "gsm8k",
        "GSM8K with the coder model: all selectors at two shares",
        8,
        "quality.reasoning",
        (
            *("--model", "{coder}", "--collect", *_SCALES, "--window", "64"),
            *("--config", '{"delay":16}', "--max-tokens", "640", "--parallel", "256", "--server-args"),
            f"{SERVER} --max-total-tokens 300000 --max-running-requests 256",
        ),
        output="--out",
        needs=("coder",),
    ),
    Step(
        "regimes",
        "what each step repeats and what was stated once: all selectors at two shares",
        8,
        "quality.regimes",
        ("--model", "{coder}", "--scripts", "64"),
        output="--out",
        needs=("coder",),
    ),
    Step(
        "quality",
        "held-out texts and facts with the embedded model",
        6,
        "quality",
        ("--model", "{smollm2}", "--quick"),
        output="--out",
        needs=("smollm2",),
    ),
    Step(
        "other_kernels",
        "the kernels in the other shapes",
        10,
        "gpu.kernels",
        ("--models", "R1-Distill-Qwen-7B", "Qwen3-32B"),
        needs=("gpu",),
    ),
)

NEEDS: dict[str, Callable[[Mapping[str, str]], str | None]] = {
    "gpu": lambda _: None if torch.cuda.is_available() else "there is no CUDA GPU",
    "flashinfer": lambda given: (
        None
        if "flashinfer" in given or importlib.util.find_spec("flashinfer")
        else "flashinfer is not installed, and --flashinfer names no folder"
    ),
    "coder": lambda given: None if "coder" in given else "--coder names no folder",
    "smollm2": lambda given: None if "smollm2" in given else "--smollm2 names no folder",
}
"""Why something that steps need is not there, or None."""


def table() -> str:
    """The steps in Markdown."""
    lines = ["| step | what | minutes at most | needs |", "|---|---|---|---|"]
    lines += [f"| `{s.name}` | {s.what} | {s.minutes:g} | {', '.join(s.needs)} |" for s in STEPS]
    return "\n".join(lines) + "\n"


def command(step: Step, out: Path, given: Mapping[str, str], rehearse: bool) -> list[str]:
    """The command line of a step."""
    words = step.rehearsal if rehearse else step.arguments
    assert words is not None
    for name, folder in given.items():
        words = tuple(word.replace(f"{{{name}}}", folder) for word in words)
    target = [step.output, str(out / step.result)] if step.output else []
    return [sys.executable, "-m", f"{BENCHMARKS}.{step.module}", *words, *target]


def missing(step: Step, given: Mapping[str, str], rehearse: bool) -> str | None:
    """Why a step cannot be run here, or None."""
    if rehearse:
        return "it is not rehearsed" if step.rehearsal is None else None
    return next((why for need in step.needs if (why := NEEDS[need](given))), None)


def run(
    step: Step, words: list[str], out: Path, seconds: float, given: Mapping[str, str]
) -> dict[str, Any]:
    """Run one step; what it has written when its time is over stays."""
    log = out / f"{step.name}.log"
    environment = dict(os.environ)
    if "flashinfer" in step.needs and "flashinfer" in given:
        # For these steps only: where SGLang finds it, it samples by kernels of FlashInfer's as well.
        path = [environment.get("PYTHONPATH", ""), given["flashinfer"]]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    started = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            end_group(process)
    ended = "its time was over" if code is None else f"exit code {code}"
    return {
        "command": shlex.join(["python", *words[1:]]),
        "seconds": round(time.monotonic() - started),
        "ended": ended,
        "good": code == 0,
    }


def main() -> int:
    """0 where every step that could be run ended well."""
    names = [step.name for step in STEPS]
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("gpu-results"))
    parser.add_argument("--list", action="store_true", help="print the steps and end")
    parser.add_argument("--only", nargs="+", choices=names, metavar="STEP", help=", ".join(names))
    parser.add_argument("--smollm2", help="folder of SmolLM2-135M-Instruct")
    parser.add_argument("--coder", help="folder of Qwen2.5-Coder-1.5B-Instruct")
    parser.add_argument("--flashinfer", help="folder that holds FlashInfer, where it is not installed")
    parser.add_argument("--seconds", type=float, default=1e9, help="for all steps together")
    parser.add_argument("--rehearse", action="store_true", help="everything small, without a GPU")
    options = parser.parse_args()
    if options.list:
        print(table(), end="")
        return 0
    end_on_sigterm()
    options.out.mkdir(parents=True, exist_ok=True)
    given = {name: f for name in ("coder", "smollm2", "flashinfer") if (f := getattr(options, name))}
    began = time.monotonic()
    status: dict[str, Any] = {"machine": machine(), "pid": os.getpid(), "steps": {}}
    for step in STEPS:
        if options.only and step.name not in options.only:
            continue
        left = options.seconds - (time.monotonic() - began)
        if why := missing(step, given, options.rehearse):
            found: dict[str, Any] = {"not_run": why}
        elif step.output and (options.out / step.result).is_file():
            found = {"not_run": "its result is there already"}
        elif left <= 0:
            found = {"not_run": "the time of all steps is over"}
        else:
            words = command(step, options.out, given, options.rehearse)
            print(f"{step.name}: {step.what}", flush=True)
            found = run(step, words, options.out, min(left, 60 * step.minutes), given)
        print(f"{step.name}: {found.get('not_run') or found['ended']}", flush=True)
        status["steps"][step.name] = found
        write(status, options.out / "status.json")
    print(json.dumps(status["steps"], indent=1))
    return 0 if all(found.get("good", True) for found in status["steps"].values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
