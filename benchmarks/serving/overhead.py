"""What the plugin's Python adds to a decode step that has no pass: a profile of the scheduler.

``python -m kara_sglang.benchmarks.serving.overhead`` starts a server on the tiny model whose window is
longer than its answers, so that every request records its queries and no window ever falls due, and
samples the scheduler with py-spy while it decodes.
"""

from __future__ import annotations

import concurrent.futures
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil

import kara_sglang
from kara_sglang.benchmarks import command_line
from kara_sglang.benchmarks.machine import machine
from kara_sglang.benchmarks.output import write_json
from kara_sglang.benchmarks.serving.peers import PEERS, start
from kara_sglang.benchmarks.serving.rows import Row
from kara_sglang.benchmarks.serving.server import Server, end_on_sigterm
from kara_sglang.benchmarks.serving.setup import Setup
from kara_sglang.benchmarks.tiny_model import add_word_tokenizer, make_tiny_llama
from kara_sglang.hooks import SCHEDULER_HOOKS

WINDOW = 4096
_PACKAGE = str(Path(kara_sglang.__file__).parent)
_FRAME = re.compile(r"^(?P<function>.+) \((?P<file>[^:()]*)(:\d+)?\)$")


ARITHMETIC = "arithmetic of recording"


def ours(stack: list[tuple[str, str]], around: set[str]) -> str | None:
    """The function that a sample is charged to, where it is the plugin's; outermost frame first.

    Everything below a hook is ours, also where it calls torch or SGLang. Not ours is what an AROUND
    hook wraps, and what SGLang does between its own wrapper and the wrapped function is. What a kernel
    does is arithmetic: on a GPU it is part of the captured graph.
    """
    for function, file in stack:
        if file.startswith(_PACKAGE) and function not in around:
            inner = any(name.endswith("kernels/record.py") for _, name in stack)
            return ARITHMETIC if inner else function
    if stack and stack[-1][1].endswith("plugins/hook_registry.py"):
        return "hook_registry"
    return None


def share(profile: str, around: set[str]) -> tuple[float, int, Counter[str]]:
    """Share of the decode samples that are ours, their number, and who they belong to.

    Only samples inside SGLang's scheduling loop that are not waiting for work count.
    """
    total = 0
    charged: Counter[str] = Counter()
    for line in profile.splitlines():
        text, _, count = line.rpartition(" ")
        frames = [_FRAME.match(frame) for frame in text.split(";")]
        stack = [(m["function"].rpartition(".")[2], m["file"]) for m in frames if m is not None]
        names = {function for function, _ in stack}
        if not names & {"event_loop_overlap", "event_loop_normal"}:
            continue
        total += int(count)
        if (function := ours(stack, around)) is not None:
            charged[function] += int(count)
    return (sum(charged.values()) / total if total else 0.0), total, charged


def scheduler_of(server: Server) -> int:
    """Process id of the server's scheduler."""
    for process in psutil.Process(server.pid).children(recursive=True):
        if "sglang::scheduler" in " ".join(process.cmdline()):
            return process.pid
    raise RuntimeError("the server has no process named sglang::scheduler")


def main() -> int:
    parser = command_line.parser(__spec__, __doc__)
    parser.add_argument(
        "--requests", type=command_line.whole(), default=4, help="running at once; default: 4"
    )
    parser.add_argument(
        "--seconds", type=command_line.whole(), default=20, help="of sampling; default: 20"
    )
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--profile", type=Path, help="keep py-spy's samples here, for flamegraph tools")
    options = parser.parse_args()
    if shutil.which("py-spy", path=str(Path(sys.executable).parent)) is None:
        parser.error("py-spy is needed: pip install py-spy")

    end_on_sigterm()
    with tempfile.TemporaryDirectory(prefix="kara-overhead-") as name:
        folder = Path(name)
        setup = Setup(
            model=str(add_word_tokenizer(make_tiny_llama(folder / "tiny"))),
            dtype="float32",
            window=WINDOW,
            delay=0,
            query_mem_gb=0.5,
            page_size=16,
            pool=options.requests * 8192,
            # SGLang's default; other benchmarks log every step, and our part of the line is not free.
            server_args=("--decode-log-interval", "40"),
        )
        row = Row("kara", "every request records, no pass", selector="kara", settings={"delay": 0})
        server = start(PEERS["sglang"], row, setup, folder / "server.log").wait()
        try:
            profile, info = _profile(server, options.requests, options.seconds, folder)
        finally:
            server.stop()
    if options.profile:
        options.profile.write_text(profile)
    if info["recorders_in_use"] != options.requests or info["passes"]:
        print(f"not what was to be measured: {info}", file=sys.stderr)
        return 1
    around = {hook.handler.partition(":")[2] for hook in SCHEDULER_HOOKS if hook.kind == "around"}
    part, samples, charged = share(profile, around)
    answer = {
        "machine": machine(),
        "requests": options.requests,
        "python_share_of_decode": part - charged[ARITHMETIC] / samples,
        "share_of_decode": part,
        "samples": samples,
        "by_function": {function: count / samples for function, count in charged.most_common()},
    }
    print(json.dumps(answer, indent=1))
    if options.out:
        write_json(options.out, answer, indent=1)
    return 0


def _profile(server: Server, requests: int, seconds: int, folder: Path) -> tuple[str, dict[str, Any]]:
    """py-spy's raw samples of the scheduler while it decodes, and what the plugin says at the end."""
    sampling = {"max_new_tokens": 7000, "ignore_eos": True, "temperature": 0}
    body = {"input_ids": [[5 + i] * 32 for i in range(requests)], "sampling_params": sampling}
    out = folder / "profile.txt"
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        running = pool.submit(server.post, "/generate", body)
        time.sleep(2)
        subprocess.run(
            [
                *(str(Path(sys.executable).with_name("py-spy")), "record", "--format", "raw"),
                *("--pid", str(scheduler_of(server)), "--duration", str(seconds), "--rate", "250"),
                *("--full-filenames", "--output", str(out)),
            ],
            check=True,
            capture_output=True,
        )
        info = server.get("/server_info").json()["internal_states"][0]["kv_compress"]
        server.post("/abort_request", {"abort_all": True})
        running.result()
    return out.read_text(), info


if __name__ == "__main__":
    raise SystemExit(main())
