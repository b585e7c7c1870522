"""Numbers of 8 bits are gathered as bytes and come out as what they were."""

from __future__ import annotations

import pytest
import torch

from kara_sglang.kernels.movable import movable, rows_of


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_floats_of_8_bits_are_moved_as_bytes(dtype: torch.dtype) -> None:
    """Every one of the 256, NaN included, and writing through the view."""
    bits = torch.arange(256, dtype=torch.uint8).reshape(64, 4)
    numbers = bits.clone().view(dtype)
    view = movable(numbers)
    assert view.dtype == torch.uint8 and view.data_ptr() == numbers.data_ptr()
    rows = torch.tensor([63, 0, 17, 17])
    found = rows_of(numbers, rows)
    assert found.dtype == dtype and torch.equal(found.view(torch.uint8), bits[rows])
    view[5] = 7
    assert numbers.view(torch.uint8)[5].tolist() == [7] * 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.uint8, torch.int8])
def test_others_are_left_as_they_are(dtype: torch.dtype) -> None:
    numbers = torch.arange(12).to(dtype).reshape(4, 3)
    assert movable(numbers) is numbers
    assert torch.equal(rows_of(numbers, torch.tensor([3, 1])), numbers[[3, 1]])
