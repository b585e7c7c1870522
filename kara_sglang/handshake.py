"""How a scheduler tells the launcher that it runs the plugin.

Its word goes with the start message that it sends anyway (``Scheduler.get_init_info``): a digest of its
hooks, or why it must not serve. On a data-parallel server a controller process stands between the two
and sends a start message of its own. It builds that message

* with ``get_init_info``, in SGLang 0.5.23: one hook adds what the schedulers said;
* in the middle of a function, in 0.5.22: there the word travels in the start-up times, which both
  messages have and the controller sums up.

Which of the two it is, ``Hook.otherwise`` decides by what SGLang has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from kara_sglang import hooks

if TYPE_CHECKING:
    from sglang.srt.managers.data_parallel_controller import DataParallelController

KEY = "kv_compress"

_TIMES = "startup_time"

_heard: list[Any] = []
"""In a controller without ``get_init_info``: the schedulers' words, as they come in."""


def ready_word() -> int:
    """What a scheduler says that runs the plugin."""
    return hooks.digest(hooks.scheduler_hooks())


def tell(message: dict[str, Any], word: int | str) -> None:
    """Put a scheduler's word into its start message."""
    message[KEY] = word
    message[_TIMES] = message.get(_TIMES, {}) | {KEY: word}


def told(message: dict[str, Any]) -> int | str | None:
    """Take the word out of a scheduler's or a controller's start message; None where there is none."""
    in_times = message.get(_TIMES, {}).pop(KEY, None)  # /server_info shows these times
    return message.get(KEY, in_times)


def after_controller_init_info(result: dict[str, Any], controller: DataParallelController) -> None:
    """AFTER ``DataParallelController.get_init_info``: pass on what all its schedulers said."""
    result[KEY] = _for_all(message.get(KEY) for message in controller._scheduler_init_infos)


def around_startup_times(
    original: Callable[..., dict[str, Any]], startup_times: Iterable[Any]
) -> dict[str, Any]:
    """AROUND ``data_parallel_controller.aggregate_scheduler_startup_times``: hear what schedulers said.

    Each replica has a thread that calls it.
    """
    times = list(startup_times)
    _heard.extend((each or {}).get(KEY) for each in times)
    return original(times)


def after_controller_init(
    _result: None, controller: DataParallelController, *_args: Any, **_kwargs: Any
) -> None:
    """AFTER ``DataParallelController.__init__``, which waits for all schedulers."""
    controller.startup_time = controller.startup_time | {KEY: _for_all(_heard)}


def _for_all(words: Iterable[Any]) -> Any:
    """One word for all schedulers: any of them that is not ready speaks for all."""
    ready = ready_word()
    return next((word for word in words if word != ready), ready)
