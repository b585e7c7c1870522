"""How queries are moved ahead, off the tables of SGLang's own models."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import pytest
import torch
from rope import angles, rotated

from kara_sglang.kernels.rope_shift import RopeShift
from kara_sglang.scheduler.rotary import TURNED, rope_shift_of

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


class Gemma3Attention(Attention):
    """Has a table as well, which knows no scaling."""


class Gemma3TextModel(torch.nn.Module):
    """As SGLang's: all layers with full attention turn by its embedding."""

    def __init__(self, rope: dict[str, object]) -> None:
        super().__init__()
        from sglang.srt.models.gemma3_causal import Gemma3RotaryEmbedding
        from transformers import Gemma3TextConfig

        config = Gemma3TextConfig(head_dim=DIM, num_hidden_layers=2)
        config.rope_parameters = {"rope_theta": 1e6, **rope}
        self.rotary_emb = Gemma3RotaryEmbedding(config)
        config.rope_parameters = {"rope_type": "default", "rope_theta": 1e4}
        self.rotary_emb_local = Gemma3RotaryEmbedding(config)
        self.layers = torch.nn.ModuleList(Gemma3Attention(rotary(64)) for _ in range(2))

    def shift(self) -> RopeShift:
        layers = [layer.attn for layer in self.layers]
        return rope_shift_of(self, layers, 37, torch.device("cpu"), windowed=True)


@pytest.mark.parametrize(
    "rope", [{"rope_type": "default"}, {"rope_type": "linear", "factor": 8.0}], ids=str
)
def test_full_layers_of_gemma_3_turn_by_the_models_embedding(rope: dict[str, object]) -> None:
    """By SGLang's own rotation: a query moved ahead is the query of a later position."""
    from sglang.srt.layers.rotary_embedding.utils import apply_rotary_pos_emb_native_eager

    model, x = Gemma3TextModel(rope), torch.randn(1, 4, DIM)
    here, ahead = (
        apply_rotary_pos_emb_native_eager(
            x, x, *(part[0] for part in model.rotary_emb(x, torch.tensor([[position]])))
        )[0]
        for position in (100, 137)
    )
    shift = model.shift()
    for layer in range(2):
        torch.testing.assert_close(shift.moved(here, layer), ahead, atol=1e-4, rtol=0)


def test_beside_layers_with_a_window_only_known_models_are_turned() -> None:
    """Others have a table in layers that do not turn. The way out costs them nothing."""
    layer = Attention(rotary(64))
    with pytest.raises(ValueError, match="ahead"):
        rope_shift_of(layer, [layer.attn], 37, torch.device("cpu"), windowed=True)
    with pytest.raises(ValueError, match="ahead"):
        Gemma3TextModel({"rope_type": "dynamic", "factor": 2.0}).shift()
    modules = ("gemma2", "gemma3_causal", "gpt_oss", "olmo2")
    for name, module in zip(TURNED, modules, strict=True):
        assert hasattr(importlib.import_module(f"sglang.srt.models.{module}"), name)


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
