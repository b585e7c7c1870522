"""Telling SGLang's scheduler what a compressed request will really hold.

Stock SGLang reserves one KV slot for every token that a request may still generate, so what a pass
frees would stay empty (``managers/schedule_policy.py``, ``PrefillAdder``). Here the reserve follows the
settings: over a window's W tokens a request grows by R slots, whoever chooses them.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from kara_sglang.radix_integration.row import Geometry

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
    from sglang.srt.managers.scheduler import Scheduler

    from kara_sglang.coordinator import Coordinator
    from kara_sglang.policy import Policy

LOOK_EVERY = 8
"""Steps from one look at the queue to the next where each step has a pass: a look adds up what is
reserved for all running requests."""


def growth(geometry: Geometry, tokens: float, uncompressed: int, kept: int) -> float:
    """Most KV slots by which a request grows while it generates ``tokens``.

    Parameters
    ----------
    geometry : Geometry
    tokens : float
        Tokens to come.
    uncompressed : int
        Tokens from the next window's start on, so far; negative in front of the first one.
    kept : int
        R of this request.
    """
    window, delay = geometry.window, geometry.delay
    ahead = uncompressed + tokens
    # No pass takes a request whose last token is on its way, and that one never has any KV.
    taken = max(0, int((ahead - 3 - delay) // window))
    at_the_end = ahead - taken * (window - kept)
    # Right before its last compression it holds a whole window and its delay.
    before_last = (taken - 1) * kept + window + delay if taken else 0
    # A window that is overdue will give slots back, but memory that is not free yet is no reserve.
    return max(0.0, min(max(at_the_end, before_last) - uncompressed, tokens))


def reserve(
    policy: Policy,
    latest: Geometry,
    tokens: float,
    held: int,
    base: int,
    kept: int,
    running: int,
) -> float:
    """KV slots that a request takes for ``tokens`` still to come, at most.

    Parameters
    ----------
    policy : Policy
    latest : Geometry
        With what a window may wait for its pass in the delay (``Policy.wait``).
    tokens : float
    held : int
        KV slots that it holds.
    base : int
        KV index at which its next window starts.
    kept : int
        R of this request.
    running : int
        Requests that run at once.
    """
    grown = growth(latest, tokens, held - base, kept)
    grown = max(grown, min(tokens, policy.floor - held))
    # Where passes fall behind, what they leave is held as in stock SGLang.
    return tokens - policy.in_time(running, latest.window) * (tokens - grown)


class Latch:
    """Lets SGLang look at its queue again when passes have changed what is free.

    A request that finds no room sets ``ScheduleBatch.batch_is_full``, and SGLang clears it when a
    running request leaves (``managers/scheduler.py``, ``_get_new_batch_prefill_raw``). With long
    answers that can be thousands of steps, in which what passes free would stand empty. When it looks,
    SGLang checks all of its own limits anew.
    """

    def __init__(self) -> None:
        self._step = 0
        self._changed = False

    def step(self, running: ScheduleBatch, *, passed: bool) -> None:
        """Called in each decode step, with whether it has had a pass."""
        self._step += 1
        self._changed |= passed
        if self._changed and self._step % LOOK_EVERY == 0:
            running.batch_is_full = self._changed = False


def to_come(req: Req) -> int:
    """Tokens of an answer, still to be written, that SGLang reserves slots for where it expects all."""
    from sglang.srt.managers import schedule_policy

    left = req.sampling_params.max_new_tokens - len(req.output_ids)
    return min(max(left, 0), schedule_policy.CLIP_MAX_NEW_TOKENS)


def idle_slots(scheduler: Scheduler) -> int:
    """KV slots that are free, or that the prefix cache would give up."""
    free = scheduler.token_to_kv_pool_allocator.available_size()
    return free + scheduler.tree_cache.evictable_size()


def short_of_slots(scheduler: Scheduler, running: ScheduleBatch) -> bool:
    """Whether a decode step may need more slots than there are: a page for each request."""
    return idle_slots(scheduler) < len(running.reqs) * scheduler.page_size


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
    for req in itertools.islice(scheduler.waiting_queue, max(rows, 0)):
        yield len(req.origin_input_ids) + len(req.output_ids) + to_come(req)


def adder_class(original: Callable[..., type], scheduler: Any) -> type:
    """AROUND ``Scheduler.get_prefill_adder_class``: reserve what requests will hold, not what they say.

    Prompts are reserved in full, and SGLang's own clamp on the answers of retracted requests stays.
    """
    from kara_sglang.runtime import runtime

    base = original(scheduler)
    return base if runtime.coordinator is None else _compressed(base, runtime.coordinator)


@functools.cache
def _compressed(base: type, coordinator: Coordinator) -> type:
    class CompressedPrefillAdder(base):
        @functools.cached_property
        def _counts_on_compression(self) -> bool:
            # Decided once: who is admitted in this step must not change it for the next candidate.
            return coordinator.acts(self.running_batch)

        def _get_running_request_total_token_offset(self, req: Req) -> float:
            # The same answer all through one scheduling step: preemption takes back what was added.
            known = self.__dict__.setdefault("_reserved", {})
            if req.rid not in known:
                stock = super()._get_running_request_total_token_offset(req)
                known[req.rid] = self._reserve(req, stock)
            return known[req.rid]

        def _select_prefill_admission(self, req: Req, *, total_tokens: int, **kwargs: Any) -> Any:
            output = to_come(req)
            saved = output - math.ceil(self._reserve(req, output))
            admission = super()._select_prefill_admission(
                req, total_tokens=total_tokens - saved, **kwargs
            )
            if getattr(admission, "max_new_tokens", 0):
                admission = dataclasses.replace(
                    admission, max_new_tokens=max(0, admission.max_new_tokens - saved)
                )
            return admission

        def _reserve(self, req: Req, tokens: float) -> float:
            if not self._counts_on_compression:
                return tokens
            running = len(self.running_batch.reqs) + len(self.can_run_list) + 1
            return coordinator.reserve(req, tokens, running)

    return CompressedPrefillAdder
