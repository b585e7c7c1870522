"""How many requests a query ring serves: for the start-up line, /server_info, doctor and plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kara_sglang.scheduler.ring.recorder import QueryRecorder


@dataclass(frozen=True, slots=True)
class Served:
    """By the query ring of one rank.

    Attributes
    ----------
    bytes, why
        All of it, and why it is so large.
    all_heads, mean
        How many requests it serves, with all query heads of each or with their mean.
    all_heads_bytes, mean_bytes
        What one of them takes.
    heads
        The setting ``query_heads``.
    """

    bytes: int
    why: str
    all_heads: int
    mean: int
    all_heads_bytes: int
    mean_bytes: int
    heads: str

    @classmethod
    def of(cls, recorder: QueryRecorder, heads: str) -> Served:
        every = recorder.shape.group
        room = recorder.room(every), recorder.room(1)
        sizes = recorder.request_bytes(every), recorder.request_bytes(1)
        return cls(recorder.num_bytes, recorder.why, *room, *sizes, heads)

    @property
    def requests(self) -> int:
        """That it serves, at most."""
        return self.all_heads if self.heads == "all" else self.mean

    @property
    def request_bytes(self) -> int:
        """What one takes at least."""
        return self.all_heads_bytes if self.heads == "all" else self.mean_bytes

    def in_words(self) -> str:
        """How many requests it serves, and what becomes of others."""
        every = f"{self.all_heads} requests with all query heads"
        kinds = {"all": every, "mean": f"{self.mean} requests with the mean of their query heads"}
        room = kinds.get(self.heads, f"{every} or {self.mean} with their mean")
        return f"{room}; windows of others are chosen without queries"
