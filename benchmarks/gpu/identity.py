"""Compares stock SGLang with a server that compresses, whose requests ask to be left as they are.

For each attention backend both servers get the same greedy requests::

    python -m kara_sglang.benchmarks.gpu.identity --model Qwen/Qwen3-8B --output identity.json

The second server runs ``--kv-compress kara``: it has a query ring, and its decode graphs record. Sent
one by one, requests under ``identity`` (every pass runs and keeps every token) and such that opt out
compute the shapes of stock SGLang's, so their tokens must be equal. Then as many under ``kara`` run
beside them in one batch. There batching may change last bits, so the stock server gets the batch twice,
to show how much that is. SGLang's own checks for leaks and double frees are on. The result says whether
the servers had CUDA graphs and overlap on. Works without a GPU, too. With ``--pool`` the servers of all
backends are up at the same time, each with so many KV slots.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import shlex
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import requests

from kara_sglang import cpu_engine
from kara_sglang.benchmarks import command_line
from kara_sglang.benchmarks.machine import origin
from kara_sglang.benchmarks.output import write_json
from kara_sglang.benchmarks.serving.peers import start
from kara_sglang.benchmarks.serving.peers.sglang import SGLang
from kara_sglang.benchmarks.serving.rows import STOCK, Row, rows
from kara_sglang.benchmarks.serving.scenarios import Scale
from kara_sglang.benchmarks.serving.server import Server, end_on_sigterm
from kara_sglang.benchmarks.serving.setup import GPU_SCALE, Setup, resolve_model
from kara_sglang.embedded_model import EmbeddedModelMissing

MODULE = "kara_sglang.benchmarks.gpu.identity"
WINDOWS = 3
"""Windows that each answer has."""
SERVER = "kara-0.5"
OPTIONS: dict[str, Any] = {
    "identity": {"selector": "identity", "retain": 1.0},
    "opted out": False,
    "kara": {"selector": "kara", "retain": 0.5},
}
"""How requests name what is to be done with them; a stock server is told nothing."""
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
    """What a server said to each of some prompts.

    Attributes
    ----------
    tokens, logprobs
        Of the output, one list per prompt.
    windows, without_queries
        Compressed windows per prompt, and how many of them were chosen without queries though the
        selector asks for them; 0 on a stock server.
    """

    tokens: list[list[int]]
    logprobs: list[list[float]]
    windows: list[int]
    without_queries: list[int]

    @classmethod
    def of(cls, responses: Sequence[dict[str, Any]]) -> Answers:
        """From the responses of ``/generate``."""
        said = [response["meta_info"] for response in responses]
        scored = [info["output_token_logprobs"] for info in said]
        return cls(
            tokens=[[token for _, token, *_ in answer] for answer in scored],
            logprobs=[[logprob for logprob, *_ in answer] for answer in scored],
            windows=[info.get("kv_compress", {}).get("windows", 0) for info in said],
            without_queries=[info.get("kv_compress", {}).get("without_queries", 0) for info in said],
        )

    def part(self, chosen: slice) -> Answers:
        """Those of some prompts."""
        return Answers(
            self.tokens[chosen],
            self.logprobs[chosen],
            self.windows[chosen],
            self.without_queries[chosen],
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


ONE_BY_ONE = len(PROMPTS)
MIXED = [*["kara"] * ONE_BY_ONE, *["identity", "opted out"] * (ONE_BY_ONE // 2)]
"""What the requests of the batch ask for: all prompts under ``kara``, and all once more beside them."""
BESIDE = slice(ONE_BY_ONE, None)


def ask(server: Server, output: int, kinds: Sequence[str | None], *, together: bool) -> Answers:
    """Greedy answers of ``output`` tokens to ``PROMPTS``, again and again for as many ``kinds`` as
    there are, in one batch or one after the other; the prefix cache is empty when they begin."""
    server.post("/flush_cache", {})
    texts, every = [], []
    for index, kind in enumerate(kinds):
        params: dict[str, Any] = {"temperature": 0, "max_new_tokens": output, "ignore_eos": True}
        if kind is not None:
            params["custom_params"] = {"kv_compress": OPTIONS[kind]}
        texts.append(PROMPTS[index % len(PROMPTS)])
        every.append(params)
    if together:
        body = {"text": texts, "sampling_params": every, "return_logprob": True}
        return Answers.of(server.post("/generate", body).json())
    bodies = (
        {"text": text, "sampling_params": params, "return_logprob": True}
        for text, params in zip(texts, every, strict=True)
    )
    return Answers.of([server.post("/generate", body).json() for body in bodies])


def facts(server: Server, peer: SGLang) -> dict[str, Any]:
    """Whether CUDA graphs and overlap are off, as the server says, and the share of its decode steps so
    far that ran without a graph, as its log says."""
    info = server.get("/server_info").json()
    return {
        **{flag: info[flag] for flag in ("disable_cuda_graph", "disable_overlap_schedule")},
        "steps_without_graph": peer.counters(server, 0).without_graph,
    }


def check(setup: Setup, backend: str, logs: Path) -> dict[str, Any]:
    """Compare both servers with one attention backend.

    Raises
    ------
    RuntimeError
        Where a server does not come up, or passes did not run as often as they must or had no queries.
    requests.RequestException
        Where a server ends while it answers, as its checks make it.
    """
    flags = ("--attention-backend", backend)
    setup = dataclasses.replace(setup, server_args=(*setup.server_args, *flags))
    # Windows start at a page, the last token has no KV, and passes of a batch are spread over 32 steps.
    output = WINDOWS * setup.window + setup.delay + setup.page_size + 34
    known = rows(setup.window)
    peer = Checked()

    def answers(
        name: str, rounds: Sequence[tuple[Sequence[str | None], bool]]
    ) -> tuple[list[Answers], dict[str, Any]]:
        server = start(peer, known[name], setup, logs / f"{backend}-{name}.log").wait()
        try:
            said = [ask(server, output, kinds, together=together) for kinds, together in rounds]
            return said, facts(server, peer)
        finally:
            server.stop()

    nothing = [None] * ONE_BY_ONE
    of_stock = [(nothing, False), (nothing * 2, True), (nothing * 2, True)]
    of_ours = [(["identity"] * ONE_BY_ONE, False), (["opted out"] * ONE_BY_ONE, False), (MIXED, True)]
    with ThreadPoolExecutor(1 if setup.pool is None else 2) as pool:
        both = pool.map(answers, (STOCK, SERVER), (of_stock, of_ours))
        ((stock, batch, again), stock_facts), ((identity, off, mixed), our_facts) = both
    windows = {"identity": WINDOWS, "kara": WINDOWS, "opted out": 0}
    due = [windows[kind] for kinds, _ in of_ours for kind in kinds]
    found = [count for said in (identity, off, mixed) for count in said.windows]
    if found != due or any(stock.windows):
        raise RuntimeError(f"{found} windows were compressed, {due} were due")
    if any(mixed.without_queries):
        raise RuntimeError(
            f"{sum(mixed.without_queries)} windows had no queries; give more --query-mem-gb"
        )
    return {
        "output_tokens": output,
        "one_by_one": compare(identity, stock),
        "opted_out_one_by_one": compare(off, stock),
        "beside_kara": compare(mixed.part(BESIDE), batch.part(BESIDE)),
        "stock_twice_all_at_once": compare(again.part(BESIDE), batch.part(BESIDE)),
        "servers": {STOCK: stock_facts, SERVER: our_facts},
    }


def backends_here() -> list[str]:
    """Attention backends of a CUDA server for which everything is installed."""
    needs = {"triton": "triton", "fa3": "sgl_kernel.flash_ops", "flashinfer": "flashinfer"}
    return [name for name, module in needs.items() if _is_installed(module)]


def _is_installed(module: str) -> bool:
    package, _, inner = module.partition(".")
    spec = importlib.util.find_spec(package)
    if spec is None or not inner:
        return spec is not None
    return any(list(Path(folder).glob(f"{inner}*")) for folder in spec.submodule_search_locations or ())


def main() -> int:
    """0 where all backends gave stock SGLang's tokens one by one, else 1."""
    cpu = cpu_engine.is_installed()
    scale = Scale() if cpu else GPU_SCALE
    backends = ["torch_native"] if cpu else backends_here()
    parser = command_line.parser(__spec__, __doc__)
    parser.add_argument(
        "--model", type=command_line.model, default="tiny", help="tiny, smollm2, a folder or a hub name"
    )
    parser.add_argument(
        "--dtype", choices=command_line.DTYPES, help="default: float32 for tiny, else bfloat16"
    )
    parser.add_argument(
        "--backends", nargs="+", default=backends, help=f"default, those here: {' '.join(backends)}"
    )
    parser.add_argument(
        "--window", type=command_line.whole(), default=scale.window, help="tokens; default: %(default)s"
    )
    parser.add_argument(
        "--pool", type=int, help="KV slots of a server; all servers are up at once then"
    )
    parser.add_argument(
        "--query-mem-gb", type=float, default=0.25 if cpu else 2.0, help="default: %(default)s"
    )
    parser.add_argument("--server-args", default="", help="more flags for both servers, as one word")
    parser.add_argument("--output", type=Path, help="write the results there as JSON")
    options = parser.parse_args()
    end_on_sigterm()
    report: dict[str, Any] = {
        **origin(MODULE, sys.argv[1:]),
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
        query_mem_gb=options.query_mem_gb,
        page_size=scale.page_size,
        pool=options.pool,
        server_args=tuple(shlex.split(options.server_args)),
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
        exact = ("one_by_one", "opted_out_one_by_one")
        good &= "failed" not in found and not any(found[name]["part_at"] for name in exact)
        for name, result in found.items():
            if isinstance(result, dict) and "equal" in result:
                print(f"{backend}, {name}: {result['equal']} of {result['answers']} answers equal")
        write_json(options.output, report, indent=2)
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
