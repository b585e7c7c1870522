"""Lengths on the device: what rows lack, and what a step in flight has published."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kara_sglang.scheduler.lengths import Lengths
from kara_sglang.scheduler.pace import PLAIN, Pace
from kara_sglang.scheduler.runtime import around_verify_coins, runtime


def lengths(pace: Pace = PLAIN) -> Lengths:
    rows = SimpleNamespace(req_to_token=torch.zeros(6, 32, dtype=torch.int32))
    scheduler = SimpleNamespace(req_to_token_pool=rows, enable_overlap=False, last_batch=None)
    return Lengths(scheduler, pace)


def batch(rows: list[int], slots: list[int]) -> SimpleNamespace:
    reqs = [SimpleNamespace(kv=SimpleNamespace(req_pool_idx=row)) for row in rows]
    return SimpleNamespace(
        reqs=reqs, seq_lens=torch.tensor(slots), seq_lens_cpu=torch.tensor(slots), seq_lens_sum=7
    )


def test_positions_of_every_draft_follow_the_logical_length() -> None:
    """Rebound, so that a worker's own tensor stays as it is; images' positions as well."""
    known = lengths()
    known.lacks([(2, 32), (4, 0)])
    own = torch.tensor([10, 11, 11, 50, 51, 52])
    step = SimpleNamespace(
        positions=own, req_pool_indices=torch.tensor([2, 4]), mrope_positions=own.expand(3, -1)
    )
    known.shift_positions(step)
    assert step.positions.tolist() == [42, 43, 43, 50, 51, 52]
    assert step.mrope_positions.tolist() == [step.positions.tolist()] * 3
    assert own.tolist() == [10, 11, 11, 50, 51, 52]
    assert known.logical_of_step(torch.tensor([10, 50])).tolist() == [42, 50]


def test_seeded_coins_are_drawn_by_the_logical_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang's own function is given the lengths in tokens of the step whose positions were shifted, so
    that no pass makes a request draw the same coin twice."""
    from sglang.srt.speculative import eagle_utils

    known = lengths()
    compaction = SimpleNamespace(lengths=known)
    monkeypatch.setattr(runtime, "coordinator", SimpleNamespace(compaction=compaction))
    seen: list[list[int]] = []
    coins = torch.zeros(2, 3), torch.zeros(2)

    def seeded(*, seq_lens: torch.Tensor, **_others: Any) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(seq_lens.tolist())
        return coins

    monkeypatch.setattr(eagle_utils, "_seeded_verify_coins", seeded)

    def draw() -> Any:
        step = SimpleNamespace(
            positions=torch.tensor([10, 11, 12, 50, 51, 52]),
            req_pool_indices=torch.tensor([2, 4]),
            mrope_positions=None,
        )
        known.shift_positions(step)
        return around_verify_coins(
            eagle_utils._verify_coins,
            sampling_info=SimpleNamespace(sampling_seed=torch.tensor([7, 7])),
            seq_lens=torch.tensor([10, 50]),
            draft_token_num=3,
            candidates=torch.zeros(2, 3),
            device="cpu",
        )

    assert draw() is coins
    known.lacks([(2, 32), (4, 0)])
    draw()
    monkeypatch.setattr(runtime, "coordinator", None)
    draw()
    assert seen == [[10, 50], [42, 50], [10, 50]]


def test_a_freed_row_lacks_nothing() -> None:
    """Whoever gets it next may be somebody whom nobody has looked at, such as a beam's member."""
    known = lengths()
    known.lacks([(2, 32), (3, 16)])
    known.row_freed(2)
    assert known.removed.tolist() == [0, 0, 0, 16, 0, 0]
    known.row_freed(3)
    assert known.removed_of(torch.tensor([2, 3])) is None


def test_published_lengths_are_corrected_once() -> None:
    """Passes since the step in flight began; two of them add up, and a row's next owner has none."""
    known = lengths(Pace(4, behind=4))
    running = batch([1, 2, 3], [100, 200, 300])
    known.shorten(running, {0: 32, 2: 64})
    known.shorten(running, {0: 32})
    known.row_freed(3)
    published = batch([3, 1, 2], [50, 103, 201])
    known.correct(published)
    assert published.seq_lens.tolist() == published.seq_lens_cpu.tolist() == [50, 39, 201]
    assert published.seq_lens_sum == 290
    known.correct(published)
    assert published.seq_lens.tolist() == [50, 39, 201]


def test_without_overlap_a_batch_keeps_its_own_lengths() -> None:
    known = lengths(Pace(4))
    running = batch([1], [100])
    known.shorten(running, {0: 32})
    known.correct(running)
    assert running.seq_lens.tolist() == running.seq_lens_cpu.tolist() == [68]
    assert running.seq_lens_sum == 68


def test_lengths_are_unknown_behind_a_step_of_drafts_only() -> None:
    """Behind a prefill the results of the decode step before it are there."""
    known, plain = lengths(Pace(4, behind=4)), lengths()
    assert known.unknown == 0
    for decodes in (True, False):
        mode = SimpleNamespace(is_decode=lambda decodes=decodes: decodes)
        known.scheduler.last_batch = plain.scheduler.last_batch = SimpleNamespace(forward_mode=mode)
        assert known.unknown == (4 if decodes else 0)
        assert plain.unknown == 0
