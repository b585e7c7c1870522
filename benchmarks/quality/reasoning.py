"""Problems with a checkable answer, through the OpenAI route: does compression cost right answers?

    python -m kara_sglang.benchmarks.quality.reasoning --model DIR --out reasoning.json

starts a server (or asks the one at ``--url``) and lets every row answer the same problems until the
model ends its answer by itself. ``--data`` takes a JSON-lines file: ``question`` or ``problem``, and
``answer`` or ``solution`` (GSM8K, MATH-500 and AIME come in these forms); by default it is the first
problems of GSM8K's test set. Answers are graded by ``math-verify``. An interrupted run goes on.

``--collect`` stops when all answers are there; the same command without it, on any machine that has the
run folder and math-verify, grades them. ``again`` is a second run of the full cache: answers that come
out of batches of another shape differ in last bits, and ``again`` shows how much that alone changes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from kara_sglang import __version__, cpu_engine
from kara_sglang.benchmarks import command_line
from kara_sglang.benchmarks.machine import command, machine
from kara_sglang.benchmarks.markdown import grid
from kara_sglang.benchmarks.output import write_json
from kara_sglang.benchmarks.quality import campaign, coder_model
from kara_sglang.benchmarks.quality.engine import PAGE_SIZE, EngineFailed
from kara_sglang.benchmarks.quality.estimates import interval, points, resampled, share_interval
from kara_sglang.benchmarks.quality.instrument import REFERENCE_ROW
from kara_sglang.benchmarks.quality.pace import MODELS_OWN, fastest
from kara_sglang.benchmarks.quality.texts import DATA
from kara_sglang.benchmarks.serving.peers import PEERS, start
from kara_sglang.benchmarks.serving.rows import Row as ServedRow
from kara_sglang.benchmarks.serving.server import Server, end_on_sigterm
from kara_sglang.benchmarks.serving.setup import Setup
from kara_sglang.config import KaraConfig

MODULE = "kara_sglang.benchmarks.quality.reasoning"
INSTRUCTION = "Reason step by step, and put the final answer within \\boxed{}."
ROWS = ("full", "again", "kara", "keys", "random", "recent", "snapkv", "paper")
WHOLE = ("full", "again")
"""Rows that are not compressed."""
SERVER_SETTINGS = {"paper": {"preset": "paper"}}
"""Rows that need a server of their own, and its settings; its selector is ``kara``."""
SEEDS = 1_000_000
"""From one sample of a problem to the next."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One question and its answer, as text that ``math-verify`` reads."""

    number: int
    question: str
    answer: str


@dataclass(frozen=True, slots=True)
class Row:
    """One way to answer all problems.

    Attributes
    ----------
    name
        ``full``, ``again``, ``paper``, or a selector.
    retain
        Share that is kept; 1 where nothing is compressed.
    """

    name: str
    retain: float

    @property
    def key(self) -> str:
        """Unique, and fit for a file's name."""
        return self.name if self.name in WHOLE else f"{self.name}@{self.retain:g}"

    @property
    def options(self) -> Any:
        """The request's ``kv_compress``."""
        if self.name in WHOLE:
            return False
        selector = "kara" if self.name in SERVER_SETTINGS else self.name
        return {"selector": selector, "retain": self.retain}

    @property
    def settings(self) -> dict[str, Any]:
        """What its server has beside the settings of all."""
        return SERVER_SETTINGS.get(self.name, {})


def rows_of(names: Sequence[str], retains: Sequence[float]) -> list[Row]:
    """Every name at every share; rows that keep all stand once."""
    whole = [Row(name, 1.0) for name in names if name in WHOLE]
    return whole + [Row(n, r) for r in retains for n in names if n not in WHOLE]


class Failed(RuntimeError):
    """One line for the user."""


