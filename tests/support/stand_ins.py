"""What SGLang would be, in a few lines each, for the simulated scheduler of ``world.py``."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from kara_sglang.config import SELECTORS, KaraConfig
from kara_sglang.kernels.backend import LayerPool, TorchKernels, WindowJob
from kara_sglang.kernels.record import Recorder
from kara_sglang.kernels.rope_shift import RopeShift
from kara_sglang.kernels.selectors import REGISTRY
from kara_sglang.radix_integration.row import STATE, RequestState, Window
from kara_sglang.scheduler.pace import PLAIN, Pace
from kara_sglang.scheduler.ring.recorder import QueryRecorder

if TYPE_CHECKING:
    from model import Model

LAYERS, KV_HEADS, DIM, GROUP = 2, 2, 4, 2
ROWS = 16
SCALES = [0.4, 0.6]
TURN = RopeShift.of(
    [
        RopeShift.of_layer(torch.tensor([0.6]), torch.tensor([0.8]), DIM, halves=True),
        RopeShift.of_layer(torch.empty(0), torch.empty(0), DIM, halves=True),
    ]
)


class PagedAllocator:
    """Hands out pages; whoever frees a page twice, or a part of one, is caught."""

    def __init__(self, num_pages: int, page_size: int, pool: Any, random: Random) -> None:
        self.page_size = page_size
        self.pool = pool
        self.free = list(range(1, num_pages + 1))  # page 0 takes the writes of padded tokens
        random.shuffle(self.free)
        self.free_set = set(self.free)
        self.freed: list[int] = []  # since the model looked last
        self.group: list[tuple[torch.Tensor, int]] | None = None

    def get_kvcache(self) -> Any:
        return self.pool

    def available_size(self) -> int:
        return len(self.free) * self.page_size

    def take_page(self) -> int:
        page = self.free.pop()
        self.free_set.remove(page)
        return page

    def alloc(self, need: int) -> torch.Tensor | None:
        assert need % self.page_size == 0, "whole pages"
        if need > self.available_size():
            return None
        pages = torch.tensor([self.take_page() for _ in range(need // self.page_size)])
        return (pages[:, None] * self.page_size + torch.arange(self.page_size)).flatten()

    def free_page(self, page: int) -> None:
        assert page not in self.free_set, f"page {page} freed twice"
        self.free.append(page)
        self.free_set.add(page)
        self.freed.append(page)

    def free_segment(self, free_index: torch.Tensor, *, start_pos: int) -> None:
        assert start_pos % self.page_size == 0, "a segment starts with a page"
        if self.group is not None:
            self.group.append((free_index, start_pos))
            return
        slots = free_index.tolist()
        for first in range(0, len(slots), self.page_size):
            part = slots[first : first + self.page_size]
            assert part[0] % self.page_size == 0
            assert part == list(range(part[0], part[0] + len(part)))
            self.free_page(part[0] // self.page_size)

    def free_group_begin(self) -> None:
        assert self.group is None
        self.group = []

    def free_group_end(self) -> None:
        group, self.group = self.group, None
        assert group is not None
        for free_index, start_pos in group:
            self.free_segment(free_index, start_pos=start_pos)


@dataclass
class Kv:
    """The fields of SGLang's ``ReqKvInfo`` that the plugin touches."""

    req_pool_idx: int | None = None
    cache_protected_len: int = 0
    kv_committed_len: int = 0
    kv_allocated_len: int = 0

    @property
    def holds_kv(self) -> bool:
        return self.req_pool_idx is not None


@dataclass
class Prefix:
    """Whole pages that the prefix tree owns: nobody may write or free them."""

    ids: list[int]
    slots: list[int]
    tokens: list[int]
    users: int = 0


class Finish(str):
    """SGLang's ``BaseFinishReason``."""

    def to_json(self) -> dict[str, str]:
        return {"type": str(self)}


