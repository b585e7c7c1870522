"""One pass over the windows that are due: check, splice, compress, shorten, free.

Data flows one way: recorder -> selector -> Token2Chunk -> compaction -> page table -> lengths ->
allocator. Nothing comes back from the device: exactly R of W tokens are kept, so every length,
page-table edit and freed slot is known on the host beforehand.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kara_sglang.config import KaraConfig
from kara_sglang.kernels import selectors
from kara_sglang.kernels.backend import Kernels, LayerPool, WindowJob
from kara_sglang.kernels.record import any_pages
from kara_sglang.kernels.rope_shift import RopeShift
from kara_sglang.kernels.selectors import Selector
from kara_sglang.radix_integration import exact
from kara_sglang.radix_integration.row import Geometry, RequestState, Voters, Window
from kara_sglang.scheduler import window_pool
from kara_sglang.scheduler.drafts import Drafts
from kara_sglang.scheduler.lengths import Lengths
from kara_sglang.scheduler.ring.recorder import QueryRecorder
from kara_sglang.scheduler.streams import forward_stream, keep_until_read
from kara_sglang.scheduler.tracer import Tracer

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool


@dataclass(frozen=True, slots=True)
class Pass:
    """What a pass has done.

    Attributes
    ----------
    windows
        How many it took; of these, ``without_queries`` had none though their selector asks for them.
    slots_freed
        KV slots.
    seconds
        Of the host.
    """

    windows: int
    without_queries: int
    slots_freed: int
    seconds: float


@dataclass(frozen=True, slots=True)
class _Taken:
    """A window that this pass takes."""

    place: int  # of its request in the batch
    req: Req
    state: RequestState
    window: Window
    job: WindowJob
    alone: int  # of the slots that it frees, without a partner (``scheduler/window_pool.py``)


class Compaction:
    """The passes of one scheduler.

    Parameters
    ----------
    scheduler : Scheduler
        SGLang's, after its ``__init__``.
    config : KaraConfig
    recorder : QueryRecorder
        Without pages where the settings leave no memory for queries.
    kernels : Kernels
    scales : callable
        Gives the softmax scale of each layer (``scales.py``).
    rope_shift : RopeShift or None
        How queries are moved ahead; None where the settings do not ask for it.
    drafts : sequence of MHATokenToKVPool
        Pools of draft models; a token has the same slot in all of them.
    layers : sequence of int
        Numbers in the KV pool of the layers that a pass works over; None: all.
    reach : int
        Tokens before its own that the others see, at most (``compat/sliding_window.py``).
    """

    def __init__(
        self,
        scheduler: Scheduler,
        config: KaraConfig,
        recorder: QueryRecorder,
        kernels: Kernels,
        scales: Callable[[], list[float]],
        rope_shift: RopeShift | None,
        drafts: Sequence[MHATokenToKVPool] = (),
        layers: Sequence[int] | None = None,
        reach: int = 0,
    ) -> None:
        self.scheduler = scheduler
        self.recorder = recorder
        self.kernels = kernels
        self.scales = scales
        self.rope_shift = rope_shift
        self.drafts = Drafts(drafts, kernels)
        self.layers = layers
        self.reach = reach
        self.windowed = window_pool.is_used(scheduler)
        self.lengths = Lengths(scheduler, recorder.pace)
        self.geometry = Geometry(scheduler.page_size, config.window, config.delay)
        self.debug_checks = config.debug_checks
        self.tracer = Tracer(scheduler, config) if config.trace is not None else None
        self._without_queries = selectors.build("keys", config)
        self._layers: LayerPool | None = None
        self._buffers: tuple[list[torch.Tensor], ...] = ()  # SGLang's, of which these are views

    def warm_up(self, each: Iterable[Selector], kept: int) -> None:
        """Run passes over slots that nobody holds yet, and record nothing, so that no request waits for
        a compiler: each selector, with each size of recorder, and R ``kept``."""
        start, count = self.geometry.page_size, self.geometry.window + self.geometry.delay
        device = self.scheduler.req_to_token_pool.req_to_token.device
        with forward_stream(self.scheduler):
            self.recorder.warm_up(self.kernels)
        for selector in each:
            sizes = self.recorder.sizes if selector.needs_queries else (0,)
            for size in sizes:
                job = WindowJob(
                    slots=torch.arange(
                        start, start + self.geometry.window, dtype=torch.int32, device=device
                    ),
                    kept=kept,
                    selector=selector,
                    seed=0,
                    query_start=0,
                    query_count=count,
                    pages=any_pages(0, count, size),
                )
                with forward_stream(self.scheduler):
                    keep_until_read(job.slots)
                    drafts = bool(self.drafts)
                    for chosen in self.kernels.compress(self._pool(), [job], positions=drafts) or ():
                        self.drafts.follow(job, chosen)

    def run(self, batch: ScheduleBatch, due: Sequence[tuple[Req, RequestState]]) -> Pass:
        """Compress the next windows of these requests, which run in ``batch``: one for each time that a
        request is named.

        Raises
        ------
        RuntimeError
            Where an invariant does not hold.
        """
        started = time.perf_counter()
        places = self._check(batch, due)
        taken = [self._splice(batch, places[id(req)], req, state) for req, state in due]
        self._compress(taken)
        self._shorten(batch, taken)
        self._free(taken)
        without_queries = sum(
            each.state.selector.needs_queries and each.job.pages is None for each in taken
        )
        freed = sum(each.window.freed for each in taken)
        return Pass(len(taken), without_queries, freed, time.perf_counter() - started)

    # -- check -------------------------------------------------------------------------------------

    def generation(self, req: Req) -> int:
        """Of the request's row; a new owner has another one."""
        return int(self.scheduler.req_to_token_pool.req_generation[req.kv.req_pool_idx])

    def _check(self, batch: ScheduleBatch, due: Sequence[tuple[Req, RequestState]]) -> dict[int, int]:
        """Where the requests of the batch are in it, by ``id``."""
        places = {id(req): place for place, req in enumerate(batch.reqs)}
        for req, state in due:
            place = places.get(id(req))
            if place is None:
                raise RuntimeError(f"kv-compress: request {req.rid} is no longer in the running batch")
            if self.generation(req) != state.generation:
                raise RuntimeError(f"kv-compress: the row of request {req.rid} has a new owner")
            self._check_lengths(batch, place, req, state)
        return places

    def _check_lengths(self, batch: ScheduleBatch, place: int, req: Req, state: RequestState) -> None:
        committed, allocated = req.kv.kv_committed_len, req.kv.kv_allocated_len
        agree = allocated >= committed if self.lengths.pace.speculates else allocated == committed
        # A batch behind which a step is in flight gets its lengths from that step.
        in_batch = committed if self.lengths.pace.behind else int(batch.seq_lens_cpu[place])
        if not agree or in_batch != committed:
            raise RuntimeError(
                f"kv-compress: request {req.rid} has committed {committed}, allocated {allocated}, "
                f"in the batch {in_batch} KV slots; they must agree before a pass"
            )
        if self.debug_checks:
            lacks = int(self.lengths.removed[req.kv.req_pool_idx])
            held = committed if self.lengths.pace.behind else int(batch.seq_lens[place])
            if lacks != state.removed or held != committed:
                raise RuntimeError(
                    f"kv-compress: request {req.rid}: on the device its row has {held} slots and lacks "
                    f"{lacks} tokens; it has {committed}, and {state.removed} were removed"
                )
            if self.windowed:
                row = batch.req_to_token_pool.req_to_token[req.kv.req_pool_idx]
                pool = self.scheduler.token_to_kv_pool_allocator.get_kvcache()
                window_pool.check_seen(pool, row, committed, self.reach)

    def check_ranks_agree(self, due: Sequence[tuple[Req, RequestState]]) -> None:
        """All ranks that share these requests are about to take the same windows of them. Every rank
        asks in every step: one that asked only where something is due would wait for the others. With
        DP attention other ranks have other requests."""
        ranks = self.scheduler.attn_tp_group
        if ranks.world_size == 1:
            return
        taken = [(req.rid, state.base) for req, state in due]
        mine = zlib.crc32(repr(taken).encode())
        bounds = torch.tensor([mine, -mine])
        torch.distributed.all_reduce(bounds, op=torch.distributed.ReduceOp.MAX, group=ranks.cpu_group)
        if bounds.tolist() != [mine, -mine]:
            raise RuntimeError(f"kv-compress: tensor-parallel ranks disagree; this one takes {taken}")

    # -- splice ------------------------------------------------------------------------------------

    def _splice(self, batch: ScheduleBatch, place: int, req: Req, state: RequestState) -> _Taken:
        """Cut the next window's last W - R slots out of the row, and account for it in the state and in
        the request's lengths.

        Only the page table moves: the tail behind the window keeps its K/V where it is. What SGLang has
        allocated for drafts belongs to the tail.
        """
        state.check(self.geometry, req.kv.kv_committed_len, req.kv.cache_protected_len)
        row = batch.req_to_token_pool.req_to_token[req.kv.req_pool_idx]
        base, kept, end = state.base, state.kept, state.base + self.geometry.window
        slots = row[base:end].clone()  # a slice of the row is a view
        voters = self._voters(state)
        job = self._job(state, voters, slots)

        tail = row[end : req.kv.kv_allocated_len].clone()
        row[base + kept : base + kept + tail.shape[0]] = tail
        if not state.shares and kept < self.geometry.window:
            exact.bar_insert(req, state)
        alone = window_pool.cut(req.kv, base + kept, end) if self.windowed else 0
        window = state.commit(self.geometry, _mark(state, voters, job.seed))
        state.voted += job.pages is not None
        req.kv.kv_committed_len -= window.freed
        req.kv.kv_allocated_len -= window.freed
        return _Taken(place, req, state, window, job, alone)

    def _voters(self, state: RequestState) -> Voters:
        """Whose queries choose the request's next window."""
        if state.recorder is None:
            return "none"
        return self.recorder.voters(state.recorder, state.base + state.removed)

    def _job(self, state: RequestState, voters: Voters, slots: torch.Tensor) -> WindowJob:
        start, count = state.base + state.removed, self.geometry.window + self.geometry.delay
        pages, selector = None, state.selector
        if state.recorder is not None and voters != "none":
            pages = self.recorder.pages_of(state.recorder, start, count)
        elif selector.needs_queries:
            selector = self._without_queries
        return WindowJob(
            slots=slots,
            kept=state.kept,
            selector=selector,
            seed=state.seed + 1_000_003 * len(state.windows),
            query_start=start,
            query_count=count,
            pages=pages,
        )

    # -- compress ----------------------------------------------------------------------------------

    def _compress(self, taken: Sequence[_Taken]) -> None:
        """Score, select and compact on the device."""
        jobs = [each.job for each in taken]
        shown = self.debug_checks or self.tracer is not None
        with forward_stream(self.scheduler):
            for each in taken:
                keep_until_read(each.job.slots)
                if self.recorder.check is not None and each.job.pages is not None:
                    self.recorder.check.require(
                        each.req.rid, each.job.pages, each.job.query_start, each.job.query_count
                    )
            kept = self.kernels.compress(self._pool(), jobs, positions=shown or bool(self.drafts))
            if kept is None:
                return
            for job, chosen in zip(jobs, kept, strict=True):
                self.drafts.follow(job, chosen)
            if not shown:
                return
            if self.debug_checks:
                _check_kept(kept, jobs, self.geometry.page_size)
            if self.tracer is not None:
                self.tracer.add([(each.state, each.window) for each in taken], kept)

    def _pool(self) -> LayerPool:
        """The same object as long as SGLang's buffers and the scales are the same."""
        pool = window_pool.full_pool(self.scheduler.token_to_kv_pool_allocator.get_kvcache())
        buffers, scales, known = (pool.k_buffer, pool.v_buffer), self.scales(), self._layers
        anew = [id(part) for part in buffers] != [id(part) for part in self._buffers]
        if known is None or anew or known.scales != scales:
            self._buffers = buffers
            every = range(len(pool.k_buffer)) if self.layers is None else self.layers
            # 8-bit floats are kept as bytes (``KVCache.store_dtype``).
            keys, values = ([parts[layer].view(pool.dtype) for layer in every] for parts in buffers)
            self._layers = known = LayerPool(
                keys=keys,
                values=values,
                rings=self.recorder.rings if self.recorder.num_pages else [],
                scales=scales,
                rope_shift=self.rope_shift,
            )
        return known

    # -- shorten, free -----------------------------------------------------------------------------

    def _shorten(self, batch: ScheduleBatch, taken: Sequence[_Taken]) -> None:
        """Bring the batch's lengths and the rows' positions up to date."""
        freed: dict[int, int] = {}
        for each in taken:
            freed[each.place] = freed.get(each.place, 0) + each.window.freed
        self.lengths.shorten(batch, freed)
        self.lengths.lacks((each.req.kv.req_pool_idx, each.state.removed) for each in taken)

    def _free(self, taken: Sequence[_Taken]) -> None:
        """Give whole pages back."""
        allocator = self.scheduler.token_to_kv_pool_allocator
        allocator.free_group_begin()  # one release for all windows: each copies the free list
        for each in taken:
            kept = each.job.kept
            # By segments, because plain free() of the paged allocator synchronises.
            slots, start = each.job.slots[kept:], each.window.kv_start + kept
            window_pool.free(allocator, slots, start, each.alone)
        allocator.free_group_end()


def _mark(state: RequestState, voters: Voters, seed: int) -> str:
    """Names what decides which tokens the next window keeps and no setting says: two windows that
    differ in it are two windows to the prefix cache."""
    if state.selector.seeded:
        return f"seed {seed}"
    return voters if state.selector.needs_queries else ""


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
