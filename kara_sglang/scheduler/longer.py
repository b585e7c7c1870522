"""An answer that outgrows the KV pool.

SGLang ends an answer where the whole request would no longer fit the pool uncompressed, because it
computes a retracted request again from its tokens. A request whose windows are all compressed holds
less. So where one comes near that cap and asked for more, it may go on to what the pool can hold: it is
*long* from then on. Until then it is like all others, so who does not say how much it will write, as
most do not, reserves no more than in stock SGLang.

One at a time is long. Its windows are compressed as they fall due, whatever the policy does; admission
reserves the most that it will come to hold; and where memory is short all others are retracted before
it. So it never has to be computed again. Whoever comes to its cap meanwhile ends there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kara_sglang.radix_integration.row import Geometry, ceil_align
from kara_sglang.scheduler import window_pool
from kara_sglang.scheduler.forecast import LAST, growth, longest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.managers.scheduler import Scheduler

    from kara_sglang.radix_integration.row import RequestState
    from kara_sglang.scheduler.metrics import Totals
    from kara_sglang.scheduler.pace import Pace

ASKED = "kv_compress_asked"
"""Attribute of SGLang's ``Req`` that holds its :class:`Asked`, where it asked for more than its cap."""

UNLIMITED = 1 << 30
"""What SGLang takes for a request that does not say how long its answer may be."""

GONE = (
    "The answer is longer than the KV pool, and its KV was given up (the server was paused with mode "
    "retract), so that it cannot go on. Send the request again."
)


@dataclass(frozen=True, slots=True)
class Asked:
    """How long an answer may be, in tokens.

    Attributes
    ----------
    tokens
        By the request, the server's limit and the model's context.
    cap
        By SGLang, so that the request fits the pool uncompressed.
    """

    tokens: int
    cap: int


