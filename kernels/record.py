"""The ring of recorded queries: where a token's query lies, and how it gets there.

The ring is cut into *units*. A unit holds, for each of ``ring_len`` consecutive tokens, one query per
KV head. A recorder that keeps **all** heads owns ``group`` units, unit g for head g of each
GQA group; one that keeps the **mean** owns a single unit, for the mean query of each group: logits are
linear in the query, so it votes for what the heads of a group agree on. The token at logical position p
lies at ``p % ring_len`` of its unit, so nothing moves when the KV cache is compacted, and the delay's
queries are still there when the next window begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch

from kara_sglang.kernels.copies import to_device

FP8 = torch.float8_e4m3fn
_FP8_MAX = torch.finfo(FP8).max
_FP8_MAX_BITS = 0x43E00000  # 448.0 as a float32
EXPONENTS = (-100, 119)
"""Smallest and largest exponent that is stored; within them no product over- or underflows."""


@dataclass(frozen=True, slots=True)
class Ring:
    """Recorded queries of one layer, or of all layers with one more dimension in front.

    e4m3 ends at 448, and some models' queries do not (those with biases in the projection and no norm
    behind it). So a ring in fp8 keeps an exponent per entry and KV head: the smallest power of two by
    which a head's numbers must be divided to fit. It is exact, needs no calibration, and costs one byte
    beside ``head_dim`` bytes.

    Attributes
    ----------
    queries
        Shape ``(num_entries, num_kv_heads, head_dim)``.
    exponents
        Shape ``(num_entries, num_kv_heads)``, int8: a query is ``queries * 2**exponents``. None where
        ``queries`` are no e4m3.
    """

    queries: torch.Tensor
    exponents: torch.Tensor | None = None

    def __post_init__(self) -> None:
        is_fp8 = self.queries.dtype == FP8
        if is_fp8 != (self.exponents is not None):
            raise ValueError(
                f"a ring of {self.queries.dtype} takes exponents if, and only if, it is {FP8}"
            )
        if self.exponents is not None and (
            self.exponents.shape != self.queries.shape[:-1] or self.exponents.dtype != torch.int8
        ):
            raise ValueError(f"exponents must be int8 of shape {tuple(self.queries.shape[:-1])}")

    @classmethod
    def zeros(
        cls, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> Self:
        """A ring of ``shape`` ``([num_layers,] num_entries, num_kv_heads, head_dim)``."""
        queries = torch.zeros(shape, dtype=dtype, device=device)
        if dtype != FP8:
            return cls(queries)
        return cls(queries, torch.zeros(shape[:-1], dtype=torch.int8, device=device))

    def __getitem__(self, layers: int | slice) -> Self:
        """One layer of a ring of all layers, or several, on the same memory."""
        exponents = None if self.exponents is None else self.exponents[layers]
        return type(self)(self.queries[layers], exponents)

    @staticmethod
    def head_bytes(head_dim: int, dtype: torch.dtype) -> int:
        """Bytes of one head of one entry."""
        return head_dim * dtype.itemsize + (1 if dtype == FP8 else 0)


def to_fp8(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``rows`` of shape ``(..., head_dim)`` as e4m3 and exponents ``(...)``, int8, see :class:`Ring`.

    An infinity becomes the largest number that can be stored; NaN stays.
    """
    rows = rows.float()
    largest = rows.abs().contiguous().view(torch.int32).amax(dim=-1)  # as integers: in the same order
    exponents = -((_FP8_MAX_BITS - largest) >> 23)  # log2(largest / 448), rounded up
    exponents = exponents.clamp(*EXPONENTS)
    rows = (rows * power_of_two(-exponents)[..., None]).clamp(-_FP8_MAX, _FP8_MAX)
    return rows.to(FP8), exponents.to(torch.int8)


def power_of_two(exponents: torch.Tensor) -> torch.Tensor:
    """``2.0 ** exponents``, float32 and exact, for integers from -126 to 127."""
    return ((exponents.to(torch.int32) + 127) << 23).view(torch.float32)


