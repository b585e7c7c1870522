"""Whether KV slots are short: what is idle, what is reserved, what the queue will need."""

from __future__ import annotations

from types import SimpleNamespace

from kara_sglang.scheduler.pace import PLAIN
from kara_sglang.scheduler.shortage import needed, short_of_slots


def test_a_step_may_need_a_page_for_each_request() -> None:
    """Free slots and those that the prefix cache would give up count alike."""
    for free, evictable, expected in ((48, 0, False), (40, 8, False), (47, 0, True), (0, 32, True)):
        scheduler = SimpleNamespace(
            page_size=16,
            token_to_kv_pool_allocator=SimpleNamespace(available_size=lambda n=free: n),
            tree_cache=SimpleNamespace(evictable_size=lambda n=evictable: n),
        )
        assert short_of_slots(scheduler, SimpleNamespace(reqs=[1, 2, 3]), PLAIN) is expected


def test_what_requests_need_is_summed_up_to_the_mark() -> None:
    """100 slots held; two that run have 60 tokens to come, of which 0.5 are expected unless they ignore
    the end; those that wait count with prompt and answer, as many as have rows."""
    read: list[str] = []

    def req(name: str, prompt: int, ignore_eos: bool = False) -> SimpleNamespace:
        params = SimpleNamespace(max_new_tokens=60, ignore_eos=ignore_eos)
        return SimpleNamespace(
            rid=name, origin_input_ids=[1] * prompt, output_ids=[], sampling_params=params
        )

    class Queue(list):
        def __iter__(self):
            for one in super().__iter__():
                read.append(one.rid)
                yield one

    scheduler = SimpleNamespace(
        max_total_num_tokens=1000,
        token_to_kv_pool_allocator=SimpleNamespace(available_size=lambda: 850),
        tree_cache=SimpleNamespace(evictable_size=lambda: 50),
        new_token_ratio_tracker=SimpleNamespace(current=0.5),
        get_num_allocatable_reqs=lambda _running, running_batch: 2,
        waiting_queue=Queue([req("a", 40), req("b", 140), req("no row", 1000)]),
        disagg_decode_prealloc_queue=None,
    )
    running = SimpleNamespace(reqs=[req("x", 10), req("y", 10, ignore_eos=True)])
    # 100 + 30 + 60 = 190; a: 290; b: 490.
    for share, expected, until in ((0.19, True, []), (0.2, True, ["a"]), (0.49, True, ["a", "b"])):
        read.clear()
        assert needed(scheduler, running, share) is expected and read == until
    assert not needed(scheduler, running, 0.4901)
    # On a decode server those come behind for whose prompt there is no room yet.
    coming = [SimpleNamespace(req=scheduler.waiting_queue.pop(place)) for place in (2, 1)]
    scheduler.disagg_decode_prealloc_queue = SimpleNamespace(queue=coming[::-1])
    assert needed(scheduler, running, 0.49) and not needed(scheduler, running, 0.4901)
    scheduler.get_num_allocatable_reqs = lambda _running, running_batch: -1
    assert not needed(scheduler, running, 0.191)
