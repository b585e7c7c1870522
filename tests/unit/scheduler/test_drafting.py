"""Steps that verify drafts: rows, pages, lengths, positions and queries over random histories."""

from __future__ import annotations

import dataclasses
from random import Random

import pytest
from drafting import DraftingWorld
from stand_ins import Setting, random_setting
from world import lived

from kara_sglang.config import KaraConfig
from kara_sglang.scheduler.pace import Pace


def drafting_setting(random: Random, real: bool) -> Setting:
    """Any server that speculates: chains and trees of any size, with overlap and without."""
    setting = random_setting(random, real)
    tokens = random.choice([2, 3, 4, 8, 16, 80])
    pace = Pace(
        tokens,
        tokens if setting.overlap else 0,
        branches=random.random() < 0.5,
        drafted=random.choice([0, tokens, 3 * tokens]),
    )
    more = -(-pace.reserve * setting.max_running // setting.page)
    return dataclasses.replace(setting, pace=pace, num_pages=setting.num_pages + more)


def run_history(seed: int, real: bool) -> DraftingWorld:
    return lived(DraftingWorld, drafting_setting(Random(seed), real), seed)


@pytest.mark.parametrize("block", range(2))
def test_histories_with_kv(block: int) -> None:
    """After each pass every held slot has the K and V that belong there, as chosen by the queries of
    those drafts that were accepted; each step gets true positions and the true lengths."""
    worlds = [run_history(seed, real=True) for seed in range(40 * block, 40 * block + 40)]
    assert sum(world.windows for world in worlds) > 200
    assert sum(world.windows - world.without_queries for world in worlds) > 100
    assert sum(world.retractions for world in worlds) > 20
    assert max(world.most_at_once for world in worlds) > 10


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("tokens", [2, 5, 16])
def test_every_window_has_its_queries(tokens: int, overlap: bool) -> None:
    """However far a step goes, the request has asked for a recorder before a window begins in it."""
    settings = {"policy": "periodic", "query_heads": "mean", "debug_checks": True}
    config = KaraConfig(window=48, delay=16, **settings)
    pace = Pace(tokens, tokens if overlap else 0, branches=True)
    setting = Setting(config, page=16, units=12, overlap=overlap, steps=300, trouble=0.0, pace=pace)
    world = DraftingWorld(setting, seed=tokens)
    world.run()
    assert world.windows > 3
    assert world.without_queries == 0


@pytest.mark.parametrize("block", range(4))
def test_histories_of_rows_and_pages(block: int) -> None:
    """Many more histories of lengths, rows and pages alone."""
    worlds = [run_history(seed, real=False) for seed in range(60 * block, 60 * block + 60)]
    assert sum(world.windows for world in worlds) > 150
    assert sum(world.retractions for world in worlds) > 15
