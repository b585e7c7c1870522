"""A scheduler process with the real coordinator, and the model that says what must be in it.

The model knows which slots a request's row holds, which token's K/V lies there for each layer and head,
and which pages are free. Of the code under test it is told one thing: which windows were taken.
"""

from __future__ import annotations

import math
from collections import Counter
from random import Random
from types import SimpleNamespace
from typing import Any

import torch
from stand_ins import (
    DIM,
    GROUP,
    KV_HEADS,
    LAYERS,
    ROWS,
    SCALES,
    TURN,
    PagedAllocator,
    Prefix,
    Request,
    Setting,
    Stream,
    WatchedKernels,
    WatchedRecorder,
)

from kara_sglang.kernels.record import FP4, FP8, PAGE, Ring
from kara_sglang.kernels.select import select
from kara_sglang.kernels.selectors import REGISTRY
from kara_sglang.radix_integration.row import (
    VOTERS,
    Voters,
    Window,
    ceil_align,
)
from kara_sglang.scheduler.compaction import Compaction
from kara_sglang.scheduler.coordinator import Coordinator
from kara_sglang.scheduler.ring.demand import Demand
from kara_sglang.scheduler.ring.recorder import AttentionShape
from kara_sglang.trace import format as trace_file


class Model:
    """One process with its KV pool, watched; ``world.py`` does what SGLang's scheduler does in it."""

    def __init__(self, setting: Setting, seed: int) -> None:
        self.setting = setting
        self.config = config = setting.config
        self.page = setting.page
        self.random = Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        num_slots, heads = (setting.num_pages + 1) * self.page, KV_HEADS if setting.real else 0

        def buffers() -> list[torch.Tensor]:
            return [torch.zeros(num_slots, heads, DIM) for _ in range(LAYERS)]

        pool = SimpleNamespace(k_buffer=buffers(), v_buffer=buffers(), dtype=torch.float32)
        self.pool = pool
        self.allocator = PagedAllocator(setting.num_pages, self.page, pool, self.random)
        self.req_to_token = torch.zeros((ROWS, 2048), dtype=torch.int32)
        self.free_rows = list(range(1, ROWS))
        self.row_generation = torch.zeros(ROWS, dtype=torch.int64)
        rows = SimpleNamespace(req_to_token=self.req_to_token, req_generation=self.row_generation)
        self.stream = Stream() if setting.overlap else None
        self.queue: list[Request] = []  # retracted
        self.scheduler = SimpleNamespace(
            page_size=self.page,
            metrics_collector_context=SimpleNamespace(current_scheduler_metrics_enabled=False),
            token_to_kv_pool_allocator=self.allocator,
            enable_overlap=setting.overlap,
            attn_tp_group=SimpleNamespace(world_size=1, rank_in_group=0),
            last_batch=None,
            device_module=SimpleNamespace(current_stream=lambda: "schedule stream"),
            forward_stream=self.stream,
            forward_stream_ctx=self.stream,
            req_to_token_pool=rows,
            tree_cache=SimpleNamespace(
                disable=False,
                evictable_size=self.evictable_size,
                supports_prefix_sharing=lambda: True,
                prefix_device_indices=lambda req: torch.tensor(req.slots),
                token_to_kv_pool_allocator=SimpleNamespace(
                    evict_to_free_tokens=lambda _tree, tokens: self.make_room(tokens // self.page)
                ),
            ),
            tp_worker=SimpleNamespace(get_decode_cuda_graph_bs=lambda: []),
            max_total_num_tokens=setting.num_pages * self.page,
            max_new_tokens_limit=None,
            enable_hierarchical_cache=False,
            enable_priority_preemption=False,
            chunked_req=None,
            waiting_queue=self.queue,
            disagg_decode_prealloc_queue=None,
            new_token_ratio_tracker=SimpleNamespace(current=0.5),
            get_num_allocatable_reqs=lambda running, running_batch: len(self.free_rows),
            server_args=SimpleNamespace(
                model_path="a-model", tokenizer_path=None, retraction_policy="length"
            ),
            model_config=SimpleNamespace(
                get_total_num_kv_heads=lambda: KV_HEADS, vocab_size=4711, context_len=setting.context
            ),
        )
        device = torch.device("cpu")
        shape = AttentionShape(LAYERS, KV_HEADS * GROUP, KV_HEADS, DIM, torch.float32, device)
        dtype = config.ring_dtype(torch.float32)
        unit = LAYERS * KV_HEADS * {FP4: DIM // 2 + 4, FP8: DIM + 1}.get(dtype, 4 * DIM)
        unit *= PAGE * Demand(0, config.window, config.delay, setting.pace).peak
        budget = setting.units * unit if config.keeps_queries else 0
        checked = config.debug_checks and setting.real  # else no query is ever made
        self.recorder = WatchedRecorder(
            shape, config.window, config.delay, budget, dtype, checked=checked, pace=setting.pace
        )
        self.recorder.world = self
        self.recorder.allocate_tables(ROWS)
        watched = WatchedKernels(self, setting.real)
        compaction = Compaction(self.scheduler, config, self.recorder, watched, lambda: SCALES, TURN)
        self.coordinator = Coordinator(config, compaction)
        self.batch = SimpleNamespace(
            reqs=[],
            seq_lens=torch.empty(0, dtype=torch.int64),
            seq_lens_cpu=torch.empty(0, dtype=torch.int64),
            seq_lens_sum=None,
            req_to_token_pool=rows,
            batch_is_full=False,
        )
        self.scheduler.running_batch = self.batch
        self.tree: list[Prefix] = []
        self.tree_pages: Counter[int] = Counter()
        self.in_flight: list[Request] = []
        self.unpublished: list[tuple[Request, int]] = []  # prefills, with their lengths
        self.arrived = self.steps = self.windows = self.tokens_freed = self.retractions = 0
        self.without_queries = self.traces = self.most_of_one = self.gone = self.returned = 0
        self.texts = [[self.random.randrange(9) for _ in range(100)] for _ in range(2)]
        # K, V and queries of every token that was ever computed, by a number of its own.
        self.num_tokens = 0
        self.log_k = torch.empty((0, LAYERS, KV_HEADS, DIM))
        self.log_v = torch.empty((0, LAYERS, KV_HEADS, DIM))
        self.log_q = torch.empty((0, LAYERS, KV_HEADS, GROUP, DIM))

    def evictable_size(self) -> int:
        held = {slot // self.page for p in self.tree if p.users for slot in p.slots[:: self.page]}
        return (len(self.tree_pages) - len(held)) * self.page

    def assert_on_forward_stream(self) -> None:
        stream = self.stream
        assert stream is None or (stream.current and stream.waited), "not on the forward stream"

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def before_decode(self) -> None:
        batch = self.batch
        self.steps += 1
        names = ("seq_lens", "seq_lens_cpu")
        before = [getattr(batch, name) for name in names]
        copies = [tensor.clone() for tensor in before]
        self.allocator.freed = []
        for req in batch.reqs:  # a pass may take the recorder away
            recorder = req.state.recorder if req.state is not None else None
            req.num_units = 0 if recorder is None else recorder.heads
            req.recorded_from = None if recorder is None else recorder.first
            req.recorder = recorder
        self.coordinator.before_decode(batch)
        assert all(torch.equal(*pair) for pair in zip(before, copies, strict=True)), "in place"

        taken, removed_pages = [], []
        for req in batch.reqs:
            windows = req.state.windows if req.state is not None else []
            assert windows[: len(req.windows)] == req.windows
            for window in windows[len(req.windows) :]:
                taken.append((req, window))
                removed_pages += self.take(req, window)
        assert sorted(self.allocator.freed) == sorted(removed_pages)
        self.check_policy(taken)
        for req in batch.reqs:
            recorder = req.state.recorder if req.state is not None else None
            if recorder is not None and recorder is not req.recorder:
                pace, since = self.setting.pace, recorder.since
                assert 0 <= since - len(req.token_at) < max(1, pace.behind), "from the next query on"
                to_come = (self.first_window(req) - since) % self.config.window
                assert to_come < pace.tokens, "a whole window"
        self.check_lengths()
        if taken and self.setting.real:
            self.check_contents()

    def take(self, req: Request, window: Window) -> list[int]:
        """Do to the model what the window says was done; returns the pages that this frees."""
        config, page = self.config, self.page
        width, kept = config.window, self.kept_of(req)
        start = window.kv_start
        assert (window.width, window.kept) == (width, kept)
        assert start % page == kept % page == 0
        assert start >= req.kv.cache_protected_len
        end_of_last = req.windows[-1].kv_start + req.windows[-1].kept if req.windows else 0
        assert start >= end_of_last
        assert start == (end_of_last if req.windows else self.first_window(req)), "tokens were left out"
        if self.selector_of(req).needs_queries:
            assert window.mark == self.voters_of(req, window.logical_start)
        elif self.selector_name(req) == "random":
            assert window.mark == f"seed {req.state.seed + 1_000_003 * len(req.windows)}"
        else:
            assert window.mark == ""
        assert len(req.slots) >= start + width + config.delay, "not due"
        assert not req.finished() and req.to_finish is None
        assert not req.next_output_finishes_by_length()
        assert window.logical_start == start + req.removed
        covered = torch.tensor(req.token_at[window.logical_start : window.logical_start + width])
        tokens = req.tokens
        inside = tokens[..., start : start + width]
        assert (inside == covered).all(), "a token was compressed twice"
        freed = req.slots[start + kept : start + width]
        req.slots = req.slots[: start + kept] + req.slots[start + width :]
        chosen = self.chosen(req, window, covered)
        new = covered.expand(LAYERS, KV_HEADS, -1).gather(-1, chosen)
        req.kept = torch.cat([tokens[..., :start], new], dim=-1)
        req.windows = [*req.windows, window]
        self.windows += 1
        self.without_queries += window.mark == "none"
        self.tokens_freed += len(freed)
        return [slot // page for slot in freed[::page]]

    def chosen(self, req: Request, window: Window, covered: torch.Tensor) -> torch.Tensor:
        """Positions that each layer and head must have kept."""
        kept, width = window.kept, window.width
        shape = (LAYERS, KV_HEADS, kept)
        if not self.setting.real:
            return torch.arange(kept).expand(shape)
        if self.selector_name(req) == "random":
            # Only the pool knows which; that it is a choice at all is checked here.
            slots = req.slots[window.kv_start : window.kv_start + kept]
            names = torch.stack([buffer[slots, :, 0].T for buffer in self.pool.v_buffer]).long() - 1
            found = torch.searchsorted(covered, names)
            assert (found < width).all() and torch.equal(covered[found], names)
            assert (found.diff(dim=-1) > 0).all()
            return found
        selector, queries = self.selector_of(req), None
        if window.mark == "none":
            selector = REGISTRY["keys"].from_config(self.config)
        layers = []
        for layer in range(LAYERS):
            if selector.needs_queries:
                queries = self.queries_of(req, window.logical_start, layer)
                if selector.ahead:
                    queries = TURN.moved(queries, layer)
            keys, values = self.log_k[covered, layer], self.log_v[covered, layer]
            scores = selector.score(queries, keys, values, scale=SCALES[layer], seed=0)
            layers.append(select(scores, kept, selector.chunks))
        return torch.stack(layers)

    def first_window(self, req: Request) -> int:
        """Where the windows of the request start, in tokens; its prefix holds no compressed ones."""
        return ceil_align(req.prefilled, self.page)

    def voters_of(self, req: Request, start: int) -> Voters:
        """Whose queries are in the ring for a window from ``start`` on."""
        if req.recorded_from is None or req.recorded_from > start:
            return "none"
        return "mean" if req.num_units < GROUP else "all"

    def queries_of(self, req: Request, start: int, layer: int) -> torch.Tensor:
        """What the window's tokens and the delay's asked for, as it was recorded."""
        count = self.config.window + self.config.delay
        queries = self.log_q[req.token_at[start : start + count], layer]
        if req.num_units < GROUP:
            queries = sum(queries.unbind(dim=2))[:, :, None] * (1 / GROUP)
        if self.config.query_dtype == "fp8":
            power = 2.0 ** (queries.double().abs().amax(dim=-1, keepdim=True) / 448).log2().ceil()
            queries = ((queries / power).float().to(FP8).double() * power).float()
        if self.config.query_dtype == "fp4":
            queries = Ring.of(queries, FP4).numbers()
        return queries

    def selector_name(self, req: Request) -> str:
        options = req.options if isinstance(req.options, dict) else {}
        return options.get("selector") or self.config.selector

    def selector_of(self, req: Request) -> Any:
        return REGISTRY[self.selector_name(req)].from_config(self.config)

    def kept_of(self, req: Request) -> int:
        if self.selector_name(req) == "identity":
            return self.config.window
        options = req.options if isinstance(req.options, dict) else {}
        pages = self.config.window // self.page
        share = options.get("retain", self.config.retain)
        return max(1, min(pages, math.floor(share * pages + 0.5))) * self.page

    def check_policy(self, taken: list[tuple[Request, Window]]) -> None:
        """No window is taken that the policy does not allow, but those of a long answer."""
        config = self.config
        taken = [one for one in taken if not self.coordinator.longer.is_long(one[0])]
        of_one = Counter(id(req) for req, _ in taken)
        self.most_of_one = max(self.most_of_one, *of_one.values(), 0)
        if config.policy in ("threshold", "punctual"):
            assert len(of_one) == len(taken), "one at once of each request"
        if config.policy == "threshold":
            for req, window in taken:
                assert len(req.slots) + window.freed >= config.threshold
        elif config.policy == "punctual":
            for req, window in taken:
                due_at = window.kv_start + window.width + config.delay
                late = len(req.slots) + window.freed > due_at
                assert not late or req.retraction_count, "late"
        else:
            assert len(taken) <= config.max_requests_per_pass
            assert not taken or self.steps % config.period == 0

    def check_lengths(self) -> None:
        """KV lengths, logical lengths, rows, and who is compressed at all."""
        batch = self.batch
        lengths = [len(req.slots) for req in batch.reqs]
        assert batch.seq_lens.tolist() == batch.seq_lens_cpu.tolist() == lengths
        assert self.positions(batch.seq_lens).tolist() == [len(req.token_at) for req in batch.reqs]
        for req, length in zip(batch.reqs, lengths, strict=True):
            kv, state = req.kv, req.state
            assert kv.kv_committed_len == kv.kv_allocated_len == length
            if self.allocator.freed or self.steps % 16 == 0:
                assert self.req_to_token[kv.req_pool_idx, :length].tolist() == req.slots
            if req.beam_group or req.multimodal_inputs or req.options is False:
                assert state is None
                continue
            assert state is not None and state.removed == req.removed
            assert state.base % self.page == 0 and state.base >= kv.cache_protected_len

    def check_contents(self) -> None:
        """K and V of every held slot are what was written for the token that should be there."""
        heads = torch.arange(KV_HEADS)
        rows = [(req.slots, req.tokens) for req in self.batch.reqs]
        for prefix in self.tree:
            tokens = torch.tensor(prefix.tokens).expand(LAYERS, KV_HEADS, -1)
            rows.append((prefix.slots, tokens))
        for layer in range(LAYERS):
            for buffer, log in (
                (self.pool.k_buffer[layer], self.log_k),
                (self.pool.v_buffer[layer], self.log_v),
            ):
                for slots, tokens in rows:
                    assert torch.equal(buffer[slots], log[tokens[layer].T, layer, heads])

    def check_trace(self, req: Request) -> None:
        """A file once the request has ended and only then; its bits name the tokens that are held."""
        path = trace_file.folder_of(self.config.trace) / trace_file.file_name(req.rid)
        if not req.windows or not req.finished():
            assert not path.exists()
            return
        self.traces += 1
        trace = trace_file.load(path)
        about = trace.about
        assert (about.rid, about.finish) == (req.rid, req.finished_reason)
        assert (about.retractions, about.selector) == (req.retraction_count, self.selector_name(req))
        assert about.kept == self.kept_of(req)
        assert trace.prompt_ids.tolist() == req.origin_input_ids
        assert trace.output_ids.tolist() == req.output_ids
        rows = [
            [
                w.logical_start,
                w.kv_start,
                w.width,
                w.kept,
                (*VOTERS, w.mark).index(w.mark) % len(VOTERS),
            ]
            for w in req.windows
        ]
        assert trace.windows.tolist() == rows
        for (start, kv_start, _, kept, _), bits in zip(rows, trace.keeps(), strict=True):
            positions = torch.from_numpy(bits.nonzero()[2]).view(LAYERS, KV_HEADS, kept)
            named = torch.tensor(req.token_at)[start + positions]
            assert torch.equal(named, req.kept[..., kv_start : kv_start + kept])

    def row_of(self, req: Request) -> list[int]:
        """All slots in the request's row."""
        return req.slots

    def positions(self, slots: torch.Tensor) -> torch.Tensor:
        """What the hook makes of ``ForwardBatch.positions`` of the running batch, whose requests have
        the same number of tokens each."""
        rows = torch.tensor([req.kv.req_pool_idx for req in self.batch.reqs], dtype=torch.int64)
        step = SimpleNamespace(positions=slots, req_pool_indices=rows, mrope_positions=None)
        self.coordinator.compaction.lengths.shift_positions(step)
        return step.positions

    def check_pages(self) -> None:
        """Each page is free, the tree's, or one request's; rows are made of whole pages."""
        owners = [*self.allocator.free, *self.tree_pages]
        for req in self.batch.reqs:
            row = self.row_of(req)
            own = row[req.kv.cache_protected_len :]
            owners += [slot // self.page for slot in own[:: self.page]]
            for first in range(0, len(row), self.page):
                part = row[first : first + self.page]
                assert part[0] % self.page == 0 and part[-1] - part[0] == len(part) - 1
        assert sorted(owners) == list(range(1, self.setting.num_pages + 1))
        held = [req.state.recorder for req in self.batch.reqs if req.state is not None]
        held = [recorder for recorder in held if recorder is not None]
        assert self.recorder.in_use == len(held)
        pages = [page for one in held for block in one.pages.values() for page in block]
        assert self.recorder.free_pages + len(pages) == self.recorder.num_pages
        assert len(set(pages)) == len(pages)
        assert {len(block) for one in held for block in one.pages.values()} <= {1, GROUP}
        totals = sum(one.heads * self.recorder.demand._rolled(*one.granted) for one in held)
        assert (self.recorder.demand._totals == totals).all()
