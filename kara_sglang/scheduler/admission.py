"""Telling SGLang's scheduler what a compressed request will really hold.

Stock SGLang reserves one KV slot for every token that a request may still generate, so what a pass
frees would stay empty (``managers/schedule_policy.py``, ``PrefillAdder``). Here the reserve follows the
settings (``forecast.py``).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kara_sglang.scheduler.coordinator import Coordinator
from kara_sglang.scheduler.returning import Offer
from kara_sglang.scheduler.runtime import runtime
from kara_sglang.scheduler.shortage import to_come

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req


def adder_class(original: Callable[..., type], scheduler: Any) -> type:
    """AROUND ``Scheduler.get_prefill_adder_class``: reserve what requests will hold, not what they say.

    Prompts are reserved in full, and SGLang's own clamp on the answers of retracted requests stays.
    """
    base = original(scheduler)
    return base if runtime.coordinator is None else _compressed(base, runtime.coordinator)


@functools.cache
def _compressed(base: type, coordinator: Coordinator) -> type:
    class CompressedPrefillAdder(base):
        _offer: Offer | None = None  # of the candidate, while SGLang decides

        @functools.cached_property
        def _counts_on_compression(self) -> bool:
            # Decided once: who is admitted in this step must not change it for the next candidate.
            return coordinator.is_compressing(self.running_batch)

        def _get_running_request_total_token_offset(self, req: Req) -> float:
            # The same answer all through one scheduling step: preemption takes back what was added.
            known = self.__dict__.setdefault("_reserved", {})
            if req.rid not in known:
                long = coordinator.longer.reserve(req)
                if long is None:
                    stock = super()._get_running_request_total_token_offset(req)
                    long = self._reserve(req, stock)
                known[req.rid] = long
            return known[req.rid]

        def add_one_req(
            self, req: Req, has_chunked_req: bool, truncation_align_size: int | None
        ) -> Any:
            self._offer = coordinator.returning.offer(req)
            result = super().add_one_req(req, has_chunked_req, truncation_align_size)
            if self._offer is not None:  # nobody took it
                coordinator.returning.withdraw(req, self._offer)
                self._offer = None
            if req in self.can_run_list[-1:]:
                coordinator.returning.admitted(req)
            return result

        def _commit_prefill_admission(self, req: Req, admission: Any, mamba_gap_reserve: int) -> None:
            if self._offer is not None:
                coordinator.returning.bring_back(req, self._offer)
                self._offer = None
            super()._commit_prefill_admission(req, admission, mamba_gap_reserve)

        def _select_prefill_admission(self, req: Req, *, total_tokens: int, **kwargs: Any) -> Any:
            from sglang.srt.managers.schedule_policy import AddReqResult

            output = to_come(req)
            saved = output - math.ceil(self._reserve(req, output))
            needs = 0 if self._offer is None else self._offer.needs
            admission = super()._select_prefill_admission(
                req, total_tokens=total_tokens + needs - saved, **kwargs
            )
            if isinstance(admission, AddReqResult):
                return admission
            if self._offer is not None and not coordinator.returning.make_room(self._offer):
                return AddReqResult.NO_TOKEN
            if admission.max_new_tokens:
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
