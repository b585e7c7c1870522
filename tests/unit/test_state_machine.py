"""Rows, pages and lengths: the real coordinator against a plain model, over random histories.

SGLang is replaced by a few lines that do what its scheduler does, in its order. The model knows which
slots a request's row holds, which token's K/V lies there for each layer and head, and which pages are
free. Of the code under test it is told one thing: which windows were taken.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kara_sglang.config import SELECTORS, KaraConfig
from kara_sglang.kernels.backend import LayerPool, TorchKernels, WindowJob
from kara_sglang.kernels.record import FP4, FP8, PAGE, Ring
from kara_sglang.kernels.rope_shift import RopeShift
from kara_sglang.kernels.select import select
from kara_sglang.kernels.selectors import REGISTRY
from kara_sglang.radix_integration.row import (
    STATE,
    VOTERS,
    Geometry,
    Recorder,
    RequestState,
    Voters,
    Window,
    ceil_align,
)
from kara_sglang.scheduler.coordinator import Coordinator
from kara_sglang.scheduler.latch import LOOK_EVERY
from kara_sglang.scheduler.metrics import Totals
from kara_sglang.scheduler.ring.demand import Demand
from kara_sglang.scheduler.ring.handout import MOST_IN_A_ROW
from kara_sglang.scheduler.ring.recorder import AttentionShape, QueryRecorder
from kara_sglang.scheduler.streams import forward_stream
from kara_sglang.trace import format as trace_file

LAYERS, KV_HEADS, DIM, GROUP = 2, 2, 4, 2
ROWS = 8
SCALES = [0.4, 0.6]
TURN = RopeShift.of(
    [
        RopeShift.of_layer(torch.tensor([0.6]), torch.tensor([0.8]), DIM, halves=True),
        RopeShift.of_layer(torch.empty(0), torch.empty(0), DIM, halves=True),
    ]
)


# -- what SGLang would be ------------------------------------------------------------------------------


class PagedAllocator:
    """Hands out pages; whoever frees a page twice, or a part of one, is caught."""

    def __init__(self, num_pages: int, page_size: int, pool: Any, random: Random) -> None:
        self.page_size = page_size
        self.pool = pool
        self.free = list(range(1, num_pages + 1))  # page 0 takes the writes of padded tokens
        random.shuffle(self.free)
        self.free_set = set(self.free)
        self.freed: list[int] = []  # since the model looked last
        self.group: list[tuple[torch.Tensor, int]] | None = None

    def get_kvcache(self) -> Any:
        return self.pool

    def available_size(self) -> int:
        return len(self.free) * self.page_size

    def take_page(self) -> int:
        page = self.free.pop()
        self.free_set.remove(page)
        return page

    def free_page(self, page: int) -> None:
        assert page not in self.free_set, f"page {page} freed twice"
        self.free.append(page)
        self.free_set.add(page)
        self.freed.append(page)

    def free_segment(self, free_index: torch.Tensor, *, start_pos: int) -> None:
        assert start_pos % self.page_size == 0, "a segment starts with a page"
        if self.group is not None:
            self.group.append((free_index, start_pos))
            return
        slots = free_index.tolist()
        for first in range(0, len(slots), self.page_size):
            part = slots[first : first + self.page_size]
            assert part[0] % self.page_size == 0
            assert part == list(range(part[0], part[0] + len(part)))
            self.free_page(part[0] // self.page_size)

    def free_group_begin(self) -> None:
        assert self.group is None
        self.group = []

    def free_group_end(self) -> None:
        group, self.group = self.group, None
        assert group is not None
        for free_index, start_pos in group:
            self.free_segment(free_index, start_pos=start_pos)


@dataclass
class Kv:
    """The fields of SGLang's ``ReqKvInfo`` that the plugin touches."""

    req_pool_idx: int | None = None
    cache_protected_len: int = 0
    kv_committed_len: int = 0
    kv_allocated_len: int = 0

    @property
    def holds_kv(self) -> bool:
        return self.req_pool_idx is not None


@dataclass
class Prefix:
    """Whole pages that the prefix tree owns: nobody may write or free them."""

    ids: list[int]
    slots: list[int]
    tokens: list[int]
    users: int = 0


class Finish(str):
    """SGLang's ``BaseFinishReason``."""

    def to_json(self) -> dict[str, str]:
        return {"type": str(self)}


class Request:
    """SGLang's ``Req``; behind the line, what the model knows of it."""

    def __init__(self, rid: int, prompt: list[int], max_new_tokens: int, options: Any) -> None:
        self.rid = str(rid)
        self.origin_input_ids = prompt
        self.output_ids: list[int] = []
        self.sampling_params = SimpleNamespace(
            custom_params=None if options is None else {"kv_compress": options},
            max_new_tokens=max_new_tokens,
            ignore_eos=True,
            n=1,
        )
        self.kv = Kv()
        self.skip_radix_cache_insert = False
        self.beam_group: Any = None
        self.multimodal_inputs: Any = None
        self.finished_reason: Finish | None = None
        self.to_finish: Finish | None = None
        self.retraction_count = 0
        # --------------------------------------------------------------------------------------
        self.options = options
        self.never_inserts = False
        self.slots: list[int] = []  # by KV index
        self.token_at: list[int] = []  # by logical position
        self.kept = torch.empty((LAYERS, KV_HEADS, 0), dtype=torch.int64)  # up to the last window
        self.windows: list[Window] = []
        self.prefilled = 0
        self.num_units = 0
        self.recorder: Recorder | None = None  # before the step
        self.recorded_from: int | None = None
        self.prefix: Prefix | None = None

    def finished(self) -> bool:
        return self.finished_reason is not None

    def next_output_finishes_by_length(self) -> bool:
        return len(self.output_ids) + 1 >= self.sampling_params.max_new_tokens

    @property
    def state(self) -> RequestState | None:
        return getattr(self, STATE, None)

    @property
    def tokens(self) -> torch.Tensor:
        """By KV index, shape (layers, KV heads, KV length): whose K and V must lie there."""
        behind = torch.tensor(self.token_at[self.kept.shape[-1] + self.removed :], dtype=torch.int64)
        return torch.cat([self.kept, behind.expand(LAYERS, KV_HEADS, -1)], dim=-1)

    @property
    def removed(self) -> int:
        return len(self.token_at) - len(self.slots)


