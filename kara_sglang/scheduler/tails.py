"""Requests that decode in a step that prefills others: SGLang's mixed chunks.

SGLang puts them behind those that it prefills, each as a prefill of one token
(``ScheduleBatch.mix_with_running``), and runs the step as a prefill.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from sglang.srt.managers.schedule_batch import ScheduleBatch
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch


@dataclass(frozen=True, slots=True)
class Tails:
    """The last tokens of one step.

    Attributes
    ----------
    first
        Tokens of the step before them.
    rows
        Rows of ``req_to_token``, shape ``(tails,)``, int64.
    positions
        Logical positions, shape ``(tails,)``, int64.
    """

    first: int
    rows: torch.Tensor
    positions: torch.Tensor

    @classmethod
    def of(cls, step: ForwardBatch, batch: ScheduleBatch) -> Tails | None:
        """Those of a step whose positions are logical ones; None where it prefills only."""
        count = len(batch.decoding_reqs or ())
        if not count:
            return None
        first = step.positions.shape[0] - count
        return cls(first, step.req_pool_indices[-count:], step.positions[first:])

    def queries(self, queries: torch.Tensor) -> torch.Tensor:
        """Their queries among those of the step, shape ``(tokens, ...)``, which may be padded."""
        return queries[self.first : self.first + len(self.rows)]
