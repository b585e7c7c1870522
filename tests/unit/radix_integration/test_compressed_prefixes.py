"""Compressed prefixes in SGLang's real tree and allocators, against a dictionary of token tuples.

The dictionary knows every cached prefix by what it stands for: who may use it, its tokens, and how they
are cut into single pages and windows. It knows nothing of trees, physical keys, hashes or the index.
"""

from __future__ import annotations

import pytest
from prefixes import World


@pytest.mark.parametrize("page", [1, 4])
@pytest.mark.parametrize("block", range(2))
def test_tree_and_index_are_the_dictionary(page: int, block: int) -> None:
    """Matches reach as far as any cached prefix does, with the slots that were put there for those
    tokens; exact KV wins ties; nothing locked is evicted; the pool's arithmetic holds."""
    world = World(page, seed=1000 * page + block)
    for count in range(5000):
        world.step()
        if count % 10 == 0:
            world.check()
    world.flush()
    seen = world.seen
    assert min(seen[kind] for kind in ("compressed", "exact", "window", "evicted")) > 100, seen
    assert min(seen[f"leaves {where} a window"] for where in ("inside", "at", "behind")) > 10, seen
    assert seen["flush"] > 1, seen


def test_a_forgetful_index_costs_misses_only() -> None:
    """Eight windows, one layout for a text: whatever is matched is right all the same."""
    world = World(page=4, seed=7, capacity=8)
    for _ in range(5000):
        world.step()
        assert world.cache.layouts.num_windows <= 8
    world.check()
    world.flush()
    assert world.seen["compressed"] > 20
