"""Real SGLang servers for the tests: started by the real launcher, spoken to over HTTP."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import requests

from kara_sglang.benchmarks.processes import end_group
from kara_sglang.benchmarks.tiny_model import VOCAB

CPU_FLAGS = (
    *("--device", "cpu", "--attention-backend", "torch_native", "--sampling-backend", "pytorch"),
    *("--grammar-backend", "none", "--sleep-on-idle"),
)
PAGE_16 = ("--page-size", "16", "--max-total-tokens", "8192", "--dtype", "float32")
WINDOW = (
    *("--kv-compress-window", "64", "--kv-compress-query-mem-gb", "0.05"),
    *("--kv-compress-config", '{"delay": 16, "policy": "periodic", "debug_checks": true}'),
)
# Behind WINDOW: no window waits, so that it can be foretold when each one is compressed.
PUNCTUAL = (
    "--kv-compress-config",
    '{"delay": 16, "policy": "punctual", "query_heads": "all", "debug_checks": true}',
)
# What odd requests may ask for (torture.py).
ODD = ("--enable-return-hidden-states", "--enable-custom-logit-processor")

STRICT = {
    # SGLang finds leaks, double frees and use after free by itself, at every step.
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1",
    "SGLANG_CHECK_KV_PAGE_INVARIANTS": "1",
}


def environment(extra: dict[str, str] | None = None) -> dict[str, str]:
    """The environment of a server: one thread, because two cores share many processes here."""
    base = {name: value for name, value in os.environ.items() if not name.startswith("SGLANG_")}
    own = (
        base
        | {"SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
        | STRICT
        | (extra or {})
    )
    # Behind a test's own, which may have a file of the same name.
    path = (own.get("PYTHONPATH"), str(Path(__file__).parent / "startup"))
    return own | {"PYTHONPATH": os.pathsep.join(filter(None, path))}


def free_port() -> int:
    """A port that nobody takes before a server does, tens of seconds later.

    It lies below those that systems give out by themselves, in the range of this worker, and is given
    once.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    while True:
        port = 10_000 + 1_000 * (worker % 20) + random.SystemRandom().randrange(1_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            if port not in _given:
                _given.add(port)
                return port


_given: set[int] = set()
"""Ports that this process has given out."""


class Server:
    """A running server."""

    speculates = False

    def __init__(self, process: subprocess.Popen, port: int, log: Path) -> None:
        self.process = process
        self.url = f"http://127.0.0.1:{port}"
        self.log = log

    def post(self, path: str, body: dict[str, Any], **kwargs: Any) -> requests.Response:
        return requests.post(self.url + path, json=body, timeout=300, **kwargs)

    def generate(
        self, input_ids: list, *, kv_compress: Any = None, tokens: int = 300, **extra: Any
    ) -> Any:
        """Greedy generation of exactly ``tokens`` tokens; a list of lists makes one batch.

        ``kv_compress`` is one option for all, or a list with one per request.
        """
        many = isinstance(input_ids[0], list)
        options = kv_compress if isinstance(kv_compress, list) else [kv_compress] * len(input_ids)
        sampling = extra.pop("sampling_params", {})

        def params(option: Any) -> dict[str, Any]:
            base = {"max_new_tokens": tokens, "temperature": 0, "ignore_eos": True} | sampling
            return base if option is None else base | {"custom_params": {"kv_compress": option}}

        body = {
            "input_ids": input_ids,
            "sampling_params": [params(o) for o in options] if many else params(kv_compress),
            "return_logprob": True,
        }
        response = self.post("/generate", body | extra)
        response.raise_for_status()
        return response.json()

    def state(self) -> dict[str, Any]:
        """The plugin's part of /server_info."""
        info = requests.get(self.url + "/server_info", timeout=60).json()
        return info["internal_states"][0]["kv_compress"]

    def flush(self) -> None:
        """Empty the prefix cache; the server must be idle."""
        for _ in range(50):
            if requests.post(self.url + "/flush_cache", timeout=60).status_code == 200:
                return
            time.sleep(0.2)
        raise AssertionError("the server does not become idle")

    def assert_nothing_leaked(self) -> None:
        """Every slot of the pool and every recorder comes back."""
        # Looked at before the flush, which hands out a fresh pool and would hide what is missing.
        for _ in range(50):
            state = self.state()
            lost = state["pool_tokens"] - state["pool_tokens_free"] - state["pool_tokens_evictable"]
            if not lost:
                break
            time.sleep(0.2)
        assert not lost, f"{lost} slots are neither free nor in the prefix cache of an idle server"
        self.flush()
        state = self.state()
        assert state["pool_tokens_free"] == state["pool_tokens"]
        assert state["recorders_in_use"] == 0
        assert self.process.poll() is None

    def log_text(self) -> str:
        return self.log.read_text(errors="replace")


@contextlib.contextmanager
def launch(
    model: Path, log: Path, *flags: str, env: dict[str, str] | None = None, timeout: float = 240
) -> Iterator[Server]:
    """Start ``python -m sglang.launch_server`` and wait until it is ready; stop it afterwards.

    SGLang finds free ports seconds before it takes them, so of two servers that start at once one may
    find its own taken; it is started anew.
    """
    command = ("-m", "sglang.launch_server", "--model-path", str(model), *CPU_FLAGS)
    for others in (2, 1, 0):
        port = free_port()
        with run((*command, "--port", str(port), *flags), log, env) as process:
            try:
                wait_until_ready(process, port, log, timeout)
            except AssertionError:
                if others and "EADDRINUSE" in log.read_text():
                    continue
                raise
            yield Server(process, port, log)
            assert process.poll() is None, f"the server died:\n{log.read_text()[-4000:]}"
            return


@contextlib.contextmanager
def run(
    arguments: tuple[str, ...], log: Path, env: dict[str, str] | None = None
) -> Iterator[subprocess.Popen]:
    """Run ``python *arguments`` in a process group of its own, which is stopped at the end."""
    with log.open("w") as out:
        process = subprocess.Popen(
            (sys.executable, *arguments),
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environment(env),
            start_new_session=True,
        )
    try:
        yield process
    finally:
        end_group(process)


def wait_until_ready(process: subprocess.Popen, port: int, log: Path, timeout: float) -> None:
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        if process.poll() is not None:
            raise AssertionError(f"the server did not start:\n{log.read_text()[-6000:]}")
        with contextlib.suppress(requests.RequestException):
            if requests.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == 200:
                return
        time.sleep(0.5)
    raise AssertionError(f"no answer after {timeout} s:\n{log.read_text()[-6000:]}")


def in_parallel(calls: list) -> list:
    """Run the calls at once, each in a thread of its own; results in order."""
    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]


def launch_small(
    tiny_model: Path,
    logs: Path,
    page_size: int,
    reuse: str,
    *more: str,
    env: dict[str, str] | None = None,
) -> AbstractContextManager[Server]:
    """Small windows on a small pool, overlap scheduling on; requests may be odd."""
    flags = (
        *("--skip-tokenizer-init", "--dtype", "float32", "--page-size", str(page_size)),
        *("--max-total-tokens", "1536", "--chunked-prefill-size", "128"),
        *("--kv-compress", "kara", "--kv-compress-window", "32", "--kv-compress-query-mem-gb", "0.05"),
        *("--kv-compress-prefix-reuse", reuse),
        *("--kv-compress-config", '{"delay": 8, "policy": "periodic", "debug_checks": true}'),
        *(*ODD, "--enable-priority-scheduling", *more),
    )
    # Requests are admitted as if they wrote 16 tokens, so that some must be retracted.
    clipped = {"SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION": "16"}
    return launch(tiny_model, logs / f"{reuse}_{page_size}.log", *flags, env=clipped | (env or {}))


def prompt(length: int, seed: int) -> list[int]:
    """Random token ids without the special ones."""
    rng = random.Random(seed)
    return [rng.randrange(3, VOCAB) for _ in range(length)]
