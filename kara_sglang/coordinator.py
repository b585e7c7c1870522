"""The compaction pass: runs inside SGLang's scheduler, before each decode step.

Data flows one way: recorder -> selector -> Token2Chunk -> compaction -> page table -> lengths ->
allocator. The only values that come back from the device are none: exactly R of W tokens are kept, so
every length, page-table edit and freed slot is known on the host beforehand.
"""

from __future__ import annotations

import contextlib
import logging
import time
import zlib
from array import array
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from kara_sglang import policy
from kara_sglang.admission import Forecast, needed, short_of_slots
from kara_sglang.config import KaraConfig
from kara_sglang.kernels import selectors
from kara_sglang.kernels.backend import Kernels, LayerPool, WindowJob
from kara_sglang.kernels.copies import to_device
from kara_sglang.kernels.turn import Turn
from kara_sglang.metrics import Metrics
from kara_sglang.options import RequestOptions
from kara_sglang.policy import Candidate
from kara_sglang.radix_integration import exact
from kara_sglang.radix_integration.prefix import forget_match, prefix_of, removed
from kara_sglang.recorder import QueryRecorder
from kara_sglang.state import STATE, Geometry, RequestState
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
        self.forecast = Forecast(self.geometry)
        self.totals = Totals()
        context = scheduler.metrics_collector_context
        self.metrics: Metrics | None = None
        if context.current_scheduler_metrics_enabled:
            self.metrics = Metrics(context.collector.labels)
        self.tracer = Tracer(scheduler, config) if config.trace is not None else None
        self._selectors = {name: selectors.build(name, config) for name in selectors.REGISTRY}
        self._arrivals = 0
        self._copies: dict[int, int] = {}  # admitted so far, by prompt
        self._acting = False  # whether the policy does, in this decode step
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
                units = torch.arange(size, device=device)
                job = WindowJob(
                    slots=torch.arange(start, start + width, dtype=torch.int32, device=device),
                    kept=self.config.kept(self.geometry.page_size),
                    selector=selector,
                    seed=0,
                    query_start=0,
                    query_count=width + self.geometry.delay,
                    units=units.clamp(max=self.recorder.num_units - 1) if size else None,
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
        if self._selectors[options.selector or self.config.selector].keeps_all:
            return self.config.window
        return self.config.kept(self.geometry.page_size, options.retain)

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

    def reserve(self, req: Req, tokens: float) -> float:
        """KV slots that a running or waiting request takes for ``tokens`` still to come, at most."""
        if hasattr(req, STATE):
            state: RequestState | None = getattr(req, STATE)
            if state is None or state.waits_for_recorder():
                return tokens
            kv_len = req.kv.kv_committed_len
            return self.forecast.growth(tokens, state.uncompressed(kv_len), state.kept)
        options = self._options(req)
        if not options.enabled or _skip_reason(req) is not None:
            return tokens
        return self.forecast.growth(tokens, 0, self._kept(options))

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
            self._drop_recorder(req, state)
        running = self.scheduler.running_batch.reqs
        if not any(other is not req and other.kv.holds_kv for other in running):
            self.export(leaving=req)  # the last one leaves; a pass or a log line exports otherwise

    def _drop_recorder(self, req: Req, state: RequestState) -> None:
        if state.recorder is not None:
            self.recorder.release(state.recorder)
            state.recorder = None
        elif state.selector.needs_queries:
            width = self.geometry.window
            whole = state.uncompressed(req.kv.kv_committed_len) // width * width
            self._lose(state, "no_recorder", state.base + whole)

    def _lose(self, state: RequestState, reason: str, kv_len: int) -> None:
        """The next window begins at ``kv_len`` or later; what lies before it stays uncompressed."""
        width = self.geometry.window
        state.passed_over += state.start_window_at(kv_len, self.geometry)
        windows, state.passed_over = divmod(state.passed_over, width)
        if self._acting:  # else nobody meant to compress them
            self.totals.skip(reason, windows)
            self.forecast.observe(windows * (width - state.kept), 0)

    # -- one decode step ---------------------------------------------------------------------------

    def before_decode(self, batch: ScheduleBatch) -> None:
        """Compress what is due, then hand out recorders for what comes next.

        Called before SGLang's memory check and before it prepares the decode step, so that freed pages
        can spare a retraction.
        """
        self._acting = self.acts(batch)
        ready: list[Candidate] = []
        waiting: list[Candidate] = []
        for index, req in enumerate(batch.reqs):
            state = getattr(req, STATE) if hasattr(req, STATE) else self._admit(req)
            if state is None:
                continue
            if state.waits_for_recorder():
                if self._has_use_for_recorder(req, state):
                    waiting.append(self._candidate(index, req, state))
            elif req.kv.kv_committed_len >= state.due_at(self.geometry) and _goes_on(req):
                ready.append(self._candidate(index, req, state))
        ready = ready if self._acting else []
        due = self.policy.due(ready, urgent=bool(ready) and short_of_slots(self.scheduler, batch))
        if self.config.debug_checks:
            self._check_ranks_agree(batch, due)
        if due:
            self._compress(batch, due)
        if self.recorder is not None:
            waiting += self._pass_recorders_on(batch, due, len(waiting))
            if waiting:
                self._assign_recorders(batch, waiting)
            if self.recorder.stale:
                with self._forward_stream():
                    self.recorder.flush()

    def _candidate(self, index: int, req: Req, state: RequestState) -> Candidate:
        kv_len = req.kv.kv_committed_len
        if state.recorder is not None and kv_len - state.due_at(self.geometry) > self.recorder.lag:
            # The ring has come round: the first window that it still covers is the next one now.
            self._lose(state, "late", kv_len - self.recorder.ring_len)
        return Candidate(
            index=index,
            order=state.order,
            kv_len=kv_len,
            overdue=kv_len - state.due_at(self.geometry),
            uncompressed=state.uncompressed(kv_len),
            gain=self.geometry.window - state.kept,
        )

    def _has_use_for_recorder(self, req: Req, state: RequestState) -> bool:
        left = req.sampling_params.max_new_tokens - len(req.output_ids)
        return state.can_fill_a_window(req.kv.kv_committed_len, left, self.geometry)

    def _pass_recorders_on(
        self, batch: ScheduleBatch, compressed: list[int], num_waiting: int
    ) -> list[Candidate]:
        """Who has just been compressed gives the recorder back where it is of no more use to it, and,
        to queue for another, while others wait in vain.

        Returns
        -------
        list of Candidate
            Those that queue now.
        """
        cheapest = policy.cheapest(self.recorder.shape.group, self.config.query_heads)
        queue = []
        for index in compressed:
            req = batch.reqs[index]
            state: RequestState = getattr(req, STATE)
            if state.recorder is None:
                continue
            useful = self._has_use_for_recorder(req, state)
            if useful and num_waiting * cheapest <= self.recorder.free_units:
                continue
            self.recorder.release(state.recorder)
            state.recorder = None
            if useful:
                queue.append(self._candidate(index, req, state))
        return queue

    def _assign_recorders(self, batch: ScheduleBatch, waiting: list[Candidate]) -> None:
        group, heads = self.recorder.shape.group, self.config.query_heads
        for index, num_units in policy.grants(waiting, self.recorder.free_units, group, heads):
            req = batch.reqs[index]
            state: RequestState = getattr(req, STATE)
            kv_len = req.kv.kv_committed_len
            self._lose(state, "no_recorder", kv_len)
            # The step that is prepared next computes the query at this position.
            state.recorder = self.recorder.acquire(
                req.kv.req_pool_idx, num_units, kv_len + state.removed
            )

    # -- the pass ----------------------------------------------------------------------------------

    def _compress(self, batch: ScheduleBatch, due: list[int]) -> None:
        started = time.perf_counter()
        geometry = self.geometry
        jobs: list[WindowJob] = []
        freed = torch.zeros_like(batch.seq_lens_cpu)
        to_free: list[tuple[torch.Tensor, int]] = []
        windows = 0

        for index in due:
            req = batch.reqs[index]
            state: RequestState = getattr(req, STATE)
            start = state.base + state.removed
            if state.recorder is not None and not self.recorder.covers(
                state.recorder, start, req.kv.kv_committed_len + state.removed
            ):
                raise RuntimeError(
                    f"kv-compress: queries of the window at {start} of request {req.rid} are no "
                    "longer in the ring"
                )
            if self._generation(req) != state.generation:
                raise RuntimeError(f"kv-compress: the row of request {req.rid} has a new owner")
            state.check(geometry, req.kv.kv_committed_len, req.kv.cache_protected_len)
            self._check_lengths(batch, index, req, state)
            slots = self._splice(batch, req, state)
            seed = state.seed + 1_000_003 * len(state.windows)
            jobs.append(
                WindowJob(
                    slots=slots,
                    kept=state.kept,
                    selector=state.selector,
                    seed=seed,
                    query_start=start,
                    query_count=geometry.window + geometry.delay,
                    units=self.recorder.units_of(state.recorder)
                    if state.selector.needs_queries
                    else None,
                )
            )
            to_free.append((slots[state.kept :], state.base + state.kept))
            if not state.shares and state.kept < geometry.window:
                exact.bar_insert(req, state)
            window = state.commit(geometry, self._mark(state, seed))
            req.kv.kv_committed_len -= window.freed
            req.kv.kv_allocated_len -= window.freed
            self.forecast.observe(window.freed, window.freed)
            freed[index] = window.freed
            windows += 1

        with self._forward_stream():
            for job in jobs:
                _keep_until_read(job)
            shown = self.config.debug_checks or self.tracer is not None
            kept = self.kernels.compress(self._pool(), jobs, positions=shown)
            if self.config.debug_checks:
                _check_kept(kept, jobs, geometry.page_size)
            if self.tracer is not None:
                self.tracer.add([getattr(batch.reqs[index], STATE) for index in due], kept)

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
        self.totals.add_pass(windows, int(freed.sum()), time.perf_counter() - started)
        self.export()

    def _mark(self, state: RequestState, seed: int) -> str:
        """Names what decides which tokens the next window keeps and no setting says: two windows that
        differ in it are two windows to the prefix cache."""
        if state.selector.seeded:
            return f"seed {seed}"
        if not state.selector.needs_queries:
            return ""
        return "all" if len(state.recorder.units) == self.recorder.shape.group else "mean"

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

    def _check_ranks_agree(self, batch: ScheduleBatch, due: list[int]) -> None:
        """All tensor-parallel ranks are about to take the same windows of the same requests. Every rank
        asks in every step: one that asked only where something is due would wait for the others."""
        scheduler = self.scheduler
        if scheduler.tp_size == 1:
            return
        taken = [(batch.reqs[i].rid, getattr(batch.reqs[i], STATE).base) for i in due]
        mine = zlib.crc32(repr(taken).encode())
        bounds = torch.tensor([mine, -mine])
        torch.distributed.all_reduce(
            bounds, op=torch.distributed.ReduceOp.MAX, group=scheduler.tp_cpu_group
        )
        if bounds.tolist() != [mine, -mine]:
            raise RuntimeError(f"kv-compress: tensor-parallel ranks disagree; this one takes {taken}")

    def _pool(self) -> LayerPool:
        pool = self.scheduler.token_to_kv_pool_allocator.get_kvcache()
        recorder = self.recorder
        return LayerPool(
            keys=list(pool.k_buffer),
            values=list(pool.v_buffer),
            rings=recorder.rings if recorder is not None else [],
            ring_len=recorder.ring_len if recorder is not None else 0,
            scales=self.scales,
            turn=self.turn,
        )

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


def _keep_until_read(job: WindowJob) -> None:
    """Tell the allocator that the current stream reads tensors that another stream has made."""
    for tensor in (job.slots, job.units):
        if tensor is not None and tensor.is_cuda:
            tensor.record_stream(torch.cuda.current_stream())


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
