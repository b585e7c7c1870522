"""The ring of recorded queries: where a token's query lies, and how it gets there.

The ring is cut into *pages*. A page holds, for each of :data:`PAGE` consecutive tokens whose first
position is a multiple of it (a *block*), one query per KV head. A recorder that keeps **all** heads has
``group`` pages for a block, page g for head g of each GQA group; one that keeps the **mean** owns a
single page, for the mean query of each group: logits are linear in the query, so it votes for what the
heads of a group agree on. A table says for each row of ``req_to_token`` which pages its newest blocks
have. It goes by logical positions, so nothing moves when the KV cache is compacted, and the delay's
queries are still there when the next window begins.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

import torch

from kara_sglang.kernels.movable import movable, rows_of
from kara_sglang.kernels.transfer import to_device

PAGE = 64
"""Tokens of a page of the ring."""
FP8 = torch.float8_e4m3fn
FP4 = torch.uint8
"""Two numbers of 4 bits to a byte, see :func:`to_fp4`."""
_FP8_MAX = torch.finfo(FP8).max
_FP8_MAX_BITS = 0x43E00000  # 448.0 as a float32
EXPONENTS = (-100, 119)
"""Smallest and largest exponent that is stored; within them no product over- or underflows."""
FP4_MAX = 6
FP4_SHIFT = 4
"""A scale is stored times 2**4. So queries to 23,040 can be stored, and those from 1e-4 on lose nothing
to the scale's own range."""


