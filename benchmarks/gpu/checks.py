"""Every kernel against the torch reference, on the device of a case."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from kara_sglang.benchmarks.gpu.case import BATCH, CHUNKS, KEYS, RULE, Case, require
from kara_sglang.benchmarks.gpu.timing import captured
from kara_sglang.kernels import record as reference_record
from kara_sglang.kernels.backend import LayerPool, TorchKernels
from kara_sglang.kernels.compact import compact as reference_compact
from kara_sglang.kernels.score import AttentionRule, blend_neighbours
from kara_sglang.kernels.score import attention_scores as reference_scores
from kara_sglang.kernels.score import weight_scores as reference_weights
from kara_sglang.kernels.select import select as reference_select


def check(case: Case) -> dict[str, Any]:
    """Every kernel against the reference; raises where they differ.

    Returns
    -------
    dict
        ``score_error``: largest relative difference of a score; ``turned_score_error``: the same with
        queries that are moved ahead, for which keys are rounded to float16. ``weight_error``: the same
        without queries. ``same_choice``: share of positions that a whole pass and the reference's agree
        on; near ties may fall either way.
    """
    pool, settings = case.pool, case.settings
    expected = case.expected_rings()
    case.record()
    case.require_recorded(expected, "record")

    weight_error = error_of_weights(case)
    require(weight_error < 1e-3, f"weights: relative error {weight_error}")
    error = score_error(case, dataclasses.replace(RULE, ahead=False))
    require(error < 1e-3, f"score: relative error {error}")
    turned_error = score_error(case, RULE)
    require(turned_error < 5e-3, f"score with turned keys: relative error {turned_error}")

    # Before anything has moved: a compacted window holds tokens twice, and equal scores are a toss-up.
    widened = copied(pool, torch.float32)
    theirs = torch.stack(TorchKernels().compress(widened, case.jobs(), positions=True) or [])
    ours = torch.stack(case.kernels().compress(copied(pool), case.jobs(), positions=True) or [])
    same = (ours[..., None] == theirs[..., None, :]).any(-1).float().mean().item()
    require(same > 0.99, f"a pass: {same:.4f} of the positions agree")

    case.kept.fill_(-1)
    raw = case.scores.flatten(0, 1).clone()
    case.select()  # which leaves the blended scores
    blended = torch.stack([blend_neighbours(of_heads, RULE.neighbours) for of_heads in raw])
    blend_error = relative(case.scores, blended.view_as(case.scores))
    require(blend_error < 1e-4, f"blended scores: relative error {blend_error}")
    chosen = reference_select(case.scores, settings.kept, CHUNKS)
    require(torch.equal(case.kept.long(), chosen), "select")

    copies = [buffer.clone() for buffer in (*pool.keys, *pool.values)]
    case.compact()
    for index, (ours, theirs) in enumerate(zip((*pool.keys, *pool.values), copies, strict=True)):
        for job in range(case.num_jobs):
            kept = case.kept[index % case.model.layers, job].long()
            # As bytes, because torch indexes no 8-bit floats on every device.
            reference_compact(theirs.view(torch.uint8), case.slots[job], kept)
        require(torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8)), "compact")

    check_replay(case)
    return {
        "weight_error": weight_error,
        "score_error": error,
        "turned_score_error": turned_error,
        "same_choice": same,
    }


def error_of_weights(case: Case) -> float:
    """Largest relative difference of a score without queries, before neighbours are blended."""
    case.scores.fill_(float("nan"))
    case.weights()
    expected = torch.empty_like(case.scores)
    rule = dataclasses.replace(KEYS.rule, neighbours=1)
    for layer, (keys, values) in enumerate(zip(case.pool.keys, case.pool.values, strict=True)):
        for job, slots in enumerate(case.slots.long()):
            expected[layer, job] = reference_weights(keys.float()[slots], values.float()[slots], rule)
    return relative(case.scores, expected)


def score_error(case: Case, rule: AttentionRule) -> float:
    """Largest relative difference of a score by ``rule``, before neighbours are blended;
    ``case.scores`` then holds the scores."""
    case.scores.fill_(float("nan"))
    case.score(rule)
    return relative(case.scores, expected_scores(case, rule))


def expected_scores(case: Case, rule: AttentionRule) -> torch.Tensor:
    """The float32 reference of ``case.scores`` by ``rule``, before neighbours are blended."""
    expected = torch.empty_like(case.scores)
    pool = case.pool
    for layer, ring in enumerate(pool.rings):
        for job, slots in enumerate(case.slots.long()):
            start, count = case.starts[job], case.voters.count
            pages = case.recorder.pages_of(case.owners[job], start, count)
            queries = reference_record.recorded(ring, start, count, pages)
            if rule.ahead:
                assert pool.rope_shift is not None
                queries = pool.rope_shift.moved(queries, layer)
            expected[layer, job] = reference_scores(
                queries,
                pool.keys[layer].float()[slots],
                pool.values[layer].float()[slots],
                scale=pool.scales[layer],
                rule=dataclasses.replace(rule, neighbours=1),
            )
    return expected


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest relative difference; NaN where there is one."""
    return ((ours - theirs).abs() / theirs).max().item()


def stress_compact(case: Case, moves: int) -> None:
    """``moves`` compactions of windows in which loads and stores overlap most, each compared with the
    reference byte by byte. What is kept is the window's tokens 1 to R, so that all rows between are the
    source of one and the target of the next, also where blocks meet.

    Raises
    ------
    AssertionError
        Where one byte differs.
    """
    buffers = (*case.pool.keys, *case.pool.values)
    layers, kept = case.model.layers, case.settings.kept
    case.kept.copy_(torch.arange(1, kept + 1, device=case.slots.device))
    for move in range(moves):
        expected = [buffer.clone() for buffer in buffers]
        case.compact()
        for index, (ours, theirs) in enumerate(zip(buffers, expected, strict=True)):
            for job in range(case.num_jobs):
                reference_compact(theirs, case.slots[job], case.kept[index % layers, job].long())
            require(torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8)), f"move {move}")
        case.mix()


def check_replay(case: Case) -> None:
    """A captured recording step follows its inputs when they are refreshed by copy, as SGLang's do, and
    its queries lie in memory of the graph."""
    replay = captured(case.record_in_a_model)
    case.queries.copy_(torch.randn_like(case.queries) * 1000)
    order = torch.randperm(BATCH, device=case.slots.device)
    case.rows.copy_(case.rows[order])
    case.positions.copy_(case.positions[order])
    expected = case.expected_rings()
    replay()
    case.require_recorded(expected, "record in a replayed graph")


def copied(pool: LayerPool, dtype: torch.dtype | None = None) -> LayerPool:
    """A pool of its own with the same ring, K and V as ``dtype``."""
    keys, values = (
        [buffer.to(dtype or buffer.dtype, copy=True) for buffer in side]
        for side in (pool.keys, pool.values)
    )
    return dataclasses.replace(pool, keys=keys, values=values)
