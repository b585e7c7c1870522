"""A launch that is made again: what fits is found out once, and nothing of it is mixed up."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from kara_sglang.kernels.triton.launch import Launch


class Kernel:
    """As Triton's: called by name it says what it has compiled, and that takes values in order."""

    def __init__(self, compiles: bool = True) -> None:
        self.params = [SimpleNamespace(name=name) for name in ("table", "count", "BLOCK")]
        self.calls: list[Any] = []
        self.compiles = compiles

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        def first(**arguments: Any) -> dict[tuple[int, ...], Callable[..., None]] | None:
            self.calls.append((grid, arguments))
            again = {(*grid, 1, 1): lambda *values: self.calls.append(values)}
            return again if self.compiles else None

        return first


def test_the_first_call_compiles_and_later_ones_launch_that() -> None:
    """With the kernel's parameters in their order, without the compiler's options."""
    kernel = Kernel()
    launch = Launch(kernel, 6, BLOCK=64, count=3, table="t", num_warps=4)
    for _ in range(3):
        launch()
    first, *later = kernel.calls
    assert first == ((6,), {"BLOCK": 64, "count": 3, "table": "t", "num_warps": 4})
    assert later == [("t", 3, 64)] * 2


def test_the_interpreter_compiles_nothing() -> None:
    kernel = Kernel(compiles=False)
    launch = Launch(kernel, 2, table="t", count=3, BLOCK=64)
    launch()
    launch()
    assert [call[0] for call in kernel.calls] == [(2,), (2,)]
