"""Requests at their first decode step: who is new in a batch, and the state each one starts with."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from kara_sglang.config import KaraConfig
from kara_sglang.kernels import selectors
from kara_sglang.radix_integration import exact
from kara_sglang.radix_integration.prefix import prefix_of, removed_of
from kara_sglang.radix_integration.row import RequestState, has_decoded, keep_state
from kara_sglang.scheduler.compaction import Compaction
from kara_sglang.scheduler.metrics import Totals
from kara_sglang.scheduler.returning import Returning
from kara_sglang.scheduler.seeds import Seeds
from kara_sglang.scheduler.terms import TermsOf

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch


class Newcomers:
    """Of one scheduler.

    Parameters
    ----------
    config : KaraConfig
    compaction : Compaction
    terms_of : TermsOf
    totals : Totals
        Counts who is left uncompressed.
    returning : Returning
        Knows whose row a retraction took.
    """

    def __init__(
        self,
        config: KaraConfig,
        compaction: Compaction,
        terms_of: TermsOf,
        totals: Totals,
        returning: Returning,
    ) -> None:
        self.compaction = compaction
        self.terms_of = terms_of
        self.totals = totals
        self.returning = returning
        self.seeds = Seeds(config.seed)
        self.selectors = {name: selectors.build(name, config) for name in selectors.REGISTRY}
        self._arrivals = 0

    def start(self, batch: ScheduleBatch) -> list[tuple[Req, RequestState]]:
        """Make the states of those that decode for the first time; returns those that are compressed.

        SGLang appends them to its batch (``ScheduleBatch.merge_batch``), and keeps the order when
        others leave. Behind a step that prefilled them beside the others they come first.
        """
        last = list(itertools.takewhile(_is_new, reversed(batch.reqs)))
        others = itertools.islice(batch.reqs, len(batch.reqs) - len(last))
        first = itertools.takewhile(_is_new, others)
        new = [*first, *reversed(last)]
        started = [(req, self._start(req)) for req in new]
        # The windows of a prefix: their positions went by the match as long as it was prefilled.
        self.compaction.lengths.lacks((req.kv.req_pool_idx, removed_of(req)) for req in new)
        return [(req, state) for req, state in started if state is not None]

    def _start(self, req: Req) -> RequestState | None:
        self._arrivals += 1
        state, terms = self.returning.come_back(req), self.terms_of(req)
        if state is None and terms.skipped is None:
            selector = self.selectors[terms.selector]
            prefix = prefix_of(req)
            windows = list(prefix.windows) if prefix is not None else []
            state = RequestState(
                selector=selector,
                kept=terms.kept,
                seed=self.seeds.of(req, terms.seed) if selector.seeded else 0,
                base=self.returning.base(req),
                removed=sum(window.freed for window in windows),
                windows=windows,
                reused=len(windows),
                shares=prefix is not None and prefix.sharing is not None,
            )
        if state is not None:
            state.generation, state.order = self.compaction.generation(req), self._arrivals
            self.returning.decodes(req, state)
            if not state.shares and state.removed:
                exact.bar_insert(req, state)
        elif terms.skipped is not None and not req.retracted_stain:
            self.totals.skip(terms.skipped)
        keep_state(req, state)
        return state


def _is_new(req: Req) -> bool:
    return not has_decoded(req)
