"""How many tokens a step accepts from a draft model, with compression and without.

    python -m kara_sglang.benchmarks.quality.drafts --out drafts.json

The model drafts for itself unless ``--draft`` names another one, so nearly all guesses are right while
both remember the same, and what compression takes from the draft shows. In the rows *left alone* a pass
does not move the draft's K and V, so that it remembers the first tokens of each window.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kara_sglang import cpu_engine, embedded_model
from kara_sglang.benchmarks import command_line
from kara_sglang.benchmarks.machine import origin
from kara_sglang.benchmarks.markdown import grid
from kara_sglang.benchmarks.output import write_json
from kara_sglang.benchmarks.quality.engine import engine_arguments
from kara_sglang.benchmarks.quality.instrument import install

TOPICS = (
    *("the history of bridges", "how bread is made", "a lighthouse keeper", "learning to swim"),
    *("the water cycle", "a small town market", "building a boat", "a school for robots"),
)
STEPS = 3
"""Tokens that are drafted for a step; with its own it verifies one more."""


MODULE = "kara_sglang.benchmarks.quality.drafts"
BASE = "not compressed"
ROWS: dict[str, Any] = {
    BASE: False,
    "kara, a half": {"retain": 0.5},
    "kara, a quarter": {"retain": 0.25},
    "keys, a half": {"selector": "keys", "retain": 0.5},
}
ALONE = "{}, draft left alone"


def register() -> None:
    """What SGLang calls in the processes of an engine whose draft model is left alone."""
    from kara_sglang.scheduler.drafts import Drafts

    Drafts.follow = lambda *_args: None  # type: ignore[method-assign]


@contextlib.contextmanager
def left_alone() -> Iterator[None]:
    """Engines that are started meanwhile leave their draft model alone."""
    with tempfile.TemporaryDirectory() as folder:
        # A spawned process gets this one's path.
        sys.path.insert(0, str(install(Path(folder), "kara-drafts-left-alone", MODULE)))
        try:
            yield
        finally:
            del sys.path[0]


def accepted(options: argparse.Namespace, rows: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """By row, what each answer says: tokens per step, and windows."""
    import sglang

    import kara_sglang

    kara_sglang.configure("kara", window=options.window, delay=32, policy="periodic")
    engine = sglang.Engine(
        model_path=str(options.model),
        speculative_algorithm="STANDALONE",
        speculative_draft_model_path=str(options.draft or options.model),
        speculative_num_steps=STEPS,
        speculative_eagle_topk=1,
        speculative_num_draft_tokens=STEPS + 1,
        max_total_tokens=len(TOPICS) * (options.tokens + 200),
        **engine_arguments(),
    )
    try:
        return {name: _answers(engine, options, row) for name, row in rows.items()}
    finally:
        engine.shutdown()


def _answers(engine: Any, options: argparse.Namespace, row: Any) -> list[dict[str, Any]]:
    tokenizer = engine.tokenizer_manager.tokenizer
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": f"Write a long text about {topic}."}],
            tokenize=False,
            add_generation_prompt=True,
        )
        for topic in TOPICS
    ]
    params = {
        "max_new_tokens": options.tokens,
        "temperature": 0,
        "ignore_eos": True,
        "custom_params": {"kv_compress": row},
    }
    answers = engine.generate(prompts, params)
    return [
        {
            "accepted": answer["meta_info"]["spec_accept_length"],
            "windows": answer["meta_info"]["kv_compress"]["windows"],
        }
        for answer in answers
    ]


def main(argv: list[str] | None = None) -> int:
    parser = command_line.parser(__spec__, __doc__)
    model = command_line.model_folder
    parser.add_argument("--model", type=model, help="default: the embedded model, SmolLM2-135M")
    parser.add_argument("--draft", type=model, help="draft model; default: the model itself")
    whole = command_line.whole()
    parser.add_argument("--tokens", type=whole, default=500, help="an answer; default: %(default)s")
    parser.add_argument("--window", type=whole, default=128, help="default: %(default)s")
    parser.add_argument("--rows", nargs="*", choices=ROWS, default=list(ROWS), help="default: all")
    parser.add_argument(
        "--alone",
        nargs="*",
        choices=[name for name in ROWS if name != BASE],
        default=["kara, a half", "kara, a quarter"],
        help="rows once more, with the draft left alone; default: those of kara",
    )
    parser.add_argument("--out", type=Path, help="JSON file")
    options = parser.parse_args(argv)
    if cpu_engine.is_installed():
        os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
    options.model = options.model or embedded_model.embedded_model_path()
    found = accepted(options, {name: ROWS[name] for name in ROWS if name in (BASE, *options.rows)})
    alone = {ALONE.format(name): ROWS[name] for name in options.alone}
    if alone:
        with left_alone():
            found |= accepted(options, alone)
    base = [answer["accepted"] for answer in found[BASE]]
    lines = []
    for name, answers in found.items():
        steps = [answer["accepted"] for answer in answers]
        changes = [100 * (one / other - 1) for one, other in zip(steps, base, strict=True)]
        error = statistics.stdev(changes) / len(changes) ** 0.5
        windows = sum(answer["windows"] for answer in answers)
        change = f"{statistics.mean(changes):+.1f} ± {error:.1f}" if windows else "-"
        lines.append([name, f"{statistics.mean(steps):.2f}", change, str(windows)])
    print(grid(["row", "tokens per step", "change, %", "windows"], lines), end="")
    if options.out:
        about = origin(MODULE, argv or sys.argv[1:])
        write_json(options.out, about | {"rows": found}, indent=1)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
