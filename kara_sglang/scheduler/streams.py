"""The streams of a scheduler process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from sglang.srt.managers.scheduler import Scheduler


@contextlib.contextmanager
def forward_stream(scheduler: Scheduler) -> Iterator[None]:
    """Run behind the step in flight, whose attention still reads K/V and writes queries."""
    if not scheduler.enable_overlap:
        yield
        return
    current = scheduler.device_module.current_stream()
    with scheduler.forward_stream_ctx:
        scheduler.forward_stream.wait_stream(current)
        yield


def keep_until_read(tensor: torch.Tensor) -> None:
    """Tell the allocator that the current stream reads a tensor that another stream has made."""
    if tensor.is_cuda:
        tensor.record_stream(torch.cuda.current_stream())
