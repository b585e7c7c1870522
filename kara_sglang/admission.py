"""Telling SGLang's scheduler what a compressed request will really hold.

Stock SGLang reserves one KV slot for every token that a request may still generate, so what a pass
frees would stay empty (``managers/schedule_policy.py``, ``PrefillAdder``). Here the reserve follows the
settings: over a window's W tokens a request grows by R slots. How far that is kept is measured, because
windows without a recorder stay uncompressed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kara_sglang.state import Geometry

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

_MEMORY = 0.95
"""Weight that the past keeps when another window is seen: the average looks back some 20 windows."""


class Forecast:
    """Slots that requests take for tokens to come, from settings and from what was measured.

    Parameters
    ----------
    geometry : Geometry
    """

    def __init__(self, geometry: Geometry) -> None:
        self.geometry = geometry
        # Slots that windows gave back, and would have given back had all been compressed; decayed.
        # The first value stands for one window that kept its promise.
        self._freed = self._promised = float(geometry.window)

    @property
    def kept_promise(self) -> float:
        """Share of the promised slots that windows really gave back lately, 0 to 1."""
        return self._freed / self._promised

    def observe(self, promised: int, freed: int) -> None:
        """A window went by that should have freed ``promised`` slots and freed ``freed``."""
        if promised:
            self._promised = _MEMORY * self._promised + promised
            self._freed = _MEMORY * self._freed + freed

    def growth(self, tokens: float, uncompressed: int, kept: int) -> float:
        """Most KV slots by which a request grows while it generates ``tokens``.

        Parameters
        ----------
        tokens : float
            Tokens to come.
        uncompressed : int
            Tokens from the next window's start on, so far.
        kept : int
            R of this request.
        """
        window, delay = self.geometry.window, self.geometry.delay
        ahead = uncompressed + tokens
        taken = max(0, int((ahead - delay) // window))
        at_the_end = ahead - taken * (window - kept)
        # Right before its last compression it holds a whole window and its delay.
        before_last = (taken - 1) * kept + window + delay if taken else 0
        nominal = max(at_the_end, before_last) - uncompressed
        return tokens - self.kept_promise * (tokens - min(tokens, nominal))


def adder_class(original: Callable[..., type], scheduler: Any) -> type:
    """AROUND ``Scheduler.get_prefill_adder_class``: reserve what requests will hold, not what they say.

    Prompts are reserved in full, and SGLang's own clamp on the answers of retracted requests stays.
    """
    from sglang.srt.managers import schedule_policy

    from kara_sglang.runtime import runtime

    base = original(scheduler)
    coordinator = runtime.coordinator
    if coordinator is None:
        return base

    class CompressedPrefillAdder(base):
        def _get_running_request_total_token_offset(self, req: Req) -> float:
            reserve = super()._get_running_request_total_token_offset(req)
            return coordinator.reserve(req, reserve)

        def _select_prefill_admission(self, req: Req, *, total_tokens: int, **kwargs: Any) -> Any:
            left = req.sampling_params.max_new_tokens - len(req.output_ids)
            output = min(max(left, 0), schedule_policy.CLIP_MAX_NEW_TOKENS)
            saved = output - math.ceil(coordinator.reserve(req, output))
            admission = super()._select_prefill_admission(
                req, total_tokens=total_tokens - saved, **kwargs
            )
            if getattr(admission, "max_new_tokens", 0):
                admission = dataclasses.replace(
                    admission, max_new_tokens=max(0, admission.max_new_tokens - saved)
                )
            return admission

    return CompressedPrefillAdder
