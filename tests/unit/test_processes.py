"""Benchmarks and tests end the servers that they start, with everything those started."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import psutil
import pytest

from kara_sglang.benchmarks.processes import end_group

PARENT = """
import signal, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
signal.signal(signal.SIGTERM, {on_term})
print(child.pid, flush=True)
{then}
"""
SLEEP = "time.sleep(600)"


@pytest.mark.parametrize(
    ("on_term", "then", "status"),
    [
        ("signal.SIG_DFL", SLEEP, -signal.SIGTERM),
        ("signal.SIG_IGN", SLEEP, -signal.SIGKILL),
        ("signal.SIG_DFL", "pass", 0),
    ],
    ids=["polite", "by force", "leader gone"],
)
def test_a_group_ends_with_its_children(on_term: str, then: str, status: int) -> None:
    program = PARENT.format(on_term=on_term, then=then)
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout is not None
    child = psutil.Process(int(process.stdout.readline()))
    if then == "pass":
        process.wait(10)
        assert child.is_running()
    end_group(process, seconds=1)
    assert process.returncode == status
    deadline = time.monotonic() + 10
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the child is left"
        time.sleep(0.05)
    process.stdout.close()
