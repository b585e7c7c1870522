"""The compaction pass: runs inside SGLang's scheduler, before each decode step.

Data flows one way: recorder -> selector -> Token2Chunk -> compaction -> page table -> lengths ->
allocator. The only values that come back from the device are none: exactly R of W tokens are kept, so
every length, page-table edit and freed slot is known on the host beforehand.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import time
import zlib
from array import array
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from kara_sglang import policy
from kara_sglang.admission import LOOK_EVERY, Latch, needed, reserve, short_of_slots
from kara_sglang.calendar import Calendar
from kara_sglang.config import KaraConfig
from kara_sglang.graphs import Graphs
from kara_sglang.handout import Handout
from kara_sglang.kernels import selectors
from kara_sglang.kernels.backend import Kernels, LayerPool, WindowJob
from kara_sglang.kernels.copies import to_device
from kara_sglang.kernels.record import PAGE, blocks_of
from kara_sglang.kernels.turn import Turn
from kara_sglang.metrics import Metrics
from kara_sglang.options import RequestOptions
from kara_sglang.policy import Candidate
from kara_sglang.radix_integration import exact
from kara_sglang.radix_integration.prefix import forget_match, prefix_of, removed
from kara_sglang.radix_integration.row import STATE, Geometry, RequestState, Voters, ceil_align
from kara_sglang.recorder import QueryRecorder
from kara_sglang.stats import Totals
from kara_sglang.trace.tracer import Tracer

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
    from sglang.srt.managers.scheduler import Scheduler

logger = logging.getLogger(__name__)

COPY = "kv_compress_copy"
"""Attribute of SGLang's ``Req``: which of the answers to one prompt it is. It survives a retraction."""

_MOST_PROMPTS = 4096


