"""The ring of recorded queries: where a token's query lies, and how it gets there.

The ring is cut into *units*. A unit holds, for each of ``ring_len`` consecutive tokens, one query head
of every KV head. A recorder that keeps **all** heads owns ``group`` units, unit g for head g of each
GQA group; a **rotating** one owns a single unit and keeps head ``position % group``. The token at
logical position p lies at ``p % ring_len`` of its unit, so nothing moves when the KV cache is
compacted, and the delay's queries are still there when the next window begins.
"""

from __future__ import annotations

import torch

FP8 = torch.float8_e4m3fn
_FP8_MAX = torch.finfo(FP8).max


def plan(
    positions: torch.Tensor,
    units: torch.Tensor,
    rotating: torch.Tensor,
    ring_len: int,
    trash: int,
) -> torch.Tensor:
    """Where the queries of one decode step go; made once per step and shared by all layers.

    Parameters
    ----------
    positions : torch.Tensor
        Logical positions of the step's tokens, shape ``(batch,)``, int64.
    units : torch.Tensor
        Units of each row's recorder, shape ``(batch, group)``, int64; -1 for a row without one. A
        rotating recorder repeats its only unit.
    rotating : torch.Tensor
        Shape ``(batch,)``, bool.
    ring_len : int
        Tokens per unit.
    trash : int
        Index of the ring's last entry, which takes what nobody keeps.

    Returns
    -------
    torch.Tensor
        Ring entries, shape ``(batch, group)``, int64.
    """
    group = torch.arange(units.shape[1], device=units.device)
    idle = (units < 0) | (rotating[:, None] & (positions[:, None] % units.shape[1] != group))
    entry = units * ring_len + positions[:, None] % ring_len
    return torch.where(idle, trash, entry)


def record(ring: torch.Tensor, entries: torch.Tensor, queries: torch.Tensor) -> None:
    """Store one step's queries of one layer.

    Parameters
    ----------
    ring : torch.Tensor
        One layer's ring, shape ``(num_entries, num_kv_heads, head_dim)``, written in place.
    entries : torch.Tensor
        What :func:`plan` returned, shape ``(batch, group)``.
    queries : torch.Tensor
        Post-RoPE queries, shape ``(batch, num_kv_heads * group * head_dim)`` or with the last
        dimension already split; any float dtype.
    """
    batch, group = entries.shape
    _, num_kv_heads, head_dim = ring.shape
    by_group = queries.view(batch, num_kv_heads, group, head_dim).transpose(1, 2)
    rows = by_group.reshape(batch * group, num_kv_heads, head_dim)
    if ring.dtype == FP8:
        # e4m3 has no infinity: what lies beyond its range would become NaN.
        rows = rows.clamp(-_FP8_MAX, _FP8_MAX)
    rows = rows.to(ring.dtype)
    if ring.dtype == FP8:  # which index_copy_ does not know
        ring, rows = ring.view(torch.uint8), rows.view(torch.uint8)
    ring.index_copy_(0, entries.flatten(), rows)


def recorded(
    ring: torch.Tensor, start: int, count: int, units: torch.Tensor, ring_len: int
) -> torch.Tensor:
    """Read ``count`` tokens' queries from logical position ``start`` on.

    Parameters
    ----------
    ring : torch.Tensor
        One layer's ring, shape ``(num_entries, num_kv_heads, head_dim)``.
    start, count : int
        Tokens, with ``count <= ring_len``.
    units : torch.Tensor
        The recorder's units, shape ``(group,)``, or ``(1,)`` for a rotating one.
    ring_len : int
        Tokens per unit.

    Returns
    -------
    torch.Tensor
        Shape ``(count, num_kv_heads, group or 1, head_dim)``, the ring's dtype.
    """
    offsets = torch.arange(start, start + count, device=ring.device) % ring_len
    entries = units[None, :] * ring_len + offsets[:, None]
    raw = ring.view(torch.uint8) if ring.dtype == FP8 else ring
    rows = raw[entries]  # (count, group or 1, num_kv_heads, head_dim)
    return rows.view(ring.dtype).transpose(1, 2)
