"""A scarce pool on the simulated scheduler: requests arrive, are admitted as SGLang does, and end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sglang.srt.managers.schedule_policy import AddReqResult
from stand_ins import Request, Setting
from world import World

from kara_sglang.config import KaraConfig
from kara_sglang.radix_integration.row import ceil_align
from kara_sglang.scheduler import admission
from kara_sglang.scheduler.shortage import idle_slots, to_come

PAGE, PROMPT, ANSWER, FIT = 16, 64, 1024, 3
"""Tokens, and how many requests the pool holds uncompressed: the serving benchmark's scarce point."""


@dataclass(frozen=True)
class Admission:
    max_new_tokens: int


class Adder:
    """SGLang's ``PrefillAdder``, as far as memory decides (``managers/schedule_policy.py``)."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.running_batch = world.batch
        self.can_run_list: list[Request] = []
        self.offset = sum(self._get_running_request_total_token_offset(req) for req in world.batch.reqs)

    @property
    def rem_total_tokens(self) -> float:
        return idle_slots(self.world.scheduler) - self.offset

    def _get_running_request_total_token_offset(self, req: Request) -> float:
        return req.sampling_params.max_new_tokens - len(req.output_ids)

    def _select_prefill_admission(
        self, req: Request, *, total_tokens: float
    ) -> Admission | AddReqResult:
        fits = total_tokens < self.rem_total_tokens
        return Admission(to_come(req)) if fits else AddReqResult.NO_TOKEN

    def add_one_req(self, req: Request, _chunked: bool, _align: int | None) -> bool:
        prompt = len(req.origin_input_ids) + len(req.output_ids)
        chosen: Any = self._select_prefill_admission(req, total_tokens=prompt + to_come(req) + PAGE)
        fits = isinstance(chosen, Admission)
        if fits:
            self.can_run_list.append(req)
            self.offset += ceil_align(prompt, PAGE) + PAGE + chosen.max_new_tokens
        return fits


class Scarce:
    """One server, and what was counted.

    Parameters
    ----------
    arrivals : dict of int to int
        How many requests arrive in which step.
    config
        Settings beside those of the serving benchmark.

    Attributes
    ----------
    taken
        Windows by decode step.
    acting
        Whether the policy did, by decode step; of ``pressure``.
    steps_to_start
        By request, from its arrival on.
    """

    def __init__(self, arrivals: dict[int, int], **config: Any) -> None:
        slots = FIT * (PROMPT + ANSWER + PAGE) + PAGE * (FIT + 1)
        settings = KaraConfig(**({"window": 64, "delay": 16, "selector": "keys"} | config))
        self.world = World(
            Setting(settings, page=PAGE, num_pages=slots // PAGE, trouble=0.0, real=False), seed=0
        )
        self.taken: list[int] = []
        self.acting: list[bool] = []
        self.steps_to_start: list[int] = []
        self.requests: list[Request] = []
        self._came: dict[str, int] = {}
        self._serve(arrivals)

    def _serve(self, arrivals: dict[int, int]) -> None:
        world, step = self.world, 0
        while step <= max(arrivals) or world.queue or world.batch.reqs:
            for _ in range(arrivals.get(step, 0)):
                number = len(self.requests)
                req = Request(number, [100 + number] * PROMPT, ANSWER, None)
                self.requests.append(req)
                self._came[req.rid] = step
                world.queue.append(req)
            self._admit(step)
            step += 1
            if world.batch.reqs:
                self._decode()

    def _admit(self, step: int) -> None:
        world = self.world
        if world.batch.batch_is_full or not world.queue:
            return
        adder = admission._compressed(Adder, world.coordinator)(world)
        for req in world.queue:
            if len(adder.can_run_list) == len(world.free_rows) or not adder.add_one_req(
                req, False, None
            ):
                world.batch.batch_is_full = bool(world.batch.reqs or adder.can_run_list)
                break
        for req in adder.can_run_list:
            world.queue.remove(req)
            assert world.prefill(req)
            self.steps_to_start.append(step - self._came[req.rid])

    def _decode(self) -> None:
        world, running = self.world, len(self.world.batch.reqs)
        before = world.windows
        world.before_decode()
        self.taken.append(world.windows - before)
        self.acting.append(getattr(world.coordinator.policy, "acting", True))
        while not world.make_room(world.needed()):
            world.retract(world.batch.reqs[-1])
        world.decode(world.batch.reqs)
        world.process_results(world.batch.reqs)
        if len(world.batch.reqs) < running:
            world.batch.batch_is_full = False
