"""A simulated scheduler: the real coordinator against a plain model of rows, pages and lengths.

SGLang is replaced by a few lines that do what its scheduler does, in its order. The model knows which
slots a request's row holds, which token's K/V lies there for each layer and head, and which pages are
free. Of the code under test it is told one thing: which windows were taken.
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
    Finish,
    PagedAllocator,
    Prefix,
    Request,
    Setting,
    Stream,
    WatchedKernels,
    WatchedRecorder,
)

from kara_sglang.config import KaraConfig
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
from kara_sglang.scheduler.streams import forward_stream
from kara_sglang.trace import format as trace_file


class World:
    """A scheduler process with its KV pool, and the model that watches it."""

    def __init__(self, setting: Setting, seed: int) -> None:
        self.setting = setting
        self.config = config = setting.config
        self.page = setting.page
        self.random = Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        num_slots = (setting.num_pages + 1) * self.page if setting.real else 1

        def buffers() -> list[torch.Tensor]:
            return [torch.zeros(num_slots, KV_HEADS, DIM) for _ in range(LAYERS)]

        pool = SimpleNamespace(k_buffer=buffers(), v_buffer=buffers())
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
            tp_size=1,
            device_module=SimpleNamespace(current_stream=lambda: "schedule stream"),
            forward_stream=self.stream,
            forward_stream_ctx=self.stream,
            req_to_token_pool=rows,
            tree_cache=SimpleNamespace(evictable_size=self.evictable_size),
            tp_worker=SimpleNamespace(get_decode_cuda_graph_bs=lambda: []),
            max_total_num_tokens=setting.num_pages * self.page,
            waiting_queue=self.queue,
            new_token_ratio_tracker=SimpleNamespace(current=0.5),
            get_num_allocatable_reqs=lambda running, running_batch: len(self.free_rows),
            server_args=SimpleNamespace(model_path="a-model", tokenizer_path=None),
            model_config=SimpleNamespace(get_total_num_kv_heads=lambda: KV_HEADS, vocab_size=4711),
        )
        device = torch.device("cpu")
        shape = AttentionShape(LAYERS, KV_HEADS * GROUP, KV_HEADS, DIM, torch.float32, device)
        dtype = config.ring_dtype(torch.float32)
        unit = LAYERS * KV_HEADS * {FP4: DIM // 2 + 4, FP8: DIM + 1}.get(dtype, 4 * DIM)
        unit *= PAGE * Demand(0, config.window, config.delay).peak
        budget = setting.units * unit if config.keeps_queries else 0
        checked = config.debug_checks and setting.real  # else no query is ever made
        self.recorder = WatchedRecorder(
            shape, config.window, config.delay, budget, dtype, checked=checked
        )
        self.recorder.world = self
        self.recorder.allocate_tables(ROWS)
        compaction = Compaction(
            self.scheduler, config, self.recorder, WatchedKernels(self, setting.real), SCALES, TURN
        )
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
        self.arrived = self.steps = self.windows = self.tokens_freed = self.retractions = 0
        self.without_queries = self.traces = 0
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

    # -- tokens and slots --------------------------------------------------------------------------

    def new_tokens(self, count: int) -> list[int]:
        first = self.num_tokens
        self.num_tokens += count
        if self.setting.real and self.num_tokens > len(self.log_k):
            heads = (1024 + count, LAYERS, KV_HEADS)
            k, v = (torch.randn((*heads, DIM), generator=self.generator) for _ in range(2))
            q = torch.randn((*heads, GROUP, DIM), generator=self.generator) * 3
            self.log_k = torch.cat([self.log_k, k])
            self.log_v = torch.cat([self.log_v, v])
            self.log_q = torch.cat([self.log_q, q])
            # The value's first number tells which token it is.
            self.log_v[..., 0] = torch.arange(1.0, len(self.log_v) + 1)[:, None, None]
        return list(range(first, self.num_tokens))

    def write_kv(self, slots: list[int], tokens: list[int]) -> None:
        if self.setting.real:
            for layer in range(LAYERS):
                self.pool.k_buffer[layer][slots] = self.log_k[tokens, layer]
                self.pool.v_buffer[layer][slots] = self.log_v[tokens, layer]

    def extend(self, req: Request, tokens: list[int]) -> None:
        """Slots for further tokens: the rest of the row's last page, then new pages."""
        old = len(req.slots)
        for index in range(old, old + len(tokens)):
            starts_page = index % self.page == 0
            slot = self.allocator.take_page() * self.page if starts_page else req.slots[-1] + 1
            req.slots.append(slot)
        new = req.slots[old:]
        self.write_kv(new, tokens)
        row = self.req_to_token[req.kv.req_pool_idx]
        row[old : len(req.slots)] = new[0] if len(new) == 1 else torch.tensor(new)
        req.token_at += tokens
        req.kv.kv_committed_len = req.kv.kv_allocated_len = len(req.slots)

    def make_room(self, pages: int) -> bool:
        """Evict unused prefixes until ``pages`` are free."""
        for prefix in self.tree[:]:
            if len(self.allocator.free) >= pages:
                break
            if not prefix.users:
                self.tree.remove(prefix)
                self.count_pages(prefix, -1)
        return len(self.allocator.free) >= pages

    def count_pages(self, prefix: Prefix, change: int) -> None:
        for slot in prefix.slots[:: self.page]:
            page = slot // self.page
            self.tree_pages[page] += change
            if not self.tree_pages[page]:
                del self.tree_pages[page]
                self.allocator.free_page(page)

    def insert(self, req: Request, length: int) -> Prefix | None:
        """Leave the first ``length`` tokens of a row to the tree; it must hold exactly these tokens."""
        if length == 0:
            return None
        plain = torch.tensor(req.token_at[:length])
        assert (req.tokens[..., :length] == plain).all(), "compressed KV reached the tree"
        ids = (req.origin_input_ids + req.output_ids)[:length]
        assert len(ids) == length
        prefix = Prefix(ids, req.slots[:length], req.token_at[:length])
        self.tree.append(prefix)
        self.count_pages(prefix, 1)
        return prefix

    # -- what a scheduler does ---------------------------------------------------------------------

    def prefill(self, req: Request) -> bool:
        """Match the tree, compute the rest, leave the whole pages to the tree, join the batch."""
        ids = req.origin_input_ids + req.output_ids
        if not self.free_rows or not self.make_room(len(ids) // self.page + 1):
            return False
        best = 0
        req.slots, req.token_at = [], []
        for prefix in self.tree:
            limit = min(len(prefix.ids), len(ids) - 1)
            same = next((i for i in range(limit) if prefix.ids[i] != ids[i]), limit)
            same = same // self.page * self.page
            if same > best:
                best = same
                req.slots, req.token_at = prefix.slots[:same], prefix.tokens[:same]
        req.kept = torch.empty((LAYERS, KV_HEADS, 0), dtype=torch.int64)
        req.kv.req_pool_idx = self.free_rows.pop()
        self.row_generation[req.kv.req_pool_idx] += 1
        self.req_to_token[req.kv.req_pool_idx, :best] = torch.tensor(req.slots, dtype=torch.int32)
        self.extend(req, self.new_tokens(len(ids) - best))
        req.kv.cache_protected_len = len(ids) // self.page * self.page
        req.prefix = self.insert(req, req.kv.cache_protected_len)
        if req.prefix is not None:
            req.prefix.users += 1
        req.prefilled = len(ids)
        req.output_ids.append(self.random.randrange(9))
        length = torch.tensor([len(ids)])
        batch = self.batch
        batch.reqs = [*batch.reqs, req]
        batch.seq_lens = torch.cat([batch.seq_lens, length])
        batch.seq_lens_cpu = torch.cat([batch.seq_lens_cpu, length])
        return True

    def arrive(self) -> None:
        text = self.random.choice(self.texts)
        prompt = text[: self.random.randint(1, len(text))]
        if self.chance(0.5):
            prompt = [*prompt, 10 + self.arrived]
        options = self.random.choice(self.setting.options)
        req = Request(self.arrived, prompt, self.random.randint(2, 400), options)
        self.arrived += 1
        req.skip_radix_cache_insert = req.never_inserts = self.chance(0.1)
        if self.chance(0.05):
            setattr(req, self.random.choice(["beam_group", "multimodal_inputs"]), object())
        self.queue.append(req)

    def release(self, req: Request, *, checkpoint: bool) -> None:
        """SGLang's ``release_kv_cache``."""
        kv = req.kv
        if any(window.freed for window in req.windows):
            assert req.skip_radix_cache_insert, "its row no longer is what the tree would say"
        else:
            assert req.skip_radix_cache_insert == req.never_inserts
        kept_by_tree = kv.cache_protected_len
        if checkpoint and not req.skip_radix_cache_insert:
            kept_by_tree = len(req.slots) // self.page * self.page
            self.insert(req, kept_by_tree)
        row = self.req_to_token[kv.req_pool_idx, : kv.kv_committed_len]
        self.allocator.free_segment(row[kept_by_tree:], start_pos=kept_by_tree)
        if req.prefix is not None:
            req.prefix.users -= 1
        self.coordinator.row_freed(req)
        assert req.state is None or req.state.recorder is None
        if self.config.trace is not None:
            self.check_trace(req)
        assert kv.req_pool_idx not in self.recorder.active
        self.free_rows.append(kv.req_pool_idx)
        kv.req_pool_idx = None

    def drop(self, gone: list[Request]) -> None:
        """SGLang's ``filter_batch``."""
        batch = self.batch
        keep = [i for i, req in enumerate(batch.reqs) if req not in gone]
        if len(keep) < len(batch.reqs):
            batch.reqs = [batch.reqs[i] for i in keep]
            for name in ("seq_lens", "seq_lens_cpu"):
                setattr(batch, name, getattr(batch, name)[keep])

    def retract(self, req: Request) -> None:
        self.retractions += 1
        self.release(req, checkpoint=False)
        # Req.reset_for_retract
        req.retraction_count += 1
        req.kv.cache_protected_len = 0
        self.coordinator.forget(req)
        assert req.state is None and req.skip_radix_cache_insert == req.never_inserts
        req.windows = []
        req.prefix = None
        self.drop([req])
        self.queue.append(req)

    def decode(self, reqs: list[Request]) -> None:
        """Allocate, then run the model: attention writes K/V and the hook records queries."""
        batch = self.batch
        if not reqs:
            return
        batch.seq_lens = batch.seq_lens + 1
        batch.seq_lens_cpu = batch.seq_lens_cpu + 1
        tokens = self.new_tokens(len(reqs))
        positions = self.positions(batch.seq_lens - 1)
        assert positions.tolist() == [len(req.token_at) for req in reqs], "RoPE positions"
        for req, token in zip(reqs, tokens, strict=True):
            self.extend(req, [token])
        if self.recorder.in_use and self.setting.real:
            rows = torch.tensor([req.kv.req_pool_idx for req in reqs])
            for layer in range(LAYERS):
                queries = self.log_q[tokens, layer].reshape(len(reqs), -1)
                self.recorder.record(self.coordinator.kernels, layer, queries, rows, positions)

    def process_results(self, reqs: list[Request]) -> None:
        """SGLang's ``process_batch_result_decode``: the step's tokens arrive, requests finish."""
        gone = []
        for req in reqs:
            if not req.kv.holds_kv or req.finished():
                continue  # retracted meanwhile: its token is dropped
            req.output_ids.append(self.random.randrange(9))
            if len(req.output_ids) >= req.sampling_params.max_new_tokens:
                req.finished_reason = Finish("length")
            elif req.to_finish is not None:
                req.finished_reason, req.to_finish = req.to_finish, None
            elif self.chance(self.setting.trouble / 2):
                req.finished_reason = Finish("stop")
            if req.finished():
                self.release(req, checkpoint=True)
                gone.append(req)
        self.drop(gone)

    def step(self) -> None:
        """One turn of the scheduler's loop."""
        trouble, batch = self.setting.trouble, self.batch
        if len(batch.reqs) + len(self.queue) < self.setting.max_running and self.chance(0.3):
            self.arrive()
        if self.queue and self.prefill(self.queue[0]):
            self.queue.pop(0)
        if not batch.reqs:
            self.process_results(self.in_flight)
            self.in_flight = []
            return
        if self.chance(trouble):
            self.random.choice(batch.reqs).to_finish = Finish("abort")
        self.before_decode()
        if self.chance(trouble):
            # SGLang lets a step pass where requests that are about to end will make room.
            self.process_results(self.in_flight)
            self.in_flight = []
            return
        # With overlap, the step in flight may be a request's last: it takes no further one.
        in_flight = [req for req in self.in_flight if req in batch.reqs]
        self.drop([req for req in in_flight if req.next_output_finishes_by_length()])
        needed = sum(len(req.slots) % self.page == 0 for req in batch.reqs)
        while batch.reqs and (self.chance(trouble) or not self.make_room(needed)):
            self.retract(batch.reqs[-1])
            needed = sum(len(req.slots) % self.page == 0 for req in batch.reqs)
        launched = batch.reqs[:]
        self.decode(launched)
        self.process_results(self.in_flight if self.setting.overlap else launched)
        self.in_flight = launched if self.setting.overlap else []
        if self.allocator.freed or self.steps % 16 == 0:
            self.check_pages()

    def positions(self, slots: torch.Tensor) -> torch.Tensor:
        """What the hook makes of ``ForwardBatch.positions`` of the running batch."""
        rows = torch.tensor([req.kv.req_pool_idx for req in self.batch.reqs], dtype=torch.int64)
        step = SimpleNamespace(positions=slots, req_pool_indices=rows, mrope_positions=None)
        self.coordinator.compaction.lengths.shift_positions(step)
        return step.positions

    # -- the model ---------------------------------------------------------------------------------

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
                assert recorder.since == len(req.token_at), "records from the next query on"
                assert (len(req.token_at) - self.first_window(req)) % self.config.window == 0, (
                    "a whole window"
                )
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
        """Nobody has two windows at once, and none is taken that the policy does not allow."""
        config = self.config
        assert len({id(req) for req, _ in taken}) == len(taken)
        if config.policy == "threshold":
            for req, window in taken:
                assert len(req.slots) + window.freed >= config.threshold
        elif config.policy == "punctual":
            for req, window in taken:
                due_at = window.kv_start + window.width + config.delay
                assert len(req.slots) + window.freed == due_at, "late"
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

    def check_pages(self) -> None:
        """Each page is free, the tree's, or one request's; rows are made of whole pages."""
        owners = [*self.allocator.free, *self.tree_pages]
        for req in self.batch.reqs:
            own = req.slots[req.kv.cache_protected_len :]
            owners += [slot // self.page for slot in own[:: self.page]]
            for first in range(0, len(req.slots), self.page):
                part = req.slots[first : first + self.page]
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

    def run(self) -> None:
        """The whole history; at its end everybody leaves and everything is free again."""
        for _ in range(self.setting.steps):
            self.step()
        if self.setting.real:
            self.check_contents()
        for req in self.batch.reqs[:]:
            req.finished_reason = Finish("abort")
            self.release(req, checkpoint=self.chance(0.5))
        self.batch.reqs = []
        assert self.make_room(self.setting.num_pages), "leaked"
        assert len(self.allocator.free) == self.setting.num_pages
        assert self.recorder.in_use == 0
        assert self.recorder.free_pages == self.recorder.num_pages
        assert self.recorder.demand.spare == self.recorder.num_pages
        if self.recorder.stale:
            with forward_stream(self.scheduler):
                self.recorder.flush()
        assert (self.recorder.pages == -1).all()
        totals = self.coordinator.totals
        counted = (totals.windows, totals.without_queries, totals.slots_freed)
        assert counted == (self.windows, self.without_queries, self.tokens_freed)


def one_request(**config: Any) -> tuple[World, Request]:
    """A server with one running request of 5 prompt tokens that never ends by itself."""
    settings = {"window": 8, "delay": 2, "retain": 0.5} | config
    world = World(Setting(KaraConfig(**settings), trouble=0.0, num_pages=2000), seed=0)
    req = Request(0, [1, 2, 3, 4, 5], 10_000, None)
    assert world.prefill(req)
    return world, req


def advance(world: World, steps: int) -> None:
    for _ in range(steps):
        world.before_decode()
        world.decode(world.batch.reqs)


def votes(req: Request) -> str:
    """Who chose its windows, a letter each."""
    return "".join(window.mark[0] for window in req.windows)


def answer(world: World, steps: int) -> None:
    """As :func:`advance`, and the tokens arrive."""
    for _ in range(steps):
        advance(world, 1)
        world.process_results(world.batch.reqs)


def whole_life(world: World, req: Request) -> list[int]:
    """Serve one request to its end; the KV slots that it held, step by step."""
    assert world.prefill(req)
    held = []
    while not req.finished():
        world.step()
        held.append(len(req.slots))
    return held
