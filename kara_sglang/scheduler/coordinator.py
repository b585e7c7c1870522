"""Who is compressed and who records, step by step, inside SGLang's scheduler.

A decode step goes through here once, before SGLang's memory check and before it prepares the step, so
that freed pages can spare a retraction.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kara_sglang.config import KaraConfig
from kara_sglang.radix_integration import exact
from kara_sglang.radix_integration.prefix import forget_match, held_state
from kara_sglang.radix_integration.row import RequestState, forget_state, state_of
from kara_sglang.scheduler import policy
from kara_sglang.scheduler.calendar import Calendar
from kara_sglang.scheduler.compaction import Compaction
from kara_sglang.scheduler.forecast import Forecast
from kara_sglang.scheduler.graphs import Graphs
from kara_sglang.scheduler.latch import LOOK_EVERY, Latch
from kara_sglang.scheduler.longer import Longer
from kara_sglang.scheduler.metrics import Metrics, Totals, slots_held
from kara_sglang.scheduler.newcomers import Newcomers
from kara_sglang.scheduler.policy import Candidate
from kara_sglang.scheduler.returning import Returning
from kara_sglang.scheduler.ring.handout import Handout
from kara_sglang.scheduler.shortage import needed, short_of_slots
from kara_sglang.scheduler.streams import forward_stream
from kara_sglang.scheduler.terms import TermsOf

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
    from sglang.srt.managers.scheduler import Scheduler


class Coordinator:
    """Compresses the running requests of one scheduler (one tensor-parallel rank).

    Parameters
    ----------
    config : KaraConfig
    compaction : Compaction
        The passes of this scheduler, with the same settings.
    """

    def __init__(self, config: KaraConfig, compaction: Compaction) -> None:
        self.config = config
        self.compaction = compaction
        self.scheduler: Scheduler = compaction.scheduler
        scheduler = self.scheduler
        self.recorder = compaction.recorder
        self.pace = compaction.recorder.pace
        self.kernels = compaction.kernels
        self.geometry = compaction.geometry
        self.policy = policy.build(config)
        self.forecast = Forecast(self.policy, self.geometry, self.pace)
        self.terms_of = TermsOf(config, scheduler.page_size)
        self.handout = Handout(self.recorder, config.query_heads, compaction.lengths)
        self.latch = Latch()
        self.calendar = Calendar(self.geometry, compaction.lengths)
        self.graphs = Graphs(scheduler.tp_worker.get_decode_cuda_graph_bs())
        self.totals = Totals()
        self.longer = Longer(scheduler, self.geometry, self.pace, self.totals)
        self.returning = Returning(scheduler, config, self.pace, self.totals)
        self.newcomers = Newcomers(config, compaction, self.terms_of, self.totals, self.returning)
        context = scheduler.metrics_collector_context
        self.metrics: Metrics | None = None
        if context.current_scheduler_metrics_enabled:
            self.metrics = Metrics(context.collector.labels)
        self._ready: dict[int, tuple[Req, RequestState]] = {}  # with a window that is due, by order
        self._acting = False  # whether the policy did when it was asked last
        self._sizes: tuple[int, int] | None = None  # of batch and queue then; None: ask again
        if config.shares_prefixes:
            scheduler.tree_cache.sharing_of = lambda req: self.terms_of(req).sharing
            scheduler.tree_cache.computed_again = self.totals.compute_again
            scheduler.tree_cache.vocab_size = scheduler.model_config.vocab_size
            scheduler.tree_cache.reach = compaction.reach
            scheduler.tree_cache.debug_checks = config.debug_checks

    def warm_up(self) -> None:
        """Try all selectors that a request may name, so that no request waits for a compiler."""
        own = self.config.selector
        every = self.newcomers.selectors.values()
        each = [one for one in every if self.kernels.compiles or one.name == own]
        self.compaction.warm_up(each, self.config.kept(self.geometry.page_size))

    # -- requests ----------------------------------------------------------------------------------

    @property
    def running(self) -> list[Req]:
        """Requests that decode. SGLang's running batch is empty while they do so beside a prefill."""
        last = self.scheduler.last_batch
        mixed = last.decoding_reqs if last is not None and last.forward_mode.is_mixed() else None
        return self.scheduler.running_batch.reqs or mixed or []

    def is_compressing(self, running: ScheduleBatch) -> bool:
        """Whether the policy compresses anybody as things stand."""
        return self.policy.is_compressing(lambda share: needed(self.scheduler, running, share))

    def reserve(self, req: Req, tokens: float, running: int) -> float:
        """KV slots that a running or waiting request takes for ``tokens`` still to come, at most, where
        so many requests run."""
        terms = self.terms_of(req)
        if terms.skipped is not None:
            return tokens
        state = state_of(req)
        if state is not None:
            held, base = req.kv.kv_committed_len, state.base
        else:
            held, base = self.returning.to_hold(req)
        return self.forecast.reserve(tokens, held, base, terms.kept, running)

    def forget(self, req: Req) -> None:
        """The request was retracted: its KV is gone, or waits on the host."""
        state = held_state(req)
        if state is not None:
            exact.allow_insert(req, state)
            self.returning.retracted(req)
        forget_state(req)
        forget_match(req)
        self.longer.retracted(req)

    def row_freed(self, req: Req) -> None:
        """The request gives its row back (finished, aborted or retracted)."""
        self.longer.leave(req)
        state = held_state(req)
        if state is not None:
            if self.compaction.tracer is not None:
                self.compaction.tracer.end(req, state)
            self.handout.leave(state)
            self.calendar.forget(state)
            self._ready.pop(state.order, None)
        self.compaction.lengths.row_freed(req.kv.req_pool_idx)
        if not any(other is not req and other.kv.holds_kv for other in self.running):
            self.export(leaving=req)  # the last one leaves; a pass or a log line exports otherwise

    def export(self, leaving: Req | None = None) -> None:
        """Bring the Prometheus metrics up to date, where they are on."""
        if self.metrics is not None:
            running = [req for req in self.running if req is not leaving]
            self.metrics.update(self.totals, self.recorder.in_use, *slots_held(running))

    # -- one decode step ---------------------------------------------------------------------------

    def before_decode(self, batch: ScheduleBatch) -> None:
        """Compress what is due, then hand out recorders for windows that begin."""
        self.graphs.step(len(batch.reqs))
        self.returning.step()
        looked_at = self.calendar.next_step() + self.newcomers.start(batch)
        for req, state in looked_at:
            self.longer.look(req, state)
            if req.kv.kv_committed_len >= self._ready_at(req, state):
                self._ready[state.order] = req, state
        due = self._due(batch)
        if self.config.debug_checks:
            self.compaction.check_ranks_agree(due)
        if due:
            self.totals.add(self.compaction.run(batch, due))
            self.export()
            self._sizes = None
            for req, state in due:
                if req.kv.kv_committed_len < self._ready_at(req, state):
                    self._ready.pop(state.order, None)
        self.latch.step(batch, passed=bool(due))
        self._hand_out(due, looked_at)
        for req, state in looked_at + due:
            looks_in = self.longer.looks_in(req)
            self.calendar.make_date(req, state, self._ready_at(req, state), looks_in)

    def _ready_at(self, req: Req, state: RequestState) -> int:
        """KV length from which on the request's next window may be taken."""
        floor = 0 if self.longer.is_long(req) else self.policy.floor
        return max(state.due_at(self.geometry), floor)

    def _due(self, batch: ScheduleBatch) -> list[tuple[Req, RequestState]]:
        """Whose window is compressed in this step: as the policy says, and one of the long answer."""
        sizes = len(batch.reqs), len(self.scheduler.waiting_queue)
        if self._ready and (sizes != self._sizes or self.calendar.step % LOOK_EVERY == 0):
            self._acting, self._sizes = self.is_compressing(batch), sizes
        ready = []
        if self._acting:
            ready = [one for one in self._ready.values() if _outlives_this_step(one[0])]
        candidates = [self._candidate(index, *one) for index, one in enumerate(ready)]
        urgent = bool(ready) and short_of_slots(self.scheduler, batch, self.pace)
        due = [ready[index] for index in self.policy.due(candidates, urgent=urgent)]
        long = self.longer.one
        if long is None or any(req is long[0] for req, _ in due):
            return due
        if long[1].order in self._ready and _outlives_this_step(long[0]):
            due.append(long)
        return due

    def _candidate(self, index: int, req: Req, state: RequestState) -> Candidate:
        kv_len = req.kv.kv_committed_len
        return Candidate(
            index=index,
            order=state.order,
            kv_len=kv_len,
            overdue=kv_len - state.due_at(self.geometry),
            uncompressed=state.uncompressed(kv_len),
            gain=self.geometry.window - state.kept,
            width=self.geometry.window,
        )

    def _hand_out(
        self,
        compressed: list[tuple[Req, RequestState]],
        looked_at: list[tuple[Req, RequestState]],
    ) -> None:
        """Recorders: from those that were compressed, to those of which a window begins."""
        for req, state in compressed:
            useful = self._falls_due(req, state.due_at(self.geometry))
            self.handout.pass_on(state, useful=useful)
        for req, state in looked_at:
            if state.recorder is not None:
                self.handout.go_on(req, state)
        asking = []
        for req, state in looked_at:
            kv_len = req.kv.kv_committed_len
            if not state.selector.needs_queries or state.recorder is not None:
                continue
            if self.calendar.asks_in(req, state) > 0:
                continue
            if self._falls_due(req, kv_len + self.geometry.window + self.geometry.delay):
                asking.append((req, state))
            else:
                self.handout.withdraw(state)
        if asking:
            self.handout.ask(asking, self.calendar.step)
        if self.recorder.stale:
            with forward_stream(self.scheduler):
                self.recorder.flush()

    def _falls_due(self, req: Req, due_at: int) -> bool:
        """Whether the row can become so long before the request ends."""
        left: int = req.sampling_params.max_new_tokens - len(req.output_ids)
        return req.kv.kv_committed_len + left >= due_at


def _outlives_this_step(req: Req) -> bool:
    """Whether the request outlives the step in flight; otherwise its window would be compressed for
    nothing."""
    if req.finished() or req.to_finish is not None:
        return False
    return not req.next_output_finishes_by_length()
