"""What an engine must offer to be compared: a command line, and how to talk to it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from kara_sglang.benchmarks.serving.counters import Counters
from kara_sglang.benchmarks.serving.load import Load
from kara_sglang.benchmarks.serving.rows import Row

if TYPE_CHECKING:
    from kara_sglang.benchmarks.serving.server import Server


@dataclass(frozen=True, slots=True)
class Setup:
    """What all servers of a comparison share.

    Attributes
    ----------
    model
        Folder or hub name.
    dtype
        ``--dtype``.
    window, delay
        Tokens.
    query_mem_gb
        GiB for recorded queries.
    page_size
        Tokens per page.
    pool
        KV slots, or None: what the engine takes by itself.
    server_args
        Further flags for every SGLang server.
    pythons
        Interpreter of each peer that lives in an environment of its own.
    cpu
        Whether there is no GPU.
    """

    model: str
    dtype: str
    window: int
    delay: int
    query_mem_gb: float
    page_size: int
    pool: int | None
    server_args: tuple[str, ...]
    pythons: dict[str, Path]
    cpu: bool


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


class Offline(Protocol):
    """One engine without a server; its ``backend`` is None."""

    name: str
    install: str
    backend: None

    def missing(self, setup: Setup) -> str | None:
        """As :meth:`Peer.missing`."""

    def offline(self, row: Row, setup: Setup, load: Load, seed: int) -> dict[str, Any]:
        """Run the load; returns ``duration`` in seconds, ``total_output_tokens`` and ``completed``."""