class Coordinator:
    """Compresses the running requests of one scheduler (one tensor-parallel rank).

    Parameters
    ----------
    scheduler : Scheduler
        SGLang's, after its ``__init__``.
    config : KaraConfig
    recorder : QueryRecorder or None
        None where the settings leave no memory for queries.
    kernels : Kernels
    scales : list of float
        Softmax scale per layer.
    turn : Turn or None
        How queries are moved ahead; None where the settings do not ask for it.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        config: KaraConfig,
        recorder: QueryRecorder | None,
        kernels: Kernels,
        scales: list[float],
        turn: Turn | None,
    ) -> None:
        self.scheduler = scheduler
        self.config = config
        self.recorder = recorder
        self.kernels = kernels
        self.scales = scales
        self.turn = turn
        self.geometry = Geometry(scheduler.page_size, config.window, config.delay)
        self.policy = policy.build(config)
        # What admission counts on: the last windows of all requests may wait for their passes.
        self._latest = dataclasses.replace(self.geometry, delay=config.delay + self.policy.wait)
        self.latch = Latch()
        self.graphs = Graphs(scheduler.tp_worker.get_decode_cuda_graph_bs())
        self.totals = Totals()
        context = scheduler.metrics_collector_context
        self.metrics: Metrics | None = None
        if context.current_scheduler_metrics_enabled:
            self.metrics = Metrics(context.collector.labels)
        self.tracer = Tracer(scheduler, config) if config.trace is not None else None
        self._selectors = {name: selectors.build(name, config) for name in selectors.REGISTRY}
        self._layers: LayerPool | None = None
        self._without_queries = self._selectors["keys"]
        self.handout = Handout(recorder, config.query_heads) if recorder is not None else None
        self.calendar = Calendar()
        self._ready: dict[int, tuple[Req, RequestState]] = {}  # with a window that is due, by order
        self._acting = False  # whether the policy did when it was asked last
        self._sizes: tuple[int, int] | None = None  # of batch and queue then; None: ask again
        self._arrivals = 0
        self._copies: dict[int, int] = {}  # admitted so far, by prompt
        if config.prefix_reuse == "compressed":
            scheduler.tree_cache.settings_of = self.sharing_settings
            scheduler.tree_cache.vocab_size = scheduler.model_config.vocab_size
            scheduler.tree_cache.debug_checks = config.debug_checks

    def warm_up(self) -> None:
        """Run passes over slots that nobody holds yet, and record nothing, so that no request waits for
        a compiler: all selectors that a request may name, with each size of recorder."""
        start, width = self.geometry.page_size, self.geometry.window
        device = self.scheduler.req_to_token_pool.req_to_token.device
        if self.recorder is not None:
            with self._forward_stream():
                self.recorder.warm_up(self.kernels)
        for name, selector in self._selectors.items():
            if name != self.config.selector and not self.kernels.compiles:
                continue
            sizes = {0}
            if selector.needs_queries:
                sizes = {1, self.recorder.shape.group} if self.recorder is not None else set()
            for size in sorted(sizes):
                job = WindowJob(
                    slots=torch.arange(start, start + width, dtype=torch.int32, device=device),
                    kept=self.config.kept(self.geometry.page_size),
                    selector=selector,
                    seed=0,
                    query_start=0,
                    query_count=width + self.geometry.delay,
                    pages=((0,) * len(blocks_of(0, width + self.geometry.delay)),) * size or None,
                )
                with self._forward_stream():
                    _keep_until_read(job)
                    self.kernels.compress(self._pool(), [job])

    # -- requests ----------------------------------------------------------------------------------

    def _admit(self, req: Req) -> RequestState | None:
        """Make the state of a request that is about to take its first decode step."""
        self._arrivals += 1
        options = self._options(req)
        skipped = "opt_out" if not options.enabled else _skip_reason(req)
        state = None
        if skipped is None:
            selector = self._selectors[options.selector or self.config.selector]
            prefix = prefix_of(req)
            windows = list(prefix.windows) if prefix is not None else []
            state = RequestState(
                selector=selector,
                kept=self._kept(options),
                seed=self._seed(req, options) if selector.seeded else 0,
                base=exact.first_base(req.kv, self.geometry.page_size),
                generation=self._generation(req),
                order=self._arrivals,
                removed=sum(window.freed for window in windows),
                windows=windows,
                reused=len(windows),
                shares=prefix is not None and prefix.settings is not None,
            )
        else:
            self.totals.skip(skipped)
        setattr(req, STATE, state)
        return state

    def _kept(self, options: RequestOptions) -> int:
        """R of a request with these options."""
        selector = options.selector or self.config.selector
        return self.config.kept_by(selector, self.geometry.page_size, options.retain)

    def sharing_settings(self, req: Req) -> bytes | None:
        """What decides which tokens of this request's windows are kept; None: it uses and leaves exact
        prefixes only. Requests share compressed prefixes where this is the same.

        A seed that is made from the prompt is left out: who continues a text has a longer prompt.
        """
        options = self._options(req)
        wanted = options.prefix or self.config.prefix_reuse
        if not options.enabled or wanted != "compressed" or _skip_reason(req) is not None:
            return None
        if not self.config.may_share(self._kept(options)):
            return None
        name = options.selector or self.config.selector
        seed = options.seed if self._selectors[name].seeded else None
        return repr((self.config.to_json(), name, self._kept(options), seed)).encode()

    def acts(self, running: ScheduleBatch) -> bool:
        """Whether the policy compresses anybody as things stand."""
        return self.policy.acts(lambda share: needed(self.scheduler, running, share))

    def reserve(self, req: Req, tokens: float, running: int) -> float:
        """KV slots that a running or waiting request takes for ``tokens`` still to come, at most, where
        so many requests run."""
        if hasattr(req, STATE):
            state: RequestState | None = getattr(req, STATE)
            if state is None:
                return tokens
            held, kept, base = req.kv.kv_committed_len, state.kept, state.base
        else:
            options = self._options(req)
            if not options.enabled or _skip_reason(req) is not None:
                return tokens
            held, kept = len(req.origin_input_ids) + len(req.output_ids), self._kept(options)
            base = ceil_align(held, self.geometry.page_size)
        return reserve(self.policy, self._latest, tokens, held, base, kept, running)

    def _options(self, req: Req) -> RequestOptions:
        try:
            return RequestOptions.parse(req.sampling_params.custom_params, self.config)
        except ValueError as error:
            # The launcher checks every request, so this is a fault of ours. It must not end the
            # scheduler; full KV is what can be promised to a request that asked for nonsense.
            logger.error("kv-compress: request %s slipped through unchecked: %s", req.rid, error)
            return RequestOptions(enabled=False)

    def _generation(self, req: Req) -> int:
        return int(self.scheduler.req_to_token_pool.req_generation[req.kv.req_pool_idx])

    def _seed(self, req: Req, options: RequestOptions) -> int:
        # From the prompt, by crc32: the same in every run and on every rank, which request ids and
        # hash() are not.
        prompt = zlib.crc32(array("q", req.origin_input_ids).tobytes())
        seed = self.config.seed ^ prompt if options.seed is None else options.seed
        number = self._copy_number(req, prompt)
        return zlib.crc32(f"{seed} {number}".encode()) if number else seed

    def _copy_number(self, req: Req, prompt: int) -> int:
        """Which of the ``n`` answers to its prompt a request is, from 0, in the order of admission."""
        copies = req.sampling_params.n
        if copies > 1 and not hasattr(req, COPY):
            number = self._copies.pop(prompt, 0) % copies
            setattr(req, COPY, number)
            if number + 1 < copies:
                self._copies[prompt] = number + 1
            if len(self._copies) > _MOST_PROMPTS:  # of copies that were aborted before
                del self._copies[next(iter(self._copies))]
        return getattr(req, COPY, 0)

    def forget(self, req: Req) -> None:
        """The request was retracted: its KV is gone and will be computed anew, uncompressed."""
        state = getattr(req, STATE, None)
        if state is not None:
            exact.allow_insert(req, state)
        if hasattr(req, STATE):
            delattr(req, STATE)
        forget_match(req)

    def row_freed(self, req: Req) -> None:
        """The request gives its row back (finished, aborted or retracted)."""
        state = getattr(req, STATE, None)
        if state is not None:
            if self.tracer is not None:
                self.tracer.end(req, state)
            if self.handout is not None:
                self.handout.leave(state)
            self.calendar.forget(state)
            self._ready.pop(state.order, None)
        running = self.scheduler.running_batch.reqs
        if not any(other is not req and other.kv.holds_kv for other in running):
            self.export(leaving=req)  # the last one leaves; a pass or a log line exports otherwise

    # -- one decode step ---------------------------------------------------------------------------

    def before_decode(self, batch: ScheduleBatch) -> None:
        """Compress what is due, then hand out recorders for windows that begin.

        Called before SGLang's memory check and before it prepares the decode step, so that freed pages
        can spare a retraction.
        """
        self.graphs.step(len(batch.reqs))
        looked_at = self.calendar.next_step() + self._newcomers(batch)
        for req, state in looked_at:
            if req.kv.kv_committed_len >= self._ready_at(state):
                self._ready[state.order] = req, state
        due = self._due(batch)
        if self.config.debug_checks:
            self._check_ranks_agree(due)
        if due:
            self._compress(batch, due)
            self._sizes = None
            for req, state in due:
                if req.kv.kv_committed_len < self._ready_at(state):
                    del self._ready[state.order]
        self.latch.step(batch, passed=bool(due))
        if self.handout is not None:
            self._hand_out(due, looked_at)
        for req, state in looked_at + due:
            self._make_date(req, state)

    def _newcomers(self, batch: ScheduleBatch) -> list[tuple[Req, RequestState]]:
        """Those that decode for the first time. SGLang appends them to its batch
        (``ScheduleBatch.merge_batch``), and keeps the order when others leave."""
        new = list(itertools.takewhile(lambda req: not hasattr(req, STATE), reversed(batch.reqs)))
        admitted = [(req, self._admit(req)) for req in reversed(new)]
        return [(req, state) for req, state in admitted if state is not None]

    def _ready_at(self, state: RequestState) -> int:
        """KV length from which on the policy may take the request's next window."""
        return max(state.due_at(self.geometry), self.policy.floor)

    def _make_date(self, req: Req, state: RequestState) -> None:
        """Look again when a window is due, when one begins that wants a recorder, or when a recorder
        needs another page. Who is ready needs no date for the first: it is made when the window has
        been taken."""
        kv_len = req.kv.kv_committed_len
        dates = [self._ready_at(state) - kv_len]
        if state.recorder is not None:
            dates.append(PAGE - (kv_len + state.removed) % PAGE)
        elif self.handout is not None and state.selector.needs_queries:
            dates.append(state.next_window(kv_len, self.geometry) or self.geometry.window)
        dates = [steps for steps in dates if steps > 0]
        if dates:
            self.calendar.look_in(min(dates), req, state)

    def _due(self, batch: ScheduleBatch) -> list[tuple[Req, RequestState]]:
        """Whose window is compressed in this step, as the policy says."""
        sizes = len(batch.reqs), len(self.scheduler.waiting_queue)
        if self._ready and (sizes != self._sizes or self.calendar.step % LOOK_EVERY == 0):
            self._acting, self._sizes = self.acts(batch), sizes
        ready = [one for one in self._ready.values() if _goes_on(one[0])] if self._acting else []
        candidates = [self._candidate(index, *one) for index, one in enumerate(ready)]
        urgent = bool(ready) and short_of_slots(self.scheduler, batch)
        return [ready[index] for index in self.policy.due(candidates, urgent=urgent)]

    def _candidate(self, index: int, req: Req, state: RequestState) -> Candidate:
        kv_len = req.kv.kv_committed_len
        return Candidate(
            index=index,
            order=state.order,
            kv_len=kv_len,
            overdue=kv_len - state.due_at(self.geometry),
            uncompressed=state.uncompressed(kv_len),
            gain=self.geometry.window - state.kept,
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
            if state.next_window(kv_len, self.geometry) > 0:
                continue
            if self._falls_due(req, kv_len + self.geometry.window + self.geometry.delay):
                asking.append((req, state))
            else:
                self.handout.withdraw(state)
        if asking:
            self.handout.ask(asking, self.calendar.step)
        if self.recorder.stale:
            with self._forward_stream():
                self.recorder.flush()

    def _falls_due(self, req: Req, due_at: int) -> bool:
        """Whether the row can become so long before the request ends."""
        left = req.sampling_params.max_new_tokens - len(req.output_ids)
        return req.kv.kv_committed_len + left >= due_at

    def _voters(self, state: RequestState) -> Voters:
        """Whose queries choose the request's next window."""
        if state.recorder is None:
            return "none"
        return self.recorder.voters(state.recorder, state.base + state.removed)

    # -- the pass ----------------------------------------------------------------------------------

    def _compress(self, batch: ScheduleBatch, due: list[tuple[Req, RequestState]]) -> None:
        started = time.perf_counter()
        places = {id(req): index for index, req in enumerate(batch.reqs)}
        geometry = self.geometry
        jobs: list[WindowJob] = []
        freed = torch.zeros_like(batch.seq_lens_cpu)
        to_free: list[tuple[torch.Tensor, int]] = []
        without_queries = 0

        for req, state in due:
            index = places.get(id(req))
            if index is None:
                raise RuntimeError(f"kv-compress: request {req.rid} is no longer in the running batch")
            if self._generation(req) != state.generation:
                raise RuntimeError(f"kv-compress: the row of request {req.rid} has a new owner")
            state.check(geometry, req.kv.kv_committed_len, req.kv.cache_protected_len)
            self._check_lengths(batch, index, req, state)
            voters = self._voters(state)
            lacks_queries = state.selector.needs_queries and voters == "none"
            slots = self._splice(batch, req, state)
            seed = state.seed + 1_000_003 * len(state.windows)
            start, count = state.base + state.removed, geometry.window + geometry.delay
            pages = None
            if voters != "none":
                pages = self.recorder.pages_of(state.recorder, start, count)
            jobs.append(
                WindowJob(
                    slots=slots,
                    kept=state.kept,
                    selector=self._without_queries if lacks_queries else state.selector,
                    seed=seed,
                    query_start=start,
                    query_count=count,
                    pages=pages,
                )
            )
            to_free.append((slots[state.kept :], state.base + state.kept))
            if not state.shares and state.kept < geometry.window:
                exact.bar_insert(req, state)
            window = state.commit(geometry, _mark(state, voters, seed))
            state.voted += voters != "none"
            without_queries += lacks_queries
            req.kv.kv_committed_len -= window.freed
            req.kv.kv_allocated_len -= window.freed
            freed[index] = window.freed

        with self._forward_stream():
            for job in jobs:
                _keep_until_read(job)
            if self.recorder is not None and (check := self.recorder.check) is not None:
                for (req, _), job in zip(due, jobs, strict=True):
                    if job.pages is not None:
                        check.require(req.rid, job.pages, job.query_start, job.query_count)
            shown = self.config.debug_checks or self.tracer is not None
            kept = self.kernels.compress(self._pool(), jobs, positions=shown)
            if self.config.debug_checks:
                _check_kept(kept, jobs, geometry.page_size)
            if self.tracer is not None:
                self.tracer.add([state for _, state in due], kept)

        # Rebound, never written in place: overlap scheduling keeps older batches in flight.
        batch.seq_lens = batch.seq_lens - to_device(freed, batch.seq_lens.device)
        batch.seq_lens_cpu = batch.seq_lens_cpu - freed
        batch.seq_lens_sum = None
        allocator = self.scheduler.token_to_kv_pool_allocator
        allocator.free_group_begin()  # one release for all windows: each copies the free list
        for slots, start in to_free:
            # free_segment, because plain free() of the paged allocator synchronises.
            allocator.free_segment(slots, start_pos=start)
        allocator.free_group_end()
        seconds = time.perf_counter() - started
        self.totals.add_pass(len(due), without_queries, int(freed.sum()), seconds)
        self.export()

    def _splice(self, batch: ScheduleBatch, req: Req, state: RequestState) -> torch.Tensor:
        """Cut the window's last W - R slots out of the row; returns all W slots, in token order.

        Only the page table moves: the tail behind the window keeps its K/V where it is.
        """
        row = batch.req_to_token_pool.req_to_token[req.kv.req_pool_idx]
        end = state.base + self.geometry.window
        slots = row[state.base : end].clone()  # a slice of the row is a view
        tail = row[end : req.kv.kv_committed_len].clone()
        row[state.base + state.kept : state.base + state.kept + tail.shape[0]] = tail
        return slots

    def _check_lengths(self, batch: ScheduleBatch, index: int, req: Req, state: RequestState) -> None:
        committed, allocated = req.kv.kv_committed_len, req.kv.kv_allocated_len
        in_batch = int(batch.seq_lens_cpu[index])
        if not committed == allocated == in_batch:
            raise RuntimeError(
                f"kv-compress: request {req.rid} has committed {committed}, allocated {allocated}, "
                f"in the batch {in_batch} KV slots; they must agree before a pass"
            )
        if self.config.debug_checks:
            ahead = int(batch.orig_seq_lens[index]) - int(batch.seq_lens[index])
            if ahead != state.removed or int(batch.seq_lens[index]) != in_batch:
                raise RuntimeError(
                    f"kv-compress: request {req.rid}: logical length is {ahead} ahead of its "
                    f"{int(batch.seq_lens[index])} KV slots, {state.removed} were removed"
                )

    def _check_ranks_agree(self, due: list[tuple[Req, RequestState]]) -> None:
        """All tensor-parallel ranks are about to take the same windows of the same requests. Every rank
        asks in every step: one that asked only where something is due would wait for the others."""
        scheduler = self.scheduler
        if scheduler.tp_size == 1:
            return
        taken = [(req.rid, state.base) for req, state in due]
        mine = zlib.crc32(repr(taken).encode())
        bounds = torch.tensor([mine, -mine])
        torch.distributed.all_reduce(
            bounds, op=torch.distributed.ReduceOp.MAX, group=scheduler.tp_cpu_group
        )
        if bounds.tolist() != [mine, -mine]:
            raise RuntimeError(f"kv-compress: tensor-parallel ranks disagree; this one takes {taken}")

    def _pool(self) -> LayerPool:
        """The same object as long as SGLang's buffers are the same."""
        pool = self.scheduler.token_to_kv_pool_allocator.get_kvcache()
        known = self._layers
        if known is None or known.keys is not pool.k_buffer or known.values is not pool.v_buffer:
            recorder = self.recorder
            self._layers = known = LayerPool(
                keys=pool.k_buffer,
                values=pool.v_buffer,
                rings=recorder.rings if recorder is not None else [],
                scales=self.scales,
                turn=self.turn,
            )
        return known

    @contextlib.contextmanager
    def _forward_stream(self) -> Iterator[None]:
        """Run behind the step in flight, whose attention still reads K/V and writes queries."""
        scheduler = self.scheduler
        if not scheduler.enable_overlap:
            yield
            return
        current = scheduler.device_module.current_stream()
        with scheduler.forward_stream_ctx:
            scheduler.forward_stream.wait_stream(current)
            yield

    # -- what others ask ---------------------------------------------------------------------------

    def held(self, leaving: Req | None = None) -> tuple[int, int]:
        """KV slots held by the running requests but ``leaving``, and their logical length in tokens."""
        physical = gone = 0
        for req in self.scheduler.running_batch.reqs:
            if req is not leaving and req.kv.holds_kv:
                physical += req.kv.kv_committed_len
                gone += removed(req)
        return physical, physical + gone

    def export(self, leaving: Req | None = None) -> None:
        """Bring the Prometheus metrics up to date, where they are on."""
        if self.metrics is not None:
            recorders = self.recorder.in_use if self.recorder is not None else 0
            self.metrics.update(self.totals, recorders, *self.held(leaving))


def _mark(state: RequestState, voters: Voters, seed: int) -> str:
    """Names what decides which tokens the next window keeps and no setting says: two windows that
    differ in it are two windows to the prefix cache."""
    if state.selector.seeded:
        return f"seed {seed}"
    return voters if state.selector.needs_queries else ""


def _keep_until_read(job: WindowJob) -> None:
    """Tell the allocator that the current stream reads a tensor that another stream has made."""
    if job.slots.is_cuda:
        job.slots.record_stream(torch.cuda.current_stream())


def _goes_on(req: Req) -> bool:
    """Whether the request outlives the step in flight; otherwise its window would be compressed for
    nothing."""
    if req.finished() or req.to_finish is not None:
        return False
    return not req.next_output_finishes_by_length()


def _skip_reason(req: Req) -> str | None:
    """Why a request is never compressed, or None."""
    if req.beam_group is not None:
        return "beam"
    if req.multimodal_inputs is not None:
        return "multimodal"
    return None


def _check_kept(kept: list[torch.Tensor], jobs: list[WindowJob], page_size: int) -> None:
    for chosen, job in zip(kept, jobs, strict=True):
        width = job.slots.shape[0]
        ascending = bool((chosen.diff(dim=-1) > 0).all())
        inside = bool((chosen >= 0).all()) and bool((chosen < width).all())
        if chosen.shape[-1] != job.kept or not ascending or not inside:
            raise RuntimeError(
                f"kv-compress: selection must be {job.kept} strictly ascending positions in "
                f"[0, {width}), got shape {tuple(chosen.shape)}, ascending {ascending}, inside {inside}"
            )
        pages = job.slots.view(-1, page_size)
        whole = pages[:, :1] + torch.arange(page_size, device=pages.device)
        if not bool((pages == whole).all()) or bool((pages[:, 0] % page_size).any()):
            raise RuntimeError("kv-compress: a window does not consist of whole pages")
        if pages[:, 0].unique().numel() != len(pages):
            raise RuntimeError("kv-compress: a window holds the same page twice")