@dataclass
class Stream:
    """Knows whether the forward stream is current and has been told to wait."""

    current: bool = False
    waited: bool = False

    def wait_stream(self, other: object) -> None:
        assert self.current and other == "schedule stream"
        self.waited = True

    def __enter__(self) -> None:
        assert not self.current
        self.current, self.waited = True, False

    def __exit__(self, *_: object) -> None:
        self.current = False


class WatchedKernels(TorchKernels):
    """The reference, or, for histories without K/V, kernels that keep the first R and touch nothing."""

    def __init__(self, world: World, real: bool) -> None:
        super().__init__()
        self.world = world
        self.real = real

    def compress(
        self, pool: LayerPool, jobs: list[WindowJob], *, positions: bool = False
    ) -> list[torch.Tensor] | None:
        self.world.assert_on_forward_stream()
        if self.real:
            return super().compress(pool, jobs, positions=positions)
        if not positions:
            return None
        return [torch.arange(job.kept).expand(LAYERS, KV_HEADS, job.kept) for job in jobs]


class WatchedRecorder(QueryRecorder):
    """Tables may be written on the forward stream only: the step in flight reads them."""

    world: World
    lacks = 0  # recorders that had pages and found no further one

    def extend(self, recorder: Recorder, position: int) -> bool:
        had_pages = bool(recorder.pages)
        found = super().extend(recorder, position)
        self.lacks += had_pages and not found
        return found

    def flush(self) -> None:
        self.world.assert_on_forward_stream()
        super().flush()


