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


def most_kept(kept: torch.Tensor, width: int) -> torch.Tensor:
    """What most heads of each layer keep of a window.

    Parameters
    ----------
    kept : torch.Tensor
        Positions, shape ``(num_layers, num_kv_heads, R)``, int64, in [0, W).
    width : int
        W.

    Returns
    -------
    torch.Tensor
        Shape ``(num_layers, R)``, int64, strictly ascending; ties go to the earlier token. Nothing
        comes back from the device.
    """
    every = kept.flatten(1)
    counts = torch.zeros((len(kept), width), dtype=torch.int32, device=kept.device)
    counts.scatter_add_(1, every, torch.ones_like(every, dtype=torch.int32))
    ranked = counts.argsort(dim=-1, descending=True, stable=True)
    return ranked[:, : kept.shape[-1]].sort(dim=-1).values


def kept_alike(kept: torch.Tensor, layers: int, heads: int, width: int) -> torch.Tensor:
    """What a draft model keeps of a window so as to keep what its target keeps.

    In a slot it has the token behind the one that the target has there
    (``speculative/eagle_worker_common.py``), so it keeps the slot before; the window's first token lies
    outside, and the last slot stands in for it. A layer follows the target's layer at the same relative
    depth, the last of all the last one: head by head where both models have the same shape, otherwise
    by what most of its heads keep.

    Parameters
    ----------
    kept : torch.Tensor
        The target's positions, shape ``(num_layers, num_kv_heads, R)``, int64.
    layers, heads : int
        Of the draft.
    width : int
        W.

    Returns
    -------
    torch.Tensor
        Shape ``(layers, heads, R)``, int64, strictly ascending along R.
    """
    if kept.shape[:2] != (layers, heads):
        agreed = most_kept(kept, width)
        followed = [agreed[-(-(layer + 1) * len(kept) // layers) - 1] for layer in range(layers)]
        kept = torch.stack(followed)[:, None].expand(-1, heads, -1)
    return ((kept - 1) % width).sort(dim=-1).values
