"""Problems with a checkable answer, through the OpenAI route: does compression cost right answers?

    python -m kara_sglang.benchmarks.quality.reasoning --model DIR --out reasoning.json

starts a server (or asks the one at ``--url``) and lets every row answer the same problems until the
model ends its answer by itself. ``--data`` takes a JSON-lines file: ``question`` or ``problem``, and
``answer`` or ``solution`` (GSM8K, MATH-500 and AIME come in these forms); by default it is the first
problems of GSM8K's test set. Answers are graded by ``math-verify``. An interrupted run goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from kara_sglang import __version__, cpu_engine
from kara_sglang.benchmarks.machine import command, machine
from kara_sglang.benchmarks.quality import coder_model
from kara_sglang.benchmarks.quality.engine import PAGE_SIZE
from kara_sglang.benchmarks.quality.estimates import known, mean, share_interval
from kara_sglang.benchmarks.quality.instrument import REFERENCE_ROW
from kara_sglang.benchmarks.quality.script import write_json
from kara_sglang.benchmarks.quality.texts import DATA
from kara_sglang.benchmarks.serving.peers import PEERS, Setup
from kara_sglang.benchmarks.serving.rows import Row
from kara_sglang.benchmarks.serving.server import Server, end_on_sigterm
from kara_sglang.config import KaraConfig

MODULE = "kara_sglang.benchmarks.quality.reasoning"
INSTRUCTION = "Reason step by step, and put the final answer within \\boxed{}."
ROWS = ("full", "kara", "keys", "random", "recent", "snapkv")


@dataclass(frozen=True, slots=True)
class Problem:
    """One question and its answer, as text that ``math-verify`` reads."""

    number: int
    question: str
    answer: str


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


def serve(options: argparse.Namespace, log: Path) -> Server:
    """Start the real launcher with the plugin."""
    on_cpu = cpu_engine.is_installed()
    context = options.max_tokens + 1024
    settings = json.loads(options.config)
    row = Row("kara", "every selector by request", selector="kara", settings=settings)
    setup = Setup(
        model=options.model or _default_model(),
        dtype="float32" if on_cpu else "auto",
        window=options.window,
        delay=KaraConfig.from_settings(settings).delay,
        query_mem_gb=options.query_mem_gb or (0.25 if on_cpu else 2.0),
        page_size=PAGE_SIZE,
        pool=options.parallel * context if on_cpu else None,
        server_args=(
            *("--context-length", str(context)),
            *(("--mem-fraction-static", "0.95") if on_cpu else ()),  # the pool's size is given
        ),
        pythons={},
        cpu=on_cpu,
    )
    try:
        return Server(PEERS["sglang"], row, setup, log).wait()
    except RuntimeError as error:
        raise Failed(str(error)) from None


def ask(url: str, problem: Problem, row: str, options: argparse.Namespace) -> dict[str, Any]:
    """One answer: text, tokens, whether it was cut off, seconds, and what was compressed."""
    import requests

    kv_compress: Any = False if row == REFERENCE_ROW else {"selector": row, "retain": options.retain}
    body = {
        "model": "default",
        "messages": [{"role": "user", "content": f"{problem.question}\n\n{INSTRUCTION}"}],
        "max_tokens": options.max_tokens,
        "temperature": options.temperature,
        "seed": problem.number,
        "custom_params": {"kv_compress": kv_compress},
        "return_meta_info": True,
    }
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


def figures(answers: dict[str, dict[int, dict[str, Any]]], retain: float) -> list[dict[str, Any]]:
    """One record per row, paired with the full cache over the same problems."""
    full = answers[REFERENCE_ROW]
    records = []
    for row, given in answers.items():
        right = [float(given[n]["right"]) for n in full]
        low, high = share_interval(int(sum(right)), len(right))
        against = mean([float(given[n]["right"]) - float(full[n]["right"]) for n in full])
        tokens = mean([given[n]["tokens"] for n in full])
        windows = [(given[n]["kv_compress"] or {}).get("windows", 0) for n in full]
        records.append(
            {
                "row": row,
                "retain": 1.0 if row == REFERENCE_ROW else retain,
                "problems": len(right),
                "accuracy": sum(right) / len(right),
                "accuracy_low": low,
                "accuracy_high": high,
                "accuracy_over_full": against.value,
                "accuracy_over_full_se": known(against.error),
                "output_tokens": tokens.value,
                "output_tokens_se": known(tokens.error),
                "truncated": mean([float(given[n]["cut"]) for n in full]).value,
                "seconds": mean([given[n]["seconds"] for n in full]).value,
                "windows": mean([float(w) for w in windows]).value,
            }
        )
    return records


def table(records: list[dict[str, Any]]) -> str:
    """The records in Markdown; intervals are Wilson's at 95 %."""
    lines = [
        "| row | retain | accuracy (95 %) | over full | output tokens | cut off | s per problem |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in records:
        over, error = f"{r['accuracy_over_full']:+.3f}", r["accuracy_over_full_se"]
        over += "" if error is None else f" ± {error:.3f}"
        lines.append(
            f"| {r['row']} | {r['retain']:g} | {r['accuracy']:.3f} ({r['accuracy_low']:.3f} to "
            f"{r['accuracy_high']:.3f}) | {over} | {r['output_tokens']:.0f} | "
            f"{r['truncated']:.3f} | {r['seconds']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the figures")
    parser.add_argument("--model", help="folder or hub name; default: what coder_model has made")
    parser.add_argument("--url", help="ask this server instead of starting one")
    parser.add_argument("--data", type=Path, default=DATA / "gsm8k.jsonl", help="JSON lines")
    parser.add_argument("--problems", type=int, help="only the first so many")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), metavar="SELECTOR")
    parser.add_argument("--retain", type=float, default=0.5)
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--config", default="{}", help="as --kv-compress-config")
    parser.add_argument("--query-mem-gb", type=float, help="default: 0.25 on a CPU, 2 on a GPU")
    parser.add_argument("--max-tokens", type=int, default=1024)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--parallel", type=int, default=8, help="problems at once")
    parser.add_argument("--folder", type=Path, help="run folder; by default --out without its suffix")
    options = parser.parse_args(arguments)
    if REFERENCE_ROW not in options.rows:
        options.rows.insert(0, REFERENCE_ROW)
    return options


