"""What the clients do: one run of SGLang's own load generator, ``sglang.benchmark.serving``."""

from __future__ import annotations

import contextlib
import csv
import json
import multiprocessing
import sys
import warnings
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from kara_sglang.benchmarks.serving import hang_ups


@dataclass(frozen=True, slots=True)
class Load:
    """The requests of one run.

    Attributes
    ----------
    requests
        How many.
    prompt, output
        Tokens per request; ``output`` is an upper bound where ``ignore_eos`` is off.
    concurrency
        Requests in flight at once; None: all of them.
    ignore_eos
        Every answer has exactly ``output`` tokens (equal work); off: answers end where the model
        ends them, at temperature 1.
    kind
        ``random`` token ids, prompts with a ``shared-prefix``, ``arrivals`` of a trace, or clients that
        ``hang-up`` before their answer ends.
    groups
        Of prompts that share a prefix of 3/4 of the prompt.
    trace
        CSV with the columns TIMESTAMP and ContextTokens, for ``arrivals``.
    slowdown
        Factor on the trace's times.
    shortest, longest
        Tokens after which the first and the last client leaves, for ``hang-up``.
    """

    requests: int
    prompt: int
    output: int
    concurrency: int | None = None
    ignore_eos: bool = True
    kind: Literal["random", "shared-prefix", "arrivals", "hang-up"] = "random"
    groups: int = 4
    trace: Path | None = None
    slowdown: float = 1.0
    shortest: int = 0
    longest: int = 0

    def arguments(self, folder: Path) -> list[str]:
        """Arguments of ``sglang.benchmark.serving``; a trace is written into ``folder``."""
        words = ["--num-prompts", str(self.requests), "--temperature", "0" if self.ignore_eos else "1"]
        if not self.ignore_eos:
            words.append("--disable-ignore-eos")
        if self.concurrency is not None:
            words += ["--max-concurrency", str(self.concurrency)]
        if self.kind == "random":
            return [
                *words,
                *("--dataset-name", "random-ids", "--random-range-ratio", "1"),
                *("--random-input-len", str(self.prompt), "--random-output-len", str(self.output)),
            ]
        if self.kind == "shared-prefix":
            shared = self.prompt * 3 // 4
            return [
                *words,
                *("--dataset-name", "generated-shared-prefix", "--gsp-num-groups", str(self.groups)),
                *("--gsp-prompts-per-group", str(self.requests // self.groups)),
                *("--gsp-system-prompt-len", str(shared)),
                *("--gsp-question-len", str(self.prompt - shared)),
                *("--gsp-output-len", str(self.output)),
            ]
        trace = folder / "trace.jsonl"
        assert self.trace is not None
        write_trace(self.trace, trace, self.requests, self.prompt, self.output)
        return [
            *words,
            *("--dataset-name", "mooncake", "--dataset-path", str(trace)),
            *("--mooncake-slowdown-factor", str(self.slowdown)),
        ]


_WORDS_PER_BLOCK = 129
"""Words that the load generator writes for one id of a trace in Mooncake's format."""


def write_trace(source: Path, target: Path, requests: int, longest: int, output: int) -> None:
    """Turn arrival times and prompt lengths of Azure's trace into SGLang's trace format.

    Prompts are cut at ``longest`` tokens and share nothing; answers have ``output`` tokens, because
    those of the trace (211 on average) are shorter than the ones that compression is for.
    """
    with source.open(newline="") as file, target.open("w") as out:
        start, block = None, 0
        for row in list(csv.DictReader(file))[:requests]:
            # Seven digits of a second's fraction: one more than Python reads.
            time = datetime.fromisoformat(row["TIMESTAMP"][:26])
            start = start or time
            blocks = max(1, min(int(row["ContextTokens"]), longest) // _WORDS_PER_BLOCK)
            record = {
                "timestamp": (time - start).total_seconds() * 1000,
                "hash_ids": list(range(block, block + blocks)),
                "output_length": output,
            }
            block += blocks
            print(json.dumps(record), file=out)


def drive(
    load: Load, *, backend: str, url: str, model: str, tokenizer: str, seed: int, folder: Path
) -> dict[str, Any]:
    """Run the load against a server; returns the load generator's result, or one that is named alike.

    Raises
    ------
    RuntimeError
        Where the load generator failed or a request did not succeed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if load.kind == "hang-up":
        return hang_ups.drive(
            url,
            prompt=load.prompt,
            most=load.output,
            leave_after=hang_ups.lengths(load.requests, load.shortest, load.longest),
            end_of_text=end_of_text(model),
            seed=seed,
        )
    result, log = folder / "result.jsonl", folder / "client.log"
    result.unlink(missing_ok=True)
    arguments = [
        *("--backend", backend, "--base-url", url, "--model", model, "--tokenizer", tokenizer),
        *("--seed", str(seed), "--warmup-requests", "0", "--disable-tqdm"),
        *("--output-file", str(result), "--output-details"),
        *load.arguments(folder),
    ]
    if backend == "sglang":
        arguments.append("--cache-report")
    # Forked, because importing the load generator takes longer than many a run.
    with warnings.catch_warnings(action="ignore"):
        import sglang.benchmark.serving  # noqa: F401

    client = multiprocessing.get_context("fork").Process(target=_client, args=(arguments, log))
    client.start()
    client.join()
    if client.exitcode or not result.exists():
        raise RuntimeError(f"sglang.benchmark.serving ended with {client.exitcode}; its log: {log}")
    answer: dict[str, Any] = json.loads(result.read_text().splitlines()[-1])
    if failed := [error for error in answer["errors"] if error]:
        raise RuntimeError(f"{len(failed)} requests failed, the first with: {failed[0][:500]}")
    return answer


def end_of_text(model: str) -> list[int]:
    """Tokens with which a model of this folder or hub name ends its answers."""
    from transformers import AutoConfig, GenerationConfig

    try:
        ids = GenerationConfig.from_pretrained(model).eos_token_id
    except OSError:
        ids = AutoConfig.from_pretrained(model).eos_token_id
    return ids if isinstance(ids, list) else [] if ids is None else [ids]


def _client(arguments: list[str], log: Path) -> None:
    from sglang.benchmark import serving

    sys.argv = ["sglang.benchmark.serving", *arguments]
    with log.open("w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        serving.cli_main()
