"""What the kernels need to know of a pool: an address per layer, and what all layers share."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

import torch
import triton
import triton.language as tl

from kara_sglang.kernels.backend import LayerPool
from kara_sglang.kernels.record import FP4, Ring
from kara_sglang.kernels.rope_shift import RopeShift
from kara_sglang.kernels.transfer import to_device


@dataclass(frozen=True, slots=True)
class PoolTables:
    """A :class:`LayerPool` as tables on the device, so that one launch reaches every layer.

    Attributes
    ----------
    keys, values, rings, ring_scales
        Address of each layer's buffer, shape ``(num_layers,)``, int64. ``rings`` is None without a
        recorder, ``ring_scales`` where the ring has none.
    scales
        Softmax scale of each layer, shape ``(num_layers,)``, float32.
    rope_shift
        As the pool's.
    moves
        What a compaction moves: pairs of a table, which lists all layers once or twice, and the bytes
        of one head of one slot. One pair where K and V have the same shape.
    num_layers, num_kv_heads, head_dim, value_dim
        Of the pool.
    key_dtype, ring_dtype
        Of K and V, and of the recorded queries.
    dot
        In which queries and keys are multiplied: float16, or float32 where either is stored so.
    alignment
        Bytes (a power of two, at most 16) that divide every address.
    capability
        Compute capability of the GPU.
    pool
        What the tables were made from.
    """

    keys: torch.Tensor
    values: torch.Tensor
    rings: torch.Tensor | None
    ring_scales: torch.Tensor | None
    scales: torch.Tensor
    rope_shift: RopeShift | None
    moves: tuple[tuple[torch.Tensor, int], ...]
    num_layers: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    key_dtype: torch.dtype
    ring_dtype: torch.dtype
    dot: torch.dtype
    alignment: int
    capability: tuple[int, int]
    pool: LayerPool

    @classmethod
    def of(cls, pool: LayerPool) -> Self:
        """Check the buffers and copy their addresses to the device, without synchronising.

        Raises
        ------
        ValueError
            Where layers differ in shape or dtype, K and V in dtype, a buffer has gaps, or the shift
            does not fit.
        """
        rings = [ring.queries for ring in pool.rings]
        ring_scales = [ring.scales for ring in pool.rings if ring.scales is not None]
        if not pool.keys:
            raise ValueError("a pool without layers")
        for name, per_layer in (("V", pool.values), ("scale", pool.scales), ("ring", rings)):
            if len(per_layer) != len(pool.keys) and (per_layer or name != "ring"):
                raise ValueError(f"{len(pool.keys)} layers of K, {len(per_layer)} of {name}")
        for name, buffers in (
            ("K", pool.keys),
            ("V", pool.values),
            ("ring", rings),
            ("ring's scales", ring_scales),
        ):
            for buffer in buffers:
                if buffer.shape != buffers[0].shape or buffer.dtype != buffers[0].dtype:
                    raise ValueError(f"the {name} buffers of the layers differ in shape or dtype")
                if not buffer.is_contiguous():
                    raise ValueError(f"a {name} buffer is not contiguous")
        if pool.keys[0].dtype != pool.values[0].dtype:
            raise ValueError("K and V differ in dtype")
        if pool.keys[0].shape[:2] != pool.values[0].shape[:2]:
            raise ValueError("K and V differ in slots or heads")
        if rings and (rings[0].shape[1], pool.rings[0].head_dim) != pool.keys[0].shape[1:]:
            raise ValueError("the ring's heads are not those of K")
        shape = len(pool.keys), pool.keys[0].shape[2]
        if pool.rope_shift is not None and any(
            part.shape != shape or not part.is_contiguous()
            for part in (pool.rope_shift.cos, pool.rope_shift.sin, pool.rope_shift.partner)
        ):
            raise ValueError(f"the RoPE shift is no contiguous {shape[0]} layers of {shape[1]} numbers")
        keys, values = _addresses(pool.keys), _addresses(pool.values)
        _, num_kv_heads, head_dim = pool.keys[0].shape
        value_dim = pool.values[0].shape[2]
        key_bytes = head_dim * pool.keys[0].itemsize
        value_bytes = value_dim * pool.values[0].itemsize
        stored = {buffer.dtype for buffer in (*pool.keys, *rings)}
        device = pool.keys[0].device
        both = table([*keys, *values], device)
        key_table, value_table = both.chunk(2)
        return cls(
            keys=key_table,
            values=value_table,
            rings=table(_addresses(rings), device) if rings else None,
            ring_scales=table(_addresses(ring_scales), device) if ring_scales else None,
            scales=to_device(torch.tensor(pool.scales, dtype=torch.float32), device),
            rope_shift=pool.rope_shift,
            moves=((both, key_bytes),)
            if key_bytes == value_bytes
            else ((key_table, key_bytes), (value_table, value_bytes)),
            num_layers=len(keys),
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            value_dim=value_dim,
            key_dtype=pool.keys[0].dtype,
            ring_dtype=rings[0].dtype if rings else pool.keys[0].dtype,
            dot=torch.float32 if torch.float32 in stored else torch.float16,
            alignment=math.gcd(16, *keys, *values, *_addresses(rings)),
            capability=capability_of(device),
            pool=pool,
        )


def capability_of(device: torch.device) -> tuple[int, int]:
    """Compute capability; that of the first GPUs with all that the kernels use where there is none."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