@dataclass(frozen=True)
class Setting:
    """One server and what happens to it."""

    config: KaraConfig
    page: int = 1
    units: int = 6
    overlap: bool = True
    real: bool = True
    num_pages: int = 400
    max_running: int = 3
    steps: int = 120
    options: tuple[Any, ...] = (None,)
    trouble: float = 0.02  # chance per step of each kind of it


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
            model_config=SimpleNamespace(get_total_num_kv_heads=lambda: KV_HEADS),
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
        self.coordinator = Coordinator(
            self.scheduler, config, self.recorder, WatchedKernels(self, setting.real), SCALES, TURN
        )
        self.batch = SimpleNamespace(
            reqs=[],
            seq_lens=torch.empty(0, dtype=torch.int64),
            seq_lens_cpu=torch.empty(0, dtype=torch.int64),
            orig_seq_lens=torch.empty(0, dtype=torch.int32),
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
        batch.orig_seq_lens = torch.cat([batch.orig_seq_lens, length.int()])
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
            for name in ("seq_lens", "seq_lens_cpu", "orig_seq_lens"):
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
        batch.orig_seq_lens = batch.orig_seq_lens + 1
        tokens = self.new_tokens(len(reqs))
        positions = batch.orig_seq_lens.to(torch.int64) - 1
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

    # -- the model ---------------------------------------------------------------------------------

    def before_decode(self) -> None:
        batch = self.batch
        self.steps += 1
        names = ("seq_lens", "seq_lens_cpu", "orig_seq_lens")
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
        assert batch.orig_seq_lens.tolist() == [len(req.token_at) for req in batch.reqs]
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


# -- histories -----------------------------------------------------------------------------------------


def random_setting(random: Random, real: bool) -> Setting:
    """Any server: page sizes, windows, shares, delays, recorders that are late or never come."""
    page = random.choice([1, 1, 1, 16, 16, 64] if not real else [1, 1, 1, 1, 16])
    window = page * random.randint(1, {1: 24, 16: 4, 64: 2}[page])
    selector = random.choice(SELECTORS)
    config = KaraConfig(
        selector=selector,
        window=window,
        retain=random.choice([0.01, 0.25, 0.5, 0.5, 0.7, 1.0]),
        query_mem_gb=random.choice([None, 1.0]),
        delay=random.choice([0, 0, 1, 5, 16, 40]),
        score=random.choice(["sum", "sum_v", "l2", "l2_v", "l2_v4_k"]),
        neighbours=random.choice([1, 3, 13]),
        delay_votes=random.choice([False, True]),
        chunk_budget=random.choice([0.0, 0.1, 0.5]),
        chunk_quantile=random.choice([0.0, 0.5]),
        last_queries=random.choice([1, 8]),
        query_heads=random.choice(["auto", "all", "mean"]),
        query_dtype=random.choice(["fp4", "fp8", "model"]),
        policy=random.choice(["periodic", "periodic", "threshold", "pressure"]),
        period=random.choice([1, 1, 3, 100]),
        max_requests_per_pass=random.choice([1, 8]),
        threshold=random.choice([0, 60, 120]),
        min_pool_usage=random.choice([0.0, 0.2, 0.8]),
        debug_checks=random.random() < 0.5,
    )
    options: list[Any] = [None]
    if random.random() < 0.5:
        names = [n for n in SELECTORS if config.keeps_queries or not REGISTRY[n].needs_queries]
        options += [False, True, {}, {"retain": random.choice([0.1, 0.5, 1])}]
        options += [{"selector": random.choice(names), "seed": random.randrange(9)}]
    return Setting(
        config=config,
        page=page,
        units=random.randint(0, 3 * GROUP),
        overlap=random.random() < 0.5,
        real=real,
        num_pages=-(-random.choice([400, 600, 1500]) // page) + 8,
        max_running=random.randint(1, 5),
        steps=random.choice([40, 120] if page == 1 else [100, 200]),
        options=tuple(options),
        trouble=random.choice([0.0, 0.01, 0.05]),
    )


def run_history(seed: int, real: bool, trace: Path | None = None) -> World:
    setting = random_setting(Random(seed), real)
    if trace is not None:
        config = dataclasses.replace(setting.config, trace=str(trace))
        setting = dataclasses.replace(setting, config=config)
    world = World(setting, seed)
    try:
        world.run()
    except Exception as error:
        error.add_note(f"history {seed}, {'with' if real else 'without'} K/V: {setting}")
        raise
    return world


@pytest.mark.parametrize("block", range(3))
def test_histories_with_kv(block: int) -> None:
    """After each pass every held slot of every layer and head has the K and V that belong there."""
    worlds = [run_history(seed, real=True) for seed in range(50 * block, 50 * block + 50)]
    assert sum(world.windows for world in worlds) > 200
    assert sum(world.retractions for world in worlds) > 20


def test_traced_histories(tmp_path: Path) -> None:
    """Each file names the tokens whose K and V are held; retractions and aborts among the requests."""
    worlds = []
    for seed in range(1000, 1050):
        folder = tmp_path / str(seed)
        folder.mkdir()
        worlds.append(run_history(seed, real=True, trace=folder))
        assert len(list(folder.iterdir())) == worlds[-1].traces
    assert sum(world.traces for world in worlds) > 50
    assert sum(world.retractions for world in worlds) > 20


def test_punctual_histories() -> None:
    """No window waits, whatever else runs, is retracted, or is out of recorders; and no recorder that
    was granted lacks a page."""
    worlds = []
    for seed in range(2000, 2300):
        setting = random_setting(Random(seed), real=False)
        heads = "all" if setting.config.query_heads == "all" else "mean"
        config = dataclasses.replace(setting.config, policy="punctual", query_heads=heads)
        worlds.append(World(dataclasses.replace(setting, config=config), seed))
        worlds[-1].run()
    assert sum(world.windows for world in worlds) > 900
    assert sum(world.retractions for world in worlds) > 100
    assert sum(world.without_queries for world in worlds) > 100  # rings were too small
    assert sum(world.recorder.lacks for world in worlds) == 0


@pytest.mark.parametrize("policy", ["periodic", "punctual"])
def test_windows_that_fall_due_together(policy: str) -> None:
    """Spread over the next steps by default; with ``punctual`` all go at once."""
    config = KaraConfig(selector="recent", window=64, delay=2, policy=policy)
    world = World(Setting(config, num_pages=2000, max_running=6, trouble=0.0, real=False), seed=0)
    for rid in range(6):
        assert world.prefill(Request(rid, [rid, 1, 2, 3, 4], 10_000, None))
    steps = []
    for _ in range(64 + 2 + 40):
        before = world.windows
        advance(world, 1)
        world.before_decode()
        steps += [world.steps] * (world.windows - before)
    assert len(steps) == 6
    assert len(set(steps)) == 1 if policy == "punctual" else len(set(steps)) > 3


@pytest.mark.parametrize("block", range(8))
def test_histories_of_rows_and_pages(block: int) -> None:
    """Thousands of histories of lengths, rows and pages alone."""
    worlds = [run_history(seed, real=False) for seed in range(250 * block, 250 * block + 250)]
    assert sum(world.windows for world in worlds) > 900
    assert sum(world.retractions for world in worlds) > 100


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


@pytest.mark.parametrize("selector", SELECTORS)
def test_windows_follow_each_other(selector: str) -> None:
    """The first starts behind the prompt, each further one behind the R kept tokens."""
    world, req = one_request(selector=selector)
    kept = 8 if selector == "identity" else 4
    advance(world, 100)
    starts = [window.kv_start for window in req.windows]
    assert starts == [5 + kept * i for i in range(len(starts))] and len(starts) >= 11
    assert [window.logical_start for window in req.windows] == [5 + 8 * i for i in range(len(starts))]
    assert len(req.slots) == 105 - len(starts) * (8 - kept)


def test_a_window_is_compressed_in_the_step_in_which_it_is_due() -> None:
    """Not with one token less than W and the delay behind the prompt."""
    world, req = one_request(selector="recent", window=8, delay=3)
    advance(world, 8 + 3)
    assert not req.windows
    world.before_decode()
    assert len(req.windows) == 1 and len(req.slots) == 5 + 4 + 3


@pytest.mark.parametrize("attribute", ["to_finish", "length", "finished_reason"])
def test_a_request_about_to_finish_is_left_alone(attribute: str) -> None:
    """Its window would be compressed for nothing."""
    world, req = one_request(selector="recent")
    advance(world, 8 + 2)
    if attribute == "length":
        req.sampling_params.max_new_tokens = len(req.output_ids) + 1
    else:
        setattr(req, attribute, "abort")
    world.coordinator.before_decode(world.batch)
    assert req.state.windows == []


def votes(req: Request) -> str:
    """Who chose its windows, a letter each."""
    return "".join(window.mark[0] for window in req.windows)


def test_a_window_that_began_without_a_recorder_is_chosen_without_queries() -> None:
    """The window in progress does not wait for one; the next one votes."""
    config = KaraConfig(window=8, delay=2, retain=0.5, query_heads="all")
    world = World(Setting(config, units=GROUP, trouble=0.0, num_pages=2000), seed=0)
    first = Request(0, [1, 2, 3, 4, 5], 10_000, None)
    second = Request(1, [1, 2, 3], 10_000, None)
    assert world.prefill(first) and world.prefill(second)
    advance(world, 20)
    first.finished_reason = Finish("stop")
    world.release(first, checkpoint=False)  # in the middle of the second's third window
    world.drop([first])
    advance(world, 21)
    assert votes(first) == "aa" and votes(second) == "nnna"
    assert [w.logical_start for w in second.windows] == [3, 11, 19, 27]
    totals = world.coordinator.totals
    assert (totals.windows, totals.without_queries, totals.skipped) == (6, 3, {})


@pytest.mark.parametrize("selector", ["kara", "causal", "snapkv"])
def test_without_a_ring_unit_windows_are_those_of_keys(selector: str) -> None:
    """The same tokens in the same places at the same time as for a request that asks for `keys`."""
    rows = []
    for options in (None, {"selector": "keys"}):
        config = KaraConfig(selector=selector, window=8, delay=2)
        world = World(Setting(config, units=0, trouble=0.0), seed=0)
        req = Request(0, [1, 2, 3], 10_000, options)
        assert world.prefill(req)
        advance(world, 50)
        rows.append(req)
        assert req.state.without_queries() == world.coordinator.totals.without_queries
    assert torch.equal(rows[0].kept, rows[1].kept) and votes(rows[0]) == "nnnnn"
    assert [window.mark for window in rows[1].windows] == [""] * 5
    assert [row.state.without_queries() for row in rows] == [5, 0]


@pytest.mark.parametrize("selector", ["identity", "recent", "keys"])
def test_only_selectors_with_queries_count_windows_without(selector: str) -> None:
    world, req = one_request(selector=selector)
    advance(world, 50)
    assert len(req.windows) == 5
    assert world.coordinator.totals.without_queries == req.state.without_queries() == 0


def test_skips_are_counted_by_reason() -> None:
    """Opt-outs, beams and multimodal requests are never compressed, and say why."""
    world, req = one_request(selector="recent")
    opted_out, beam, pictures = (
        Request(1 + i, [1, 2], 10_000, False if i == 0 else None) for i in range(3)
    )
    beam.beam_group = object()
    pictures.multimodal_inputs = object()
    for other in (opted_out, beam, pictures):
        assert world.prefill(other)
    advance(world, 40)
    assert len(req.windows) > 2
    assert [other.state for other in (opted_out, beam, pictures)] == [None] * 3
    assert world.coordinator.totals.skipped == {"opt_out": 1, "beam": 1, "multimodal": 1}


def test_seeds_come_from_the_prompt() -> None:
    """The same prompt gets the same random choice on every rank and in every run; a request may ask
    for another one."""
    states = []
    for prompt, options in (([1, 2], None), ([1, 2], None), ([1, 3], None), ([1, 2], {"seed": 5})):
        world, _ = one_request(selector="random")
        req = Request(1, prompt, 100, options)
        assert world.prefill(req)
        world.before_decode()
        states.append(req.state.seed)
    assert states[0] == states[1] != states[2] and states[3] == 5


def test_the_answers_to_one_prompt_have_seeds_of_their_own() -> None:
    """With ``n`` above 1: the same ones in every run, also after a retraction, whichever others run."""
    runs = []
    for others in (0, 2):
        world = World(Setting(KaraConfig(selector="random", window=8, delay=2), trouble=0.0), seed=0)
        seeds: list[list[int]] = []
        for options in (None, {"seed": 5}):
            copies = [Request(rid, [1, 2, 3], 100, options) for rid in range(3)]
            for copy in copies:
                copy.sampling_params.n = 3
            requests = [*copies[:2], *(Request(7, [4], 100, None) for _ in range(others)), copies[2]]
            for req in requests:
                assert world.prefill(req)
            world.before_decode()
            first = [copy.state.seed for copy in copies]
            world.retract(copies[1])
            world.queue.remove(copies[1])
            assert world.prefill(copies[1])
            world.before_decode()
            assert [copy.state.seed for copy in copies] == first
            for req in requests:
                req.finished_reason = Finish("length")
                world.release(req, checkpoint=True)
            world.drop(requests)
            seeds.append(first)
        assert len({seed for of_copies in seeds for seed in of_copies}) == 6
        assert seeds[1][0] == 5
        runs.append(seeds)
    assert runs[0] == runs[1]
    assert world.coordinator.seeds._copies == {}


def test_copies_that_never_come_are_forgotten() -> None:
    world, _ = one_request(selector="random")
    for number in range(5000):
        req = Request(number, [number], 100, None)
        req.sampling_params.n = 2
        world.coordinator.seeds.of(req, None)
    assert 0 < len(world.coordinator.seeds._copies) < 5000


@pytest.mark.parametrize("selector", ["identity", "kara", "recent"])
def test_a_window_of_which_all_is_kept_bars_nobody_from_the_tree(selector: str) -> None:
    """``identity``, and any other at a share of 1: the row still is what the tree would say."""
    world, req = one_request(selector=selector, retain=1.0)
    advance(world, 40)
    assert len(req.windows) > 2 and not req.skip_radix_cache_insert
    req.finished_reason = Finish("length")
    req.output_ids = [7] * (len(req.token_at) - 5)
    cached = len(world.tree)
    world.release(req, checkpoint=True)
    assert len(world.tree) == cached + 1 and len(world.tree[-1].ids) == len(req.token_at)


@pytest.mark.parametrize("mine", [True, False])
def test_ranks_that_disagree_about_whether_raise(mine: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Something is due on one rank and nothing on the other: both take part in the comparison, in every
    step, so neither waits for the other, and nothing has been done to a row yet."""
    worlds = [one_request(debug_checks=True)[0] for _ in range(2)]
    for world in worlds:
        world.scheduler.tp_size, world.scheduler.tp_cpu_group = 2, "ranks"
    world = worlds[0]
    asked: list[torch.Tensor] = []

    def agreeing(bounds: torch.Tensor, **_: Any) -> None:
        asked.append(bounds.clone())

    monkeypatch.setattr(torch.distributed, "all_reduce", agreeing)
    req = world.batch.reqs[0]
    while len(req.slots) < 5 + 8 + 2:
        advance(world, 1)
    steps = len(asked)
    assert steps == world.steps and len({tuple(one.tolist()) for one in asked}) == 1, "nothing was due"
    world.before_decode()
    assert len(asked) == steps + 1 and len(req.windows) == 1
    other = asked[0] if mine else asked[-1]  # what the other rank says of the next step

    def disagreeing(bounds: torch.Tensor, **_: Any) -> None:
        torch.maximum(bounds, other, out=bounds)

    world.decode(world.batch.reqs)
    while mine and len(req.slots) < 5 + 4 + 8 + 2:
        advance(world, 1)
    monkeypatch.setattr(torch.distributed, "all_reduce", disagreeing)
    windows = list(req.state.windows)
    with pytest.raises(RuntimeError, match="tensor-parallel ranks disagree; this one takes"):
        world.coordinator.before_decode(world.batch)
    assert req.state.windows == windows


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("units", [1, GROUP])
def test_warming_up_leaves_no_trace(selector: str, units: int) -> None:
    """A pass over slots that nobody holds, also where the ring has room for a recorder of the mean."""
    config = KaraConfig(selector=selector, window=32, delay=2)
    world = World(Setting(config, page=16, units=units, trouble=0.0), seed=0)
    world.coordinator.warm_up()
    assert world.coordinator.totals == Totals()
    assert sorted(world.allocator.free) == list(range(1, world.setting.num_pages + 1))
    world.run()


@pytest.mark.parametrize("page_size", [1, 16])
def test_the_real_allocator_takes_what_the_pass_frees(page_size: int) -> None:
    """int32 slots of a row, an empty segment for R = W, whole pages: as the stand-in above does."""
    from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
    from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator

    size, device = 64 * page_size, "cpu"
    if page_size == 1:
        real = TokenToKVPoolAllocator(size, torch.int64, device, None, need_sort=False)
    else:
        real = PagedTokenToKVPoolAllocator(size, page_size, torch.int64, device, None, need_sort=False)
    slots = real.alloc(8 * page_size)
    row = torch.zeros(100 * page_size, dtype=torch.int32)
    row[: len(slots)] = slots
    assert real.available_size() == size - 8 * page_size
    window = row[2 * page_size : 6 * page_size].clone()
    real.free_segment(window[4 * page_size :], start_pos=6 * page_size)
    assert real.available_size() == size - 8 * page_size
    real.free_segment(window[page_size:], start_pos=3 * page_size)
    assert real.available_size() == size - 5 * page_size
    again = real.alloc(real.available_size()).tolist()
    held = {*slots[: 3 * page_size].tolist(), *slots[6 * page_size :].tolist()}
    assert len(set(again)) == len(again) and not held & set(again)


def test_the_stand_ins_have_the_fields_of_sglang() -> None:
    """A field that SGLang renames must not live on in this file."""
    from sglang.srt.managers.schedule_batch import Req, ReqKvInfo, ScheduleBatch

    assert {f.name for f in dataclasses.fields(Kv)} <= {f.name for f in dataclasses.fields(ReqKvInfo)}
    assert hasattr(ReqKvInfo, "holds_kv")
    batch_fields = {f.name for f in dataclasses.fields(ScheduleBatch)}
    world, req = one_request()
    assert set(vars(world.batch)) <= batch_fields
    for name in ("finished", "next_output_finishes_by_length"):
        assert callable(getattr(Req, name))
    source = inspect.getsource(Req.__init__)
    for name in (
        *("origin_input_ids", "output_ids", "sampling_params", "kv", "skip_radix_cache_insert"),
        *("beam_group", "multimodal_inputs", "finished_reason", "to_finish", "retraction_count"),
    ):
        assert hasattr(req, name) and f"self.{name}" in source, name


# -- invariants that must be noticed -------------------------------------------------------------------


GEOMETRY = Geometry(page_size=4, window=16, delay=2)


def state(**changes: Any) -> RequestState:
    return RequestState(
        **{"selector": REGISTRY["recent"](), "kept": 8, "seed": 0, "base": 20} | changes
    )


@pytest.mark.parametrize(
    "changes,kv_len,protected,message",
    [
        ({"base": 21}, 90, 20, "base 21 is no multiple of page 4"),
        ({"kept": 6}, 90, 20, "R 6 is no multiple of page 4"),
        ({"kept": 0}, 90, 20, r"R 0 not in \(0, 16\]"),
        ({"kept": 20}, 90, 20, r"R 20 not in \(0, 16\]"),
        ({}, 90, 24, "window at 20 reaches into the 24 tokens that the prefix tree owns"),
        ({}, 37, 20, "window at 20 taken at KV length 37, due at 38"),
        ({"removed": 8}, 90, 20, "8 removed, windows say otherwise"),
        ({"windows": [Window(16, 16, 16, 8)], "removed": 8}, 90, 20, "window at 20 overlaps"),
        ({"windows": [Window(8, 8, 16, 8)], "removed": 8}, 90, 20, "window at 20 leaves a gap behind"),
    ],
)
def test_a_broken_state_is_not_compressed(
    changes: dict[str, Any], kv_len: int, protected: int, message: str
) -> None:
    """Each invariant of a window raises with its numbers; the state just short of it does not."""
    state().check(GEOMETRY, 38, 20)
    state(windows=[Window(8, 8, 16, 8)], removed=8, reused=1).check(GEOMETRY, 38, 20)
    with pytest.raises(RuntimeError, match=f"kv-compress: .*{message}"):
        state(**changes).check(GEOMETRY, kv_len, protected)


def test_commit_and_beginnings_of_windows() -> None:
    """Host arithmetic of windows: one begins at the base and at each W tokens behind it."""
    one = state(selector=REGISTRY["kara"]())
    assert one.due_at(GEOMETRY) == 38 and one.uncompressed(19) == 0 and one.uncompressed(25) == 5
    assert [n for n in range(60) if one.next_window(n, GEOMETRY) == 0] == [20, 36, 52]
    assert [one.next_window(n, GEOMETRY) for n in (3, 19, 21, 35, 37)] == [17, 1, 15, 1, 15]
    assert one.commit(GEOMETRY, "none") == Window(20, 20, 16, 8, "none")
    assert (one.base, one.removed) == (28, 8)
    assert one.commit(GEOMETRY, "mean") == Window(36, 28, 16, 8, "mean")
    assert (one.base, one.removed, one.without_queries()) == (36, 16, 1)
    one.check(GEOMETRY, 36 + 18, 20)
    one.reused = 1  # the first came with the prefix
    assert one.without_queries() == 0
    assert [ceil_align(n, 16) for n in (0, 1, 16, 17)] == [0, 16, 16, 32]


def corrupt_committed(world: World, req: Request) -> None:
    req.kv.kv_allocated_len += 1


def corrupt_batch(world: World, req: Request) -> None:
    world.batch.seq_lens_cpu = world.batch.seq_lens_cpu - 1


def corrupt_device_length(world: World, req: Request) -> None:
    world.batch.seq_lens = world.batch.seq_lens - 1


def corrupt_logical_length(world: World, req: Request) -> None:
    world.batch.orig_seq_lens = world.batch.orig_seq_lens + 1


def corrupt_row(world: World, req: Request) -> None:
    world.req_to_token[req.kv.req_pool_idx, 6] = world.req_to_token[req.kv.req_pool_idx, 7]


def corrupt_generation(world: World, req: Request) -> None:
    world.row_generation[req.kv.req_pool_idx] += 1


def corrupt_protected(world: World, req: Request) -> None:
    req.kv.cache_protected_len = 9


@pytest.mark.parametrize(
    "corrupt,message",
    [
        (corrupt_committed, "committed 15, allocated 16, in the batch 15"),
        (corrupt_batch, "in the batch 14"),
        (corrupt_device_length, "logical length is 1 ahead"),
        (corrupt_logical_length, "logical length is 1 ahead of its 15 KV slots, 0 were removed"),
        (corrupt_row, "holds the same page twice"),
        (corrupt_generation, "the row of request 0 has a new owner"),
        (corrupt_protected, "the 9 tokens that the prefix tree owns"),
    ],
)
def test_debug_checks_notice(corrupt: Callable[[World, Request], None], message: str) -> None:
    """Whatever disagrees before a pass stops the server, with the numbers."""
    world, req = one_request(selector="recent", debug_checks=True)
    advance(world, 8 + 2)
    corrupt(world, req)
    with pytest.raises(RuntimeError, match=message):
        world.coordinator.before_decode(world.batch)


@pytest.mark.parametrize("first,second", [(21, 22), (16, 17), (20, 36)])
def test_debug_checks_notice_torn_pages(first: int, second: int) -> None:
    """With pages of 16 a row is made of whole ones, in order."""
    config = KaraConfig(selector="recent", window=32, delay=2, debug_checks=True)
    world = World(Setting(config, page=16, trouble=0.0), seed=0)
    req = Request(0, list(range(16)), 10_000, None)
    assert world.prefill(req)
    advance(world, 32 + 2)
    row = world.req_to_token[req.kv.req_pool_idx]
    row[[first, second]] = row[[second, first]]
    with pytest.raises(RuntimeError, match="does not consist of whole pages"):
        world.coordinator.before_decode(world.batch)


@pytest.mark.parametrize("stored", ["model", "fp8", "fp4"])
@pytest.mark.parametrize("heads", ["all", "mean"])
def test_what_lay_in_the_ring_before_does_not_matter(heads: str, stored: str) -> None:
    """After `/resume_memory_occupation` anything may: the ring has been given back meanwhile."""
    world, req = one_request(selector="kara", query_heads=heads, query_dtype=stored)
    for part in world.recorder.ring.parts:
        part.view(torch.uint8).fill_(0xFF)  # NaN, or the largest numbers
    advance(world, 100)  # scores, and so the kept tokens, are checked against the true queries
    assert len(req.windows) >= 11 and votes(req) == heads[0] * len(req.windows)


@pytest.mark.parametrize("heads", ["all", "mean"])
def test_debug_checks_notice_a_step_that_recorded_nothing(heads: str) -> None:
    """As in a CUDA graph that was captured without its recording launches: the window would be chosen
    by what lay in the ring before."""
    world, req = one_request(selector="kara", query_heads=heads, debug_checks=True)
    advance(world, 8 + 2)
    world.coordinator.before_decode(world.batch)
    assert len(req.state.windows) == 1
    world, _ = one_request(selector="kara", query_heads=heads, debug_checks=True)
    advance(world, 8)
    record = world.recorder.record
    world.recorder.record = lambda *_: None
    advance(world, 1)
    world.recorder.record = record
    advance(world, 1)
    with pytest.raises(
        RuntimeError, match="the query of position 13 in layer 0, it holds none of this request's"
    ):
        world.coordinator.before_decode(world.batch)


@pytest.mark.parametrize("kept", [[0, 1, 2, 2], [3, 2, 1, 0], [0, 1, 2, 8], [-1, 0, 1, 2], [0, 1, 2]])
def test_debug_checks_notice_a_bad_selection(kept: list[int]) -> None:
    """Kernels that return anything but R ascending positions of the window are caught."""
    world, _ = one_request(selector="recent", debug_checks=True)
    advance(world, 8 + 2)
    bad = torch.tensor(kept).expand(LAYERS, KV_HEADS, -1)
    world.coordinator.kernels.compress = lambda pool, jobs, positions: [bad]
    with pytest.raises(RuntimeError, match="selection must be 4 strictly ascending positions"):
        world.coordinator.before_decode(world.batch)


@pytest.mark.parametrize("heads", ["all", "mean"])
def test_queries_that_were_overwritten_are_not_used(heads: str) -> None:
    """Where passes come too late for the ring, old windows are chosen without queries, all are
    compressed in their order, and those that the ring still covers are voted on."""
    world, req = one_request(selector="kara", query_heads=heads)
    hold_back, world.coordinator.policy.due = world.coordinator.policy.due, lambda *_, **__: []
    advance(world, 213)
    assert req.windows == []
    world.coordinator.policy.due = hold_back
    advance(world, 18)  # scores, and so the kept tokens, are checked against the true queries
    # The table has room for so many blocks; the last is that of the newest token before the first pass.
    begin = req.windows[0].logical_start
    oldest = ((begin + 213 - 1) // PAGE - world.recorder.num_blocks + 1) * PAGE
    first = next(i for i in range(20) if begin + 8 * i >= oldest)
    assert first > 0
    assert votes(req) == "n" * first + heads[0] * (len(req.windows) - first)
    assert len(req.windows) > first + 2
    assert world.coordinator.totals.without_queries == first


def voted_share(requests: list[Request]) -> list[float]:
    return [sum(voter != "n" for voter in votes(req)) / len(req.windows) for req in requests]


@pytest.mark.parametrize("heads,units", [("all", 2), ("all", 3), ("mean", 1), ("auto", 1)])
@pytest.mark.parametrize("running", [2, 3])
@pytest.mark.parametrize("together", [True, False])
def test_recorders_go_round(heads: str, units: int, running: int, together: bool) -> None:
    """With room for one recorder, each of two or three requests votes on as many windows as the
    others, also where their windows begin in the same steps; and all windows are compressed."""
    config = KaraConfig(window=8, delay=2, query_heads=heads)
    world = World(Setting(config, units=units, trouble=0.0, num_pages=4000), seed=0)
    requests = [Request(i, [1, 2, 3, i], 10_000, None) for i in range(running)]
    for req in requests:
        assert world.prefill(req)
        advance(world, 0 if together else 3)
    advance(world, 900)
    assert min(len(req.windows) for req in requests) >= 900 // 8 - 1
    shares = voted_share(requests)
    # A change of owners costs a window, or less.
    expected = MOST_IN_A_ROW / (MOST_IN_A_ROW + 1) / running
    assert max(shares) - min(shares) <= 0.05 and 0.95 * expected <= sum(shares) / running, shares


def test_pages_are_kept_for_those_that_asked_in_vain_longest() -> None:
    """Windows that begin in nearly the same steps: the first in each row does not win every time."""
    config = KaraConfig(window=64, delay=16)
    world = World(Setting(config, page=16, units=2, trouble=0.0, num_pages=2000, real=False), seed=0)
    requests = [Request(i, list(range(20 + 3 * i)), 10_000, None) for i in range(7)]
    for req in requests:
        assert world.prefill(req)
    advance(world, 1900)
    voted = [sum(voter != "n" for voter in votes(req)) for req in requests]
    assert min(voted) >= 6 and max(voted) <= 12, voted


def test_one_recorder_less_than_requests_costs_little_more_than_its_windows() -> None:
    """Only as many recorders change hands as requests have asked in vain."""
    config = KaraConfig(window=32, delay=2, query_heads="mean")
    world = World(Setting(config, units=4, trouble=0.0, num_pages=9000, real=False), seed=0)
    requests = [Request(i, [1, 2, 3, i], 10_000, None) for i in range(5)]
    for req in requests:
        assert world.prefill(req)
        advance(world, 6)
    advance(world, 1600)
    shares = voted_share(requests)
    assert min(shares) >= 0.6, shares


def test_who_records_all_heads_gives_way_first() -> None:
    """Some windows after the ring is full, everybody has a recorder of the mean."""
    config = KaraConfig(window=8, delay=2, query_heads="auto")
    world = World(Setting(config, units=2 * GROUP, trouble=0.0, num_pages=2000, real=False), seed=0)
    requests = [Request(i, [1, 2, 3, i], 10_000, None) for i in range(2 * GROUP)]
    for req in requests:
        assert world.prefill(req)
        advance(world, 1)
    advance(world, 12)
    assert [votes(req) for req in requests] == ["a", "a", "n", "n"]
    advance(world, 40)
    assert all(votes(req)[-1] == "m" for req in requests)
    advance(world, 40)
    assert all(votes(req)[-5:] == "mmmmm" for req in requests)


def test_nobody_gives_way_while_there_is_room() -> None:
    """Recorders stay with their requests, and every window is voted on."""
    config = KaraConfig(window=8, delay=2, query_heads="all")
    world = World(Setting(config, units=3 * GROUP, trouble=0.0, num_pages=2000, real=False), seed=0)
    requests = [Request(i, [1, 2, 3, i], 10_000, None) for i in range(3)]
    for req in requests:
        assert world.prefill(req)
        advance(world, 5)
    recorders = [req.state.recorder for req in requests]
    advance(world, 200)
    assert [req.state.recorder for req in requests] == recorders
    assert voted_share(requests) == [1, 1, 1]


def test_who_needs_no_queries_takes_no_recorder() -> None:
    """On a server that records: others find the whole ring, and its own windows come all the same."""
    config = KaraConfig(window=8, delay=2, query_heads="all")
    world = World(Setting(config, units=GROUP, trouble=0.0, num_pages=2000), seed=0)
    keys = Request(0, [1, 2, 3], 10_000, {"selector": "keys"})
    kara = Request(1, [1, 2, 4], 10_000, None)
    assert world.prefill(keys)
    advance(world, 30)
    assert world.recorder.in_use == 0 and len(keys.windows) == 3
    assert world.prefill(kara)
    advance(world, 30)
    assert set(world.recorder.active) == {kara.kv.req_pool_idx}
    assert len(kara.windows) == 3 and len(keys.windows) == 7
    assert votes(kara) == "aaa" and world.coordinator.totals.without_queries == 0


def whole_life(world: World, req: Request) -> list[int]:
    """Serve one request to its end; the KV slots that it held, step by step."""
    assert world.prefill(req)
    held = []
    while not req.finished():
        world.step()
        held.append(len(req.slots))
    return held


@st.composite
def lone_servers(draw: st.DrawFn) -> Setting:
    """A server for one request, with a ring for it, of any selector and any geometry, whose passes keep
    up."""
    page = draw(st.sampled_from([1, 4, 16]))
    config = KaraConfig(
        selector=draw(st.sampled_from(SELECTORS)),
        window=page * draw(st.integers(1, 8)),
        retain=draw(st.sampled_from([0.01, 0.25, 0.5, 1.0])),
        query_mem_gb=1.0,
        delay=draw(st.sampled_from([0, 1, 7, 40, 64])),
        query_heads=draw(st.sampled_from(["auto", "all", "mean"])),
        period=draw(st.sampled_from([1, 1, 5, 40])),
    )
    assume(config.period <= config.window)
    overlap = draw(st.booleans())
    return Setting(config, page=page, overlap=overlap, real=False, trouble=0.0, max_running=0)


REQUEST_OPTIONS = st.sampled_from(
    [None, {"retain": 0.01}, {"retain": 0.75}, {"selector": "kara"}, {"selector": "recent"}]
)


@settings(max_examples=150)
@given(lone_servers(), st.integers(1, 60), st.integers(1, 300), REQUEST_OPTIONS)
def test_with_a_ring_for_all_no_window_goes_without_queries(
    setting: Setting, prompt: int, tokens: int, options: Any
) -> None:
    """Whatever an answer's length: all windows that fall due are compressed, with their queries, and
    what is left over is nobody's loss."""
    world = World(setting, seed=0)
    req = Request(0, [1] * prompt, tokens, options)
    whole_life(world, req)
    totals, config = world.coordinator.totals, setting.config
    assert (totals.without_queries, totals.skipped) == (0, {})
    assert totals.windows == len(req.windows)
    # The last pass that it could be in has the KV of all but its last two tokens.
    left = prompt + tokens - 3 - world.first_window(req) - config.delay
    fewest = max(0, (left - (config.period - 1)) // config.window)
    assert fewest <= len(req.windows) <= max(0, (left + 1) // config.window)


@settings(max_examples=200)
@given(lone_servers(), st.integers(0, 3), st.integers(1, 60), st.integers(1, 300), REQUEST_OPTIONS)
def test_no_more_credit_than_what_happens(
    setting: Setting, units: int, prompt: int, tokens: int, options: Any
) -> None:
    """What admission reserves, for a request that waits and in each step of one that runs, is never
    less than what it will hold: with a ring or without one, and whatever share it asks for itself."""
    config = setting.config
    world = World(dataclasses.replace(setting, units=units), seed=0)
    coordinator = world.coordinator
    req = Request(0, [1] * prompt, tokens, options)
    reserves = [prompt + coordinator.reserve(req, tokens, 1)]
    assert world.prefill(req)
    held = []
    while not req.finished():
        world.step()
        held.append(len(req.slots))
        if not req.finished() and req.state is not None:
            left = tokens - len(req.output_ids)
            reserves.append(len(req.slots) + coordinator.reserve(req, left, 1))
    for step, reserve in enumerate(reserves):
        assert max(held[step:]) <= reserve
    # Nor is much more reserved than is needed: a window that just does not fall due.
    more = config.window - world.kept_of(req) + config.period + 2
    assert reserves[0] <= max(held) + more


def test_where_passes_fall_behind_less_is_promised() -> None:
    """Six requests want a pass in each step and a third, and get one in four: what is reserved covers
    what they come to hold together, also for those that ask for a tiny share."""
    config = KaraConfig(
        selector="keys", window=8, delay=2, retain=0.25, period=4, max_requests_per_pass=1
    )
    for options in (None, {"retain": 0.01}):
        setting = Setting(config, trouble=0.0, num_pages=9000, real=False, max_running=6)
        world = World(setting, seed=0)
        requests = [Request(i, [1, 2, i], 10_000, options) for i in range(6)]
        for req in requests:
            assert world.prefill(req)
        reserved = sum(3 + world.coordinator.reserve(req, 600, 6) for req in requests)
        promised = sum(3 + world.coordinator.reserve(req, 600, 1) for req in requests)
        advance(world, 600)
        held = sum(len(req.slots) for req in requests)
        assert promised < 0.6 * held, "passes do fall behind"
        assert held <= 1.02 * reserved


@pytest.mark.parametrize("threshold", [0, 100, 300, 10_000])
def test_below_the_threshold_nothing_is_promised(threshold: int) -> None:
    config = KaraConfig(selector="keys", window=8, delay=2, policy="threshold", threshold=threshold)
    world = World(Setting(config, trouble=0.0, num_pages=2000, real=False), seed=0)
    req = Request(0, [1, 2, 3], 400, None)
    reserve = 3 + world.coordinator.reserve(req, 400, 1)
    peak = max(whole_life(world, req))
    assert peak - 1 <= reserve <= peak + 8


@pytest.mark.parametrize("units", [7, 2])
@pytest.mark.parametrize("policy", ["periodic", "pressure", "threshold"])
def test_a_step_costs_what_happens_in_it(policy: str, units: int) -> None:
    """Seven requests run for 600 steps, and each is looked at when a window falls due, when one begins
    that wants a recorder, and never else; nobody is a candidate for long, or asks what is needed."""
    config = KaraConfig(
        window=50, delay=5, query_heads="mean", policy=policy, threshold=300, min_pool_usage=1.0
    )
    world = World(Setting(config, units=units, trouble=0.0, num_pages=20_000, real=False), seed=0)
    coordinator = world.coordinator
    count: Counter[str] = Counter()

    def counted(name: str, function: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            count[name] += 1
            return function(*args, **kwargs)

        return call

    for name in ("_make_date", "_candidate", "acts", "_newcomers"):
        setattr(coordinator, name, counted(name, getattr(coordinator, name)))
    for i in range(7):
        assert world.prefill(Request(i, [1, 2, i], 1000, None))
        answer(world, 3)
    answer(world, 600)
    windows = 7 * 13
    assert count["_newcomers"] == 621
    assert count["_make_date"] <= 4 * windows
    # A candidate for at most so many steps as windows that fall due nearby are spread over.
    assert count["_candidate"] <= (0 if policy == "pressure" else 8 * windows)
    assert count["acts"] <= 621 // LOOK_EVERY + 2 * windows
    taken = sum(len(req.windows) for req in world.batch.reqs)
    assert taken == 0 if policy == "pressure" else 7 * 11 <= taken <= windows


@pytest.mark.parametrize("selector", ["kara", "identity"])
def test_passes_let_sglang_look_at_its_queue(selector: str) -> None:
    """Only they do, within a few steps, and not in each step when each has a pass."""
    world, _ = one_request(selector=selector, window=4, delay=0)
    full, looked = [], 0
    for _ in range(60):
        before = len(world.batch.reqs[0].windows)
        world.batch.batch_is_full = True
        advance(world, 1)
        full.append((len(world.batch.reqs[0].windows) > before, world.batch.batch_is_full))
        looked += not world.batch.batch_is_full
    assert sum(passed for passed, _ in full) >= 14
    assert 60 // LOOK_EVERY - 1 <= looked <= 60 // LOOK_EVERY
    world.coordinator.policy.due = lambda *_, **__: []
    world.batch.batch_is_full = True
    advance(world, LOOK_EVERY)
    world.batch.batch_is_full = True  # what was passed before was looked at
    advance(world, 4 * LOOK_EVERY)
    assert world.batch.batch_is_full


def answer(world: World, steps: int) -> None:
    """As :func:`advance`, and the tokens arrive."""
    for _ in range(steps):
        advance(world, 1)
        world.process_results(world.batch.reqs)


def test_pressure_touches_nobody_unless_somebody_waits_for_room() -> None:
    """Neither while all fits, nor for those that wait for a row; and it ends with its cause."""
    config = KaraConfig(window=8, delay=2, policy="pressure")
    world = World(Setting(config, trouble=0.0, num_pages=2000), seed=0)
    req = Request(0, [1, 2, 3], 400, None)
    assert world.prefill(req)
    answer(world, 150)
    world.queue.append(Request(1, [1, 2, 4], 2000, None))
    rows, world.free_rows = world.free_rows, []
    answer(world, 50)
    assert req.windows == []
    world.free_rows = rows
    answer(world, 50)
    taken = len(req.windows)
    assert taken >= 5
    world.queue.clear()
    answer(world, 50)
    assert len(req.windows) == taken


def test_pressure_lasts_until_what_runs_fits() -> None:
    """Admitted on compression, two answers of 700 in 1,000 slots are compressed with nobody waiting."""
    config = KaraConfig(window=8, delay=2, policy="pressure")
    world = World(Setting(config, trouble=0.0, num_pages=1000), seed=0)
    running = [Request(i, [1, 2, i], 700, None) for i in range(2)]
    for req in running:
        assert world.prefill(req)
    answer(world, 690)  # fails where a slot is missing
    held = sum(len(req.slots) for req in running)
    assert 750 <= held <= 800, "compressed down to the mark and no further"
