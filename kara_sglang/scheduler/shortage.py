"""Whether KV slots are short: what is idle, what is reserved, what the queue will need."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING

from kara_sglang.radix_integration.row import ceil_align
from kara_sglang.scheduler import window_pool

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
    from sglang.srt.managers.scheduler import Scheduler

    from kara_sglang.scheduler.pace import Pace


def to_come(req: Req) -> int:
    """Tokens of an answer, still to be written, that SGLang reserves slots for where it expects all."""
    from sglang.srt.managers import schedule_policy

    left = req.sampling_params.max_new_tokens - len(req.output_ids)
    return min(max(left, 0), schedule_policy.CLIP_MAX_NEW_TOKENS)


def idle_slots(scheduler: Scheduler) -> int:
    """KV slots that are free, or that the prefix cache would give up."""
    return window_pool.free_slots(scheduler) + window_pool.evictable_slots(scheduler)


def short_of_slots(scheduler: Scheduler, running: ScheduleBatch, pace: Pace) -> bool:
    """Whether a decode step may need more slots than there are: whole pages for each request."""
    most = ceil_align(max(1, pace.reserve), scheduler.page_size)
    return idle_slots(scheduler) < len(running.reqs) * most


def needed(scheduler: Scheduler, running: ScheduleBatch, share: float) -> bool:
    """Whether requests need at least ``share`` of the KV pool uncompressed: what is held, what SGLang
    reserves for those that run, and all of those that wait, as far as there are rows for them.

    A waiting prompt counts as a whole, also where the prefix cache holds its beginning.
    """
    mark = share * scheduler.max_total_num_tokens
    # A long queue is not read to its end.
    return any(need >= mark for need in itertools.accumulate(_needs(scheduler, running)))


def _needs(scheduler: Scheduler, running: ScheduleBatch) -> Iterator[float]:
    """KV slots, part by part."""
    from sglang.srt.managers import schedule_policy

    yield scheduler.max_total_num_tokens - idle_slots(scheduler)
    ratio, most = scheduler.new_token_ratio_tracker.current, schedule_policy.CLIP_MAX_NEW_TOKENS
    for req in running.reqs:  # all of them, so without a call for each
        params = req.sampling_params
        left = params.max_new_tokens - len(req.output_ids)
        if left > 0:
            yield min(left, most) * (1.0 if params.ignore_eos else ratio)
    rows = scheduler.get_num_allocatable_reqs(len(running.reqs), running_batch=running)
    for req in itertools.islice(_waiting(scheduler), max(rows, 0)):
        yield len(req.origin_input_ids) + len(req.output_ids) + to_come(req)


def _waiting(scheduler: Scheduler) -> Iterator[Req]:
    """Those in the queue, and on a decode server those for whose prompt there is no room yet."""
    yield from scheduler.waiting_queue
    if scheduler.disagg_decode_prealloc_queue is not None:
        for transfer in scheduler.disagg_decode_prealloc_queue.queue:
            yield transfer.req
