"""Seeds of requests, on the simulated scheduler (``world.py``)."""

from __future__ import annotations

from stand_ins import Finish, Request, Setting
from world import World, one_request

from kara_sglang.config import KaraConfig


def test_seeds_come_from_the_prompt() -> None:
    """The same prompt gets the same random choice on every rank and in every run; a request may ask
    for another one."""
    states = []
    for prompt, options in (([1, 2], None), ([1, 2], None), ([1, 3], None), ([1, 2], {"seed": 5})):
        world, _ = one_request(selector="random")
        req = Request(1, prompt, 100, options)
        assert world.prefill(req)
        world.before_decode()
        states.append(req.state.seed)
    assert states[0] == states[1] != states[2] and states[3] == 5


def test_the_answers_to_one_prompt_have_seeds_of_their_own() -> None:
    """With ``n`` above 1: the same ones in every run, also after a retraction, whichever others run."""
    runs = []
    for others in (0, 2):
        world = World(
            Setting(KaraConfig(selector="random", window=8, delay=2, policy="periodic"), trouble=0.0),
            seed=0,
        )
        seeds: list[list[int]] = []
        for options in (None, {"seed": 5}):
            copies = [Request(rid, [1, 2, 3], 100, options) for rid in range(3)]
            for copy in copies:
                copy.sampling_params.n = 3
            requests = [*copies[:2], *(Request(7, [4], 100, None) for _ in range(others)), copies[2]]
            for req in requests:
                assert world.prefill(req)
            world.before_decode()
            first = [copy.state.seed for copy in copies]
            world.retract(copies[1])
            world.queue.remove(copies[1])
            assert world.prefill(copies[1])
            world.before_decode()
            assert [copy.state.seed for copy in copies] == first
            for req in requests:
                req.finished_reason = Finish("length")
                world.release(req, checkpoint=True)
            world.drop(requests)
            seeds.append(first)
        assert len({seed for of_copies in seeds for seed in of_copies}) == 6
        assert seeds[1][0] == 5
        runs.append(seeds)
    assert runs[0] == runs[1]
    assert world.coordinator.newcomers.seeds._copies == {}


def test_copies_that_never_come_are_forgotten() -> None:
    world, _ = one_request(selector="random")
    for number in range(5000):
        req = Request(number, [number], 100, None)
        req.sampling_params.n = 2
        world.coordinator.newcomers.seeds.of(req, None)
    assert 0 < len(world.coordinator.newcomers.seeds._copies) < 5000