def run(options: argparse.Namespace, shown: str) -> dict[str, Any]:
    """Ask what has not been answered yet, grade, and reduce."""
    right = grader()
    problems = load(options.data, options.problems)
    folder = options.folder or options.out.with_suffix(".run")
    folder.mkdir(parents=True, exist_ok=True)

    def place(row: str, problem: Problem) -> Path:
        return folder / "answers" / row / f"{problem.number}.json"

    # Row by row within a problem: an interrupted run has answered some problems in all rows.
    todo = [(p, row) for p in problems for row in options.rows if not place(row, p).is_file()]
    if todo:
        with contextlib.ExitStack() as stack:
            url = options.url
            if url is None:
                server = serve(options, folder / "server.log")
                stack.callback(server.stop)
                url = server.url
            pool = stack.enter_context(ThreadPoolExecutor(options.parallel))
            waiting = {pool.submit(ask, url, p, row, options): (p, row) for p, row in todo}
            try:
                for future in tqdm(as_completed(waiting), total=len(waiting), unit="answer"):
                    problem, row = waiting[future]
                    write_json(place(row, problem), future.result())
            except BaseException:
                pool.shutdown(cancel_futures=True, wait=False)
                raise
    answers: dict[str, dict[int, dict[str, Any]]] = {row: {} for row in options.rows}
    for row in options.rows:
        for problem in problems:
            answer = json.loads(place(row, problem).read_text())
            answer["right"] = right(problem.answer, answer["text"])
            answers[row][problem.number] = answer
    return {
        "meta": {
            "command": shown,
            "machine": machine(),
            "dtype": "float32" if cpu_engine.is_installed() else "model",
            "data": options.data.name,
            "model": Path(options.model or coder_model.FOLDER_NAME).name,
            "window": options.window,
            "config": json.loads(options.config),
            "max_tokens": options.max_tokens,
            "temperature": options.temperature,
            "parallel": options.parallel,
            "kara_sglang": __version__,
        },
        "results": figures(answers, options.retain),
    }


def _default_model() -> str:
    folder = coder_model.path()
    if not folder.is_dir():
        raise Failed(
            f"give --model, or make the default one (fetches 1.1 GB): python -m {coder_model.__name__}"
        )
    return str(folder)


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    try:
        result = run(options, command(MODULE, arguments))
    except (Failed, OSError) as error:
        print(f"reasoning: {error}", file=sys.stderr)
        return 1
    write_json(options.out, result)
    print(table(result["results"]))
    return 0


if __name__ == "__main__":
    end_on_sigterm()
    raise SystemExit(main(sys.argv[1:]))
