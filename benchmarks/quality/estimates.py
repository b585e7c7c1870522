"""Figures with their standard errors. One text is one observation: its tokens are not independent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from kara_sglang.benchmarks.quality.script import Cell, Script

RESAMPLES = 10_000
"""Of the bootstrap."""


class Estimate(NamedTuple):
    """A mean and its standard error (nan for a single observation)."""

    value: float
    error: float


def known(error: float) -> float | None:
    """A standard error for JSON, which has no nan: None where there was one observation only."""
    return None if math.isnan(error) else error


def mean(values: Sequence[float]) -> Estimate:
    """Mean over texts, with the standard error of the mean."""
    if not values:
        raise ValueError("no observations")
    n = len(values)
    centre = math.fsum(values) / n
    if n == 1:
        return Estimate(centre, math.nan)
    variance = math.fsum((value - centre) ** 2 for value in values) / (n - 1)
    return Estimate(centre, math.sqrt(variance / n))


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Estimate:
    """Ratio of the means of paired values, with the jackknife's standard error."""
    n = len(numerators)
    if n != len(denominators) or not n:
        raise ValueError("a ratio needs pairs")
    top, bottom = math.fsum(numerators), math.fsum(denominators)
    if n == 1:
        return Estimate(top / bottom, math.nan)
    left_out = [(top - a) / (bottom - b) for a, b in zip(numerators, denominators, strict=True)]
    centre = math.fsum(left_out) / n
    spread = math.fsum((value - centre) ** 2 for value in left_out)
    return Estimate(top / bottom, math.sqrt(spread * (n - 1) / n))


def share_interval(successes: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval of a share; 95 % by default."""
    if trials <= 0:
        raise ValueError("no trials")
    p = successes / trials
    middle = p + z * z / (2 * trials)
    half = z * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    # Exactly 0 and 1 are reached in exact arithmetic only.
    low = 0.0 if successes == 0 else (middle - half) / scale
    high = 1.0 if successes == trials else (middle + half) / scale
    return low, high


def resampled(observations: int) -> np.ndarray:
    """Indices of the bootstrap's samples, ``(RESAMPLES, observations)``, the same in every run."""
    return np.random.default_rng(0).integers(
        observations, size=(RESAMPLES, observations), dtype=np.int32
    )


def interval(values: np.ndarray) -> list[float]:
    """The middle 95 % of a bootstrap's values."""
    return [float(value) for value in np.percentile(values, (2.5, 97.5))]


def ranks(values: dict[str, float]) -> dict[str, float]:
    """Rank of each name, 1 for the smallest value; ties share the mean of their ranks."""
    ordered = sorted(values.values())
    first = {value: ordered.index(value) + 1 for value in ordered}
    return {name: first[value] + (ordered.count(value) - 1) / 2 for name, value in values.items()}


@dataclass(frozen=True, slots=True)
class Observation:
    """What one cell says about its text.

    Attributes
    ----------
    kl, nll
        Of running text, mean over its steps, in nats; None without such a probe (kl: without compared
        steps, as in the reference).
    recall, recall_logprob
        Share of the facts whose whole answer was the most likely one at each step, and the mean
        log-probability of an answer's tokens; None without facts.
    by_back
        The same share by the fact's distance in windows.
    by_offset
        The same share by where in its window a fact stands, of facts before the newest window.
    by_kind
        Per kind of fact whether each was right, 1 or 0.
    by_place
        The same per place, ``windows before the newest/offset in the window``.
    slots
        Mean KV slots held at the measured steps.
    """

    kl: float | None
    nll: float | None
    recall: float | None
    recall_logprob: float | None
    by_back: dict[int, float]
    by_offset: dict[float, float]
    by_kind: dict[str, list[float]]
    by_place: dict[str, list[float]]
    slots: float


def observe(script: Script, cell: Cell) -> Observation:
    """Reduce a cell to what its text says."""
    place = {step: i for i, step in enumerate(script.measured())}
    nll, exact, logprobs = None, [], []
    by_back: dict[int, list[float]] = {}
    by_offset: dict[float, list[float]] = {}
    by_kind: dict[str, list[float]] = {}
    by_place: dict[str, list[float]] = {}
    for probe in script.probes:
        where = [place[step] for step in range(probe.start, probe.stop)]
        average = math.fsum(cell.logprob[i] for i in where) / len(where)
        if probe.back is None:
            nll = -average
            continue
        right = float(all(cell.top[i] for i in where))
        exact.append(right)
        logprobs.append(average)
        by_back.setdefault(probe.back, []).append(right)
        by_kind.setdefault(probe.kind, []).append(right)
        if probe.offset is not None:
            by_place.setdefault(f"{probe.back}/{probe.offset:g}", []).append(right)
        if probe.back and probe.offset is not None:
            by_offset.setdefault(probe.offset, []).append(right)
    return Observation(
        kl=math.fsum(cell.kl) / len(cell.kl) if cell.kl else None,
        nll=nll,
        recall=math.fsum(exact) / len(exact) if exact else None,
        recall_logprob=math.fsum(logprobs) / len(logprobs) if exact else None,
        by_back=_means(by_back),
        by_offset=_means(by_offset),
        by_kind=by_kind,
        by_place=by_place,
        slots=math.fsum(cell.slots) / len(cell.slots),
    )


def _means(groups: dict[Any, list[float]]) -> dict[Any, float]:
    return {name: math.fsum(values) / len(values) for name, values in groups.items()}


def points(found: Sequence[float] | None) -> str:
    """A share and its 95 % interval, in points of a hundred; "" where there is none."""
    if found is None:
        return ""
    value, low, high = (100 * part for part in found)
    return f"{value:+.1f} ({low:+.1f} to {high:+.1f})"
