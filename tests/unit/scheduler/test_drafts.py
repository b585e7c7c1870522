"""The pools of draft models behind a pass."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from kara_sglang.kernels.backend import Mover, TorchKernels
from kara_sglang.scheduler.drafts import Drafts

SLOTS, WIDTH, KEPT = 64, 16, 4


class Counted(TorchKernels):
    """Counts for how many pools it was asked to move."""

    def __init__(self) -> None:
        super().__init__()
        self.pools = 0

    def mover(self, keys: Any, values: Any) -> Mover:
        self.pools += 1
        return super().mover(keys, values)


def pool(layers: int, heads: int) -> SimpleNamespace:
    """K and V that say whose they are: slot, layer and head in one number."""
    numbers = torch.arange(SLOTS * layers * heads, dtype=torch.int64).view(layers, SLOTS, heads, 1)
    return SimpleNamespace(k_buffer=list(numbers.clone()), v_buffer=list(numbers.clone() + 10**6))


def test_each_pool_keeps_the_slot_before_what_its_target_keeps() -> None:
    """Head by head where the shapes agree, otherwise what most heads keep; nothing where all is kept.
    What moves in a pool is made once, and again when SGLang has other buffers."""
    alike, other = pool(1, 2), pool(2, 3)
    before = [[part.clone() for part in one.k_buffer] for one in (alike, other)]
    kernels = Counted()
    drafts = Drafts([alike, other], kernels)
    assert drafts and not Drafts([], kernels)
    slots = torch.arange(WIDTH, dtype=torch.int32) + 20
    kept = torch.tensor([[[1, 4, 9, 15], [1, 4, 9, 15]]])
    whole = SimpleNamespace(slots=slots, kept=WIDTH)
    drafts.follow(whole, torch.arange(WIDTH).expand(1, 2, -1))
    assert kernels.pools == 0
    drafts.follow(SimpleNamespace(slots=slots, kept=KEPT), kept)
    expected = slots[torch.tensor([0, 3, 8, 14])].long()
    for one, old in zip((alike, other), before, strict=True):
        for now, then, values in zip(one.k_buffer, old, one.v_buffer, strict=True):
            assert torch.equal(now[20 : 20 + KEPT], then[expected])
            assert torch.equal(values[20 : 20 + KEPT], then[expected] + 10**6)
    drafts.follow(SimpleNamespace(slots=slots + 20, kept=KEPT), kept)
    assert kernels.pools == 2
    other.k_buffer, other.v_buffer = pool(2, 3).k_buffer, pool(2, 3).v_buffer
    drafts.follow(SimpleNamespace(slots=slots, kept=KEPT), kept)
    assert kernels.pools == 3
    assert torch.equal(other.k_buffer[1][20 : 20 + KEPT], before[1][1][expected])
