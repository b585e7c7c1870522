"""Beyond the largest decode graph: SGLang decodes eagerly there, and says so in no warning.

SGLang captures graphs for batches of up to ``--cuda-graph-max-bs-decode`` requests, by default 8 to 512
by the size of the GPU (``arg_groups/memory_hook.py``). Compression is there to let more requests run,
so it is what leads past them.
"""

from __future__ import annotations

import logging
from typing import Any

from kara_sglang.radix_integration.row import Geometry

logger = logging.getLogger(__name__)

FLAG = "--cuda-graph-max-bs-decode"


class Graphs:
    """The decode graphs of one scheduler.

    Parameters
    ----------
    sizes : list of int
        Batch sizes that were captured; none where SGLang decodes without graphs anyway.
    """

    def __init__(self, sizes: list[int]) -> None:
        self.largest = max(sizes, default=0)
        self._passed = False

    def step(self, running: int) -> None:
        """So many requests decode in this step; warns the first time that no graph is as large."""
        if running <= self.largest or self._passed or not self.largest:
            return
        self._passed = True
        logger.warning(
            "kv-compress: %d requests run, and the largest captured decode graph is for %d: SGLang "
            "runs such steps without a graph, which is slower; %s captures larger ones.",
            running,
            self.largest,
            FLAG,
        )

    def room(self, geometry: Geometry, kept: int, pool: int, most: int) -> str:
        """The largest graph beside what the pool can hold, for the log.

        Parameters
        ----------
        geometry : Geometry
        kept : int
            R.
        pool : int
            KV slots.
        most : int
            Requests that SGLang runs at once (``--max-running-requests``).
        """
        if not self.largest:
            return "no decode graphs"
        if most <= self.largest:
            return f"decode graphs for all {most} requests that may run at once"
        slots = pool // self.largest
        return (
            f"decode graphs for up to {self.largest} of {most} requests that may run at once; the pool "
            f"holds more, which then decode without a graph, while answers are shorter than "
            f"{answer_in(geometry, kept, slots)} tokens ({slots} uncompressed); "
            f"{FLAG} captures larger ones"
        )


def captured(resolved: Any) -> int:
    """Largest batch of which SGLang will capture a decode graph on a GPU; 0 where it captures none.

    Parameters
    ----------
    resolved
        ``resolving_view(server_args)``.
    """
    from sglang.srt.model_executor.cuda_graph_config import Backend

    decode = resolved.cuda_graph_config.decode
    return 0 if decode.backend == Backend.DISABLED else decode.max_bs or 0


def answer_in(geometry: Geometry, kept: int, slots: int) -> int:
    """Tokens of an answer that fits into so many KV slots, from its first to its last step."""
    tail = geometry.window + geometry.delay
    windows = (slots - tail) // kept + 1 if slots >= tail else 0
    return slots + windows * (geometry.window - kept)


def slots_of(geometry: Geometry, kept: int, tokens: int) -> int:
    """KV slots that an answer of so many tokens holds at its end."""
    windows = max(0, tokens - geometry.delay) // geometry.window
    return tokens - windows * (geometry.window - kept)
