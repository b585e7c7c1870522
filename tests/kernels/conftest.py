"""Running Triton kernels on a CPU, without disturbing whatever else this process tests.

``TRITON_INTERPRET=1`` has to be set before triton is imported and then holds for the whole process,
while other tests may already have imported triton (SGLang does) and the tests of the compiled kernels
need the compiler. What the variable does is to make ``@triton.jit`` build another class of function.
The fixture ``interpreted`` does just that, to Triton's own library and to our kernels, for the time of
one module's tests, and then puts back all that it and the interpreter have replaced. With the variable
set there is nothing left to do.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import triton.experimental.gluon  # noqa: F401  # its first import insists on the compiler's class
import triton.language as tl
from triton.runtime.interpreter import (
    InterpretedFunction,
    InterpreterBuilder,
    TensorHandle,
    _patch_lang,
)
from triton.runtime.jit import JITFunction

import kara_sglang.kernels.triton as package
from kara_sglang.kernels.backend import LayerPool, WindowShape
from kara_sglang.kernels.record import PAGE, Ring, most_blocks
from kara_sglang.kernels.rope_shift import RopeShift
from kara_sglang.kernels.triton import TritonKernels

KERNEL_MODULES = [
    importlib.import_module(f"{package.__name__}.{module.name}")
    for module in pkgutil.iter_modules(package.__path__)
]


@pytest.fixture(scope="module")
def interpreted() -> Iterator[None]:
    """Triton's interpreter in place of its compiler, for one test module."""
    # The interpreter replaces functions of these, and not all of them only until it returns.
    language = (tl, tl.core, tl.math, tl.standard, tl.tensor, tl.dtype, tl.condition)
    changed = (tl.core.tensor_descriptor_base, InterpreterBuilder, InterpretedFunction)
    owners = (*language, *changed, *KERNEL_MODULES)
    before = [(owner, dict(vars(owner))) for owner in owners]
    for owner in (tl, tl.standard, *KERNEL_MODULES):
        for name, value in list(vars(owner).items()):
            if isinstance(value, JITFunction):
                setattr(owner, name, InterpretedFunction(value.fn))
    InterpreterBuilder.create_dot = _dot_with_bfloat16
    # It replaces them anew for every call of a device function; once is enough and much faster.
    _patch_lang(tl.standard.sum.fn)
    InterpretedFunction.__call__ = lambda self, *args, **kwargs: self.rewrite()(*args, **kwargs)
    # Lanes that are masked out later may overflow; a GPU says nothing either.
    with np.errstate(over="ignore"):
        yield
    for owner, attributes in before:
        for name, value in attributes.items():
            if vars(owner)[name] is not value:
                setattr(owner, name, value)
        if isinstance(owner, type):  # modules keep the names that rewritten functions look up
            for name in set(vars(owner)) - set(attributes):
                delattr(owner, name)


_stock_dot = InterpreterBuilder.create_dot


def _dot_with_bfloat16(
    self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, *rest: Any
) -> TensorHandle:
    """The interpreter keeps bfloat16 as uint16 and would multiply the bit patterns."""
    return _stock_dot(self, _widened(a), _widened(b), *rest)


def _widened(operand: TensorHandle) -> TensorHandle:
    if operand.dtype.scalar != tl.bfloat16:
        return operand
    bits = operand.data.astype(np.uint32) << 16
    return TensorHandle(bits.view(np.float32), tl.float32)


def _new_pool(
    seed: int,
    *,
    layers: int = 1,
    heads: int = 2,
    dim: int = 64,
    value_dim: int | None = None,
    slots: int = 256,
    voices: int = 4,
    tokens: int = 64,
    dtype: torch.dtype = torch.float32,
    ring_dtype: torch.dtype = torch.float32,
) -> LayerPool:
    """A pool and ring of normal random numbers; K and V are halves of one buffer, as in SGLang. The
    ring has pages for so many ``tokens`` of so many ``voices``, wherever in a page they begin."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    keys, values = [], []
    for _ in range(layers):
        if value_dim is None:
            both = normal(2, slots, heads, dim).to(dtype)
            keys.append(both[0])
            values.append(both[1])
        else:
            keys.append(normal(slots, heads, dim).to(dtype))
            values.append(normal(slots, heads, value_dim).to(dtype))
    queries = [normal(voices * most_blocks(tokens) * PAGE + 1, heads, dim) for _ in range(layers)]
    return LayerPool(
        keys=keys,
        values=values,
        rings=[Ring.of(q, ring_dtype) for q in queries],
        scales=[dim**-0.5 * (1 + 0.1 * layer) for layer in range(layers)],
        rope_shift=_turn(layers, dim),
    )


def _copy_pool(pool: LayerPool) -> LayerPool:
    return LayerPool(
        keys=[key.clone() for key in pool.keys],
        values=[value.clone() for value in pool.values],
        rings=pool.rings,
        scales=pool.scales,
        rope_shift=pool.rope_shift,
    )


def _turn(layers: int, dim: int) -> RopeShift:
    """Layer by layer all of a head in halves, three quarters of it in neighbours, nothing."""
    turns = []
    for layer in range(layers):
        pairs = (dim // 2, dim // 8 * 3, 0)[layer % 3]
        angles = 48.0 * 100.0 ** -(torch.arange(pairs) / max(1, pairs))
        turns.append(RopeShift.of_layer(angles.cos(), angles.sin(), dim, halves=layer % 3 == 0))
    return RopeShift.of(turns)


def _windows(
    count: int, width: int, *, slots: int, seed: int, page: int = 1, dtype: torch.dtype = torch.int32
) -> torch.Tensor:
    """Slots of ``count`` windows, ``(count, width)``: whole pages in random order, none twice."""
    pages = torch.randperm(slots // page, generator=torch.Generator().manual_seed(seed))
    pages = pages[: count * (width // page)].view(count, -1, 1)
    return (pages * page + torch.arange(page)).view(count, width).to(dtype)


@pytest.fixture(autouse=True)
def _same_numbers_in_every_run() -> None:
    torch.manual_seed(0)


def _new_kernels(width: int = 128, query_count: int = 160) -> TritonKernels:
    """Triton's kernels with scratch for any window of a few heads."""
    kernels = TritonKernels()
    shape = WindowShape(3, 4, 128, torch.float32, width, width, 12, query_count)
    kernels.reserve(torch.device("cpu"), shape)
    return kernels


@pytest.fixture(scope="session")
def make() -> SimpleNamespace:
    """Makers of test data: ``make.pool``, ``make.copy``, ``make.windows`` and ``make.kernels``."""
    return SimpleNamespace(pool=_new_pool, copy=_copy_pool, windows=_windows, kernels=_new_kernels)


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@pytest.fixture(scope="session")
def identical() -> Callable[[torch.Tensor, torch.Tensor], bool]:
    """Whether two tensors of one dtype hold the same bytes, NaNs included."""
    return _same_bits