@dataclass(frozen=True, slots=True)
class Ring:
    """Recorded queries of one layer, or of all layers with one more dimension in front.

    e4m3 ends at 448 and e2m1 at 6, and some models' queries do not (those with biases in the projection
    and no norm behind it). So a ring in either keeps scales beside the numbers: :func:`to_fp8` and
    :func:`to_fp4` say how they come about. They need no calibration and no state.

    Attributes
    ----------
    queries
        Shape ``(num_entries, num_kv_heads, head_dim)``; as :data:`FP4` the last is ``head_dim / 2``.
    scales
        None where ``queries`` are floats of 16 or 32 bits; shape ``(num_entries, num_kv_heads)``, int8,
        for :data:`FP8`; ``(num_entries, num_kv_heads, scales_of(head_dim))``, uint8, for :data:`FP4`.
    """

    queries: torch.Tensor
    scales: torch.Tensor | None = None

    def __post_init__(self) -> None:
        wanted = _scales_of(self.queries.shape, self.queries.dtype)
        given = None if self.scales is None else (self.scales.shape, self.scales.dtype)
        if given != wanted:
            raise ValueError(
                f"a ring of {self.queries.dtype}, {tuple(self.queries.shape)}, takes "
                f"{'no scales' if wanted is None else f'scales of {wanted[1]}, {tuple(wanted[0])}'}"
            )

    @classmethod
    def zeros(
        cls, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> Self:
        """A ring of ``shape`` ``([num_layers,] num_entries, num_kv_heads, head_dim)``."""
        *front, head_dim = shape
        shape = torch.Size((*front, head_dim // 2 if dtype == FP4 else head_dim))
        queries, scales = torch.zeros(shape, dtype=dtype, device=device), _scales_of(shape, dtype)
        if scales is None:
            return cls(queries)
        return cls(queries, torch.zeros(scales[0], dtype=scales[1], device=device))

    @classmethod
    def of(cls, queries: torch.Tensor, dtype: torch.dtype) -> Self:
        """A ring that holds ``queries``, shape ``(..., head_dim)``, as ``dtype``."""
        if dtype == FP8:
            return cls(*to_fp8(queries))
        return cls(*to_fp4(queries)) if dtype == FP4 else cls(queries.to(dtype))

    def numbers(self) -> torch.Tensor:
        """The queries that it holds, shape ``(..., head_dim)``: float32 where they were scaled."""
        if self.scales is None:
            return self.queries
        if self.queries.dtype == FP8:
            return self.queries.float() * power_of_two(self.scales)[..., None]
        return from_fp4(self.queries, self.scales)

    def __getitem__(self, layers: int | slice) -> Self:
        """One layer of a ring of all layers, or several, on the same memory."""
        return type(self)(*(part[layers] for part in self.parts))

    @property
    def parts(self) -> tuple[torch.Tensor, ...]:
        """The queries, and the scales where there are some."""
        return (self.queries,) if self.scales is None else (self.queries, self.scales)

    @property
    def head_dim(self) -> int:
        """Numbers of a query."""
        return self.queries.shape[-1] * (2 if self.queries.dtype == FP4 else 1)

    @staticmethod
    def head_bytes(head_dim: int, dtype: torch.dtype) -> int:
        """Bytes of one head of one entry."""
        if dtype == FP4:
            return head_dim // 2 + scales_of(head_dim)
        return head_dim * dtype.itemsize + (1 if dtype == FP8 else 0)


def scales_of(head_dim: int) -> int:
    """Scales of a head in :data:`FP4`: one for each quarter of its numbers, or eighth above 128."""
    count = 4 if head_dim <= 128 else 8
    if head_dim % count:
        raise ValueError(
            f"query_dtype fp4 needs a head_dim that is a multiple of {count}, not {head_dim}; take fp8"
        )
    return count


def _scales_of(shape: torch.Size, dtype: torch.dtype) -> tuple[torch.Size, torch.dtype] | None:
    """Shape and dtype of the scales of queries that are stored so."""
    if dtype == FP8:
        return shape[:-1], torch.int8
    if dtype == FP4:
        return torch.Size((*shape[:-1], scales_of(2 * shape[-1]))), torch.uint8
    return None


def to_fp8(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``rows`` of shape ``(..., head_dim)`` as e4m3, and an exponent of each, ``(...)``, int8.

    A row is divided by the smallest power of two with which it fits. That is exact. An infinity
    becomes the largest number that can be stored; NaN stays.
    """
    rows = rows.float()
    exponents = -((_FP8_MAX_BITS - _sizes(rows).amax(dim=-1)) >> 23)  # log2(max / 448), rounded up
    exponents = exponents.clamp(*EXPONENTS)
    rows = (rows * power_of_two(-exponents)[..., None]).clamp(-_FP8_MAX, _FP8_MAX)
    return rows.to(FP8), exponents.to(torch.int8)


def to_fp4(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``rows`` of shape ``(..., head_dim)`` as e2m1, and their scales.

    e2m1 is a sign and one of 0, 1/2, 1, 3/2, 2, 3, 4, 6: two bits of exponent, one of mantissa. Each
    part of a row (:func:`scales_of`) has a scale: its largest number divided by 6, in 8 bits. These are
    the upper bits of a float16 without its sign, five of exponent and three of mantissa. What is no
    number, or too large, becomes the largest number that can be stored.

    Returns
    -------
    tuple of torch.Tensor
        Bytes, shape ``(..., head_dim / 2)``, uint8: byte i holds the row's numbers i, in the bits of a
        float16's upper byte (sign 7, others 3 to 1), and ``i + head_dim / 2`` (sign 0, others 6 to 4).
        Scales, shape ``(..., scales_of(head_dim))``, uint8.
    """
    parts = rows.float().unflatten(-1, (scales_of(rows.shape[-1]), -1))
    scales = _sizes(parts).amax(dim=-1).view(torch.float32) * (2**FP4_SHIFT / FP4_MAX)
    codes = _rounded(scales, largest=61440.0, mantissa=3, least=2.0**-14).clamp_min(1)
    numbers = _rounded(parts * (2**FP4_SHIFT / _scale(codes))[..., None], 6.0, 1, 1.0)
    first, second = numbers.flatten(-2).chunk(2, dim=-1)
    negative, also = parts.signbit().flatten(-2).to(torch.uint8).chunk(2, dim=-1)
    return negative << 7 | first << 1 | second << 4 | also, codes


def from_fp4(rows: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """What :func:`to_fp4` stored: shape ``(..., head_dim)``, float32."""
    bits = rows.int()
    first, second = (bits & 0x8E) << 8, (bits & 0x70) << 5 | (bits & 1) << 15
    # As float16s these are e2m1 times 2**-14.
    halves = torch.cat([first, second], dim=-1).to(torch.int16).view(torch.float16).float() * 2**14
    parts = halves.unflatten(-1, (scales.shape[-1], -1))
    return (parts * (_scale(scales) / 2**FP4_SHIFT)[..., None]).flatten(-2)


def _rounded(numbers: torch.Tensor, largest: float, mantissa: int, least: float) -> torch.Tensor:
    """The bits, without sign, of float32s in a type of so many bits of ``mantissa``, whose ``largest``
    and ``least`` normal numbers these are; uint8. Ties go to the even one."""
    # As integers: NaN becomes the largest.
    sizes = _sizes(numbers).clamp(max=_bits(largest))
    dropped, zero = 23 - mantissa, _bits(least) - (1 << 23)  # an exponent of 0, like that below least
    normal = (sizes + ((1 << (dropped - 1)) - 1) + ((sizes >> dropped) & 1) - zero) >> dropped
    steps = sizes.view(torch.float32) * (2**mantissa / least)  # of the smallest number
    tiny = steps.round().clamp(max=2**mantissa).int()
    return torch.where(sizes < _bits(least), tiny, normal).to(torch.uint8)


def _bits(number: float) -> int:
    """Of a positive float32."""
    return struct.unpack("<i", struct.pack("<f", number))[0]


def _scale(codes: torch.Tensor) -> torch.Tensor:
    """A stored scale, float32."""
    return (codes.to(torch.int16) << 7).view(torch.float16).float()


def _sizes(rows: torch.Tensor) -> torch.Tensor:
    """``abs(rows)`` of float32 as int32 in the same order; NaN comes last."""
    return rows.contiguous().view(torch.int32) & 0x7FFFFFFF


def power_of_two(exponents: torch.Tensor) -> torch.Tensor:
    """``2.0 ** exponents``, float32 and exact, for integers from -126 to 127."""
    return ((exponents.to(torch.int32) + 127) << 23).view(torch.float32)


@dataclass(frozen=True, slots=True)
class Step:
    """The tokens of one decode step, and what decides where their queries go.

    Attributes
    ----------
    positions
        The logical positions in whose places their queries go, shape ``(batch,)``, int64.
    rows
        The rows of ``req_to_token`` of their requests, shape ``(batch,)``, int64.
    pages
        Pages of each row's blocks, shape ``(num_rows, num_blocks, group)``, int32; block b is at
        ``b % num_blocks``. -1 where nobody records, and behind the only page of the mean.
    """

    positions: torch.Tensor
    rows: torch.Tensor
    pages: torch.Tensor

    @classmethod
    def of(cls, positions: torch.Tensor, rows: torch.Tensor, pages: torch.Tensor) -> Self:
        """A step of these requests, which computes one token of each or as many drafts of each.

        Drafts get places in their order, from the first one's position on: those of a tree that stand
        at the same position must not share one (:func:`keep_accepted`). Whoever comes later writes over
        those that were not accepted.

        Parameters
        ----------
        positions : torch.Tensor
            Logical positions, shape ``(batch * drafts,)``, int64, a request's beside each other.
        rows : torch.Tensor
            Shape ``(batch,)``, int64.
        pages : torch.Tensor
        """
        drafts = positions.shape[0] // max(1, rows.shape[0])
        if drafts > 1:
            first = positions.view(-1, drafts)[:, :1]
            positions = (first + torch.arange(drafts, device=first.device)).flatten()
            rows = rows.repeat_interleave(drafts)
        return cls(positions, rows, pages)


def keep_accepted(
    ring: Ring, first: torch.Tensor, rows: torch.Tensor, pages: torch.Tensor, accepted: torch.Tensor
) -> None:
    """Move the queries of accepted drafts to the places of their positions, in all layers.

    Parameters
    ----------
    ring : Ring
        Of all layers, written in place. The last entry is the trash.
    first : torch.Tensor
        Logical position of each request's first draft, shape ``(batch,)``, int64.
    rows, pages : torch.Tensor
        As in :class:`Step`.
    accepted : torch.Tensor
        Which of a request's drafts were accepted, in the order of their positions, shape
        ``(batch, most)``, int64; the first one always is. Negative behind the last.
    """
    _, num_entries, _, _ = ring.queries.shape
    trash = num_entries - 1
    most = accepted.shape[1]
    rows = rows.repeat_interleave(most)
    places = first[:, None] + torch.arange(most, device=first.device)
    old = torch.where(accepted < 0, places, first[:, None] + accepted)
    source = plan(Step(old.flatten(), rows, pages), trash)
    target = plan(Step(places.flatten(), rows, pages), trash)
    for part in map(movable, ring.parts):
        part.index_copy_(1, target.flatten(), part.index_select(1, source.flatten()))


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
    block = step.positions // PAGE % step.pages.shape[1]
    pages = step.pages[step.rows, block].long()
    return torch.where(pages < 0, trash, pages * PAGE + step.positions[:, None] % PAGE)


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
    _, num_entries, num_kv_heads, _ = ring.queries.shape
    trash = num_entries - 1
    entries = plan(step, trash)
    batch, group = entries.shape
    by_group = torch.stack(list(queries)).view(-1, batch, num_kv_heads, group, ring.head_dim)
    by_group = by_group.transpose(2, 3)
    if group > 1:
        alone = (entries[:, 1:2] == trash) & (entries[:, :1] != trash)
        first = torch.where(alone[..., None], mean_of(by_group), by_group[..., 0, :, :])
        by_group = torch.cat([first[..., None, :, :], by_group[..., 1:, :, :]], dim=2)
    stored = Ring.of(by_group.flatten(1, 2), ring.queries.dtype)
    for part, new in zip(ring.parts, stored.parts, strict=True):
        movable(part).index_copy_(1, entries.flatten(), movable(new))


def mean_of(heads: torch.Tensor) -> torch.Tensor:
    """The mean query of each group of ``(..., group, num_kv_heads, head_dim)``, float32.

    Added up in the order of the heads, so that every implementation gives the same bits.
    """
    total = heads[..., 0, :, :].float()
    for head in range(1, heads.shape[-3]):
        total = total + heads[..., head, :, :]
    return total * (1 / heads.shape[-3])


def blocks_of(start: int, count: int) -> range:
    """The blocks in which ``count`` tokens from logical position ``start`` on lie."""
    return range(start // PAGE, (start + count - 1) // PAGE + 1)


def any_pages(start: int, count: int, voices: int) -> tuple[tuple[int, ...], ...] | None:
    """Page 0 for each block of a window, once per voice, where only shapes matter: to warm up and to
    compile. None without voices."""
    return ((0,) * len(blocks_of(start, count)),) * voices or None


@dataclass(slots=True, eq=False)
class Recorder:
    """A request's share of the query ring."""

    row: int  # req_pool_idx
    heads: int  # of each GQA group; 1 is their mean, unless the group has a single one
    since: int  # logical position of the first recorded token
    granted: tuple[int, int]  # logical position and step of its first token, for Demand
    pages: dict[int, tuple[int, ...]] = field(default_factory=dict)  # by block: one for each head

    @property
    def first(self) -> int:
        """Logical position from which on its queries are in the ring."""
        return max(self.since, min(self.pages, default=0) * PAGE)


def most_blocks(count: int) -> int:
    """In how many blocks so many consecutive tokens can lie."""
    return (count + 2 * PAGE - 2) // PAGE


def recorded(ring: Ring, start: int, count: int, pages: Sequence[Sequence[int]]) -> torch.Tensor:
    """Read ``count`` tokens' queries from logical position ``start`` on.

    Parameters
    ----------
    ring : Ring
        One layer's.
    start, count : int
        Tokens.
    pages : sequence of sequence of int
        For each head of the group, or for the mean, the pages of the blocks in which they lie.

    Returns
    -------
    torch.Tensor
        Shape ``(count, num_kv_heads, group or 1, head_dim)``; the ring's dtype, or float32 where it has
        scales.
    """
    if any(len(of_head) != len(blocks_of(start, count)) for of_head in pages):
        raise ValueError(f"pages for another number of blocks than that of {count} tokens at {start}")
    device = ring.queries.device
    tokens = start % PAGE + torch.arange(count, device=device)
    of_token = to_device(torch.tensor(pages), device)[:, tokens // PAGE]
    entries = (of_token * PAGE + tokens % PAGE).T.flatten()
    rows = Ring(*(rows_of(part, entries) for part in ring.parts)).numbers()
    return rows.unflatten(0, (count, -1)).transpose(1, 2)
