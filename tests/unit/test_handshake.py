"""What a scheduler tells the launcher, and what the launcher makes of it."""

from __future__ import annotations

import types
from typing import Any

import pytest

from kara_sglang import handshake, hooks, plugin
from kara_sglang.config import KaraConfig
from kara_sglang.launcher import requests


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What a controller has heard so far: nothing, before and after the test."""
    monkeypatch.setattr(handshake, "_heard", [])
    return handshake._heard


def test_children_without_the_plugin_are_refused() -> None:
    """Any rank that says nothing, or something else, stops the server."""
    ready = hooks.digest(hooks.scheduler_hooks())
    good = {handshake.KEY: ready, "max_total_num_tokens": 1}
    requests.check_children([{}])  # compression is off: stock children are right
    plugin.set_launched(KaraConfig())
    requests.check_children([good])
    requests.check_children([good, dict(good)])
    for infos in ([{}], [good, {}], [{handshake.KEY: None}], [{handshake.KEY: ready + 1}]):
        with pytest.raises(RuntimeError, match=r"^kv-compress: error: "):
            requests.check_children(infos)


def test_a_child_that_says_why_is_quoted() -> None:
    """The last line of a server that must not start is the child's own reason."""
    plugin.set_launched(KaraConfig())
    with pytest.raises(RuntimeError, match=r"^kv-compress: error: the model has cross-attention"):
        requests.check_children([{handshake.KEY: "the model has cross-attention layers"}])


def started(word: Any, **more: Any) -> dict[str, Any]:
    """A scheduler's start message, once it has said its word."""
    message = {"startup_time": {"load_weight": 2.0}, **more}
    handshake.tell(message, word)
    return message


def test_a_scheduler_tells_and_the_parent_is_told() -> None:
    """With the message, and with the start-up times, which users see without it."""
    message = started(7)
    assert message["startup_time"] == {"load_weight": 2.0, handshake.KEY: 7}
    assert handshake.told(message) == 7
    assert message["startup_time"] == {"load_weight": 2.0}
    assert handshake.told({}) is None and handshake.told({"startup_time": {}}) is None


SAID = [
    (["ready", "ready"], "ready"),
    (["ready", "the pool is too small"], "the pool is too small"),
    (["ready", None], None),
    ([None, None], None),
]


@pytest.mark.parametrize("said, verdict", SAID)
def test_a_controller_with_a_message_of_its_own(said: list[Any], verdict: Any) -> None:
    """All schedulers of a data-parallel server must be ready; who is not speaks for all."""
    plugin.activate(KaraConfig())
    ready = handshake.ready_word()
    words = [ready if word == "ready" else word for word in said]
    controller = types.SimpleNamespace(_scheduler_init_infos=[{handshake.KEY: word} for word in words])
    message: dict[str, Any] = {}
    handshake.after_controller_init_info(message, controller)
    assert handshake.told(message) == (ready if verdict == "ready" else verdict)


@pytest.mark.parametrize("said, verdict", SAID)
def test_a_controller_that_sums_up_start_up_times(
    said: list[Any], verdict: Any, heard: list[Any]
) -> None:
    """As SGLang 0.5.22 does: one sum per replica, of which the last one to come stays."""
    from sglang.srt.observability.startup_time import aggregate_scheduler_startup_times

    plugin.activate(KaraConfig())
    ready = handshake.ready_word()
    controller = types.SimpleNamespace(startup_time=None)
    for word in said:
        times = (started(ready if word == "ready" else word)["startup_time"] for _ in range(1))
        controller.startup_time = handshake.around_startup_times(
            aggregate_scheduler_startup_times, times
        )
    assert controller.startup_time["load_weight"] == 2.0 and len(heard) == len(said)
    handshake.after_controller_init(None, controller)
    message = {"startup_time": controller.startup_time, "max_req_input_len": 1}
    assert handshake.told(message) == (ready if verdict == "ready" else verdict)
    assert handshake.KEY not in message["startup_time"]


def test_a_scheduler_that_says_nothing_is_heard_too(heard: list[Any]) -> None:
    """It runs without the plugin: its times have no word, or there are none."""
    plugin.activate(KaraConfig())
    handshake.around_startup_times(lambda times: {}, iter([{"load_weight": 1.0}, None]))
    assert heard == [None, None]
