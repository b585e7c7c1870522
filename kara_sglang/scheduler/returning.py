"""Requests that were retracted: their compressed rows wait in host memory, and come back.

SGLang frees a retracted request's KV and computes it again from its tokens, uncompressed. Here a copy
of the row's whole pages goes to the host, compressed windows and all, and when the request is admitted
again it gets slots of its own for them: only the rest of the last page is computed. What lies in the
prefix cache by then is taken from there, up to the first window.

A copy is the request's own, so it does not matter what the prefix cache may hold. Where there is none
(no room, or nobody can say what the row holds), the request is prefilled as in SGLang, but kept out of
the prefix cache until it decodes: its output stays its own then, and is compressed again.

Copies run on the forward stream, ahead of the steps that write into the slots that become free; nobody
waits for them.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kara_sglang.radix_integration.exact import allow_insert, first_base
from kara_sglang.radix_integration.layout import Layout
from kara_sglang.radix_integration.prefix import (
    PREFIX,
    Prefix,
    Returned,
    held_state,
    layout_of,
    prefix_of,
)
from kara_sglang.radix_integration.row import RequestState, ceil_align, state_of
from kara_sglang.scheduler import window_pool
from kara_sglang.scheduler.host_rows import Blocks, HostRows
from kara_sglang.scheduler.streams import forward_stream, keep_until_read

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.managers.scheduler import Scheduler

    from kara_sglang.config import KaraConfig
    from kara_sglang.scheduler.metrics import Totals
    from kara_sglang.scheduler.pace import Pace

RETRACTED = "kv_compress_retracted"
"""Attribute of SGLang's ``Req`` that holds its :class:`Retracted`, from a retraction to its next decode
step; absent where it was not compressed."""


@dataclass(slots=True)
class Copy:
    """A row's first slots on the host.

    Attributes
    ----------
    state
        As it was.
    slots
        How many; whole pages.
    blocks
        What they hold.
    """

    state: RequestState
    slots: int
    blocks: Blocks

    @property
    def tokens(self) -> int:
        """Logical length."""
        return self.slots + self.state.removed

    @property
    def exact(self) -> int:
        """Slots in front of the first window: they hold what the prefix cache may hold as well."""
        windows = self.state.windows
        return min(windows[0].kv_start if windows else self.state.base, self.slots)


@dataclass(slots=True)
class Retracted:
    """A compressed request that has lost its row.

    Attributes
    ----------
    insert_skipped
        ``Req.skip_radix_cache_insert`` as it was: it is set until the request has decoded.
    prompt
        Tokens; what lies behind was compressed, or will be.
    copy
        None: it is computed again.
    """

    insert_skipped: bool
    prompt: int
    copy: Copy | None


@dataclass(frozen=True, slots=True)
class Offer:
    """A copy that the request may be admitted with.

    Attributes
    ----------
    copy
    front
        Slots of the row's beginning, int64, that the prefix cache holds and goes on to own.
    matched
        ``Req.prefix_len``, ``host_hit_length`` and ``cache_protected_len`` without the copy.
    """

    copy: Copy
    front: torch.Tensor
    matched: tuple[int, int, int]

    @property
    def needs(self) -> int:
        """Slots that the copy takes."""
        return self.copy.slots - len(self.front)


class Returning:
    """Of one scheduler.

    Parameters
    ----------
    scheduler : Scheduler
    config : KaraConfig
    pace : Pace
    totals : Totals
        Counts what comes back, and what is computed again.
    """

    def __init__(self, scheduler: Scheduler, config: KaraConfig, pace: Pace, totals: Totals) -> None:
        self.scheduler = scheduler
        self.pace = pace
        self.totals = totals
        self.most_bytes = int(config.retracted_mem_gb * 2**30)
        self._kept: tuple[Req, Copy] | None = None  # of whom is about to be retracted
        self._new: list[Req] = []  # retracted with copies, and maybe not in the queue yet
        self._barred: list[tuple[Req, RequestState]] = []  # who decode since the newest step

    @property
    def allowed(self) -> bool:
        """Whether rows can come back here. A draft model has KV of its own, and so have sliding-window
        layers with a pool of their own; a decode server has backups of SGLang's; and without a prefix
        cache SGLang admits in another way."""
        scheduler = self.scheduler
        return not (
            self.pace.speculates
            or window_pool.is_used(scheduler)
            or scheduler.disagg_decode_prealloc_queue is not None
            or scheduler.tree_cache.disable
        )

    # -- retraction --------------------------------------------------------------------------------

    def keep(self, req: Req) -> None:
        """The running request is about to be retracted: copy its row, where that is possible."""
        state = held_state(req)
        if state is None or not self.allowed:
            return
        slots = self._slots_to_keep(req, state)
        if not slots:
            return
        held = sum(len(copy.blocks) for _, copy in self._waiting())
        if (held + self._rows.num_blocks(slots)) * self._rows.block_bytes > self.most_bytes:
            return
        blocks = self._rows.take(slots)
        if not self._all_ranks(blocks is not None) or blocks is None:
            return
        # Read here: on the forward stream the row may have a new owner by then.
        row = self.scheduler.req_to_token_pool.req_to_token[req.kv.req_pool_idx, :slots].long()
        with forward_stream(self.scheduler):
            keep_until_read(row)
            self._rows.save(row, blocks)
        self._kept = req, Copy(state, slots, blocks)

    def _slots_to_keep(self, req: Req, state: RequestState) -> int:
        """Whole pages of the row, of which a prefill leaves at least one token to compute. A token that
        the step in flight is about to give is dropped (``batch_result_processor.py``), so its input is
        the last that the request knows."""
        if req.return_hidden_states or req.session is not None or req.input_embeds is not None:
            return 0
        if req.return_logprob and req.logprob.input_token_logprobs_val is None:
            return 0  # the prompt's are not there yet
        known = len(req.origin_input_ids) + len(req.output_ids)
        page = self.scheduler.page_size
        slots = min(req.kv.kv_committed_len, known - 1 - state.removed) // page * page
        windows = state.windows
        return slots if not windows or slots >= windows[-1].kv_start + windows[-1].kept else 0

    def _waiting(self) -> Iterator[tuple[Req, Copy]]:
        """Who waits with a copy, the same on all tensor-parallel ranks; whoever is aborted in the queue
        takes his along."""
        every = {id(req): req for req in (*self.scheduler.waiting_queue, *self._new)}
        for req in every.values():
            copy = self._copy_of(req)
            if copy is not None:
                yield req, copy

    def retracted(self, req: Req) -> None:
        """The compressed request has been retracted. With a pool of sliding-window layers it is one
        like any other then: SGLang lets the prefix cache give up their slots while a long prefill goes
        on, and admits by that, so the prefill must not be kept out."""
        if window_pool.is_used(self.scheduler):
            return
        kept, self._kept = self._kept, None
        copy = kept[1] if kept is not None and kept[0] is req else None
        before = retracted_of(req)  # where it has not decoded since
        skipped = req.skip_radix_cache_insert if before is None else before.insert_skipped
        back = Retracted(skipped, len(req.origin_input_ids), copy)
        setattr(req, RETRACTED, back)
        req.skip_radix_cache_insert = True
        if copy is not None:
            _prefix(req).waits = True
            self._new.append(req)

    def step(self) -> None:
        """A decode step: whoever was retracted in an earlier one is in the queue by now, if at all, and
        the prefill of whoever began to decode in an earlier one has been published."""
        self._new.clear()
        for req, state in self._barred:
            if state_of(req) is state and (state.shares or not state.removed):
                allow_insert(req, state)
                state.insert_skipped = None
        self._barred.clear()

    def drop_all(self) -> None:
        """All KV that was computed until now is void."""
        for req, _ in self._waiting():
            self._drop(req)

    def _drop(self, req: Req) -> None:
        back = retracted_of(req)
        if back is not None and back.copy is not None:
            back.copy = None
            _prefix(req).waits = False

    # -- admission ---------------------------------------------------------------------------------

    def offer(self, req: Req) -> Offer | None:
        """Let SGLang see a request that it has just matched as one whose KV is there up to the end of
        its copy; None where it has none.

        :meth:`bring_back` or :meth:`withdraw` must follow.
        """
        copy, kv = self._copy_of(req), req.kv
        if copy is None:
            return None
        matched = req.prefix_len, req.host_hit_length, kv.cache_protected_len
        from_tree = min(req.prefix_len, copy.exact)
        if from_tree == copy.slots:
            return None  # all of it was in the prefix cache
        front = torch.empty(0, dtype=torch.int64)
        if from_tree:
            front = self.scheduler.tree_cache.prefix_device_indices(req)[:from_tree]
        req.prefix_len, req.host_hit_length = copy.tokens, 0
        kv.cache_protected_len = from_tree
        _prefix(req).windows = Layout.of(copy.state.windows).windows
        return Offer(copy, front, matched)

    def withdraw(self, req: Req, offer: Offer) -> None:
        """It was not admitted."""
        req.prefix_len, req.host_hit_length, req.kv.cache_protected_len = offer.matched
        _prefix(req).windows = ()

    def make_room(self, offer: Offer) -> bool:
        """Let the prefix cache give up what the row needs, and say whether it did: with HiCache it may
        keep what the host has no room for."""
        from sglang.srt.mem_cache.common import evict_from_tree_cache

        evict_from_tree_cache(self.scheduler.tree_cache, offer.needs)
        free: int = self.scheduler.token_to_kv_pool_allocator.available_size()
        return free >= offer.needs

    def bring_back(self, req: Req, offer: Offer) -> None:
        """Allocate the row's slots, behind :meth:`make_room`, and fill them.

        Raises
        ------
        RuntimeError
            Where there are fewer slots than were free then.
        """
        scheduler, copy = self.scheduler, offer.copy
        own = scheduler.token_to_kv_pool_allocator.alloc(offer.needs)
        if own is None:
            raise RuntimeError(
                f"kv-compress: request {req.rid} was admitted with a row of {copy.slots} slots, and "
                f"{offer.needs} are not free"
            )
        row = torch.cat([offer.front.to(own.device), own])
        with forward_stream(scheduler):
            keep_until_read(row)
            self._rows.load(copy.blocks, row, len(offer.front))
        _prefix(req).returned = Returned(copy.state, row)
        self.totals.retracted_tokens_returned += copy.tokens - len(offer.front)

    def admitted(self, req: Req) -> None:
        """A request was admitted: its copy is of no use now, and what lies behind its prefix is
        computed."""
        self._drop(req)
        if req.is_retracted:
            computed = len(req.full_untruncated_fill_ids) - req.prefix_len
            self.totals.retracted_tokens_computed += computed

    # -- the next decode step ----------------------------------------------------------------------

    def come_back(self, req: Req) -> RequestState | None:
        """The state of the row that a request decodes with again; None where it did not come back."""
        prefix = prefix_of(req)
        if prefix is None or prefix.returned is None:
            return None
        state, prefix.returned = prefix.returned.state, None
        state.in_vain = state.voted = 0
        state.insert_skipped = None
        return state

    def decodes(self, req: Req, state: RequestState) -> None:
        """A compressed request takes its first decode step since its last prefill. With overlap
        scheduling SGLang publishes that prefill behind this step, so it stays barred until the next."""
        back = retracted_of(req)
        if back is not None:
            state.insert_skipped = back.insert_skipped
            self._barred.append((req, state))
            delattr(req, RETRACTED)

    def base(self, req: Req) -> int:
        """KV index of the first window of a request that begins to decode, and whose row did not come
        back: behind its prefill, of which a retracted one's output is no part."""
        page, back = self.scheduler.page_size, retracted_of(req)
        if back is None:
            return first_base(req.kv, page)
        prompt = layout_of(req).slots(back.prompt)
        return ceil_align(max(prompt, req.kv.cache_protected_len), page)

    def to_hold(self, req: Req) -> tuple[int, int]:
        """Of a request that waits: KV slots that it will have when it is admitted, and its first
        window's start."""
        page, tokens = self.scheduler.page_size, len(req.origin_input_ids) + len(req.output_ids)
        back = retracted_of(req)
        if back is None:
            return tokens, ceil_align(tokens, page)
        if back.copy is None:
            return tokens, ceil_align(back.prompt, page)
        state = back.copy.state
        return tokens - state.removed, state.base

    def _copy_of(self, req: Req) -> Copy | None:
        back = retracted_of(req)
        return None if back is None else back.copy

    @functools.cached_property
    def _rows(self) -> HostRows:
        pool = self.scheduler.token_to_kv_pool_allocator.get_kvcache()
        return HostRows([*pool.k_buffer, *pool.v_buffer])

    def _all_ranks(self, mine: bool) -> bool:
        """Whether all tensor-parallel ranks say so: they admit and retract alike."""
        ranks = self.scheduler.attn_tp_group
        if ranks.world_size == 1:
            return mine
        everyone = torch.tensor(mine, dtype=torch.int64)
        torch.distributed.all_reduce(everyone, op=torch.distributed.ReduceOp.MIN, group=ranks.cpu_group)
        return bool(everyone)


def retracted_of(req: Req) -> Retracted | None:
    """None for a request that was not retracted, has decoded since, or was not compressed."""
    found: Retracted | None = getattr(req, RETRACTED, None)
    return found


def _prefix(req: Req) -> Prefix:
    """The request's, which in a server with exact prefixes it has only where its row comes back."""
    prefix = prefix_of(req)
    if prefix is None:
        prefix = Prefix(None)
        setattr(req, PREFIX, prefix)
    return prefix
