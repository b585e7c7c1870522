"""What a match costs the scheduler's thread with compressed prefixes, however its index was filled.

``python -m kara_sglang.benchmarks.reuse.match`` puts rows into the real prefix cache and the real index
of layouts, without an engine, and times matches of one long text: the first, and one more, since a
search notes what it finds gone. Beside them stand one pass of hashing over the text and stock SGLang's
match of it. Each case is what clients could leave behind for the others.
"""

from __future__ import annotations

import gc
import hashlib
import random
import statistics
import sys
import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import InsertParams, MatchPrefixParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

from kara_sglang.benchmarks import command_line
from kara_sglang.benchmarks.machine import origin
from kara_sglang.benchmarks.output import write_json
from kara_sglang.radix_integration.compressed import CompressedRadixCache
from kara_sglang.radix_integration.keys import Text, physical_key, seed_of
from kara_sglang.radix_integration.layout import Layout
from kara_sglang.radix_integration.prefix import Sharing
from kara_sglang.radix_integration.row import Window

TEXT, WINDOW, KEPT, VOCAB = 131_072, 512, 256, 100_000
STARTS, FORKS = 64, 32
SETTINGS = b"settings"
SEED = seed_of(SETTINGS, None, None)


@dataclass(frozen=True, slots=True)
class Case:
    """What others have left.

    Attributes
    ----------
    name, why
        For the table.
    remembered
        Layouts of the text in the index.
    cached
        Layouts whose rows are in the tree, and up to which token.
    exact
        Tokens of the text that are in the tree as they are.
    leaves
        Where the text that is looked for leaves the one that is there.
    """

    name: str
    why: str
    remembered: list[Layout]
    cached: list[tuple[Layout, int]]
    exact: int
    leaves: int = TEXT


def layout(start: int, gap: int = 0, width: int = WINDOW, kept: int = KEPT) -> Layout:
    """Windows from ``start`` to the end of the text, with ``gap`` tokens behind the first."""
    windows, at, removed = [], start, 0
    while at + width <= TEXT:
        windows.append(Window(at, at - removed, width, kept, "all"))
        removed += width - kept
        at += width + (gap if len(windows) == 1 else 0)
    return Layout(tuple(windows))


