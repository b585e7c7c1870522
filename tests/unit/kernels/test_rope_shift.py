"""Moving queries ahead, against transformers' rotary embedding."""

from __future__ import annotations

import pytest
import torch
from rope import angles, rotated

from kara_sglang.kernels.rope_shift import RopeShift

DIM = 16


@pytest.mark.parametrize("halves", [True, False], ids=["halves", "neighbours"])
@pytest.mark.parametrize("rotary_dim", [DIM, DIM // 2])
def test_moved_is_rotated_further(halves: bool, rotary_dim: int) -> None:
    """What stood at p stands at p + 37 then, number by number; what RoPE leaves alone stays."""
    turns = angles(37, rotary_dim // 2)
    turn = RopeShift.of_layer(turns.cos(), turns.sin(), DIM, halves=halves)
    raw = torch.randn(5, 3, 2, DIM, dtype=torch.float64)

    def at(position: float) -> torch.Tensor:
        front = rotated(raw[..., :rotary_dim], position, halves)
        return torch.cat([front, raw[..., rotary_dim:]], dim=-1)

    moved = turn.moved(at(1200), 0)
    assert moved.dtype == torch.float32
    torch.testing.assert_close(moved.double(), at(1237), rtol=0, atol=1e-5)
    assert (moved.double() - at(1200)).abs().max() > 0.5


def test_layers_are_kept_apart() -> None:
    nothing = torch.empty(0)
    still = RopeShift.of_layer(nothing, nothing, DIM, halves=True)
    turns = angles(8, DIM // 2)
    turn = RopeShift.of([still, RopeShift.of_layer(turns.cos(), turns.sin(), DIM, halves=False)])
    assert (still.run, turn.run) == (16, 1)
    assert turn.cos.shape == turn.sin.shape == turn.partner.shape == (2, DIM)
    x = torch.randn(4, DIM)
    assert torch.equal(turn.moved(x, 0), x)
    torch.testing.assert_close(turn.moved(x, 1).double(), rotated(x.double(), 8, False))