def load(path: Path, limit: int | None) -> list[Problem]:
    """The first ``limit`` problems of a JSON-lines file."""
    problems = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines):
            if limit is not None and number == limit:
                break
            fields = {key.lower(): value for key, value in json.loads(line).items()}
            question = fields.get("question", fields.get("problem"))
            answer = fields.get("answer", fields.get("solution"))
            if question is None or answer is None:
                raise Failed(f"{path}, line {number + 1}: no question or no answer")
            problems.append(Problem(number, question, final_answer(str(answer))))
    return problems


def final_answer(text: str) -> str:
    """What GSM8K writes behind ``####``; other answers as they are."""
    marked = re.search(r"####\s*(.+)\s*$", text)
    return marked[1].strip().replace(",", "") if marked else text


def grader() -> Callable[[str, str], bool]:
    """Whether an answer's text ends in the right value; math-verify's word."""
    try:
        from math_verify import parse, verify
    except ImportError:
        raise Failed(
            "grading needs math-verify; pip install 'kara-sglang[quality]' or math-verify[antlr4_13_2]"
        ) from None

    def right(expected: str, given: str) -> bool:
        gold = parse(expected if "\\" in expected or "$" in expected else f"${expected}$")
        return bool(verify(gold, parse(given)))

    return right


def serve(options: argparse.Namespace, own: dict[str, Any], log: Path) -> Server:
    """Start the real launcher with the plugin; ``own`` are settings on top of ``--config``."""
    on_cpu = cpu_engine.is_installed()
    context = options.max_tokens + 1024
    settings = json.loads(options.config) | own
    row = ServedRow("kara", "every selector by request", selector="kara", settings=settings)
    setup = Setup(
        model=options.model or _default_model(),
        dtype=options.dtype or "auto",
        window=options.window,
        delay=KaraConfig.from_settings(settings).delay,
        query_mem_gb=options.query_mem_gb or (0.25 if on_cpu else 2.0),
        page_size=PAGE_SIZE,
        pool=options.parallel * context if on_cpu else None,
        server_args=(
            *("--context-length", str(context)),
            *(("--mem-fraction-static", "0.95") if on_cpu else ()),  # the pool's size is given
            *shlex.split(options.server_args),
        ),
    )
    try:
        return start(PEERS["sglang"], row, setup, log).wait()
    except RuntimeError as error:
        raise Failed(str(error)) from None


def ask(
    url: str, problem: Problem, row: Row, sample: int, options: argparse.Namespace
) -> dict[str, Any]:
    """One answer: text, tokens, whether it was cut off, seconds, and what was compressed."""
    import requests

    body = {
        "model": "default",
        "messages": [{"role": "user", "content": f"{problem.question}\n\n{INSTRUCTION}"}],
        "max_tokens": options.max_tokens,
        "temperature": options.temperature,
        "seed": problem.number + sample * SEEDS,
        "custom_params": {"kv_compress": row.options},
        "return_meta_info": True,
    } | ({"top_p": options.top_p} if options.temperature else {})
    started = time.monotonic()
    response = requests.post(f"{url}/v1/chat/completions", json=body, timeout=7200)
    if response.status_code != 200:
        raise Failed(f"the server says {response.status_code}: {response.text[:300]}")
    answer = response.json()
    choice = answer["choices"][0]
    report = (choice.get("meta_info") or {}).get("kv_compress")
    return {
        "text": choice["message"]["content"],
        "tokens": answer["usage"]["completion_tokens"],
        "cut": choice["finish_reason"] == "length",
        "seconds": time.monotonic() - started,
        "kv_compress": report,
    }


