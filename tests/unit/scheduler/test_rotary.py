"""How queries are moved ahead, off the tables of SGLang's own models."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from rope import angles, rotated

from kara_sglang.kernels.rope_shift import RopeShift
from kara_sglang.scheduler.rotary import rope_shift_of

DIM = 16


class Attention(torch.nn.Module):
    def __init__(self, rotary: object = "missing") -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.attn = torch.nn.Identity()
        self.attn.qk_head_dim = DIM
        if rotary != "missing":
            self.rotary_emb = rotary


def rotary(length: int, scale: float = 1.0, halves: bool = True) -> SimpleNamespace:
    """As SGLang's: cosines and sines of every position, some multiplied by a factor (yarn)."""
    turns = torch.arange(length).double()[:, None] * angles(1, DIM // 2)
    cache = torch.cat([turns.cos(), turns.sin()], dim=-1).float() * scale
    return SimpleNamespace(cos_sin_cache=cache, is_neox_style=halves)


def found(*rotaries: object) -> RopeShift:
    model = torch.nn.ModuleList(Attention(one) for one in rotaries)
    return rope_shift_of(model, [layer.attn for layer in model], 37, torch.device("cpu"))


def test_the_models_own_table_is_used() -> None:
    """Each layer's; a scale is left out; a layer that says that it has no positions is not turned."""
    turn = found(rotary(38), rotary(200, scale=1.3, halves=False), None)
    x = torch.randn(4, DIM)
    for layer, halves in ((0, True), (1, False)):
        expected = rotated(x.double(), 37, halves)
        torch.testing.assert_close(turn.moved(x, layer).double(), expected, atol=1e-4, rtol=0)
    assert torch.equal(turn.moved(x, 2), x)


def test_a_table_may_begin_before_position_0() -> None:
    """As of BailingMoE's video models: row i is position i - 100."""
    table = rotary(200)
    turns = (torch.arange(200).double() - 100)[:, None] * angles(1, DIM // 2)
    table.cos_sin_cache = torch.cat([turns.cos(), turns.sin()], dim=-1).float()
    table.position_start = -100
    x = torch.randn(4, DIM)
    moved = found(table).moved(x, 0).double()
    torch.testing.assert_close(moved, rotated(x.double(), 37, True), atol=1e-4, rtol=0)


def test_queries_that_are_normed_behind_the_rotation_are_refused() -> None:
    layer = Attention(rotary(64))
    layer.query_layernorm = torch.nn.Identity()
    with pytest.raises(ValueError, match="ahead"):
        rope_shift_of(layer, [layer.attn], 37, torch.device("cpu"))


def by_head() -> SimpleNamespace:
    """A table with coefficients per head."""
    return SimpleNamespace(cos_sin_cache=torch.zeros(64, 2, DIM), is_neox_style=True)


@pytest.mark.parametrize(
    "unknown", ["missing", SimpleNamespace(is_neox_style=True), rotary(37), by_head()]
)
def test_an_unknown_embedding_is_refused(unknown: object) -> None:
    with pytest.raises(ValueError, match=r"""start with --kv-compress-config '{"ahead": false}'"""):
        found(rotary(64), unknown)
