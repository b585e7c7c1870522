"""SGLang, with and without the plugin."""

from __future__ import annotations

import os
import sys

from kara_sglang.benchmarks.serving.counters import Counters
from kara_sglang.benchmarks.serving.rows import Row
from kara_sglang.benchmarks.serving.server import Server
from kara_sglang.benchmarks.serving.setup import Setup
from kara_sglang.serve import CPU_ENVIRONMENT, CPU_OPTIONS


class SGLang:
    name = "sglang"
    install = "pip install sglang==0.5.23 && pip install kara-sglang   # no GPU: make venv"
    backend = "sglang"

    def missing(self, setup: Setup) -> str | None:
        return None

    def command(self, row: Row, setup: Setup, port: int) -> list[str]:
        options = {
            "--model-path": setup.model,
            "--port": str(port),
            "--dtype": setup.dtype,
            # Every step is counted.
            "--decode-log-interval": "1",
        }
        if setup.cpu:
            options = CPU_OPTIONS | options
        options["--page-size"] = str(setup.page_size)
        if setup.pool is not None:
            options["--max-total-tokens"] = str(setup.pool)
        words = [word for pair in options.items() for word in pair]
        if setup.cpu:
            words.append("--sleep-on-idle")
        return [
            *(sys.executable, "-m", "sglang.launch_server", *words, *row.flags, *setup.server_args),
            *row.compress_flags(setup.window, setup.delay, setup.query_mem_gb),
        ]

    def environment(self, row: Row, setup: Setup) -> dict[str, str]:
        environment = {}
        if setup.cpu:
            # The steps consist of operations so small that sharing them takes longer than doing them:
            # a second thread makes the tiny model's steps up to twice as long.
            environment = CPU_ENVIRONMENT | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        if setup.expects is not None:
            environment["SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION"] = str(setup.expects)
        if not row.plugin:
            # A whitelist that names no plugin: SGLang as if ours were not installed.
            environment |= {"SGLANG_PLUGINS": "none"}
        return environment

    def mark(self, server: Server) -> int:
        return server.log_position()

    def counters(self, server: Server, mark: int) -> Counters:
        return Counters.of(server.log_since(mark))
