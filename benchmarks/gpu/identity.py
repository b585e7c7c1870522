"""Compares a stock server with one on which every pass runs and keeps every token.

Starts both, one after the other, for each attention backend, and sends them the same greedy requests::

    python -m kara_sglang.benchmarks.gpu.identity --model Qwen/Qwen3-8B --output identity.json

Sent one by one, both servers compute the same shapes, so the tokens must be equal. Sent all at once
they are batched as they come, which may change last bits; the stock server gets them twice, to show how
much that is. SGLang's own checks for leaks and double frees are on. Works without a GPU, too. With
``--pool`` the servers of all backends are up at the same time, each with so many KV slots.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import requests

from kara_sglang import cpu_engine
from kara_sglang.benchmarks.gpu.report import write
from kara_sglang.benchmarks.machine import command, machine
from kara_sglang.benchmarks.serving.__main__ import GPU_SCALE, resolve_model
from kara_sglang.benchmarks.serving.peers import Setup
from kara_sglang.benchmarks.serving.peers.sglang import SGLang
from kara_sglang.benchmarks.serving.rows import STOCK, Row, rows
from kara_sglang.benchmarks.serving.scenarios import Scale
from kara_sglang.benchmarks.serving.server import Server, end_on_sigterm
from kara_sglang.embedded_model import EmbeddedModelMissing

MODULE = "kara_sglang.benchmarks.gpu.identity"
WINDOWS = 3
"""Windows that each answer has."""
PROMPTS = (
    "What is the capital of France, and what is it known for?",
    "Count from one to three hundred in words.",
    "Explain step by step why the sum of two odd numbers is even.",
    "Write a Python function that sorts a list of dates, with tests for it.",
    "Tell a long story about a lighthouse keeper who finds a letter in a bottle.",
    "How do tides work? Begin with the Moon and end with a table of the four phases.",
    "A train leaves at 9:40 and drives 310 km at 124 km/h with two stops of 6 minutes. When is it in?",
    "Translate into German, French and Spanish, then comment on the grammar: I would have liked to go.",
)


class Checked(SGLang):
    """SGLang with its checks of the KV pool."""

    def environment(self, row: Row, setup: Setup) -> dict[str, str]:
        return super().environment(row, setup) | {
            "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1",
            "SGLANG_CHECK_KV_PAGE_INVARIANTS": "1",
        }


@dataclasses.dataclass(frozen=True, slots=True)
class Answers:
    """What a server said to each of ``PROMPTS``.

    Attributes
    ----------
    tokens, logprobs
        Of the output, one list per prompt.
    windows
        Compressed windows per prompt; 0 on a stock server.
    """

    tokens: list[list[int]]
    logprobs: list[list[float]]
    windows: list[int]

    @classmethod
    def of(cls, responses: Sequence[dict[str, Any]]) -> Answers:
        """From the responses of ``/generate``."""
        said = [response["meta_info"] for response in responses]
        scored = [info["output_token_logprobs"] for info in said]
        return cls(
            tokens=[[token for _, token, *_ in answer] for answer in scored],
            logprobs=[[logprob for logprob, *_ in answer] for answer in scored],
            windows=[info.get("kv_compress", {}).get("windows", 0) for info in said],
        )


def compare(ours: Answers, theirs: Answers) -> dict[str, Any]:
    """How many answers have the same tokens, where the others part, and how far the logprobs of equal
    tokens before that are apart at most."""
    parts = []
    apart = 0.0
    for index, tokens in enumerate(ours.tokens):
        pairs = list(zip(tokens, theirs.tokens[index], strict=True))
        end = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
        if end < len(pairs):
            parts.append({"prompt": index, "token": end})
        both = zip(ours.logprobs[index][:end], theirs.logprobs[index][:end], strict=True)
        apart = max([apart, *(abs(a - b) for a, b in both)])
    return {
        "answers": len(ours.tokens),
        "equal": len(ours.tokens) - len(parts),
        "part_at": parts,
        "logprob_difference": apart,
    }


def ask(server: Server, output: int, *, together: bool) -> Answers:
    """Greedy answers of ``output`` tokens to ``PROMPTS``, in one batch or one after the other."""
    params = {"temperature": 0, "max_new_tokens": output, "ignore_eos": True}
    body = {"sampling_params": params, "return_logprob": True}
    if together:
        return Answers.of(server.post("/generate", body | {"text": list(PROMPTS)}).json())
    return Answers.of([server.post("/generate", body | {"text": p}).json() for p in PROMPTS])


def check(setup: Setup, backend: str, logs: Path) -> dict[str, Any]:
    """Compare both servers with one attention backend.

    Raises
    ------
    RuntimeError
        Where a server does not come up, or the pass did not run as often as it must.
    requests.RequestException
        Where a server ends while it answers, as its checks make it.
    """
    flags = ("--attention-backend", backend)
    setup = dataclasses.replace(setup, server_args=(*setup.server_args, *flags))
    # Windows start at a page, the last token has no KV, and passes of a batch are spread over 32 steps.
    output = WINDOWS * setup.window + setup.delay + setup.page_size + 34
    known = rows(setup.window)

    def answers(name: str, times: int) -> list[Answers]:
        server = Server(Checked(), known[name], setup, logs / f"{backend}-{name}.log").wait()
        try:
            one_by_one = ask(server, output, together=False)
            return [one_by_one, *(ask(server, output, together=True) for _ in range(times))]
        finally:
            server.stop()

    with ThreadPoolExecutor(1 if setup.pool is None else 2) as pool:
        both = pool.map(answers, (STOCK, "identity"), (2, 1))
        (stock, batch, again), (identity, batch_identity) = both
    for found, expected in ((stock, 0), (identity, WINDOWS), (batch_identity, WINDOWS)):
        if found.windows != [expected] * len(PROMPTS):
            raise RuntimeError(f"{found.windows} windows were compressed, {expected} each were due")
    return {
        "output_tokens": output,
        "one_by_one": compare(identity, stock),
        "all_at_once": compare(batch_identity, batch),
        "stock_twice_all_at_once": compare(again, batch),
    }


def main() -> int:
    """0 where all backends gave equal tokens one by one, else 1."""
    cpu = cpu_engine.is_installed()
    scale = Scale() if cpu else GPU_SCALE
    backends = ["torch_native"] if cpu else ["flashinfer", "triton", "fa3"]
    usual = " ".join(backends)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny", help="tiny, smollm2, a folder or a hub name")
    parser.add_argument("--dtype", help="default: float32 for tiny, else bfloat16")
    parser.add_argument("--backends", nargs="+", default=backends, help=f"default: {usual}")
    parser.add_argument("--window", type=int, default=scale.window)
    parser.add_argument(
        "--pool", type=int, help="KV slots of a server; all servers are up at once then"
    )
    parser.add_argument("--server-args", default="", help="more flags for both servers, as one word")
    parser.add_argument("--output", type=Path, help="write the results there as JSON")
    options = parser.parse_args()
    end_on_sigterm()
    report: dict[str, Any] = {
        "command": command(MODULE, sys.argv[1:]),
        "machine": machine(),
        "model": Path(options.model).name,
        "backends": {},
    }
    good = True
    folder = Path(tempfile.mkdtemp(prefix="kara-identity-"))  # logs stay
    try:
        model = resolve_model(options.model, folder)
    except EmbeddedModelMissing as error:
        parser.error(f"--model smollm2: {error}")
    setup = Setup(
        model=model,
        dtype=options.dtype or ("float32" if options.model == "tiny" else "bfloat16"),
        window=options.window,
        delay=scale.delay,
        query_mem_gb=0,
        page_size=scale.page_size,
        pool=options.pool,
        server_args=tuple(shlex.split(options.server_args)),
        pythons={},
        cpu=cpu,
    )

    def found_with(backend: str) -> dict[str, Any]:
        try:
            return check(setup, backend, folder)
        except (RuntimeError, requests.RequestException) as error:  # the other backends may do
            print(f"{backend}: {error}\nlogs of its servers: {folder}")
            return {"failed": str(error)}

    workers = ThreadPoolExecutor(1 if options.pool is None else len(options.backends))
    for backend, found in zip(options.backends, workers.map(found_with, options.backends), strict=True):
        report["backends"][backend] = found
        good &= "failed" not in found and not found["one_by_one"]["part_at"]
        for name, result in found.items():
            if isinstance(result, dict):
                print(f"{backend}, {name}: {result['equal']} of {result['answers']} answers equal")
        write(report, options.output)
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
