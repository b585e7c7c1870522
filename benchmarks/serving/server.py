"""Servers under test: started by their own launcher, one process tree each."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import psutil
import requests

from kara_sglang.benchmarks.processes import end_group

START_SECONDS = 1800


def end_on_sigterm() -> None:
    """Let SIGTERM unwind the stack as Ctrl-C does, so that no server is left behind."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


class Server:
    """One server; it is starting until :meth:`wait` returns.

    Parameters
    ----------
    command : callable
        Its command line, given the port.
    environment : dict
        What its environment has more than ours.
    log : Path
        For its output.
    """

    def __init__(
        self, command: Callable[[int], list[str]], environment: dict[str, str], log: Path
    ) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        self.command = command(port)
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("SGLANG_")}
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as out:
            self._process = subprocess.Popen(
                self.command,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=inherited | environment,
                start_new_session=True,
            )

    def wait(self) -> Self:
        """Return once it generates.

        Raises
        ------
        RuntimeError
            Where it ends, or does not answer within half an hour; with the last lines of its log.
        """
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise
        return self

    def _wait(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                break
            try:
                # Its answer is a generated token: the engine runs, not only its HTTP front.
                if requests.get(self.url + "/health", timeout=30).status_code == 200:
                    return
            except requests.RequestException:
                pass
            time.sleep(0.5)
        tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])
        raise RuntimeError(f"the server did not come up; the end of {self.log}:\n{tail}")

    @property
    def pid(self) -> int:
        return self._process.pid

    def get(self, path: str) -> requests.Response:
        response = requests.get(self.url + path, timeout=600)
        response.raise_for_status()
        return response

    def post(
        self, path: str, body: dict[str, Any], check: bool = True, timeout: float | None = 600
    ) -> requests.Response:
        response = requests.post(self.url + path, json=body, timeout=timeout)
        if check:
            response.raise_for_status()
        return response

    def cpu_seconds(self) -> float:
        """CPU time that all processes of the server have used so far."""
        root = psutil.Process(self._process.pid)
        total = 0.0
        for process in [root, *root.children(recursive=True)]:
            times = process.cpu_times()
            total += times.user + times.system
        return total

    def log_position(self) -> int:
        return self.log.stat().st_size

    def log_since(self, position: int) -> str:
        with self.log.open("rb") as file:
            file.seek(position)
            return file.read().decode(errors="replace")

    def stop(self) -> None:
        end_group(self._process)
