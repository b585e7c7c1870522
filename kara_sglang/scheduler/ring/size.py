"""How large the query ring is where ``query_mem_gb`` is null: what requests need, within a bound.

Requests need what those take that the KV pool has room for. Each of them holds at least W + delay KV
slots when its window is chosen. A ring for all of them could take a third of the memory that SGLang has
for KV, and longer requests would leave it idle. So it takes no more than :data:`SHARE`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kara_sglang.config import KaraConfig

SHARE = 1 / 16
"""Of the memory for KV and ring together, at most."""
FIXED = 2 << 30
"""Bytes where nobody says how much memory is free."""


@dataclass(frozen=True, slots=True)
class Room:
    """What a rank has for KV and ring, and how much of it its requests can use.

    Attributes
    ----------
    free
        Bytes that SGLang would make its KV pool of if there were no ring; None on a CPU.
    slot_bytes
        K and V of one token, all layers of the rank.
    most_slots, most_running
        ``--max-total-tokens`` and ``--max-running-requests``; None where they are not given.
    """

    free: int | None = None
    slot_bytes: int = 0
    most_slots: int | None = None
    most_running: int | None = None


@dataclass(frozen=True, slots=True)
class Size:
    """Bytes of a ring, and where they come from."""

    bytes: int
    why: str


def ring_size(config: KaraConfig, of_request: int, least: int, room: Room) -> Size:
    """How large to make the ring of one rank.

    Parameters
    ----------
    config : KaraConfig
    of_request : int
        Bytes of one request with as many query heads as the settings allow.
    least : int
        Bytes of the smallest ring that is of any use.
    room : Room
    """
    if config.query_mem_gb is not None:
        return Size(int(config.query_mem_gb * 2**30), "as set")
    if room.free is None:
        return Size(FIXED, "fixed, as no memory of a GPU says what is needed")
    slots = config.window + config.delay
    requests = room.free // (slots * room.slot_bytes + of_request)
    if room.most_slots is not None:
        requests = min(requests, room.most_slots // slots)
    if room.most_running is not None:
        requests = min(requests, room.most_running)
    needed, bound = requests * of_request, int(SHARE * room.free)
    if needed <= bound:
        return Size(max(needed, least), f"what {requests} requests need")
    return Size(max(bound, least), f"1/{1 / SHARE:.0f} of the memory for KV")
