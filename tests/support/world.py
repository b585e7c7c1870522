"""A simulated scheduler: the real coordinator against a plain model of rows, pages and lengths.

SGLang is replaced by a few lines that do what its scheduler does, in its order; ``model.py`` watches.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from model import Model
from stand_ins import (
    DIM,
    GROUP,
    KV_HEADS,
    LAYERS,
    Finish,
    Prefix,
    Request,
    Setting,
)

from kara_sglang.config import KaraConfig
from kara_sglang.radix_integration.prefix import prefix_of
from kara_sglang.radix_integration.row import ceil_align
from kara_sglang.scheduler.returning import retracted_of
from kara_sglang.scheduler.streams import forward_stream


class World(Model):
    """What a scheduler does with requests, from their arrival to their end."""

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
        """Match the tree, take up a row that waits, compute the rest, leave the whole pages to the
        tree, join the batch."""
        ids = req.origin_input_ids + req.output_ids
        if not self.free_rows or not self.make_room(len(ids) // self.page + 1):
            return False
        best = self.match(req, ids)
        back = retracted_of(req)
        req.prefix_len = req.kv.cache_protected_len = best
        returning = self.coordinator.returning
        offer = returning.offer(req)
        if offer is not None and self.chance(self.setting.trouble):
            returning.withdraw(req, offer)  # another request's turn first
            assert (req.prefix_len, req.kv.cache_protected_len) == (best, best)
            return False
        row = torch.tensor(req.slots, dtype=torch.int64)
        if offer is not None:
            assert req.prefix_len == offer.copy.tokens < len(ids), "a token is left to compute"
            kept, removed = req.retracted
            assert returning.make_room(offer)
            returning.bring_back(req, offer)
            row = prefix_of(req).returned.row
            front = req.kv.cache_protected_len
            assert front <= best and row[:front].tolist() == req.slots[:front]
            req.token_at = req.token_at[:front] + kept[front : req.prefix_len]
            req.kept, req.slots = removed.clone(), row.tolist()
            shared = min(front, removed.shape[-1])
            req.kept[..., :shared] = torch.tensor(req.token_at[:shared])
            self.returned += 1
        else:
            req.kept, req.windows = torch.empty((LAYERS, KV_HEADS, 0), dtype=torch.int64), []
            req.prefilled = len(ids) if back is None else max(len(req.origin_input_ids), best)
        req.is_retracted = False
        req.kv.req_pool_idx = self.free_rows.pop()
        self.row_generation[req.kv.req_pool_idx] += 1
        self.req_to_token[req.kv.req_pool_idx, : len(row)] = row.to(torch.int32)
        self.extend(req, self.new_tokens(len(ids) - len(req.token_at)))
        if req.prefix is not None:
            req.prefix.users += 1
        self.unpublished.append((req, len(ids)))
        if not self.setting.overlap:
            self.publish()
        req.output_ids.append(self.random.randrange(9))
        length = torch.tensor([len(req.slots)])
        batch = self.batch
        batch.reqs = [*batch.reqs, req]
        batch.seq_lens = torch.cat([batch.seq_lens, length])
        batch.seq_lens_cpu = torch.cat([batch.seq_lens_cpu, length])
        return True

    def publish(self) -> None:
        """SGLang's ``checkpoint_kv_cache`` of prefills, which with overlap scheduling comes behind the
        launch of their first decode step."""
        for req, length in self.unpublished:
            if not req.kv.holds_kv or req.skip_radix_cache_insert:
                continue
            if req.prefix is not None:
                req.prefix.users -= 1
            length = length // self.page * self.page
            req.kv.cache_protected_len = length
            req.prefix = self.insert(req, length)
            if req.prefix is not None:
                req.prefix.users += 1
        self.unpublished.clear()

    def match(self, req: Request, ids: list[int]) -> int:
        """The longest beginning that the tree holds, less than all; its slots become the row's."""
        best = 0
        req.slots, req.token_at, req.prefix = [], [], None
        for prefix in self.tree:
            limit = min(len(prefix.ids), len(ids) - 1)
            same = next((i for i in range(limit) if prefix.ids[i] != ids[i]), limit)
            same = same // self.page * self.page
            if same > best:
                best, req.prefix = same, prefix
                req.slots, req.token_at = prefix.slots[:same], prefix.tokens[:same]
        return best

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
        self.cap(req)
        self.queue.append(req)

    def cap(self, req: Request) -> None:
        """SGLang's ``init_req_max_new_tokens``."""
        asked, prompt = req.sampling_params.max_new_tokens, len(req.origin_input_ids)
        room = self.setting.num_pages * self.page - ceil_align(prompt, self.page) - self.page - 1
        req.sampling_params.max_new_tokens = max(0, min(asked, room))
        self.coordinator.longer.remember(req, asked)

    def release(self, req: Request, *, checkpoint: bool) -> None:
        """SGLang's ``release_kv_cache``."""
        kv = req.kv
        if any(window.freed for window in req.windows):
            assert req.skip_radix_cache_insert, "its row no longer is what the tree would say"
        else:
            barred = retracted_of(req) is not None
            barred |= req.state is not None and req.state.insert_skipped is not None
            assert req.skip_radix_cache_insert == (req.never_inserts or barred)
        kept_by_tree = kv.cache_protected_len
        if checkpoint and not req.skip_radix_cache_insert:
            kept_by_tree = self.owned(req) // self.page * self.page
            self.insert(req, kept_by_tree)
        row = self.req_to_token[kv.req_pool_idx, : kv.kv_allocated_len]
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

    def retract(self, req: Request, *, paused: bool = False) -> None:
        """By ``ScheduleBatch.release_req``, or because the server is ``paused``."""
        self.retractions += 1
        returning, compressed = self.coordinator.returning, req.state is not None
        if paused:
            returning.drop_all()
        else:
            returning.keep(req)
        req.retracted = req.token_at, req.kept
        self.release(req, checkpoint=False)
        # Req.reset_for_retract
        req.retraction_count += 1
        req.kv.cache_protected_len = 0
        self.coordinator.forget(req)
        assert req.state is None
        if compressed:
            assert retracted_of(req).insert_skipped == req.never_inserts
        req.is_retracted = req.retracted_stain = True
        req.prefix = None
        self.drop([req])
        if self.coordinator.longer.is_gone(req):
            self.gone += 1
        else:
            self.queue.append(req)

    def retraction_order(self) -> list[int]:
        """SGLang's ``_get_decode_retraction_order``, youngest last, and our hook behind it."""
        reqs = self.batch.reqs
        return self.coordinator.longer.keep(range(len(reqs)), reqs)

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
        self.publish()
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

    def end_with_its_prefill(self, req: Request) -> None:
        """SGLang's ``process_batch_result_prefill``: the token that it gave may be the last one."""
        if len(req.output_ids) >= req.sampling_params.max_new_tokens:
            self.publish()
            req.finished_reason = Finish("length")
            self.release(req, checkpoint=True)
            self.drop([req])

    def needed(self) -> int:
        """Pages that the next step takes."""
        return sum(len(req.slots) % self.page == 0 for req in self.batch.reqs)

    def owned(self, req: Request) -> int:
        """Slots of a row that hold what a client has got; SGLang's ``Req.owned_kv_len``."""
        return req.kv.kv_committed_len

    def step(self) -> None:
        """One turn of the scheduler's loop."""
        trouble, batch = self.setting.trouble, self.batch
        if len(batch.reqs) + len(self.queue) < self.setting.max_running and self.chance(0.3):
            self.arrive()
        if self.queue and self.prefill(self.queue[0]):
            self.end_with_its_prefill(self.queue.pop(0))
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
        while batch.reqs and (self.chance(trouble) or not self.make_room(self.needed())):
            req = batch.reqs[self.retraction_order()[-1]]
            self.retract(req, paused=self.chance(self.setting.trouble))
        launched = batch.reqs[:]
        self.decode(launched)
        self.process_results(self.in_flight if self.setting.overlap else launched)
        self.in_flight = launched if self.setting.overlap else []
        if self.allocator.freed or self.steps % 16 == 0:
            self.check_pages()

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


Kind = TypeVar("Kind", bound=World)


def lived(kind: type[Kind], setting: Setting, seed: int) -> Kind:
    """A history from its beginning to its end; what goes wrong in it says which it was."""
    world = kind(setting, seed)
    try:
        world.run()
    except Exception as error:
        error.add_note(f"history {seed}, {'with' if setting.real else 'without'} K/V: {setting}")
        raise
    return world


def one_request(**config: Any) -> tuple[World, Request]:
    """A server with one running request of 5 prompt tokens that never ends by itself."""
    settings = {"window": 8, "delay": 2, "retain": 0.5, "policy": "periodic"} | config
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