class Longer:
    """The long answer of one scheduler.

    Parameters
    ----------
    scheduler : Scheduler
    geometry : Geometry
    pace : Pace
    totals : Totals
        Counts who became long.

    Attributes
    ----------
    one
        The request that is long, with its state.
    """

    def __init__(self, scheduler: Scheduler, geometry: Geometry, pace: Pace, totals: Totals) -> None:
        self.scheduler = scheduler
        self.geometry = geometry
        self.totals = totals
        self.one: tuple[Req, RequestState] | None = None
        self._pace = pace
        # Windows that begin from there on are recorded as those of an answer that goes on.
        self._ahead = geometry.window + geometry.delay + LAST

    @property
    def allowed(self) -> bool:
        """Whether an answer may outgrow the pool here: others must be able to give up all that they
        hold. HiCache holds slots while it writes them back, decode servers for requests that are on
        their way, and drafts take slots of their own; the long one may be preempted or retracted for
        others' priorities. Nor is it known what a pool of sliding-window layers must have for it."""
        scheduler = self.scheduler
        decodes_only = scheduler.disagg_decode_prealloc_queue is not None
        holds = scheduler.enable_hierarchical_cache or decodes_only or window_pool.is_used(scheduler)
        by_priority = scheduler.server_args.retraction_policy == "priority"
        by_priority |= scheduler.enable_priority_preemption
        return not (self._pace.speculates or holds or by_priority)

    def answers(self, kept: int) -> tuple[int, int]:
        """Tokens that an answer behind a short prompt can have where each window keeps so many: like
        others, and where it is long."""
        pool, context = self.scheduler.max_total_num_tokens, self.scheduler.model_config.context_len
        stock, most = longest_answers(1, pool, context, self.geometry, kept)
        return stock, most if self.allowed else stock

    # -- before it is long -------------------------------------------------------------------------

    def remember(self, req: Req, max_new_tokens: int | None) -> None:
        """SGLang has capped an answer for which a request asked so many tokens."""
        scheduler, cap = self.scheduler, req.sampling_params.max_new_tokens
        limit = scheduler.max_new_tokens_limit or UNLIMITED
        context = scheduler.model_config.context_len - len(req.origin_input_ids) - 2
        asked = UNLIMITED if max_new_tokens is None else max_new_tokens
        tokens = min(asked, limit, context)
        if self.allowed and 0 < cap < tokens:
            setattr(req, ASKED, Asked(tokens, cap))

    def looks_in(self, req: Req) -> int:
        """Tokens to come before :meth:`look`; 0: never."""
        asked = _asked(req)
        if asked is None or self.is_long(req):
            return 0
        return max(1, asked.cap - self._ahead - len(req.output_ids))

    def look(self, req: Req, state: RequestState) -> None:
        """Let a request go on beyond its cap, where it comes near it and nobody else does so."""
        asked, written = _asked(req), len(req.output_ids)
        if asked is None or self.one is not None or written < asked.cap - self._ahead:
            return
        # The rest of a prompt that is prefilled in chunks is reserved beside others than a long one.
        if self.scheduler.chunked_req is not None or req.next_output_finishes_by_length():
            return
        room = longest_row(self.scheduler.max_total_num_tokens, self.geometry) - state.base
        uncompressed = req.kv.kv_committed_len - state.base
        tokens = written + longest(self.geometry, room, uncompressed, state.kept)
        if state.kept == self.geometry.window or tokens <= asked.cap:
            delattr(req, ASKED)  # nor will there ever be room
            return
        req.sampling_params.max_new_tokens = min(asked.tokens, tokens)
        self.one = req, state
        self.totals.long_answers += 1

    # -- while it is long --------------------------------------------------------------------------

    def is_long(self, req: Req) -> bool:
        return self.one is not None and self.one[0] is req

    def reserve(self, req: Req) -> float | None:
        """KV slots that it will come to take, at most; None for others."""
        if self.one is None or self.one[0] is not req:
            return None
        state = self.one[1]
        left = req.sampling_params.max_new_tokens - len(req.output_ids)
        uncompressed = req.kv.kv_committed_len - state.base
        return growth(self.geometry, left, uncompressed, state.kept) + self.geometry.page_size

    def keep(self, order: Sequence[int], reqs: Sequence[Req]) -> list[int]:
        """Places of running requests, in the order in which they are kept where memory is short: the
        long one first."""
        return sorted(order, key=lambda place: not self.is_long(reqs[place]))

    # -- its end -----------------------------------------------------------------------------------

    def leave(self, req: Req) -> None:
        """The request gives its row back."""
        if self.is_long(req):
            self.one = None

    def retracted(self, req: Req) -> None:
        """The request must fit the pool uncompressed again."""
        asked = _asked(req)
        if asked is not None:
            req.sampling_params.max_new_tokens = asked.cap

    def is_gone(self, req: Req) -> bool:
        """Whether a request that lost its KV is too long to be computed again."""
        asked = _asked(req)
        return asked is not None and len(req.output_ids) >= asked.cap

    def end(self, req: Req) -> None:
        """Tell the client of a request that :meth:`is_gone`, as SGLang does with one that waits
        (``Scheduler.abort_request``)."""
        from sglang.srt.managers.scheduler import _make_abort_req

        reason = {"type": "abort", "message": GONE, "status_code": 503}
        self.scheduler._release_aborted_request(req)
        channel = self.scheduler.ipc_channels.send_to_tokenizer
        channel.send_output(_make_abort_req(req, finished_reason=reason), req)


def _asked(req: Req) -> Asked | None:
    return getattr(req, ASKED, None)


def longest_row(pool: int, geometry: Geometry) -> int:
    """KV slots that one row may take of a pool: all but a page, as SGLang reckons."""
    return pool - geometry.page_size


def longest_answers(
    prompt: int, pool: int, context: int, geometry: Geometry, kept: int
) -> tuple[int, int]:
    """Tokens that an answer behind a prompt of so many can have, in stock SGLang and where it is long.

    Parameters
    ----------
    prompt : int
        Tokens.
    pool : int
        KV slots.
    context : int
        Tokens of the model's context.
    geometry : Geometry
    kept : int
        R.
    """
    row, base = longest_row(pool, geometry), ceil_align(prompt, geometry.page_size)
    most = max(0, context - prompt - 2)
    stock = max(0, min(most, pool - prompt - 2, row - base - 1))
    if kept == geometry.window:
        return stock, stock
    # The last token of an answer has no KV.
    return stock, max(stock, min(most, 1 + longest(geometry, row - base, prompt - base, kept)))
