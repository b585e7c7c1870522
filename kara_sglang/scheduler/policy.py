"""Who is compressed now, and how the ring is shared. Host arithmetic, the same on every rank.

Decisions depend on the order of the batch, on lengths and on counters, for ``pressure`` also on the
scheduler's queue and the pool's free slots: all of them the same on every tensor-parallel rank, and
none of them a clock, so that ranks agree without talking to each other.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from kara_sglang.scheduler.ring.recorder import LAG

if TYPE_CHECKING:
    from kara_sglang.config import KaraConfig


@dataclass(frozen=True, slots=True)
class Candidate:
    """A request with its next window, as a policy sees it; lengths in tokens."""

    index: int  # position among the candidates
    order: int  # age: smaller came first
    kv_len: int  # KV slots that it holds
    overdue: int  # beyond the length at which its next window can be compressed; negative: not due
    uncompressed: int  # from its next window's start on
    gain: int  # slots that a window gives back
    width: int  # W

    @property
    def windows(self) -> int:
        """How many of its windows are due."""
        return max(0, 1 + self.overdue // self.width)

    def behind(self) -> Candidate:
        """The request once this window has been taken."""
        return dataclasses.replace(
            self,
            kv_len=self.kv_len - self.gain,
            overdue=self.overdue - self.width,
            uncompressed=self.uncompressed - self.width,
        )


SPREAD = 32
"""Steps over which windows that fall due together are spread, so that no step is held up by all of
them. Half of what the recorder waits for at least."""


ENOUGH = 0.9
"""Once ``pressure`` acts, the share of its mark below which it stops: a need that stays near the mark
must not switch it on and off with each window."""


def lag(config: KaraConfig) -> int:
    """Steps that a due window may have to wait for its pass: ``QueryRecorder.lag``."""
    return max(LAG, config.period + SPREAD)


class Policy(Protocol):
    """Decides, once per decode step, whose window is compressed.

    Attributes
    ----------
    floor
        KV slots that a request must hold to be compressed.
    wait
        Steps that a window which is due may wait for its pass although passes keep up.
    """

    floor: int
    wait: int

    def is_compressing(self, needed: Callable[[float], bool]) -> bool:
        """Whether anybody is compressed as things stand; if not, admission must not count on it.

        Parameters
        ----------
        needed : callable
            Says whether running and waiting requests need, uncompressed, at least so large a share of
            the KV pool; it takes time.
        """

    def due(self, candidates: Sequence[Candidate], urgent: bool = False) -> list[int]:
        """Indices of the candidates to compress in this step, ascending; one as often as windows of it
        are to be taken.

        Parameters
        ----------
        candidates : sequence of Candidate
            The running requests that could be compressed; also those of negative ``overdue``, which
            never are. None where the policy does not act.
        urgent : bool
            Whether this step may run out of slots: who may be compressed now is not put off then.
        """

    def in_time(self, running: int, steps: int) -> float:
        """Share of the windows of so many running requests that passes can take as they fall due, where
        each has one every so many steps."""


class Periodic:
    """The paper's policy (section 4.3): one global step counter, a fixed period, at most n windows.

    The cost of compression is bounded whatever the number of running requests. Those that have waited
    longest go first, the older on ties. No more go in one step than must, unless slots run out. Where
    windows of a request have piled up, it gives several at once.
    """

    floor = 0

    def __init__(self, period: int, limit: int) -> None:
        self.period = period
        self.limit = limit
        self.wait = period - 1
        self.step = 0

    def is_compressing(self, needed: Callable[[float], bool]) -> bool:
        return True

    def due(self, candidates: Sequence[Candidate], urgent: bool = False) -> list[int]:
        self.step += 1
        if self.step % self.period:
            return []
        most = self.limit if urgent else min(self.limit, self._share(candidates))
        return _first(candidates, most, self.rank)

    def _share(self, candidates: Sequence[Candidate]) -> int:
        """How many must go now for all to have gone when the first has waited :data:`SPREAD` steps."""
        left = SPREAD - self.waited(candidates)
        return math.ceil(sum(c.windows for c in candidates) / max(1, left // self.period))

    def waited(self, candidates: Sequence[Candidate]) -> int:
        """Steps that a window has waited for its pass, at most."""
        return max((c.overdue for c in candidates), default=0)

    def in_time(self, running: int, steps: int) -> float:
        return min(1.0, steps / self.period * self.limit / running)

    @staticmethod
    def rank(candidate: Candidate) -> tuple[int, ...]:
        """What decides who goes first; smaller is earlier."""
        return (-candidate.overdue, candidate.order)


class Threshold:
    """Each request for itself, as soon as it holds ``threshold`` slots: what the paper argues against.

    The more requests run, the more steps carry a pass. At 0 this is ``punctual``: no window waits, so
    when it is compressed does not depend on what else runs.
    """

    wait = 0

    def __init__(self, threshold: int) -> None:
        self.floor = threshold

    def is_compressing(self, needed: Callable[[float], bool]) -> bool:
        return True

    def due(self, candidates: Sequence[Candidate], urgent: bool = False) -> list[int]:
        return sorted(c.index for c in candidates if c.windows and c.kv_len >= self.floor)

    def in_time(self, running: int, steps: int) -> float:
        return 1.0


class Pressure(Periodic):
    """Nothing while all that run and wait need less of the pool uncompressed than ``min_usage``; else
    those that free most.

    At low load no answer is touched at all. What is held now would say too little: a pool is full of
    reserves, and requests wait, long before it is full of tokens. Windows that were left whole until
    then are due all together, and are spread like others from that step on.

    Attributes
    ----------
    acting
        What :meth:`is_compressing` said last.
    """

    def __init__(self, period: int, limit: int, min_usage: float) -> None:
        super().__init__(period, limit)
        self.min_usage = min_usage
        self.acting = False
        self._steps = 0  # in which it had candidates, without a gap

    def is_compressing(self, needed: Callable[[float], bool]) -> bool:
        self.acting = needed(self.min_usage * (ENOUGH if self.acting else 1))
        return self.acting

    def due(self, candidates: Sequence[Candidate], urgent: bool = False) -> list[int]:
        self._steps = self._steps + 1 if candidates else 0
        return super().due(candidates, urgent)

    def waited(self, candidates: Sequence[Candidate]) -> int:
        return min(super().waited(candidates), self._steps)

    @staticmethod
    def rank(candidate: Candidate) -> tuple[int, ...]:
        return (-candidate.gain, -candidate.uncompressed, candidate.order)


def build(config: KaraConfig) -> Policy:
    """The policy that the settings name."""
    if config.policy == "threshold":
        return Threshold(config.threshold)
    if config.policy == "punctual":
        return Threshold(0)
    if config.policy == "pressure":
        return Pressure(config.period, config.max_requests_per_pass, config.min_pool_usage)
    return Periodic(config.period, config.max_requests_per_pass)


def begins(config: KaraConfig) -> str:
    """When a server compresses, in words for people: the beginning of a sentence."""
    text = "compression begins when "
    if config.policy == "pressure":
        mark = f"{config.min_pool_usage * 100:g} % of the KV pool"
        text += f"running and waiting requests need {mark}, and "
    text += f"an answer is longer than {config.window + config.delay} tokens"
    if config.policy == "threshold" and config.threshold:
        text += f" and its request holds {config.threshold} KV slots"
    return text


def _first(
    candidates: Sequence[Candidate], limit: int, rank: Callable[[Candidate], tuple[int, ...]]
) -> list[int]:
    """The windows that come first, at most so many; a request's own in their order."""
    line = [(rank(c), c.index, c) for c in candidates if c.windows]
    heapq.heapify(line)
    chosen: list[int] = []
    while line and len(chosen) < limit:
        _, index, taken = line[0]
        chosen.append(index)
        following = taken.behind()
        if following.windows:
            heapq.heapreplace(line, (rank(following), index, following))
        else:
            heapq.heappop(line)
    return sorted(chosen)
