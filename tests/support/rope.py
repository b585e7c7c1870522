"""Rotary position embedding, by transformers' own rotation."""

from __future__ import annotations

import torch
from transformers.models.llama.modeling_llama import rotate_half


def angles(positions: float, pairs: int) -> torch.Tensor:
    return positions * 1e4 ** -(torch.arange(pairs).double() / pairs)


def rotated(x: torch.Tensor, position: float, halves: bool) -> torch.Tensor:
    """RoPE of all of ``x``, float64."""
    turns = angles(position, x.shape[-1] // 2)
    if halves:
        turns = torch.cat([turns, turns])
        return x * turns.cos() + rotate_half(x) * turns.sin()
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2).contiguous())
    return torch.view_as_real(pairs * torch.exp(1j * turns)).flatten(-2)
