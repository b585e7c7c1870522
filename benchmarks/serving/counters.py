"""Counted quantities of a run, as the servers themselves say them; SGLang's are exact."""

from __future__ import annotations

import re
from dataclasses import dataclass

_DECODE = re.compile(r"Decode batch, #running-req: (\d+), #token: (\d+)")
_PREFILL = re.compile(r"Prefill batch, #new-seq: \d+, #new-token: (\d+), #cached-token: (\d+)")
_HELD = re.compile(r"kv-compress: ([\d.]+) held")
_WINDOWS = re.compile(r"#window: (\d+), #without-queries: (\d+)")
_GRAPH = re.compile(r"Decode batch, .*? graph: (True|False)")
_RETRACTED = re.compile(r"#retracted_reqs: (\d+)")


@dataclass(frozen=True, slots=True)
class Counters:
    """What a server says of a run.

    Attributes
    ----------
    decode_steps
        Decode batches that were run; None where the engine does not say.
    mean_running, peak_running
        Requests in a decode batch; None where the engine did not say.
    retractions
        Requests that were thrown out to be computed again.
    prefilled
        Tokens that prefills computed.
    hit_rate
        Share of the prompt tokens that came from the prefix cache.
    held
        KV slots that running requests held per logical token, mean over the steps; 1 without
        compression.
    without_queries
        Share of the compressed windows that were chosen without queries though the selector asks for
        them; None where none was compressed.
    without_graph
        Share of the decode steps that SGLang ran eagerly: all on a CPU, elsewhere those of more
        requests than its largest captured graph is for. None where the engine does not say.
    schedule
        For each number of running requests: how many steps ran with it, and the KV slots that were in
        use, summed over these steps.
    """

    decode_steps: int | None
    mean_running: float | None
    peak_running: int | None
    retractions: int
    prefilled: int
    hit_rate: float
    held: float
    without_queries: float | None
    without_graph: float | None
    schedule: dict[int, tuple[int, int]]

    @classmethod
    def of(cls, log: str) -> Counters:
        """Count in what a run has written into the log of SGLang with ``--decode-log-interval 1``.

        Raises
        ------
        ValueError
            Where it has no decode step.
        """
        steps = [(int(requests), int(slots)) for requests, slots in _DECODE.findall(log)]
        if not steps:
            raise ValueError("the server's log has no `Decode batch` line")
        eager = _GRAPH.findall(log)
        running = [requests for requests, _ in steps]
        schedule: dict[int, tuple[int, int]] = {}
        for requests, slots in steps:
            count, total = schedule.get(requests, (0, 0))
            schedule[requests] = (count + 1, total + slots)
        prefills = [(int(new), int(cached)) for new, cached in _PREFILL.findall(log)]
        prompt = sum(new + cached for new, cached in prefills)
        held = [
            float(match.group(1)) if (match := _HELD.search(line)) else 1.0
            for line in log.splitlines()
            if "Decode batch" in line
        ]
        return cls(
            decode_steps=len(steps),
            mean_running=sum(running) / len(running),
            peak_running=max(running),
            retractions=sum(int(count) for count in _RETRACTED.findall(log)),
            prefilled=sum(new for new, _ in prefills),
            hit_rate=sum(cached for _, cached in prefills) / prompt if prompt else 0.0,
            held=sum(held) / len(held),
            without_queries=_share_without(log),
            without_graph=eager.count("False") / len(eager) if eager else None,
            schedule=dict(sorted(schedule.items())),
        )


def _share_without(log: str) -> float | None:
    counts = [(int(windows), int(without)) for windows, without in _WINDOWS.findall(log)]
    if not counts or counts[-1][0] == counts[0][0]:
        return None
    # They count from the server's start on; the first step of a run has no window yet.
    windows, without = (last - first for first, last in zip(counts[0], counts[-1], strict=True))
    return without / windows
