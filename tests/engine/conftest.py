"""Shared servers. An engine start costs half a minute, so the tests use few and share them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from server import (
    ODD,
    PAGE_16,
    WINDOW,
    Server,
    free_port,
    launch,
    launch_small,
    run,
    wait_until_ready,
)

from kara_sglang.benchmarks.tiny_model import make_tiny_llama


@pytest.fixture(scope="session")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(scope="session")
def traces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `kara` leaves a file for each request."""
    return tmp_path_factory.mktemp("traces")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("model") / "tiny-llama")


@pytest.fixture(scope="session")
def stock(tiny_model: Path, logs: Path) -> Iterator[Server]:
    """SGLang without compression; the plugin is installed but off."""
    flags = ("--skip-tokenizer-init", *PAGE_16, *ODD)
    with launch(tiny_model, logs / "stock.log", *flags) as server:
        yield server


@pytest.fixture(scope="session")
def kara(tiny_model: Path, logs: Path, traces: Path) -> Iterator[Server]:
    """Page size 16, float32, overlap scheduling on, traces; selectors are chosen per request."""
    flags = ("--skip-tokenizer-init", *PAGE_16, "--kv-compress", "kara", *WINDOW)
    flags += ("--kv-compress-trace", str(traces))
    with launch(tiny_model, logs / "kara.log", *flags) as server:
        yield server


@pytest.fixture(scope="session")
def compressed(tiny_model: Path, logs: Path) -> Iterator[Server]:
    """Compressed prefixes, page size 16."""
    with launch_small(tiny_model, logs, 16, "compressed") as server:
        server.page = 16
        yield server


@pytest.fixture(scope="session")
def smollm2(logs: Path) -> Iterator[Server]:
    """The embedded model behind `python -m kara_sglang.serve`, as `make serve` runs it."""
    port = free_port()
    log = logs / "smollm2.log"
    flags = ("--port", str(port), "--", "--enable-metrics", "--sleep-on-idle")
    flags += ("--kv-compress-trace", str(logs / "smollm2-traces"))
    with run(("-m", "kara_sglang.serve", *flags), log) as process:
        wait_until_ready(process, port, log, timeout=240)
        for _ in range(60):  # the line to try comes a moment later
            if "curl " in log.read_text():
                break
            time.sleep(0.5)
        yield Server(process, port, log)
