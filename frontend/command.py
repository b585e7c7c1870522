"""Reasoning programs from the command line: ``python -m kara_sglang.frontend solve "QUESTION"``."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import sys
import time
import warnings
from typing import Any

DEFAULT_ENDPOINT = "http://127.0.0.1:30000"
PROGRAM_NAMES = ("plan-and-solve", "self-consistency", "reflect-and-revise", "beam")
# Which program takes which number; the others' defaults are in programs.py.
NUMBERS = {
    "chains": "self-consistency",
    "rounds": "reflect-and-revise",
    "width": "beam",
    "branch": "beam",
    "depth": "beam",
}


class Refusal(Exception):
    """Why nothing can be run, in one line."""


def main(argv: list[str] | None = None) -> int:
    """0: solved; 1: the program failed on its way; 2: it could not be started. One line says why."""
    options = _parser().parse_args(argv)
    try:
        _check(options)
        endpoint = _connect(options)
    except Refusal as refusal:
        return _fail(2, refusal)
    from kara_sglang.frontend.backend import EndpointError
    from kara_sglang.frontend.programs import PROGRAMS

    warnings.filterwarnings("ignore", message="Error in stream_executor")  # raised again in our thread
    given = {name: getattr(options, name) for name in ("max_tokens", "temperature", *NUMBERS)}
    arguments = {name: value for name, value in given.items() if value is not None}
    start = time.perf_counter()
    try:
        with _progress(endpoint, options.json):
            result = PROGRAMS[options.program](endpoint, options.question, **arguments)
    except (EndpointError, ValueError) as error:
        return _fail(1, error)
    (_print_json if options.json else _print_report)(
        options, endpoint, result, time.perf_counter() - start
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m kara_sglang.frontend", description=(__doc__ or "").partition("\n")[0]
    )
    commands = parser.add_subparsers(required=True, metavar="solve", help="the command")
    solve = commands.add_parser("solve", help="answer a question with a reasoning program")
    solve.add_argument("question", metavar="QUESTION", help="in quotes")
    solve.add_argument("--program", default="self-consistency", help=", ".join(PROGRAM_NAMES))
    solve.add_argument(
        "--endpoint", default=DEFAULT_ENDPOINT, metavar="URL", help="default: %(default)s"
    )
    solve.add_argument("--json", action="store_true", help="one JSON object instead of the report")
    solve.add_argument("--max-tokens", type=int, metavar="N", help="per generated text")
    solve.add_argument("--temperature", type=float, metavar="T", help="default: the program's own")
    for name, program in NUMBERS.items():
        solve.add_argument(f"--{name}", type=int, metavar="N", help=f"of {program}")
    solve.add_argument(
        "--kv-compress",
        metavar="JSON",
        help="""of each gen: '{"retain": 0.25}', false, ...""",
    )
    solve.add_argument("--tokenizer", metavar="PATH", help="default: what the server names")
    solve.add_argument("--chat-template", metavar="NAME", help="default: the tokenizer's own")
    solve.add_argument("--api-key", metavar="KEY", help="of the server's --api-key")
    return parser


def _check(options: argparse.Namespace) -> None:
    """What can be told without a server."""
    if not options.question.strip():
        raise Refusal("QUESTION is empty; ask something")
    if options.program not in PROGRAM_NAMES:
        raise Refusal(f"--program {options.program!r} is unknown; there are {', '.join(PROGRAM_NAMES)}")
    for name, program in NUMBERS.items():
        value = getattr(options, name)
        if value is not None and program != options.program:
            raise Refusal(f"--{name} belongs to --program {program}, not to {options.program}")
        if value is not None and value < 1:
            raise Refusal(f"--{name} must be at least 1, got {value}")
    if options.max_tokens is not None and options.max_tokens < 1:
        raise Refusal(f"--max-tokens must be at least 1, got {options.max_tokens}")
    if options.temperature is not None and not options.temperature >= 0:
        raise Refusal(f"--temperature must be 0 or more, got {options.temperature}")
    if options.kv_compress is not None:
        try:
            options.kv_compress = json.loads(options.kv_compress)
        except json.JSONDecodeError as error:
            raise Refusal(
                f"--kv-compress is no JSON ({error}); give an object, true or false"
            ) from error
    if not options.json and importlib.util.find_spec("rich") is None:
        raise Refusal("rich is not installed; pip install rich, or use --json")
    if importlib.util.find_spec("sglang") is None:
        raise Refusal("sglang is not installed; programs are written in its frontend language")


def _connect(options: argparse.Namespace) -> Any:
    from kara_sglang.frontend.backend import EndpointError, KaraEndpoint

    try:
        endpoint = KaraEndpoint(
            options.endpoint,
            kv_compress=options.kv_compress,
            tokenizer=options.tokenizer,
            chat_template=options.chat_template,
            api_key=options.api_key,
        )
    except EndpointError as error:
        raise Refusal(f"--endpoint: {error}") from error
    except ValueError as error:
        raise Refusal(str(error)) from error
    if endpoint.settings is None:
        raise Refusal(
            f"--endpoint: the server {options.endpoint} runs without compression; start it with "
            "--kv-compress kara (`make serve` does)"
        )
    return endpoint


def _progress(endpoint: Any, quiet: bool) -> Any:
    if quiet:
        import contextlib

        return contextlib.nullcontext()
    from rich.console import Console

    from kara_sglang.frontend.report import live

    return live(endpoint.ledger, Console())


def _print_report(options: argparse.Namespace, endpoint: Any, result: Any, seconds: float) -> None:
    from rich.console import Console

    from kara_sglang.frontend.answers import HAS_MATH_VERIFY, MISSING_MATH_VERIFY
    from kara_sglang.frontend.report import steps_table, summary

    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(steps_table(endpoint.ledger.steps))
    console.print(f"\n{summary(endpoint.ledger, seconds)}")
    if votes := getattr(result, "votes", None):
        console.print("Votes: " + ", ".join(f"{answer} ({count})" for answer, count in votes))
        if not HAS_MATH_VERIFY:
            console.print(MISSING_MATH_VERIFY)
    console.print(f"\nAnswer: {result.answer if result.answer is not None else 'none found'}")


def _print_json(options: argparse.Namespace, endpoint: Any, result: Any, seconds: float) -> None:
    ledger = endpoint.ledger
    print(
        json.dumps(
            {
                "program": options.program,
                "model": endpoint.get_model_name(),
                "settings": endpoint.settings,
                "answer": result.answer,
                "result": dataclasses.asdict(result),
                "steps": [step.numbers() for step in ledger.steps],
                "totals": dataclasses.asdict(ledger.totals) | {"wall_seconds": seconds},
            }
        )
    )


def _fail(code: int, error: Exception) -> int:
    print(f"kara_sglang.frontend: error: {error}", file=sys.stderr)
    return code
