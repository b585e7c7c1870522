"""Moving the kept tokens of a window to its first slots: the torch reference and the CPU path."""

from __future__ import annotations

import torch

from kara_sglang.kernels.movable import movable


def compact(buffer: torch.Tensor, slots: torch.Tensor, kept: torch.Tensor) -> None:
    """Move the kept rows of one layer's K or V to the window's first R slots, in place.

    The choice differs from head to head, which is why the pool's own ``move_kv_cache`` (one index
    list for all heads) cannot do this.

    Parameters
    ----------
    buffer : torch.Tensor
        One layer's K or V of the pool, shape ``(num_slots, num_kv_heads, head_dim)``, any dtype.
        Written in place.
    slots : torch.Tensor
        The window's slots in token order, shape ``(W,)``, integer, no slot twice.
    kept : torch.Tensor
        Positions to keep, shape ``(num_kv_heads, R)``, int64, strictly ascending along R, in [0, W).

    Notes
    -----
    Head h of slot ``slots[j]`` becomes head h of what ``slots[kept[h, j]]`` held. The other W - R
    slots keep stale bytes; the caller frees them. Scratch: R rows.
    """
    buffer, slots = movable(buffer), slots.long()
    num_kept = kept.shape[1]
    heads = torch.arange(buffer.shape[1], device=buffer.device)[:, None]
    rows = buffer[slots[kept], heads]  # (num_kv_heads, R, head_dim), a copy
    buffer[slots[:num_kept], heads] = rows