def figures(
    answers: dict[str, dict[int, list[dict[str, Any]]]], rows: Sequence[Row], window: int
) -> list[dict[str, Any]]:
    """One record per row; differences are paired over the problems. The accuracy of a problem with
    several samples is the share of them that are right (pass@1).

    Parameters
    ----------
    answers
        Per row key and problem number, one for each sample.
    rows
        The full cache is one of them.
    window
        W.
    """
    numbers = list(answers[REFERENCE_ROW])

    def means(key: str, field: str) -> np.ndarray:
        return np.array(
            [np.mean([one[field] for one in answers[key][n]]) for n in numbers], dtype=float
        )

    records = []
    for row in rows:
        given = [one for n in numbers for one in answers[row.key][n]]
        samples = len(given) // len(numbers)
        graded, tokens = means(row.key, "right"), means(row.key, "tokens")
        reports = [one["kv_compress"] or {} for one in given]
        windows = np.array([report.get("windows", 0) for report in reports])
        slots = [report["kv_slots_held"] for report in reports if "kv_slots_held" in report]
        low, high = (
            share_interval(int(graded.sum()), len(graded))
            if samples == 1
            else interval(graded[resampled(len(graded))].mean(axis=1))
        )
        record = {
            "row": row.name,
            "retain": row.retain,
            "problems": len(graded),
            "accuracy": float(graded.mean()),
            "accuracy_low": low,
            "accuracy_high": high,
            "over_full": difference(graded, means(REFERENCE_ROW, "right")),
            "over_random": None,
            "longer_than_full": relative(tokens, means(REFERENCE_ROW, "tokens")),
            "output_tokens": float(tokens.mean()),
            "truncated": float(np.mean([answer["cut"] for answer in given])),
            "windows": float(windows.mean()),
            "requests_compressed": float(np.mean(windows > 0)),
            "tokens_compressed": float(windows.sum() * window / (samples * tokens.sum())),
            "kv_slots_at_end": float(np.mean(slots)) if slots else None,
            "samples": samples,
            "graded": [sum(one["right"] for one in answers[row.key][n]) for n in numbers],
        }
        null = Row("random", row.retain).key
        if row.name not in (*WHOLE, "random") and null in answers:
            record["over_random"] = difference(graded, means(null, "right"))
        records.append(record)
    return records


def difference(ours: np.ndarray, theirs: np.ndarray) -> list[float]:
    """Mean of the paired differences and its 95 % interval, from a bootstrap over problems."""
    apart = ours - theirs
    return [float(apart.mean()), *interval(apart[resampled(len(apart))].mean(axis=1))]


def relative(ours: np.ndarray, theirs: np.ndarray) -> list[float]:
    """Ratio of the means minus 1, and its 95 % interval, from a bootstrap over problems."""
    drawn = resampled(len(ours))
    ratios = ours[drawn].mean(axis=1) / theirs[drawn].mean(axis=1) - 1
    return [float(ours.mean() / theirs.mean() - 1), *interval(ratios)]