class Request:
    """SGLang's ``Req``; behind the line, what the model knows of it."""

    def __init__(self, rid: int, prompt: list[int], max_new_tokens: int, options: Any) -> None:
        self.rid = str(rid)
        self.origin_input_ids = prompt
        self.output_ids: list[int] = []
        self.sampling_params = SimpleNamespace(
            custom_params=None if options is None else {"kv_compress": options},
            max_new_tokens=max_new_tokens,
            ignore_eos=True,
            n=1,
        )
        self.kv = Kv()
        self.skip_radix_cache_insert = False
        self.beam_group: Any = None
        self.multimodal_inputs: Any = None
        self.finished_reason: Finish | None = None
        self.finished_len: int | None = None
        self.to_finish: Finish | None = None
        self.retraction_count = 0
        self.is_retracted = self.retracted_stain = False
        self.prefix_len = self.host_hit_length = 0
        self.return_hidden_states = self.return_logprob = False
        self.session = self.input_embeds = None
        # --------------------------------------------------------------------------------------
        self.options = options
        self.never_inserts = False
        self.slots: list[int] = []  # by KV index
        self.token_at: list[int] = []  # by logical position
        self.kept = torch.empty((LAYERS, KV_HEADS, 0), dtype=torch.int64)  # up to the last window
        self.windows: list[Window] = []
        self.prefilled = 0
        self.num_units = 0
        self.recorder: Recorder | None = None  # before the step
        self.recorded_from: int | None = None
        self.prefix: Prefix | None = None
        self.retracted: tuple[list[int], torch.Tensor] = [], self.kept  # of the row that it lost

    def finished(self) -> bool:
        return self.finished_reason is not None

    @property
    def output_ids_through_stop(self) -> list[int]:
        return self.output_ids[: self.finished_len]

    def next_output_finishes_by_length(self) -> bool:
        return len(self.output_ids) + 1 >= self.sampling_params.max_new_tokens

    @property
    def state(self) -> RequestState | None:
        return getattr(self, STATE, None)

    @property
    def tokens(self) -> torch.Tensor:
        """By KV index, shape (layers, KV heads, KV length): whose K and V must lie there."""
        behind = torch.tensor(self.token_at[self.kept.shape[-1] + self.removed :], dtype=torch.int64)
        return torch.cat([self.kept, behind.expand(LAYERS, KV_HEADS, -1)], dim=-1)

    @property
    def removed(self) -> int:
        return len(self.token_at) - len(self.slots)


@dataclass
class Stream:
    """Knows whether the forward stream is current and has been told to wait."""

    current: bool = False
    waited: bool = False

    def wait_stream(self, other: object) -> None:
        assert self.current and other == "schedule stream"
        self.waited = True

    def __enter__(self) -> None:
        assert not self.current
        self.current, self.waited = True, False

    def __exit__(self, *_: object) -> None:
        self.current = False


class WatchedKernels(TorchKernels):
    """The reference, or, for histories without K/V, kernels that keep the first R and touch nothing."""

    def __init__(self, world: Model, real: bool) -> None:
        super().__init__()
        self.world = world
        self.real = real

    def compress(
        self, pool: LayerPool, jobs: list[WindowJob], *, positions: bool = False
    ) -> list[torch.Tensor] | None:
        self.world.assert_on_forward_stream()
        if self.real:
            return super().compress(pool, jobs, positions=positions)
        if not positions:
            return None
        return [torch.arange(job.kept).expand(LAYERS, KV_HEADS, job.kept) for job in jobs]


class WatchedRecorder(QueryRecorder):
    """Tables may be written on the forward stream only: the step in flight reads them."""

    world: Model
    lacks = 0  # recorders that had pages and found no further one

    def extend(self, recorder: Recorder, position: int) -> bool:
        had_pages = bool(recorder.pages)
        found = super().extend(recorder, position)
        self.lacks += had_pages and not found
        return found

    def flush(self) -> None:
        self.world.assert_on_forward_stream()
        super().flush()


@dataclass(frozen=True)
class Setting:
    """One server and what happens to it."""

    config: KaraConfig
    page: int = 1
    units: int = 6
    overlap: bool = True
    real: bool = True
    num_pages: int = 400
    max_running: int = 3
    steps: int = 120
    options: tuple[Any, ...] = (None,)
    trouble: float = 0.02  # chance per step of each kind of it
    pace: Pace = PLAIN
    context: int = 1 << 20


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
