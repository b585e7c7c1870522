"""Copies to the device that do not make the host wait.

From pageable memory CUDA copies through a buffer of its own and waits for the stream. Pinned memory
goes at once; torch's allocator of pinned memory hands a block out again only when the copies that were
queued from it are done.
"""

from __future__ import annotations

import torch


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """What ``tensor``, on the host, holds, on ``device``; the tensor itself where that is the host."""
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def fill(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy ``source``, on the host, into ``target`` on any device; shape and dtype are the same."""
    if target.device.type != "cpu":
        source = source.pin_memory()
    target.copy_(source, non_blocking=True)
