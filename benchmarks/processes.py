"""Ending what a benchmark has started."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess


def end_group(process: subprocess.Popen, seconds: float = 30) -> None:
    """End the group that ``process`` leads (``start_new_session``): first politely, and where it has
    not ended after so many ``seconds``, by force. What a leader that has ended left is ended, too."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
            return
