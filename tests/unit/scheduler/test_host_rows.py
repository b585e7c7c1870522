"""Rows on the host come back as they were, in blocks of one size."""

from __future__ import annotations

import pytest
import torch

from kara_sglang.scheduler.host_rows import HostRows


def pool(slots: int = 2000, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    """Two layers whose V is wider than their K."""
    shapes = [(slots, 2, 8), (slots, 2, 8), (slots, 2, 12), (slots, 2, 12)]
    return [torch.randn(shape).to(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("count", [1, 150, 512, 1000])
def test_a_row_comes_back_from_any_place_on(dtype: torch.dtype, count: int) -> None:
    buffers = pool(dtype=dtype)
    rows = HostRows(buffers)
    assert 128 <= rows.block_slots <= 256
    order = torch.randperm(2000)
    old, new = order[:count], order[1000 : 1000 + count]
    blocks = rows.take(count)
    assert blocks is not None and len(blocks) == rows.num_blocks(count)
    rows.save(old, blocks)
    saved = [buffer[old].clone() for buffer in buffers]
    for first in (0, count // 2, count - 1):
        for buffer in buffers:
            buffer.view(torch.uint8).zero_()
        rows.load(blocks, new, first)
        for buffer, expected in zip(buffers, saved, strict=True):
            found = buffer[new].view(torch.uint8)
            assert torch.equal(found[first:], expected[first:].view(torch.uint8))
            assert not found[:first].any()
            assert buffer.view(torch.uint8).any(dim=(1, 2)).sum() <= count - first


def test_all_blocks_are_a_power_of_two() -> None:
    """torch hands pinned memory out again by such sizes, whatever the row."""
    for layers in (2, 28, 36):
        rows = HostRows([torch.empty((1, 8, 128), dtype=torch.bfloat16)] * (2 * layers))
        slot = 2 * layers * 8 * 128 * 2
        assert rows.block_bytes.bit_count() == 1
        assert rows.block_slots == rows.block_bytes // slot >= 128


def test_a_host_without_memory(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rows = HostRows(pool())

    def fail(*_args: object, **_kwargs: object) -> None:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch, "empty", fail)
    assert rows.take(10) is None
    assert "no host memory for a retracted request's row: CUDA error" in caplog.text
