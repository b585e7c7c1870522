"""A simulated scheduler that speculates: ``world.py`` with steps that verify drafts of all kinds.

How many drafts a step accepts is drawn. With overlap the scheduler learns of it a step later, as in
SGLang: it works with KV lengths that are too short, and the step that comes next reads its lengths from
what the step in flight publishes on the device (``managers/overlap_utils.py``).
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from stand_ins import LAYERS, Finish, Request, Setting
from world import World

from kara_sglang.radix_integration.row import ceil_align


class DraftingWorld(World):
    """Requests have ``spare`` slots behind those of accepted tokens: where drafts are written."""

    def __init__(self, setting: Setting, seed: int) -> None:
        super().__init__(setting, seed)
        self.published: dict[int, int] = {}  # KV lengths by row, on the device
        self.spare: dict[str, list[int]] = {}
        self.accepted: dict[str, list[int]] = {}  # by steps whose results are to come
        self.most_at_once = 0

    def prefill(self, req: Request) -> bool:
        done = super().prefill(req)
        if done:
            # Behind the step in flight; its results are processed while the prompt is computed.
            self.process_results(self.in_flight)
            self.in_flight = []
            self.spare[req.rid], self.accepted[req.rid] = [], []
            self.published[req.kv.req_pool_idx] = len(req.slots)
        return done

    def row_of(self, req: Request) -> list[int]:
        return req.slots + self.spare[req.rid]

    def reserved(self, req: Request) -> int:
        """Slots that the row must have before the next step (``page_aligned_decode_alloc_lens``)."""
        wanted = req.kv.kv_committed_len + self.setting.pace.reserve
        return max(req.kv.kv_allocated_len, ceil_align(wanted, self.page))

    def needed(self) -> int:
        slots = (
            self.reserved(req) - ceil_align(req.kv.kv_allocated_len, self.page)
            for req in self.batch.reqs
        )
        return sum(max(0, count) for count in slots) // self.page

    def owned(self, req: Request) -> int:
        through_stop = len(req.origin_input_ids) + len(req.output_ids_through_stop)
        return min(req.kv.kv_committed_len, through_stop)

    def allocate(self, req: Request) -> None:
        row, spare = self.req_to_token[req.kv.req_pool_idx], self.spare[req.rid]
        for index in range(req.kv.kv_allocated_len, self.reserved(req)):
            starts_page = index % self.page == 0
            last = (req.slots + spare)[-1]
            spare.append(self.allocator.take_page() * self.page if starts_page else last + 1)
            row[index] = spare[-1]
        req.kv.kv_allocated_len = len(req.slots) + len(spare)

    def drafts(self) -> tuple[list[int], list[int]]:
        """Depths of a step's drafts, the first of which stands for the newest token, and an accepted
        path among them."""
        pace, depths, parents = self.setting.pace, [0], [-1]
        for node in range(1, pace.tokens):
            parent = self.random.randrange(node) if pace.branches else node - 1
            parents.append(parent)
            depths.append(depths[parent] + 1)
        node = self.random.randrange(pace.tokens)
        path = []
        while node >= 0:
            path.insert(0, node)
            node = parents[node]
        return depths, path

    def before_decode(self) -> None:
        mode = SimpleNamespace(is_mixed=lambda: False, is_decode=lambda: True)
        self.scheduler.last_batch = SimpleNamespace(forward_mode=mode) if self.in_flight else None
        super().before_decode()

    def decode(self, reqs: list[Request]) -> None:
        batch, count = self.batch, self.setting.pace.tokens
        if not reqs:
            return
        for req in reqs:
            self.allocate(req)
        if self.setting.overlap:
            lengths = [self.published[req.kv.req_pool_idx] for req in reqs]
            batch.seq_lens, batch.seq_lens_cpu = torch.tensor(lengths), torch.tensor(lengths)
            self.coordinator.compaction.lengths.correct(batch)
        assert batch.seq_lens.tolist() == batch.seq_lens_cpu.tolist() == [len(r.slots) for r in reqs]
        tokens = torch.tensor(self.new_tokens(len(reqs) * count)).view(-1, count)
        trees = [self.drafts() for _ in reqs]
        depths = torch.tensor([depths for depths, _ in trees])
        positions = self.positions((batch.seq_lens[:, None] + depths).flatten())
        true = torch.tensor([len(req.token_at) for req in reqs])[:, None] + depths
        assert torch.equal(positions, true.flatten()), "RoPE positions"
        rows = torch.tensor([req.kv.req_pool_idx for req in reqs])
        if self.recorder.in_use and self.setting.real:
            for layer in range(LAYERS):
                queries = self.log_q[tokens.flatten(), layer].flatten(1)
                self.recorder.record(self.coordinator.kernels, layer, queries, rows, positions)
        accepted = torch.full((len(reqs), count), -1)
        for index, (_, path) in enumerate(trees):
            accepted[index, : len(path)] = torch.tensor(path) + index * count
        first = self.coordinator.compaction.lengths.logical(batch.seq_lens, rows)
        self.recorder.keep_accepted(first, rows, accepted)
        for req, (_, path), computed in zip(reqs, trees, tokens, strict=True):
            self.accept(req, computed[path].tolist())
        if not self.setting.overlap:
            batch.seq_lens = torch.tensor([len(req.slots) for req in reqs])
            batch.seq_lens_cpu = batch.seq_lens.clone()

    def accept(self, req: Request, tokens: list[int]) -> None:
        """The tokens of the accepted path lie in the row's next slots from now on."""
        count, spare = len(tokens), self.spare[req.rid]
        at = len(req.slots)
        slots = self.req_to_token[req.kv.req_pool_idx, at : at + self.setting.pace.tokens].tolist()
        assert slots == spare[: self.setting.pace.tokens], "the step writes where the row says"
        self.write_kv(slots[:count], tokens)
        req.slots += slots[:count]
        del spare[:count]
        req.token_at += tokens
        self.published[req.kv.req_pool_idx] = len(req.slots)
        self.accepted[req.rid].append(count)
        self.most_at_once = max(self.most_at_once, count)

    def process_results(self, reqs: list[Request]) -> None:
        gone = []
        for req in reqs:
            if not req.kv.holds_kv or req.finished():
                continue
            count, most = self.accepted[req.rid].pop(0), req.sampling_params.max_new_tokens
            req.kv.kv_committed_len += count
            before = len(req.output_ids)
            req.output_ids += [self.random.randrange(9) for _ in range(count)]
            if len(req.output_ids) >= most:
                req.finished_reason, req.finished_len = Finish("length"), most
            elif req.to_finish is not None:
                req.finished_reason, req.to_finish = req.to_finish, None
            elif self.chance(self.setting.trouble / 2):
                req.finished_reason = Finish("stop")
                req.finished_len = before + self.random.randint(1, count)
            if req.finished():
                self.release(req, checkpoint=True)
                gone.append(req)
        self.drop(gone)

    def check_lengths(self) -> None:
        for req in self.batch.reqs:
            kv, state, row = req.kv, req.state, self.row_of(req)
            unknown = sum(self.accepted[req.rid])
            assert kv.kv_committed_len + unknown == len(req.slots) <= kv.kv_allocated_len == len(row)
            assert self.req_to_token[kv.req_pool_idx, : len(row)].tolist() == row
            if req.beam_group or req.multimodal_inputs or req.options is False:
                assert state is None
                continue
            assert state is not None and state.removed == req.removed
            assert state.base % self.page == 0 and state.base >= kv.cache_protected_len
