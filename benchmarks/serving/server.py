"""Servers under test: started by their own launcher, one process tree each."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Self

import psutil
import requests

from kara_sglang.benchmarks.processes import end_group
from kara_sglang.benchmarks.serving.peers import Peer, Setup
from kara_sglang.benchmarks.serving.rows import Row

START_SECONDS = 1800


def end_on_sigterm() -> None:
    """Let SIGTERM unwind the stack as Ctrl-C does, so that no server is left behind."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


class Server:
    """One server; it is starting until :meth:`wait` returns."""

    def __init__(self, peer: Peer, row: Row, setup: Setup, log: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        self.command = peer.command(row, setup, port)
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("SGLANG_")}
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as out:
            self._process = subprocess.Popen(
                self.command,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=inherited | peer.environment(row, setup),
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

    def post(self, path: str, body: dict, check: bool = True) -> requests.Response:
        response = requests.post(self.url + path, json=body, timeout=600)
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


Start = tuple[Peer, Row, Setup]
"""What a server is started with."""


class Servers:
    """At most ``resident`` running servers; the one that was used longest ago makes room."""

    def __init__(self, resident: int, folder: Path) -> None:
        self.resident = resident
        self._folder = folder
        self._running: OrderedDict[tuple[str, int | None], Server] = OrderedDict()
        self._failed: dict[tuple[str, int | None], RuntimeError] = {}

    def get(self, start: Start, then: Iterable[Start] = ()) -> Server:
        """The server of ``start``. Where it has to be started, those that come ``then`` are started
        beside it, as far as there is room, and waited for: most of a start is one thread's work."""
        wanted = {(row.name, setup.pool): (peer, row, setup) for peer, row, setup in (start, *then)}
        if (failed := self._failed.get(next(iter(wanted)))) is not None:
            raise failed
        # Only where a pool is not sized by what is free when the server starts.
        together = self.resident if start[2].cpu else 1
        first, *_ = keys = [key for key in wanted if key not in self._failed][:together]
        if first not in self._running:
            for key in keys:
                if key in self._running:
                    self._running.move_to_end(key)
            fresh = [key for key in keys if key not in self._running]
            for key in fresh:
                if len(self._running) >= self.resident:
                    self._running.popitem(last=False)[1].stop()
                log = self._folder / f"{key[0]}-{key[1] or 'auto'}.log"
                self._running[key] = Server(*wanted[key], log)
            for key in reversed(fresh):
                try:
                    self._running[key].wait()
                except RuntimeError as error:
                    del self._running[key]
                    self._failed[key] = error  # it is told when it is that server's turn
                    if key == first:
                        raise
        self._running.move_to_end(first)
        return self._running[first]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        # All together: an end takes seconds, most of them spent waiting.
        with ThreadPoolExecutor(max(1, len(self._running))) as pool:
            list(pool.map(lambda server: server.stop(), self._running.values()))