def table(addresses: list[int], device: torch.device) -> torch.Tensor:
    """``addresses`` on ``device``, shape ``(len(addresses),)``, int64."""
    return to_device(torch.tensor(addresses, dtype=torch.int64), device)


def _addresses(buffers: list[torch.Tensor]) -> list[int]:
    return [buffer.data_ptr() for buffer in buffers]


def stored_type(dtype: torch.dtype) -> tl.dtype:
    """Triton's name of ``dtype``."""
    names = {
        torch.float32: tl.float32,
        torch.float16: tl.float16,
        torch.bfloat16: tl.bfloat16,
        torch.float8_e4m3fn: tl.float8e4nv,
        torch.float8_e5m2: tl.float8e5,
    }
    if dtype not in names:
        raise ValueError(f"{dtype} has no score; a pool of raw bytes must be viewed as its own type")
    return names[dtype]


def ring_type(dtype: torch.dtype) -> tl.dtype:
    """Triton's name of what a ring of ``dtype`` stores; uint8 for pairs of e2m1."""
    return tl.uint8 if dtype == FP4 else stored_type(dtype)


def scale_words(ring: Ring) -> torch.Tensor | None:
    """A ring's scales with all of a head's in one integer."""
    if ring.scales is None or ring.queries.dtype != FP4:
        return ring.scales
    return ring.scales.view(torch.int32 if ring.scales.shape[-1] == 4 else torch.int64)


@triton.jit
def layer_buffer(table, layer, STORED: tl.constexpr, ALIGN: tl.constexpr):
    """A layer's buffer as a pointer; 8-bit floats as uint8."""
    address = tl.load(table + layer)
    if STORED.is_fp8():
        return tl.multiple_of(address.to(tl.pointer_type(tl.uint8)), ALIGN)
    else:
        return tl.multiple_of(address.to(tl.pointer_type(STORED)), ALIGN)


@triton.jit
def within(index, LIMIT: tl.constexpr, BLOCK: tl.constexpr):
    """``index < LIMIT``; where blocks are whole a constant, for which the compiler makes no code."""
    if LIMIT % BLOCK == 0:
        return tl.full(index.shape, True, tl.int1)
    else:
        return index < LIMIT


@triton.jit
def task(blocks, num_jobs, first_layer, HEADS: tl.constexpr):
    """What a program works on: its (layer, window, head) as one number and one by one."""
    index = tl.program_id(0) // blocks
    return index, first_layer + index // (HEADS * num_jobs), index // HEADS % num_jobs, index % HEADS
