"""The CUDA implementation of :class:`kara_sglang.kernels.backend.Kernels`."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeGuard, TypeVar

import torch

from kara_sglang.kernels.backend import LayerPool, Mover, WindowJob, WindowShape, reference_scores
from kara_sglang.kernels.record import Ring, Step, most_blocks
from kara_sglang.kernels.score import WeightRule
from kara_sglang.kernels.selectors.base import AttentionSelector, BlindSelector, Selector
from kara_sglang.kernels.selectors.keys import KeysSelector
from kara_sglang.kernels.transfer import fill, to_device
from kara_sglang.kernels.triton.compact import compact
from kara_sglang.kernels.triton.launch import Launch
from kara_sglang.kernels.triton.pool import PoolTables
from kara_sglang.kernels.triton.prepare import weight_scores
from kara_sglang.kernels.triton.record import LAYERS_AT_ONCE, record
from kara_sglang.kernels.triton.score import Scratch, Voters, attention_scores, recorders_of
from kara_sglang.kernels.triton.select import select

SCRATCH_BYTES = 64 << 20
"""Memory of a pass beside the pool, unless a window takes more. A window of 512 tokens in all layers of
Qwen3-8B takes 44 MB, so it is five launches."""
_ALIGNMENT = 16  # bytes; also what Triton specialises pointers by, so that all passes look alike to it
_PLANS = 512  # that are remembered; a request may name any R, and each R has its own


class Settings(NamedTuple):
    """Windows with equal settings form a group."""

    selector: Selector
    width: int
    kept: int
    voices: int
    query_count: int

    @classmethod
    def of(cls, job: WindowJob) -> Settings:
        voices = 0 if job.pages is None else len(job.pages)
        return cls(job.selector, len(job.slots), job.kept, voices, job.query_count)


@dataclass(frozen=True, slots=True)
class Plan:
    """Whatever is the same in all passes over so many windows with equal settings.

    Attributes
    ----------
    slots, recorders
        To be filled before the launches: the windows' slots, shape ``(num_jobs, W)``, int32, and
        :attr:`Voters.recorders`.
    scores, kept
        Of all layers, ``(num_layers, num_jobs, num_kv_heads, W)``, float32, and ``(.., R)``, int32.
    score
        Launches that fill ``scores``; none where they come from elsewhere.
    move
        Launches that fill ``kept`` from ``scores`` and move the kept tokens.
    """

    slots: torch.Tensor
    recorders: torch.Tensor
    scores: torch.Tensor
    kept: torch.Tensor
    score: list[Launch]
    move: list[Launch]


class TritonKernels:
    """Windows with equal settings form a group, as many as fit the scratch. A group is a copy of slots,
    an upload of where its queries lie, three launches that score as many layers at once as fit, one
    that selects, and one or two that move.

    Whatever a group needs lies in the scratch, always in the same places: views and launches are made
    once (:class:`Plan`), and a pass only fills in slots and recorders. Nothing synchronises and nothing
    is copied from the device. All calls of an instance must be made on the same stream.
    """

    name = "triton"
    compiles = True
    layers_at_once = LAYERS_AT_ONCE

    def __init__(self) -> None:
        self._tables: PoolTables | None = None
        self._scratch: torch.Tensor | None = None
        self._plan = functools.lru_cache(_PLANS)(self._new_plan)

    def reserve(self, device: torch.device, largest: WindowShape) -> int:
        size = max(SCRATCH_BYTES, _bytes(_outer(largest, 1)) + _bytes(_inner(largest, 1, 1)))
        self._scratch = torch.empty(size, dtype=torch.uint8, device=device)
        self._plan.cache_clear()
        return size

    def record(self, ring: Ring, step: Step, queries: Sequence[torch.Tensor]) -> None:
        record(ring, step, queries)

    def compress(
        self, pool: LayerPool, jobs: list[WindowJob], *, positions: bool = False
    ) -> list[torch.Tensor] | None:
        if self._tables is None or self._tables.pool is not pool:
            self._tables = PoolTables.of(pool)
            self._plan.cache_clear()
        groups: dict[Settings, list[int]] = {}
        for index, job in enumerate(jobs):
            groups.setdefault(Settings.of(job), []).append(index)
        found: dict[int, torch.Tensor] = {}
        for settings, members in groups.items():
            at_once = self._at_once(self._shape(settings))
            for first in range(0, len(members), at_once):
                part = members[first : first + at_once]
                plan = self._plan(settings, len(part))
                self._run(plan, settings, [jobs[index] for index in part])
                if positions:  # the next group overwrites them
                    found |= zip(part, plan.kept.long().unbind(1), strict=True)
        return [found[index] for index in range(len(jobs))] if positions else None

    def mover(self, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> Mover:
        tables = PoolTables.of(LayerPool(list(keys), list(values), [], [1.0] * len(keys)))

        def move(slots: torch.Tensor, kept: torch.Tensor) -> None:
            for launch in compact(tables, slots[None], kept[:, None].int().contiguous()):
                launch()

        return move

    def _run(self, plan: Plan, settings: Settings, jobs: list[WindowJob]) -> None:
        """Compress windows with equal settings, so many as the plan is for."""
        tables, selector = self._tables, settings.selector
        assert tables is not None
        torch.cat([job.slots for job in jobs], out=plan.slots.view(-1))
        if settings.voices:
            fill(plan.recorders, recorders_of(jobs))
        if plan.score:
            for launch in plan.score:
                launch()
        elif _scores_as(selector, BlindSelector):
            _draw(selector, jobs, plan.scores)
        else:  # arithmetic of its own, for one window of one layer at a time
            for layer, of_layer in enumerate(plan.scores):
                for job, scores in zip(jobs, of_layer, strict=True):
                    scores.copy_(reference_scores(tables.pool, job, layer))
        for launch in plan.move:
            launch()

    def _shape(self, settings: Settings) -> WindowShape:
        tables = self._tables
        assert tables is not None
        return WindowShape(
            num_layers=tables.num_layers,
            num_kv_heads=tables.num_kv_heads,
            head_dim=tables.head_dim,
            dtype=tables.dot,
            width=settings.width,
            kept=settings.kept,
            voices=settings.voices,
            query_count=settings.query_count,
        )

    def _at_once(self, shape: WindowShape) -> int:
        """How many windows to take at once, at least one: three quarters of the scratch are for what
        lies between the score's launches, a quarter for the rest."""
        if self._scratch is None:
            raise RuntimeError("kv-compress: a pass without scratch memory; call reserve() first")
        quarter = self._scratch.numel() // 4
        # Padding only becomes less in larger groups, so these bounds are safe.
        fitting = quarter // _bytes(_outer(shape, 1))
        if shape.voices:
            fitting = min(fitting, 3 * quarter // _bytes(_inner(shape, 1, 1)))
        return max(1, fitting)

    def _layers_at_once(self, shape: WindowShape, num_jobs: int) -> int:
        """How many layers to score at once, in parts of about equal size."""
        assert self._scratch is not None
        left = self._scratch.numel() - _bytes(_outer(shape, num_jobs))
        of_one = _bytes(_inner(shape, num_jobs, 1))
        if of_one > left:
            raise RuntimeError(
                f"kv-compress: {num_jobs} x {shape} takes {self._scratch.numel() - left + of_one} "
                f"bytes of scratch, {self._scratch.numel()} were reserved"
            )
        fitting = left // of_one if of_one else shape.num_layers
        return math.ceil(shape.num_layers / math.ceil(shape.num_layers / fitting))

    def _new_plan(self, settings: Settings, num_jobs: int) -> Plan:
        """Views of the scratch, and launches."""
        tables, scratch, selector = self._tables, self._scratch, settings.selector
        assert tables is not None and scratch is not None
        shape = self._shape(settings)
        layers_at_once = self._layers_at_once(shape, num_jobs)
        slots, recorders, scores, kept = _carve(scratch, _outer(shape, num_jobs))
        between = scratch[_bytes(_outer(shape, num_jobs)) :]
        score: list[Launch] = []
        rule = WeightRule()
        if _scores_as(selector, KeysSelector):
            rule = selector.rule
            score.append(weight_scores(tables, range(shape.num_layers), slots, rule=rule, out=scores))
        elif _scores_as(selector, AttentionSelector):
            if not shape.voices:
                raise ValueError(f"{type(selector).__name__} needs recorded queries")
            rule = selector.rule
            voting = rule.voters(shape.query_count, shape.width)
            for first in range(0, shape.num_layers, layers_at_once):
                layers = range(first, min(first + layers_at_once, shape.num_layers))
                score += attention_scores(
                    tables,
                    layers,
                    slots,
                    Voters(recorders, shape.voices, voting.start, len(voting)),
                    rule=rule,
                    scratch=Scratch(*_carve(between, _inner(shape, num_jobs, len(layers)))),
                    out=scores[first : layers.stop],
                )
        chosen = select(
            scores, shape.kept, selector.chunks, kept, neighbours=rule.neighbours, shared=rule.per_layer
        )
        return Plan(slots, recorders, scores, kept, score, [chosen, *compact(tables, slots, kept)])


_Kind = TypeVar("_Kind", bound=Selector)


def _scores_as(selector: Selector, kind: type[_Kind]) -> TypeGuard[_Kind]:
    """Whether the kernels for selectors of a kind give this one's scores: not where it has its own."""
    return isinstance(selector, kind) and type(selector).score is kind.score


def _draw(selector: BlindSelector, jobs: list[WindowJob], scores: torch.Tensor) -> None:
    """Fill ``scores``, ``(num_layers, num_jobs, num_kv_heads, W)``, by one copy from the host."""
    num_layers, _, heads, width = scores.shape
    if selector.seeded:
        layers = range(num_layers)
        drawn = [[selector.draw(heads, width, job.seed + layer) for job in jobs] for layer in layers]
        fill(scores, torch.stack([torch.stack(of_layer) for of_layer in drawn]))
    else:
        scores.copy_(to_device(selector.draw(heads, width, 0), scores.device).expand_as(scores))


_Regions = tuple[tuple[tuple[int, ...], torch.dtype], ...]


def _outer(shape: WindowShape, num_jobs: int) -> _Regions:
    """Shapes and dtypes of what a group has once: slots, recorders, scores, and positions."""
    heads = shape.num_layers, num_jobs, shape.num_kv_heads
    return (
        ((num_jobs, shape.width), torch.int32),
        ((num_jobs, 1 + shape.voices * most_blocks(shape.query_count)), torch.int32),
        ((*heads, shape.width), torch.float32),
        ((*heads, shape.kept), torch.int32),
    )


def _inner(shape: WindowShape, num_jobs: int, num_layers: int) -> _Regions:
    """Shapes and dtypes of what lies between the score's launches, for some layers."""
    if not shape.voices:
        return ()
    heads = num_layers, num_jobs, shape.num_kv_heads
    dot = torch.float32 if shape.dtype == torch.float32 else torch.float16
    rows = shape.voices * shape.query_count
    return Scratch.regions(heads, shape.width, shape.head_dim, rows, dot)


def _padded(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return -(-math.prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT


def _bytes(regions: _Regions) -> int:
    return sum(_padded(*region) for region in regions)


def _carve(memory: torch.Tensor, regions: _Regions) -> Iterable[torch.Tensor]:
    """Tensors one behind the other in some bytes of memory."""
    start = 0
    for dimensions, dtype in regions:
        size = math.prod(dimensions) * dtype.itemsize
        yield memory[start : start + size].view(dtype).view(dimensions)
        start += _padded(dimensions, dtype)
