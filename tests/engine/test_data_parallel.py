"""Data parallelism: schedulers behind a controller process, which passes on that all run the plugin."""

from __future__ import annotations

from pathlib import Path

import pytest
import requests
from server import PAGE_16, WINDOW, launch, prompt

FLAGS = ("--skip-tokenizer-init", *PAGE_16, "--dp-size", "2", "--kv-compress", "recent")
# A core for each replica; SGLang wants to be told.
ENV = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}


def test_replicas_behind_a_controller_compress(tiny_model: Path, logs: Path) -> None:
    """The server starts, so the word came through, and both answers are compressed."""
    with launch(tiny_model, logs / "dp.log", *FLAGS, *WINDOW, env=ENV, timeout=400) as server:
        answers = server.generate([prompt(40, 1), prompt(40, 2)], tokens=200)
        assert [answer["meta_info"]["kv_compress"]["windows"] for answer in answers] == [2, 2]
        info = requests.get(f"{server.url}/server_info", timeout=60).json()
        assert [state["kv_compress"]["windows"] for state in info["internal_states"]] == [2, 2]
        # Where the word travels in the start-up times, users do not see it.
        assert "kv_compress" not in info["startup_time"]


@pytest.mark.slow
def test_replicas_that_refuse_stop_the_server(tiny_model: Path, logs: Path) -> None:
    """What a scheduler said is the last thing that the launcher says."""
    log = logs / "dp_refused.log"
    flags = (*FLAGS, "--kv-compress-window", "16384")
    refused = pytest.raises(AssertionError, match="did not start")
    with refused, launch(tiny_model, log, *flags, env=ENV, timeout=400):
        pass
    last = [line for line in log.read_text().splitlines() if line.strip()][-1]
    assert "less than a window of 16384 (--kv-compress-window)" in last
