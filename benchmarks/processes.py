"""Ending what a benchmark has started."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from typing import Any


def end_group(process: subprocess.Popen[Any], seconds: float = 30) -> None:
    """End the group that ``process`` leads (``start_new_session``): ask, wait for the leader so many
    ``seconds``, and then end by force what is left, also of a group whose leader ended by itself."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
