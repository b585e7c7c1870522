"""Moving kept tokens to a window's first slots, against copying row by row."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kara_sglang.kernels.compact import compact, kept_alike

DTYPES = (
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16),
    *(torch.uint8, torch.int8, torch.float8_e4m3fn, torch.float8_e5m2),
)


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of ``tensor``: NaN and -0.0 must travel unchanged."""
    return tensor.contiguous().view(torch.uint8)


def random_bytes(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    *outer, last = shape
    size = (*outer, last * dtype.itemsize)
    numbers = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)
    return numbers.view(dtype)


def naive(buffer: torch.Tensor, slots: list[int], kept: list[list[int]]) -> torch.Tensor:
    """Each kept row of each head goes to its place in a fresh copy."""
    result = raw(buffer).clone()
    source = raw(buffer)
    for head, positions in enumerate(kept):
        for place, position in enumerate(positions):
            result[slots[place], head] = source[slots[position], head]
    return result


@settings(max_examples=250)
@given(st.data())
def test_compact_equals_naive_copying(data: st.DataObject) -> None:
    """Any dtype, slots in any order, another choice per head; everything else keeps its bytes."""
    heads, dim = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5))
    width = data.draw(st.integers(1, 12))
    num_slots = width + data.draw(st.integers(0, 6))
    num_kept = data.draw(st.integers(1, width))
    dtype = data.draw(st.sampled_from(DTYPES))
    slots = data.draw(st.permutations(range(num_slots)))[:width]
    kept = [sorted(data.draw(st.permutations(range(width)))[:num_kept]) for _ in range(heads)]
    buffer = random_bytes((num_slots, heads, dim), dtype, data.draw(st.integers(0, 2**31)))
    expected = naive(buffer, slots, kept)
    index = torch.tensor(slots, dtype=data.draw(st.sampled_from([torch.int32, torch.int64])))
    compact(buffer, index, torch.tensor(kept))
    assert torch.equal(raw(buffer), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_keeping_all_changes_nothing(dtype: torch.dtype) -> None:
    """R = W is the identity, to the last bit."""
    buffer = random_bytes((40, 3, 8), dtype, 0)
    before = raw(buffer).clone()
    slots = torch.randperm(40, generator=torch.Generator().manual_seed(1))[:32]
    compact(buffer, slots, torch.arange(32).expand(3, 32))
    assert torch.equal(raw(buffer), before)


def test_only_the_first_slots_are_written() -> None:
    """The freed slots may have a new owner before the bytes of the window are looked at again."""
    buffer = random_bytes((64, 2, 4), torch.bfloat16, 2)
    before = raw(buffer).clone()
    slots = torch.randperm(64, generator=torch.Generator().manual_seed(3))[:16]
    kept = torch.stack([torch.arange(8, 16), torch.arange(0, 16, 2)])
    compact(buffer, slots, kept)
    changed = (raw(buffer) != before).any(dim=-1).any(dim=-1).nonzero().flatten().tolist()
    assert set(changed) <= set(slots[:8].tolist())


def test_a_view_of_a_larger_pool() -> None:
    """SGLang's K and V are halves of one allocation: the other half stays as it is."""
    storage = random_bytes((2, 20, 2, 4), torch.float32, 4)
    before = storage.clone()
    slots = torch.tensor([5, 3, 9, 2])
    compact(storage[1], slots, torch.tensor([[1, 3], [0, 2]]))
    assert torch.equal(storage[0], before[0])
    assert torch.equal(storage[1][[5, 3], 0], before[1][[3, 2], 0])
    assert torch.equal(storage[1][[5, 3], 1], before[1][[5, 9], 1])


@pytest.mark.parametrize("layers,heads", [(3, 2), (1, 2), (1, 4), (2, 2), (6, 1)])
def test_a_draft_model_keeps_what_its_target_keeps(layers: int, heads: int) -> None:
    """One slot before, where it has the target's token. Head by head where it has the target's shape;
    otherwise what most heads of the layer at the same depth keep, the last one's for a single layer.
    Ties go to the earlier token."""
    kept = torch.tensor(
        [
            [[0, 1, 7], [2, 3, 7]],  # 7 twice, then the earliest of the rest: 0, 1
            [[1, 4, 5], [4, 5, 6]],  # 4 and 5 twice, then 1
            [[0, 3, 6], [2, 3, 6]],  # 3 and 6 twice, then 0
        ]
    )
    agreed = [[0, 1, 7], [1, 4, 5], [0, 3, 6]]
    of_layer = {3: [0, 1, 2], 1: [2], 2: [1, 2], 6: [0, 0, 1, 1, 2, 2]}[layers]
    alike = kept_alike(kept, layers, heads, width=8).tolist()
    for layer, target in enumerate(of_layer):
        same = (layers, heads) == (3, 2)
        targets = kept[target].tolist() if same else [agreed[target]] * heads
        # Of 8 slots; the last one has the token behind the window.
        assert alike[layer] == [sorted(token - 1 if token else 7 for token in head) for head in targets]
