"""What the kernels need to know of a pool: an address per layer, and what all layers share."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

import torch

from kara_sglang.kernels.backend import LayerPool


@dataclass(frozen=True, slots=True)
class PoolTables:
    """A :class:`LayerPool` as tables on the device, so that one launch reaches every layer.

    Attributes
    ----------
    keys, values, rings
        Address of each layer's buffer, shape ``(num_layers,)``, int64. ``rings`` is None without a
        recorder.
    scales
        Softmax scale of each layer, shape ``(num_layers,)``, float32.
    moves
        What :func:`kara_sglang.kernels.triton.compact.compact` is called with: pairs of a table and
        the bytes of one head of one slot. One pair where K and V have the same shape.
    num_layers, num_kv_heads, head_dim, value_dim
        Of the pool.
    key_dtype, ring_dtype
        Of K and V, and of the recorded queries.
    alignment
        Bytes (a power of two, at most 16) that divide every address.
    source
        What the tables were made from; see :meth:`matches`.
    """

    keys: torch.Tensor
    values: torch.Tensor
    rings: torch.Tensor | None
    scales: torch.Tensor
    moves: tuple[tuple[torch.Tensor, int], ...]
    num_layers: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    key_dtype: torch.dtype
    ring_dtype: torch.dtype
    alignment: int
    source: tuple[object, ...]

    @classmethod
    def of(cls, pool: LayerPool) -> Self:
        """Check the buffers and copy their addresses to the device, without synchronising.

        Raises
        ------
        ValueError
            Where layers differ in shape or dtype, K and V in dtype, or a buffer has gaps.
        """
        for name, buffers in (("K", pool.keys), ("V", pool.values), ("ring", pool.rings)):
            for buffer in buffers:
                if buffer.shape != buffers[0].shape or buffer.dtype != buffers[0].dtype:
                    raise ValueError(f"the {name} buffers of the layers differ in shape or dtype")
                if not buffer.is_contiguous():
                    raise ValueError(f"a {name} buffer is not contiguous")
        if pool.keys[0].dtype != pool.values[0].dtype:
            raise ValueError("K and V differ in dtype")
        keys, values = _addresses(pool.keys), _addresses(pool.values)
        _, num_kv_heads, head_dim = pool.keys[0].shape
        value_dim = pool.values[0].shape[2]
        key_bytes = head_dim * pool.keys[0].itemsize
        value_bytes = value_dim * pool.values[0].itemsize
        device = pool.keys[0].device
        both = to_device([*keys, *values], torch.int64, device)
        key_table, value_table = both.chunk(2)
        return cls(
            keys=key_table,
            values=value_table,
            rings=to_device(_addresses(pool.rings), torch.int64, device) if pool.rings else None,
            scales=to_device(pool.scales, torch.float32, device),
            moves=((both, key_bytes),)
            if key_bytes == value_bytes
            else ((key_table, key_bytes), (value_table, value_bytes)),
            num_layers=len(keys),
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            value_dim=value_dim,
            key_dtype=pool.keys[0].dtype,
            ring_dtype=pool.rings[0].dtype if pool.rings else pool.keys[0].dtype,
            alignment=math.gcd(16, *keys, *values, *_addresses(pool.rings)),
            source=_source(pool),
        )

    def matches(self, pool: LayerPool) -> bool:
        """Whether the tables still describe ``pool``; buffers may have been made anew."""
        return self.source == _source(pool)


def to_device(
    numbers: list[int] | list[float], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """``numbers`` on ``device``, through pinned memory so that the host does not wait."""
    host = torch.tensor(numbers, dtype=dtype, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)


def _addresses(buffers: list[torch.Tensor]) -> list[int]:
    return [buffer.data_ptr() for buffer in buffers]


def _source(pool: LayerPool) -> tuple[object, ...]:
    addresses = (*_addresses(pool.keys), *_addresses(pool.values), *_addresses(pool.rings))
    return (*addresses, pool.keys[0].shape, pool.keys[0].dtype, *pool.scales)
