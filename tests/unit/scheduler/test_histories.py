"""Rows, pages and lengths over random histories, on the simulated scheduler (``world.py``)."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from random import Random
from typing import Any

import pytest
from stand_ins import GROUP, Request, Setting
from world import World, advance

from kara_sglang.config import SELECTORS, KaraConfig
from kara_sglang.kernels.selectors import REGISTRY


def random_setting(random: Random, real: bool) -> Setting:
    """Any server: page sizes, windows, shares, delays, recorders that are late or never come."""
    page = random.choice([1, 1, 1, 16, 16, 64] if not real else [1, 1, 1, 1, 16])
    window = page * random.randint(1, {1: 24, 16: 4, 64: 2}[page])
    selector = random.choice(SELECTORS)
    config = KaraConfig(
        selector=selector,
        window=window,
        retain=random.choice([0.01, 0.25, 0.5, 0.5, 0.7, 1.0]),
        query_mem_gb=random.choice([None, 1.0]),
        delay=random.choice([0, 0, 1, 5, 16, 40]),
        score=random.choice(["sum", "sum_v", "l2", "l2_v", "l2_v4_k"]),
        neighbours=random.choice([1, 3, 13]),
        delay_votes=random.choice([False, True]),
        chunk_budget=random.choice([0.0, 0.1, 0.5]),
        chunk_quantile=random.choice([0.0, 0.5]),
        last_queries=random.choice([1, 8]),
        query_heads=random.choice(["auto", "all", "mean"]),
        query_dtype=random.choice(["fp4", "fp8", "model"]),
        policy=random.choice(["periodic", "periodic", "threshold", "pressure"]),
        period=random.choice([1, 1, 3, 100]),
        max_requests_per_pass=random.choice([1, 8]),
        threshold=random.choice([0, 60, 120]),
        min_pool_usage=random.choice([0.0, 0.2, 0.8]),
        debug_checks=random.random() < 0.5,
    )
    options: list[Any] = [None]
    if random.random() < 0.5:
        names = [n for n in SELECTORS if config.keeps_queries or not REGISTRY[n].needs_queries]
        options += [False, True, {}, {"retain": random.choice([0.1, 0.5, 1])}]
        options += [{"selector": random.choice(names), "seed": random.randrange(9)}]
    return Setting(
        config=config,
        page=page,
        units=random.randint(0, 3 * GROUP),
        overlap=random.random() < 0.5,
        real=real,
        num_pages=-(-random.choice([400, 600, 1500]) // page) + 8,
        max_running=random.randint(1, 5),
        steps=random.choice([40, 120] if page == 1 else [100, 200]),
        options=tuple(options),
        trouble=random.choice([0.0, 0.01, 0.05]),
    )


def run_history(seed: int, real: bool, trace: Path | None = None) -> World:
    setting = random_setting(Random(seed), real)
    if trace is not None:
        config = dataclasses.replace(setting.config, trace=str(trace))
        setting = dataclasses.replace(setting, config=config)
    world = World(setting, seed)
    try:
        world.run()
    except Exception as error:
        error.add_note(f"history {seed}, {'with' if real else 'without'} K/V: {setting}")
        raise
    return world


@pytest.mark.parametrize("block", range(3))
def test_histories_with_kv(block: int) -> None:
    """After each pass every held slot of every layer and head has the K and V that belong there."""
    worlds = [run_history(seed, real=True) for seed in range(50 * block, 50 * block + 50)]
    assert sum(world.windows for world in worlds) > 200
    assert sum(world.retractions for world in worlds) > 20


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


@pytest.mark.parametrize("block", range(8))
def test_histories_of_rows_and_pages(block: int) -> None:
    """Thousands of histories of lengths, rows and pages alone."""
    worlds = [run_history(seed, real=False) for seed in range(250 * block, 250 * block + 250)]
    assert sum(world.windows for world in worlds) > 900
    assert sum(world.retractions for world in worlds) > 100