@dataclass(frozen=True, slots=True)
class Step:
    """The tokens of one decode step, and what decides where their queries go.

    Attributes
    ----------
    positions
        Their logical positions, shape ``(batch,)``, int64.
    rows
        The requests' rows of ``req_to_token``, shape ``(batch,)``, int64.
    units
        Units of each row's recorder, shape ``(num_rows, group)``, int64; -1 for a row without one, and
        behind the only unit of one that keeps the mean.
    ring_len
        Tokens per unit.
    """

    positions: torch.Tensor
    rows: torch.Tensor
    units: torch.Tensor
    ring_len: int


def plan(step: Step, trash: int) -> torch.Tensor:
    """Where the queries of one decode step go, the same in all layers.

    Parameters
    ----------
    step : Step
    trash : int
        Index of the ring's last entry, which takes what nobody keeps.

    Returns
    -------
    torch.Tensor
        Ring entries, shape ``(batch, group)``, int64.
    """
    units = step.units[step.rows]
    entry = units * step.ring_len + step.positions[:, None] % step.ring_len
    return torch.where(units < 0, trash, entry)


def record(ring: Ring, step: Step, queries: Sequence[torch.Tensor]) -> None:
    """Store one step's queries of some layers.

    The same operations whoever records, so they may be captured in a CUDA graph.

    Parameters
    ----------
    ring : Ring
        Of as many layers as there are queries, written in place. The last entry is the trash.
    step : Step
    queries : sequence of torch.Tensor
        Post-RoPE queries, one tensor per layer, shape ``(batch, num_kv_heads * group * head_dim)`` or
        with the last dimension already split, any float dtype.
    """
    _, num_entries, num_kv_heads, head_dim = ring.queries.shape
    trash = num_entries - 1
    entries = plan(step, trash)
    batch, group = entries.shape
    by_group = torch.stack(list(queries)).view(-1, batch, num_kv_heads, group, head_dim).transpose(2, 3)
    if group > 1:
        alone = (entries[:, 1:2] == trash) & (entries[:, :1] != trash)
        first = torch.where(alone[..., None], mean_of(by_group), by_group[..., 0, :, :])
        by_group = torch.cat([first[..., None, :, :], by_group[..., 1:, :, :]], dim=2)
    rows = by_group.reshape(-1, batch * group, num_kv_heads, head_dim)
    where = entries.flatten()
    if ring.exponents is None:
        ring.queries.index_copy_(1, where, rows.to(ring.queries.dtype))
        return
    rows, exponents = to_fp8(rows)
    # As bytes: index_copy_ does not know 8-bit floats.
    ring.queries.view(torch.uint8).index_copy_(1, where, rows.view(torch.uint8))
    ring.exponents.index_copy_(1, where, exponents)


def mean_of(heads: torch.Tensor) -> torch.Tensor:
    """The mean query of each group of ``(..., group, num_kv_heads, head_dim)``, float32.

    Added up in the order of the heads, so that every implementation gives the same bits.
    """
    total = heads[..., 0, :, :].float()
    for head in range(1, heads.shape[-3]):
        total = total + heads[..., head, :, :]
    return total * (1 / heads.shape[-3])


def recorded(ring: Ring, start: int, count: int, units: Sequence[int], ring_len: int) -> torch.Tensor:
    """Read ``count`` tokens' queries from logical position ``start`` on.

    Parameters
    ----------
    ring : Ring
        One layer's.
    start, count : int
        Tokens, with ``count <= ring_len``.
    units : sequence of int
        The recorder's units: as many as the group has heads, or one that keeps the mean.
    ring_len : int
        Tokens per unit.

    Returns
    -------
    torch.Tensor
        Shape ``(count, num_kv_heads, group or 1, head_dim)``; the ring's dtype, float32 for fp8.
    """
    if count > ring_len:
        raise ValueError(f"{count} queries asked of a ring that holds {ring_len} tokens")
    device = ring.queries.device
    offsets = torch.arange(start, start + count, device=device) % ring_len
    firsts = to_device(torch.tensor(units) * ring_len, device)
    entries = (firsts + offsets[:, None]).flatten()
    if ring.exponents is None:
        rows = ring.queries.index_select(0, entries)
    else:
        # As bytes, which every operation knows.
        rows = ring.queries.view(torch.uint8).index_select(0, entries).view(FP8).float()
        rows *= power_of_two(ring.exponents.index_select(0, entries))[..., None]
    return rows.unflatten(0, (count, -1)).transpose(1, 2)
