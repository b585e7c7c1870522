"""Numbers of a type that torch converts, but does not gather and scatter on every device."""

from __future__ import annotations

import torch


def movable(tensor: torch.Tensor) -> torch.Tensor:
    """A view for indexing: bytes where ``tensor`` holds 8-bit floats, else ``tensor`` itself."""
    eight_bits = tensor.is_floating_point() and tensor.itemsize == 1
    return tensor.view(torch.uint8) if eight_bits else tensor


def rows_of(tensor: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """``tensor[rows]`` for integer ``rows`` of shape ``(n,)``, of ``tensor``'s dtype."""
    return movable(tensor).index_select(0, rows).view(tensor.dtype)