def table(records: list[dict[str, Any]]) -> str:
    """The records in Markdown; accuracies are in percent, differences in points."""
    lines = []
    for r in records:
        accuracy, low, high = (100 * r[name] for name in ("accuracy", "accuracy_low", "accuracy_high"))
        more, least, most = (100 * part for part in r["longer_than_full"])
        over_full, longer = points(r["over_full"]), f" ({more:+.1f} ± {(most - least) / 2:.1f} %)"
        if r["row"] == REFERENCE_ROW:
            over_full = longer = ""
        right = f"{accuracy:.1f} ({low:.1f} to {high:.1f})"
        written = [f"{r['output_tokens']:.0f}{longer}", f"{100 * r['truncated']:.1f} %"]
        done = f"{100 * r['requests_compressed']:.0f} % / {100 * r['tokens_compressed']:.0f} %"
        over = [over_full, points(r["over_random"])]
        lines.append([r["row"], f"{r['retain']:g}", right, *over, *written, done])
    columns = ["row", "retain", "accuracy (95 %)", "over full (95 %)", "over random (95 %)"]
    columns += ["output tokens (95 %)", "cut off", "compressed: answers / tokens"]
    slots = [r.get("kv_slots_at_end") for r in records]
    if any(slots):  # results from before they were reported have none
        columns.append("KV slots at the end")
        lines = [
            [*line, f"{held:.0f}" if held else ""] for line, held in zip(lines, slots, strict=True)
        ]
    return grid(columns, lines)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = command_line.parser(__spec__, __doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the figures")
    parser.add_argument(
        "--model",
        type=command_line.model,
        help="folder or hub name; default: what coder_model has made",
    )
    parser.add_argument("--url", help="ask this server instead of starting one")
    parser.add_argument(
        "--data",
        type=command_line.file,
        default=DATA / "gsm8k.jsonl",
        help="JSON lines; default: problems of GSM8K",
    )
    parser.add_argument("--problems", type=command_line.whole(), help="only the first so many")
    parser.add_argument(
        "--rows",
        nargs="+",
        default=list(ROWS),
        metavar="ROW",
        help="selectors, and: full, again (the full cache once more), paper",
    )
    parser.add_argument(
        "--retain",
        type=command_line.share,
        nargs="+",
        default=[0.5],
        metavar="SHARE",
        help="default: 0.5",
    )
    parser.add_argument(
        "--window", type=command_line.whole(), default=128, help="tokens; default: %(default)s"
    )
    parser.add_argument("--config", default="{}", help="as --kv-compress-config")
    parser.add_argument("--query-mem-gb", type=float, help="default: 0.25 on a CPU, 2 on a GPU")
    parser.add_argument(
        "--max-tokens",
        type=command_line.whole(),
        default=1024,
        help="of an answer; default: %(default)s",
    )
    parser.add_argument("--temperature", type=float, default=0.0, help="default: greedy")
    parser.add_argument("--top-p", type=float, default=0.95, help="where the temperature is not 0")
    parser.add_argument(
        "--samples",
        type=command_line.whole(),
        default=1,
        help="answers to each problem, of which the mean counts (pass@1); needs a --temperature",
    )
    parser.add_argument("--parallel", type=command_line.whole(), default=32, help="answers at once")
    parser.add_argument("--dtype", help="default: the model's; without a GPU the fastest one")
    parser.add_argument("--server-args", default="", help="more flags for the server, as one word")
    parser.add_argument("--collect", action="store_true", help="only ask; grade later")
    parser.add_argument("--folder", type=Path, help="run folder; by default --out with the suffix .run")
    options = parser.parse_args(arguments)
    if REFERENCE_ROW not in options.rows:
        options.rows.insert(0, REFERENCE_ROW)
    if options.samples > 1 and not options.temperature:
        parser.error("--samples: greedy answers are all alike; give a --temperature, such as 0.6")
    if options.url and any(row in SERVER_SETTINGS for row in options.rows):
        parser.error(
            f"--url: {', '.join(SERVER_SETTINGS)} needs a server of its own; leave it out of --rows"
        )
    return options


def collect(
    options: argparse.Namespace, problems: list[Problem], rows: list[Row], folder: Path
) -> None:
    """Ask what has not been answered yet, one server after the other."""
    servers: dict[str, list[Row]] = {}
    for row in rows:
        servers.setdefault(json.dumps(row.settings), []).append(row)
    for number, (own, members) in enumerate(servers.items()):
        # Row by row within a problem: an interrupted run has answered some problems in all rows.
        every = [(p, s) for p in problems for s in range(options.samples)]
        each = [(p, row, s) for p, s in every for row in members]
        todo = [one for one in each if not place(folder, *one).is_file()]
        if not todo:
            continue
        set_pace(options, folder)
        with contextlib.ExitStack() as stack:
            url = options.url
            if url is None:
                server = serve(options, json.loads(own), folder / f"server-{number}.log")
                stack.callback(server.stop)
                url = server.url
            write_json(folder / "answered.json", answered(options))
            pool = stack.enter_context(ThreadPoolExecutor(options.parallel))
            waiting = {pool.submit(ask, url, *one, options): one for one in todo}
            try:
                for future in tqdm(as_completed(waiting), total=len(waiting), unit="answer"):
                    write_json(place(folder, *waiting[future]), future.result())
            except BaseException:
                pool.shutdown(cancel_futures=True, wait=False)
                raise


def answered(options: argparse.Namespace) -> dict[str, Any]:
    """On what the answers were given; they may be graded elsewhere."""
    threads = os.environ["OMP_NUM_THREADS"] if cpu_engine.is_installed() else None
    return {"machine": machine(), "dtype": options.dtype or MODELS_OWN, "threads": threads}


def set_pace(options: argparse.Namespace, folder: Path) -> None:
    """Without a GPU: the dtype and the number of threads that are fastest here, unless given.

    A run that goes on keeps its dtype.

    Raises
    ------
    Failed
        Where another one is asked for.
    """
    path = folder / "answered.json"
    before = json.loads(path.read_text())["dtype"] if path.is_file() else None
    if before and options.dtype not in (None, before):
        raise Failed(f"--dtype {options.dtype}: {folder} holds answers in {before}; give --folder")
    options.dtype = options.dtype or (before if before != MODELS_OWN else None)
    if options.url or not cpu_engine.is_installed():
        return
    if before == MODELS_OWN:
        raise Failed(f"{folder} holds answers of a GPU; give --folder")
    found = fastest(options.model or _default_model(), options.parallel)
    options.dtype = options.dtype or found.dtype
    os.environ.setdefault("OMP_NUM_THREADS", str(found.threads))
    times = ", ".join(f"{name} {took:.1f} ms" for name, took in found.milliseconds.items())
    print(
        f"{options.dtype} on {os.environ['OMP_NUM_THREADS']} threads (a product of {options.parallel} "
        f"tokens: {times})",
        file=sys.stderr,
    )


def place(folder: Path, problem: Problem, row: Row, sample: int) -> Path:
    """The file with a row's answer to a problem."""
    name = f"{problem.number}.{sample}" if sample else f"{problem.number}"
    return folder / "answers" / row.key / f"{name}.json"


def grade(
    options: argparse.Namespace, problems: list[Problem], rows: list[Row], folder: Path, shown: str
) -> dict[str, Any]:
    """Grade all answers, and reduce."""
    right = grader()
    answers: dict[str, dict[int, list[dict[str, Any]]]] = {row.key: {} for row in rows}
    for row in rows:
        for problem in problems:
            places = [place(folder, problem, row, sample) for sample in range(options.samples)]
            given = [json.loads(path.read_text()) for path in places]
            answers[row.key][problem.number] = [
                answer | {"right": right(problem.answer, answer["text"])} for answer in given
            ]
    return {
        "meta": {
            "command": shown,
            **json.loads((folder / "answered.json").read_text()),
            **conditions(options),
            "samples": options.samples,
            "parallel": options.parallel,
            "kara_sglang": __version__,
        },
        "results": figures(answers, rows, options.window),
    }


def conditions(options: argparse.Namespace) -> dict[str, Any]:
    """What all answers of a run folder have in common."""
    return {
        "data": options.data.name,
        "model": Path(options.model or coder_model.MODEL.folder_name).name,
        "window": options.window,
        "config": json.loads(options.config),
        "max_tokens": options.max_tokens,
        "temperature": options.temperature,
        "top_p": options.top_p,
    }


def _default_model() -> str:
    folder = coder_model.MODEL.path()
    if not folder.is_dir():
        raise Failed(
            f"give --model, or make the default one (fetches 1.1 GB): python -m {coder_model.__name__}"
        )
    return str(folder)


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    rows = rows_of(options.rows, options.retain)
    folder = options.folder or options.out.with_suffix(".run")
    try:
        problems = load(options.data, options.problems)
        campaign.same_run(folder, conditions(options))
        collect(options, problems, rows, folder)
        if options.collect:
            return 0
        shown = command(MODULE, [word for word in arguments if word != "--collect"])
        result = grade(options, problems, rows, folder, shown)
    except (Failed, EngineFailed, OSError) as error:
        print(f"reasoning: {error}", file=sys.stderr)
        return 1
    write_json(options.out, result)
    print(table(result["results"]))
    return 0


if __name__ == "__main__":
    end_on_sigterm()
    raise SystemExit(main(sys.argv[1:]))
