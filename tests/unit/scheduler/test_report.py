"""What travels with the outputs of a batch, and what becomes of it in the launcher."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from sglang.srt.managers.scheduler_components.output_streamer import SchedulerOutputStreamer
from world import advance, one_request

from kara_sglang.launcher import requests
from kara_sglang.options import KEY
from kara_sglang.scheduler import report

STREAMER = report.output_streamer_class(lambda _scheduler: SchedulerOutputStreamer, None)


def info(*finished: bool, said: Sequence[int] = (4, 5, 6, 7, 8)) -> dict[str, list]:
    """The plugin's part of a batch whose requests have ended or not."""
    reqs: list[Any] = [
        SimpleNamespace(
            finished=lambda end=end: end,
            kv=SimpleNamespace(kv_committed_len=7),
            origin_input_ids=[1, 2, 3],
            output_ids_through_stop=said,
        )
        for end in finished
    ]
    return STREAMER.build_additional_customized_info(object.__new__(STREAMER), reqs)


def test_nothing_is_sent_unless_a_request_ends() -> None:
    """Every decode step has an output batch, and few of them end anything."""
    assert info() == info(False) == info(False, False) == {}
    fields = info(False, True, False)
    assert list(fields) == [KEY]
    running, [ended], other = fields[KEY]
    assert running == other == []
    assert (ended["logical_length"], ended["kv_slots_held"]) == (7, 7)
    # A step that verifies drafts may have gone on behind the end of the answer.
    [[ended]] = info(True, said=[4, 5])[KEY]
    assert (ended["logical_length"], ended["kv_slots_held"]) == (5, 5)


def test_one_sentence_says_whether_compression_has_begun() -> None:
    world, _ = one_request(selector="keys", policy="pressure", min_pool_usage=0.01)
    begins = (
        "compression begins when running and waiting requests need 1 % of the KV pool, and an answer "
    )
    begins += f"is longer than {world.config.window + world.config.delay} tokens"
    assert report.told(world.coordinator) == f"{begins}; it has not yet"
    advance(world, 30)
    assert report.told(world.coordinator) == f"{begins}; it has, 3 windows so far"


def test_the_launcher_puts_the_report_of_an_ended_request_into_its_answer() -> None:
    """And leaves other plugins' fields to SGLang, in batches with and without ours."""
    passed: list[tuple[dict, int]] = []

    def original(_manager: Any, _meta: dict, _state: Any, others: dict, index: int, _: Any) -> None:
        passed.append((others, index))

    for fields, expected in (
        ({"x": [1, 2]}, {}),
        ({"x": [1, 2], KEY: [[{"windows": 1}], []]}, {}),
        ({"x": [1, 2], KEY: [[], [{"windows": 3}]]}, {KEY: {"windows": 3}}),
    ):
        meta: dict[str, Any] = {}
        requests.update_request_meta_info(original, None, meta, None, fields, 1, None)
        assert meta == expected
    assert passed == [({"x": [1, 2]}, 1)] * 3
