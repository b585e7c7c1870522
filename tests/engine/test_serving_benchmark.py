"""The serving benchmark itself, small: real servers, the real load generator, its real figures."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from server import environment

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def answer(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Stock SGLang and Kara at a quarter, six requests where stock can run three."""
    folder = tmp_path_factory.mktemp("serving")
    command = [
        *(sys.executable, "-m", "kara_sglang.benchmarks.serving", "--rows", "kara-0.25"),
        *("--scenarios", "scarce", "--repetitions", "1", "--requests", "6", "--output", "384"),
        *("--dir", str(folder), "--out", str(folder / "out.json")),
    ]
    outer = {k: v for k, v in os.environ.items() if k in ("PATH", "HOME", "PYTHONPATH", "TMPDIR")}
    threads = {"OMP_NUM_THREADS": environment()["OMP_NUM_THREADS"]}
    done = subprocess.run(
        command, capture_output=True, text=True, env=outer | threads, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    # A second call finds everything in the journal: no server is started, the figures are the same.
    again = subprocess.run(
        command, capture_output=True, text=True, env=outer | threads, timeout=60, check=False
    )
    assert again.returncode == 0 and again.stdout == done.stdout
    assert (folder / "out.md").read_text().count("| kara-0.25 |") == 2
    assert (folder / "out-scarce.png").stat().st_size > 1000
    return json.loads((folder / "out.json").read_text())


def test_freed_slots_are_admitted_into(answer: dict) -> None:
    """What issue after issue of other evictors lacks: fewer steps, because more requests run."""
    assert answer["decode_steps_ratio_kara_0.25"] <= 0.67
    assert answer["mean_running_ratio_kara_0.25"] >= 1.5


def test_equal_work_and_real_ends(answer: dict) -> None:
    """With ignore_eos every answer is whole; without it the random model may end some; none is lost."""
    for run in answer["runs"]:
        assert run["client"]["completed"] == 6
        tokens = run["client"]["total_output_tokens"]
        if run["point"] == "equal work":
            assert tokens == 6 * 384 and run["counters"]["retractions"] == 0
        else:  # sampled: how many it ends is chance
            assert 6 <= tokens <= 6 * 384
        assert run["cpu_seconds"] > 0


def test_stock_runs_as_many_as_fit_and_holds_every_token(answer: dict) -> None:
    runs = {run["row"]: run["counters"] for run in answer["runs"] if run["point"] == "equal work"}
    assert runs["stock"]["peak_running"] == 3 and runs["stock"]["held"] == 1.0
    assert runs["kara-0.25"]["peak_running"] > 3 and runs["kara-0.25"]["held"] < 0.8
