"""What an engine must offer to be compared: a command line, and how to talk to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from kara_sglang.benchmarks.serving.counters import Counters
from kara_sglang.benchmarks.serving.rows import Row
from kara_sglang.benchmarks.serving.server import Server
from kara_sglang.benchmarks.serving.setup import Setup


class Peer(Protocol):
    """One engine with a server. ``install`` are the shell lines that a reader needs to have it."""

    name: str
    install: str
    backend: str
    """``--backend`` of sglang.benchmark.serving."""

    def missing(self, setup: Setup) -> str | None:
        """Why the engine cannot be run here, in one line; None if it can."""

    def command(self, row: Row, setup: Setup, port: int) -> list[str]:
        """The server's command line."""

    def environment(self, row: Row, setup: Setup) -> dict[str, str]:
        """What the server's environment has more than ours."""

    def mark(self, server: Server) -> Any:
        """Where the server's own counts stand now, for :meth:`counters`."""

    def counters(self, server: Server, mark: Any) -> Counters:
        """What the server has counted since ``mark``."""


def start(peer: Peer, row: Row, setup: Setup, log: Path) -> Server:
    """A server of this engine, which is starting; its output goes into ``log``."""
    return Server(lambda port: peer.command(row, setup, port), peer.environment(row, setup), log)
