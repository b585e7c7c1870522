"""Rows, pages and lengths over random histories, on the simulated scheduler (``world.py``)."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from random import Random

import pytest
from stand_ins import Request, Setting, random_setting
from world import World, advance, lived

from kara_sglang.config import KaraConfig


def run_history(seed: int, real: bool, trace: Path | None = None) -> World:
    setting = random_setting(Random(seed), real)
    if trace is not None:
        config = dataclasses.replace(setting.config, trace=str(trace))
        setting = dataclasses.replace(setting, config=config)
    return lived(World, setting, seed)


@pytest.mark.parametrize("block", range(3))
def test_histories_with_kv(block: int) -> None:
    """After each pass every held slot of every layer and head has the K and V that belong there."""
    worlds = [run_history(seed, real=True) for seed in range(50 * block, 50 * block + 50)]
    assert sum(world.windows for world in worlds) > 200
    assert sum(world.retractions for world in worlds) > 20
    assert sum(world.returned for world in worlds) > 10


def test_traced_histories(tmp_path: Path) -> None:
    """Each file names the tokens whose K and V are held; retractions and aborts among the requests."""
    worlds = []
    for seed in range(1000, 1050):
        folder = tmp_path / str(seed)
        folder.mkdir()
        worlds.append(run_history(seed, real=True, trace=folder))
        assert len(list(folder.iterdir())) == worlds[-1].traces
    assert sum(world.traces for world in worlds) > 50
    assert sum(world.retractions for world in worlds) > 20


def test_punctual_histories() -> None:
    """No window waits, whatever else runs, is retracted, or is out of recorders; and no recorder that
    was granted lacks a page."""
    worlds = []
    for seed in range(2000, 2300):
        setting = random_setting(Random(seed), real=False)
        heads = "all" if setting.config.query_heads == "all" else "mean"
        config = dataclasses.replace(setting.config, policy="punctual", query_heads=heads)
        worlds.append(World(dataclasses.replace(setting, config=config), seed))
        worlds[-1].run()
    assert sum(world.windows for world in worlds) > 900
    assert sum(world.retractions for world in worlds) > 100
    assert sum(world.without_queries for world in worlds) > 100  # rings were too small
    assert sum(world.recorder.lacks for world in worlds) == 0


@pytest.mark.parametrize("policy", ["periodic", "punctual"])
def test_windows_that_fall_due_together(policy: str) -> None:
    """Spread over the next steps by default; with ``punctual`` all go at once."""
    config = KaraConfig(selector="recent", window=64, delay=2, policy=policy)
    world = World(Setting(config, num_pages=2000, max_running=6, trouble=0.0, real=False), seed=0)
    for rid in range(6):
        assert world.prefill(Request(rid, [rid, 1, 2, 3, 4], 10_000, None))
    steps = []
    for _ in range(64 + 2 + 40):
        before = world.windows
        advance(world, 1)
        world.before_decode()
        steps += [world.steps] * (world.windows - before)
    assert len(steps) == 6
    assert len(set(steps)) == 1 if policy == "punctual" else len(set(steps)) > 3


LONG = [pytest.param(block, marks=pytest.mark.slow) for block in range(5, 8)]


@pytest.mark.parametrize("block", [*range(5), *LONG])
def test_histories_of_rows_and_pages(block: int) -> None:
    """Thousands of histories of lengths, rows and pages alone."""
    worlds = [run_history(seed, real=False) for seed in range(250 * block, 250 * block + 250)]
    assert sum(world.windows for world in worlds) > 900
    assert sum(world.retractions for world in worlds) > 100
