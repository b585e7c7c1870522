"""Counters of one scheduler process, and the Prometheus metrics ``sglang:kv_compress_*`` made of them,
next to SGLang's own (``--enable-metrics``)."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kara_sglang.radix_integration.prefix import removed_of

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

    from kara_sglang.scheduler.compaction import Pass


@dataclass(slots=True)
class Totals:
    """What happened since the server started."""

    passes: int = 0
    windows: int = 0
    without_queries: int = 0  # windows whose selector asks for queries that were not recorded
    slots_freed: int = 0
    pass_seconds: float = 0.0
    tokens_computed_again: int = 0  # though a compressed prefix held them
    retracted_tokens_returned: int = 0  # whose KV waited on the host
    retracted_tokens_computed: int = 0  # again, of requests that were retracted
    long_answers: int = 0  # that went on beyond SGLang's cap
    skipped: Counter[str] = field(default_factory=Counter)

    def add(self, done: Pass) -> None:
        self.passes += 1
        self.windows += done.windows
        self.without_queries += done.without_queries
        self.slots_freed += done.slots_freed
        self.pass_seconds += done.seconds

    def copy(self) -> Totals:
        return dataclasses.replace(self, skipped=self.skipped.copy())

    def compute_again(self, tokens: int) -> None:
        """Count tokens that a prefill computes though a compressed prefix held them."""
        self.tokens_computed_again += tokens

    def skip(self, reason: str) -> None:
        """Count a request that is left uncompressed."""
        self.skipped[reason] += 1


def slots_held(running: Iterable[Req]) -> tuple[int, int]:
    """KV slots that these requests hold, and their logical length in tokens."""
    physical = removed = 0
    for req in running:
        if req.kv.holds_kv:
            physical += req.kv.kv_committed_len
            removed += removed_of(req)
    return physical, physical + removed


class Metrics:
    """Counters and gauges of one scheduler process.

    Parameters
    ----------
    labels : dict
        SGLang's own labels of this scheduler (model_name, tp_rank, ...).
    """

    def __init__(self, labels: dict[str, str]) -> None:
        # Imported here: SGLang sets PROMETHEUS_MULTIPROC_DIR first.
        import prometheus_client

        names = list(labels)

        def counter(name: str, text: str, extra: tuple[str, ...] = ()) -> prometheus_client.Counter:
            return prometheus_client.Counter(f"sglang:kv_compress_{name}", text, [*names, *extra])

        def gauge(name: str, text: str) -> prometheus_client.Gauge:
            made = prometheus_client.Gauge(
                f"sglang:kv_compress_{name}", text, names, multiprocess_mode="mostrecent"
            )
            return made.labels(**labels)

        self._labels = labels
        self._counted = Totals()
        self._passes = counter("passes", "Compaction passes.").labels(**labels)
        self._windows = counter("windows", "Windows compressed.").labels(**labels)
        self._without_queries = counter(
            "without_queries", "Windows whose selector asks for queries that were not recorded."
        ).labels(**labels)
        self._freed = counter("slots_freed", "KV slots freed by compaction.").labels(**labels)
        self._seconds = counter("pass_seconds", "Host seconds spent in compaction passes.").labels(
            **labels
        )
        self._again = counter(
            "tokens_computed_again", "Prompt tokens computed although a compressed prefix held them."
        ).labels(**labels)
        self._returned = counter(
            "retracted_tokens_returned",
            "Tokens of retracted requests whose KV came back from the host.",
        ).labels(**labels)
        self._recomputed = counter(
            "retracted_tokens_computed", "Tokens of retracted requests that were computed again."
        ).labels(**labels)
        self._long = counter(
            "long_answers", "Answers that went on although they no longer fit the pool uncompressed."
        ).labels(**labels)
        self._skipped = counter("skipped", "Requests left uncompressed.", ("reason",))
        self._recorders = gauge("recorders_in_use", "Requests whose queries are recorded.")
        self._held = gauge("held_tokens", "KV slots held by running requests.")
        self._logical = gauge("logical_tokens", "Logical length of running requests, in tokens.")

    def update(self, totals: Totals, recorders: int, held: int, logical: int) -> None:
        """Bring the exported values up to ``totals`` and the given gauges."""
        seen = self._counted
        self._passes.inc(totals.passes - seen.passes)
        self._windows.inc(totals.windows - seen.windows)
        self._without_queries.inc(totals.without_queries - seen.without_queries)
        self._freed.inc(totals.slots_freed - seen.slots_freed)
        self._seconds.inc(totals.pass_seconds - seen.pass_seconds)
        self._again.inc(totals.tokens_computed_again - seen.tokens_computed_again)
        self._returned.inc(totals.retracted_tokens_returned - seen.retracted_tokens_returned)
        self._recomputed.inc(totals.retracted_tokens_computed - seen.retracted_tokens_computed)
        self._long.inc(totals.long_answers - seen.long_answers)
        for reason, count in totals.skipped.items():
            self._skipped.labels(**self._labels, reason=reason).inc(count - seen.skipped[reason])
        self._counted = totals.copy()
        self._recorders.set(recorders)
        self._held.set(held)
        self._logical.set(logical)