def cases() -> Iterator[Case]:
    """All cases; the layouts of each differ in where the first and where the second window starts."""
    grid = [layout(64 + 16 * s, 16 * (f + 1)) for s in range(STARTS) for f in range(FORKS)]
    firsts = {one.windows[0]: one for one in grid}.values()
    behind_first = [(one, one.windows[0].logical_start + WINDOW) for one in firsts]
    few = grid[-8:]
    yield Case("honest", "one row, one layout", [few[0]], [(few[0], TEXT)], 2000)
    yield Case("gone", f"{STARTS} x {FORKS} layouts, no row", grid, [], 2000)
    yield Case("first windows", "as above, the first windows are there", grid, behind_first, 2000)
    rows = [*behind_first, *((one, TEXT) for one in few)]
    yield Case("eight rows", "as above, and eight whole rows", grid, rows, 2000)
    yield Case("half-way", "as above, the text leaves", grid, rows, 2000, TEXT // 2)
    many = [Layout((Window(s, s, WINDOW, KEPT, "all"),)) for s in range(1, 30_001)]
    yield Case("starts", "30,000 first windows", many, [], 40_000)
    first = layout(64).windows[0]
    crowd = [
        Layout((first, Window(64 + WINDOW + 16 * f, 64 + KEPT + 16 * f, WINDOW, KEPT, "all")))
        for f in range(4096)
    ]
    yield Case("followers", "4,096 second windows", crowd, [(crowd[0], 1024)], 2000)
    late = [layout(120_000 + 16 * s) for s in range(STARTS)]
    yield Case("late", f"{STARTS} layouts far behind, no row", late, [], 131_000)
    small = layout(64, width=16, kept=8)
    yield Case("small windows", "one row of windows of 16", [small], [(small, TEXT)], 2000)


def build(case: Case, text: array[int]) -> CompressedRadixCache:
    """A cache in which the case has happened."""
    rows = ReqToTokenPool(size=1, max_context_len=8, device="cpu", enable_memory_saver=False)
    pool = TokenToKVPoolAllocator(TEXT, torch.float32, "cpu", SimpleNamespace(), False)
    cache = CompressedRadixCache(
        CacheInitParams(
            disable=False,
            req_to_token_pool=rows,
            token_to_kv_pool_allocator=pool,
            page_size=1,
            tree_components=(ComponentType.FULL,),
        )
    )
    cache.sharing_of, cache.vocab_size = lambda _req: Sharing(SETTINGS), VOCAB

    def insert(ids: array[int]) -> None:
        # Slots of its own; nobody frees them.
        value = torch.arange(len(ids))
        cache.insert(InsertParams(key=RadixKey(ids), value=value, prev_prefix_len=len(ids)))

    insert(text[: case.exact])
    for one, end in case.cached:
        insert(physical_key(Text(SEED, memoryview(text)[:end]), one.within(end).windows))
    for one in case.remembered:
        cache.layouts.add(SEED, memoryview(text), one)
    return cache


def milliseconds(call: Callable[[], Any]) -> float:
    """CPU time of this thread: other processes of the machine do not count."""
    begin = time.thread_time()
    call()
    return 1000 * (time.thread_time() - begin)


def measure(case: Case, text: array[int], repetitions: int) -> dict[str, Any]:
    """Medians over freshly built caches; times in milliseconds."""
    asked = array("q", [*text[: case.leaves], *([1] * (TEXT - case.leaves))])
    times: dict[str, list[float]] = {"hash": [], "stock": [], "first": [], "again": []}
    for _ in range(repetitions):
        cache = build(case, text)
        gc.collect()
        gc.freeze()  # as SGLang does; the layouts of all cases are more objects than a server has
        found: list[int] = []

        def search(cache: CompressedRadixCache = cache, found: list[int] = found) -> None:
            req: Any = SimpleNamespace(multimodal_inputs=None, session=None)
            params = MatchPrefixParams(key=RadixKey(asked, limit=TEXT - 1), req=req)
            found.append(cache.match_prefix(params).device_prefix_len)

        def stock(cache: CompressedRadixCache = cache) -> None:
            UnifiedRadixCache.match_prefix(
                cache, MatchPrefixParams(key=RadixKey(asked, limit=TEXT - 1))
            )

        times["hash"].append(milliseconds(lambda: hashlib.blake2b(asked).digest()))
        times["stock"].append(milliseconds(stock))
        times["first"].append(milliseconds(search))
        times["again"].append(milliseconds(search))
        gc.unfreeze()
    return {
        "case": case.name,
        "why": case.why,
        "remembered": cache.layouts.num_windows,
        "exact": case.exact,
        "found": found,
        **{f"{name}_ms": round(statistics.median(values), 2) for name, values in times.items()},
    }


def main(argv: list[str] | None = None) -> int:
    """Print a line per case; write all of it as JSON with ``--out``."""
    parser = command_line.parser(__spec__, __doc__)
    parser.add_argument(
        "--repetitions", type=command_line.whole(), default=5, help="default: %(default)s"
    )
    parser.add_argument("--out", type=Path, help="JSON file")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    rng = random.Random(1)
    text = array("q", (rng.randrange(2, VOCAB) for _ in range(TEXT)))
    results = []
    print(f"{'case':<15}{'hash':>7}{'stock':>7}{'first':>7}{'again':>7} ms   found, again")
    for case in cases():
        one = measure(case, text, arguments.repetitions)
        results.append(one)
        figures = "".join(f"{one[f'{name}_ms']:>7.2f}" for name in ("hash", "stock", "first", "again"))
        print(f"{one['case']:<15}{figures}      {one['found']}, {one['why']}", flush=True)
    if arguments.out is not None:
        about = {
            **origin("kara_sglang.benchmarks.reuse.match", argv or sys.argv[1:]),
            "text": TEXT,
            "window": WINDOW,
        }
        write_json(arguments.out, about | {"cases": results}, indent=1)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
