"""Moving the kept tokens of a window to its first slots: the torch reference and the CPU path."""

from __future__ import annotations

from collections.abc import Sequence

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
    """What most heads of a layer keep of a window.

    Parameters
    ----------
    kept : torch.Tensor
        Positions, shape ``(num_kv_heads, R)``, int64, in [0, W).
    width : int
        W.

    Returns
    -------
    torch.Tensor
        Shape ``(R,)``, int64, strictly ascending; ties go to the earlier token. Nothing comes back from
        the device.
    """
    every = kept.flatten()
    counts = torch.zeros(width, dtype=torch.int32, device=kept.device)
    counts.scatter_add_(0, every, torch.ones_like(every, dtype=torch.int32))
    return counts.argsort(descending=True, stable=True)[: kept.shape[-1]].sort().values


def compact_alike(
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    slots: torch.Tensor,
    kept: torch.Tensor,
) -> None:
    """Let a draft model keep what its target keeps.

    In a slot it has the token behind the one that the target has there
    (``speculative/eagle_worker_common.py``), so it keeps the slot before; the window's first token lies
    outside, and the last slot stands in for it. A layer follows the target's layer at the same relative
    depth, the last of all the last one: head by head where both models have the same shape, otherwise
    by what most of its heads keep.

    Parameters
    ----------
    keys, values : sequence of torch.Tensor
        One tensor for each layer of the draft, as for :func:`compact`. Written in place.
    slots : torch.Tensor
        As for :func:`compact`.
    kept : torch.Tensor
        The target's positions, shape ``(num_layers, num_kv_heads, R)``, int64.
    """
    layers, heads, _ = kept.shape
    width = slots.shape[0]
    same = (layers, heads) == (len(keys), keys[0].shape[1])
    for layer, buffers in enumerate(zip(keys, values, strict=True)):
        chosen = kept[-(-(layer + 1) * layers // len(keys)) - 1]
        if not same:
            chosen = most_kept(chosen, width).expand(keys[0].shape[1], -1)
        chosen = ((chosen - 1) % width).sort(dim=-1).values
        for buffer in buffers:
            compact(buffer, slots, chosen)
