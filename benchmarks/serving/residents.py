"""Servers that stay up together while rows take turns."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Self

from kara_sglang.benchmarks.serving.peers import Peer, start
from kara_sglang.benchmarks.serving.rows import Row
from kara_sglang.benchmarks.serving.server import Server
from kara_sglang.benchmarks.serving.setup import Setup

Start = tuple[Peer, Row, Setup]
"""What a server is started with."""


class Servers:
    """At most ``resident`` running servers; the one that was used longest ago makes room."""

    def __init__(self, resident: int, folder: Path) -> None:
        self.resident = resident
        self._folder = folder
        self._running: OrderedDict[tuple[str, int | None], Server] = OrderedDict()
        self._failed: dict[tuple[str, int | None], RuntimeError] = {}

    def get(self, one: Start, then: Iterable[Start] = ()) -> Server:
        """The server of ``one``. Where it has to be started, those that come ``then`` are started
        beside it, as far as there is room, and waited for: most of a start is one thread's work."""
        wanted = {(row.name, setup.pool): (peer, row, setup) for peer, row, setup in (one, *then)}
        if (failed := self._failed.get(next(iter(wanted)))) is not None:
            raise failed
        # Only where a pool is not sized by what is free when the server starts.
        together = self.resident if one[2].cpu else 1
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
                self._running[key] = start(*wanted[key], log)
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
