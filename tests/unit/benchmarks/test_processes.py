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
signal.signal(signal.SIGTERM, {child_on_term})  # a child inherits what is ignored
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
signal.signal(signal.SIGTERM, {on_term})
print(child.pid, flush=True)
{then}
"""
SLEEP = "time.sleep(600)"


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize(
    ("on_term", "child_on_term", "then", "status"),
    [
        ("SIG_DFL", "SIG_DFL", SLEEP, -signal.SIGTERM),
        ("SIG_DFL", "SIG_IGN", SLEEP, -signal.SIGTERM),
        ("SIG_IGN", "SIG_IGN", SLEEP, -signal.SIGKILL),
        ("SIG_DFL", "SIG_IGN", "pass", 0),
    ],
    ids=["polite", "stubborn child", "stubborn", "leader gone"],
)
def test_a_group_ends_with_its_children(
    on_term: str, child_on_term: str, then: str, status: int
) -> None:
    program = PARENT.format(
        on_term=f"signal.{on_term}", child_on_term=f"signal.{child_on_term}", then=then
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout is not None
    child = psutil.Process(int(process.stdout.readline()))
    if then == "pass":
        process.wait(10)
        assert is_alive(child)
    end_group(process, seconds=1)
    assert process.returncode == status
    deadline = time.monotonic() + 10
    while is_alive(child):
        assert time.monotonic() < deadline, "the child is left"
        time.sleep(0.05)
    process.stdout.close()
