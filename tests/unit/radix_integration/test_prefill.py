"""Prefill behind a compressed prefix: which lengths count tokens, and which slots."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kara_sglang.radix_integration.prefill import (
    after_prepare_for_extend,
    around_prefix_kv_indices,
    before_alloc_for_extend,
    shift_positions,
)
from kara_sglang.radix_integration.prefix import PREFIX, Prefix, Sharing
from kara_sglang.radix_integration.row import Window

WINDOW = Window(12, 12, 8, 4)


def request(windows: tuple[Window, ...], prefix_len: int, row: int | None = None) -> SimpleNamespace:
    """Which has matched ``windows``; ``row``: a later chunk, whose prefix is in a row."""
    kv = SimpleNamespace(holds_kv=row is not None, req_pool_idx=row)
    found = Prefix(Sharing(b""), windows)
    return SimpleNamespace(kv=kv, prefix_len=prefix_len, retracted_stain=False, **{PREFIX: found})


def batch(*windows: tuple[Window, ...]) -> SimpleNamespace:
    """20 matched tokens and 5 to come, then 24 and 3."""
    reqs = [request(w, n) for w, n in zip(windows, (20, 24), strict=True)]
    lengths = torch.tensor([25, 27])
    table = torch.arange(100, 160).reshape(2, 30).to(torch.int32)
    told: list[int] = []
    return SimpleNamespace(
        tree_cache=SimpleNamespace(computed_again=told.append, told=told),
        reqs=reqs,
        prefix_lens=[20, 24],
        extend_lens=[5, 3],
        seq_lens=lengths,
        seq_lens_cpu=lengths.clone(),
        seq_lens_sum=52,
        req_to_token_pool=SimpleNamespace(req_to_token=table),
    )


def positions(of: SimpleNamespace) -> SimpleNamespace:
    own = torch.cat([torch.arange(16, 21), torch.arange(24, 27)])
    made = SimpleNamespace(positions=own, mrope_positions=own.expand(3, -1))
    shift_positions(made, of)
    assert own[0] == 16, "a worker's own tensor stays as it is"
    return made


def test_a_batch_counts_slots_from_allocation_on_and_positions_count_tokens() -> None:
    one = batch((WINDOW,), ())
    lengths = one.seq_lens
    before_alloc_for_extend(one)
    assert one.prefix_lens == [16, 24] and one.extend_lens == [5, 3]
    assert one.seq_lens.tolist() == one.seq_lens_cpu.tolist() == [21, 27]
    assert lengths.tolist() == [25, 27], "rebound, not written in place"
    after_prepare_for_extend(None, one)
    assert one.seq_lens_sum is None
    made = positions(one)
    assert made.positions.tolist() == [20, 21, 22, 23, 24, 24, 25, 26]
    assert made.mrope_positions.tolist() == [made.positions.tolist()] * 3


def test_a_batch_without_compressed_prefixes_is_sglangs() -> None:
    one = batch((), ())
    before = dict(vars(one))
    before_alloc_for_extend(one)
    after_prepare_for_extend(None, one)
    assert vars(one) == before or all(vars(one)[name] is value for name, value in before.items())
    assert positions(one).positions.tolist() == [16, 17, 18, 19, 20, 24, 25, 26]


def test_a_later_chunks_prefix_is_read_off_its_row() -> None:
    one = batch((WINDOW,), ())

    def indices(req: Any) -> list[int]:
        return around_prefix_kv_indices(lambda *_: torch.tensor([-1]), one, req).tolist()

    assert indices(request((WINDOW,), 20, row=1)) == list(range(130, 146))
    assert indices(request((WINDOW,), 20)) == [-1], "a first chunk's comes from the tree"
    assert indices(request((), 20, row=1)) == [-1]


@pytest.mark.parametrize("changes", [{}, {"retracted_stain": True}, {"row": 0}])
def test_reuse_is_counted_with_the_first_chunk(changes: dict[str, Any]) -> None:
    one = batch((WINDOW,), ())
    req = one.reqs[0]
    if "row" in changes:
        req.kv.holds_kv = True
    req.retracted_stain = changes.get("retracted_stain", False)
    before_alloc_for_extend(one)
    found = getattr(req, PREFIX)
    assert (found.reused_tokens, found.reused_slots) == ((0, 0) if changes else (8, 4))


def test_with_exact_prefixes_the_cache_counts_nothing() -> None:
    """It is SGLang's own. The request was retracted with a copy of its row, which is gone by now."""
    one = batch((), ())
    one.tree_cache = object()
    for req in one.reqs:
        setattr(req, PREFIX, Prefix(None))
    before_alloc_for_extend(one)
    assert one.prefix_lens == [20, 24]
    assert [getattr(req, PREFIX).computed_again for req in one.reqs] == [0, 0]


@pytest.mark.parametrize("compressed", [False, True])
def test_what_was_passed_over_is_computed_again_with_the_first_chunk(compressed: bool) -> None:
    """And once more after a retraction, of which the request's own report says nothing."""
    one = batch((), (WINDOW,) if compressed else ())
    first, later = one.reqs
    getattr(first, PREFIX).passed_over, getattr(later, PREFIX).passed_over = 30, 7
    later.kv.holds_kv = True
    for retracted in (False, True):
        first.retracted_stain = retracted
        before_alloc_for_extend(one)
        getattr(first, PREFIX).passed_over = 40
    assert one.tree_cache.told == [30, 40]
    assert [getattr(req, PREFIX).computed_again for req in one.reqs] == [30, 0]
