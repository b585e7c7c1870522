"""The table of hooks against the installed SGLang, and what happens when they do not fit."""

from __future__ import annotations

import dataclasses
import inspect
import pkgutil
import sys
import types
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest

from kara_sglang import handshake, hooks, plugin
from kara_sglang.compat import surface
from kara_sglang.config import KaraConfig
from kara_sglang.hooks import ALL_HOOKS, CLI_HOOKS, LAUNCHER_HOOKS, SCHEDULER_HOOKS, SHARING_HOOKS, Hook
from kara_sglang.launcher import requests

STAND_INS = tuple(stand_in for one in ALL_HOOKS for stand_in in one.otherwise)


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """SGLang's registry, empty for one test."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    monkeypatch.setattr(HookRegistry, "_hooks", defaultdict(list))
    monkeypatch.setattr(HookRegistry, "_patched", set())
    yield HookRegistry


@pytest.fixture
def targets(monkeypatch: pytest.MonkeyPatch) -> tuple[Hook, ...]:
    """Hooks on a module that stands in for one of SGLang's: methods of every kind and a function."""

    class Thing:
        def method(self) -> None: ...

        @classmethod
        def make(cls) -> None: ...

        @staticmethod
        def free() -> None: ...

    module = types.ModuleType("sglang.srt.kara_stand_in")
    module.Thing, module.function = Thing, lambda: None
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return tuple(
        Hook(f"kara_stand_in.{name}", "after", (), "launcher.flags:check_server_args", "for a test")
        for name in ("Thing.method", "Thing.make", "Thing.free", "function")
    )


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What a controller has heard so far: nothing, before and after the test."""
    monkeypatch.setattr(handshake, "_heard", [])
    return handshake._heard


def hook(target: str, parameters: tuple[str, ...] = (), kind: str = "after") -> Hook:
    return Hook(target, kind, parameters, "launcher.flags:add_cli_args", "for a test")


@pytest.mark.parametrize("one", ALL_HOOKS, ids=lambda one: one.target)
def test_targets_exist_with_the_parameters_that_we_rely_on(one: Hook) -> None:
    """In the installed SGLang, for every hook of every process."""
    assert hooks.problems((one,)) == []


@pytest.mark.parametrize("one", (*ALL_HOOKS, *STAND_INS), ids=lambda one: one.target)
def test_handlers_exist_and_fit_their_kind(one: Hook) -> None:
    """A handler takes what SGLang's registry passes: AFTER the result first, AROUND the original."""
    handler = hooks._handler(one)
    assert handler.__doc__ and handler.__doc__.startswith(f"{one.kind.upper()} ")
    path = one.target.rsplit(".", 2)
    assert ".".join(path[-2:]) in handler.__doc__ or path[-1] in handler.__doc__
    extra = () if one.kind == "before" else ("first",)
    inspect.signature(handler).bind(*extra, *one.parameters)
    if not one.exists():
        assert one.otherwise  # then SGLang has the place of those, which are tried here as well
        return
    function = pkgutil.resolve_name(one.path)
    parameters = inspect.signature(inspect.unwrap(getattr(function, "__func__", function))).parameters
    positional = [
        name
        for name, parameter in parameters.items()
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    # Everything that SGLang might pass by position, too.
    inspect.signature(handler).bind(*extra, *positional)


def test_the_table_is_well_formed() -> None:
    """Targets once each, known kinds, one line of reason."""
    targets = [one.target for one in ALL_HOOKS]
    assert len(set(targets)) == len(targets)
    assert {one.kind for one in ALL_HOOKS} <= {"before", "after", "around"}
    for one in (*ALL_HOOKS, *STAND_INS):
        assert one.why and one.gone and "\n" not in one.why + one.gone, one.target
    assert {*CLI_HOOKS, *LAUNCHER_HOOKS, *SCHEDULER_HOOKS, *SHARING_HOOKS} == set(ALL_HOOKS)
    assert hooks.problems() == []


@pytest.mark.parametrize(
    "target",
    [
        "server_args.ServerArgs.add_cly_args",
        "server_args.ServerArg.add_cli_args",
        "no_such_module.thing",
        "managers.no_such_module.Thing.method",
        "server_args.ServerArgs..add_cli_args",
    ],
)
def test_a_missing_target_is_reported(target: str) -> None:
    """With its whole path, in one line."""
    text = hook(target).problem()
    assert text is not None and f"sglang.srt.{target} is missing" in text and "\n" not in text


@pytest.mark.parametrize(
    "target", ["server_args.ServerArgs.engine_info_bootstrap_url", "server_args.ZMQ_TCP_PORT_DELTA"]
)
def test_a_target_that_is_no_function_is_reported(target: str) -> None:
    """A method that became a property or a number: a line, not a traceback."""
    text = hook(target, ("self",)).problem()
    assert text is not None and f"sglang.srt.{target}" in text


@pytest.mark.parametrize(
    "parameters",
    [("self",), ("cls", "namespace"), ("args",), ("args", "cls"), ("cls", "args", "more")],
)
def test_other_parameters_are_reported(parameters: tuple[str, ...]) -> None:
    """Renamed, reordered, missing."""
    text = hook("server_args.ServerArgs.from_cli_args", parameters).problem()
    assert text is not None and "from_cli_args takes ('cls', 'args')" in text
    assert str(parameters) in text


def test_a_target_that_is_already_hooked_keeps_its_signature() -> None:
    """The doctor and a second engine in one process look below the hooks that are in place."""
    from sglang.srt.plugins import load_plugins

    load_plugins()
    assert hooks.problems() == []


def test_registering_twice_hooks_once(registry: Any) -> None:
    """SGLang's launcher and its engine both load plugins."""
    for _ in range(3):
        hooks.register(CLI_HOOKS)
        hooks.register(LAUNCHER_HOOKS)
    expected = {one.path: [one.kind] for one in (*CLI_HOOKS, *LAUNCHER_HOOKS)}
    assert {
        path: [kind.value for kind, _, _ in entries] for path, entries in registry._hooks.items()
    } == expected


def test_the_log_says_whose_hooks_they_are(
    registry: Any, targets: tuple[Hook, ...], caplog: pytest.LogCaptureFixture
) -> None:
    """Also of those that a launcher puts in place by itself, outside SGLang's loading of plugins."""
    hooks.register(targets)
    with caplog.at_level("INFO"):
        registry.apply_hooks()
    lines = [record.getMessage() for record in caplog.records if "hook(s)" in record.getMessage()]
    assert len(lines) == len(targets)
    assert all("from: plugin=kara, dist=kara-sglang" in line for line in lines)


def test_other_plugins_hooks_on_the_same_target_stay(registry: Any) -> None:
    """Ours is added to theirs, not taken for it."""
    from sglang.srt.plugins.hook_registry import HookType

    def theirs(*_: Any) -> None:
        pass

    path = CLI_HOOKS[0].path
    registry.register(path, theirs, HookType.AFTER)
    hooks.register(CLI_HOOKS)
    hooks.register(CLI_HOOKS)
    assert [handler for _, handler, _ in registry._hooks[path]] == [
        theirs,
        hooks._handler(CLI_HOOKS[0]),
    ]


def test_missing_names_what_does_not_call_us(registry: Any, targets: tuple[Hook, ...]) -> None:
    """``apply_hooks`` only logs its failures: what counts is what the targets call now."""
    assert hooks.missing(targets) == [one.path for one in targets]
    hooks.register(targets)
    assert hooks.missing(targets) == [one.path for one in targets], "registered, not applied"
    registry.apply_hooks()
    assert hooks.missing(targets) == []
    gone = dataclasses.replace(targets[0], target="kara_stand_in.Thing.gone")
    assert hooks.missing((*targets, gone)) == [gone.path]


@pytest.mark.parametrize("late", [False, True])
def test_another_plugin_on_the_same_target(
    late: bool, registry: Any, targets: tuple[Hook, ...]
) -> None:
    """Beside ours it does no harm; applied before ours was registered, SGLang would skip ours."""
    from sglang.srt.plugins.hook_registry import HookType

    def theirs(original: Any, *args: Any) -> Any:
        return original(*args)

    registry.register(targets[0].path, theirs, HookType.AROUND)
    if late:
        registry.apply_hooks()
    hooks.register(targets)
    registry.apply_hooks()
    assert hooks.missing(targets) == ([targets[0].path] if late else [])


# -- where releases differ ---------------------------------------------------------------------------


def test_a_hook_without_its_target_gives_way_to_its_stand_ins(targets: tuple[Hook, ...]) -> None:
    """As what SGLang has decides; a target with other parameters is a problem all the same."""
    gone = hook("kara_stand_in.Thing.gone")
    one = dataclasses.replace(gone, otherwise=targets[:2])
    assert hooks.fitting((one, targets[2])) == targets[:3]
    assert hooks.problems((one,)) == []
    there = dataclasses.replace(targets[3], otherwise=targets[:2])
    assert hooks.fitting((there,)) == (there,)
    [line] = hooks.problems((dataclasses.replace(there, parameters=("other",)),))
    assert "takes ()" in line
    worse = dataclasses.replace(one, otherwise=(gone,))
    [line] = hooks.problems((worse,))
    assert line.startswith("sglang.srt.kara_stand_in.Thing.gone is missing")


# -- what parent and child agree on --------------------------------------------------------------------


def test_the_digest_is_that_of_the_table() -> None:
    """The same in every process; another one for any other table."""
    number = hooks.digest(SCHEDULER_HOOKS)
    assert number == hooks.digest(tuple(dataclasses.replace(one) for one in SCHEDULER_HOOKS))
    first = SCHEDULER_HOOKS[0]
    others = [
        SCHEDULER_HOOKS[1:],
        (*SCHEDULER_HOOKS, hook("server_args.ServerArgs.url")),
        (dataclasses.replace(first, target=first.target + "s"), *SCHEDULER_HOOKS[1:]),
        (dataclasses.replace(first, kind="before"), *SCHEDULER_HOOKS[1:]),
        (dataclasses.replace(first, handler="scheduler.runtime:other"), *SCHEDULER_HOOKS[1:]),
        (),
    ]
    digests = [hooks.digest(other) for other in others]
    assert number not in digests and len(set(digests)) == len(digests)


def test_digest_survives_another_interpreter() -> None:
    """It is no hash() of a string: those differ from process to process."""
    import subprocess
    import sys

    code = "from kara_sglang import hooks; print(hooks.digest(hooks.SCHEDULER_HOOKS))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) == hooks.digest(SCHEDULER_HOOKS)


def test_children_without_the_plugin_are_refused() -> None:
    """Any rank that says nothing, or something else, stops the server."""
    ready = hooks.digest(hooks.scheduler_hooks(KaraConfig()))
    good = {handshake.KEY: ready, "max_total_num_tokens": 1}
    requests.check_children([{}])  # compression is off: stock children are right
    plugin.set_launched(KaraConfig())
    requests.check_children([good])
    requests.check_children([good, dict(good)])
    for infos in ([{}], [good, {}], [{handshake.KEY: None}], [{handshake.KEY: ready + 1}]):
        with pytest.raises(RuntimeError, match=r"^kv-compress: error: "):
            requests.check_children(infos)
    # A child that shares compressed prefixes has more hooks.
    plugin.set_launched(KaraConfig(prefix_reuse="compressed"))
    with pytest.raises(RuntimeError, match=r"^kv-compress: error: "):
        requests.check_children([good])
    every = hooks.digest(hooks.scheduler_hooks(KaraConfig(prefix_reuse="compressed")))
    requests.check_children([{handshake.KEY: every}])


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


# -- which process gets which hooks --------------------------------------------------------------------


@pytest.mark.parametrize("child", [False, True])
@pytest.mark.parametrize("on", [None, "exact", "compressed"])
def test_run_time_hooks_only_where_they_are_needed(
    child: bool, on: str | None, registry: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Children of a compressing server; nobody else pays for them."""
    import sglang.srt.managers.scheduler  # noqa: F401  # what a scheduler's process has imported

    if on:
        plugin.activate(KaraConfig(prefix_reuse=on))
    parent = object() if child else None
    monkeypatch.setattr(plugin.multiprocessing, "parent_process", lambda: parent)
    plugin.register()
    expected = [*CLI_HOOKS, *(hooks.fitting(SCHEDULER_HOOKS) if child and on else ())]
    expected += SHARING_HOOKS if child and on == "compressed" else ()
    assert sorted(path for path, entries in registry._hooks.items() if entries) == sorted(
        one.path for one in expected
    )


@pytest.mark.parametrize("allowed", ["other", "other,more", " karas "])
def test_a_white_list_without_us_is_refused(allowed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang's children would not load the plugin."""
    monkeypatch.setenv("SGLANG_PLUGINS", allowed)
    [line] = plugin.hook_launcher()
    assert f"SGLANG_PLUGINS={allowed}" in line and "add kara to it or unset it" in line


@pytest.mark.parametrize("allowed", ["", "kara", "other, kara"])
def test_a_white_list_with_us_or_none_passes(
    allowed: str, registry: Any, targets: tuple[Hook, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the parent's hooks are applied at once."""
    monkeypatch.setenv("SGLANG_PLUGINS", allowed)
    monkeypatch.setattr(hooks, "CLI_HOOKS", targets[:1])
    monkeypatch.setattr(hooks, "LAUNCHER_HOOKS", targets[1:])
    hooks.register(hooks.CLI_HOOKS)
    assert plugin.hook_launcher() == []
    assert hooks.missing(targets) == []


def test_hooks_that_cannot_be_applied_are_reported(
    registry: Any, targets: tuple[Hook, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """SGLang logs the exception and goes on; the parent refuses."""

    def broken(target: str, entries: list) -> None:
        raise RuntimeError("cannot")

    monkeypatch.setattr(registry, "_apply_target", broken)
    monkeypatch.setattr(hooks, "CLI_HOOKS", targets[:1])
    monkeypatch.setattr(hooks, "LAUNCHER_HOOKS", targets[1:])
    lines = plugin.hook_launcher()
    assert len(lines) == len(targets)
    assert all("could not be put in place" in line for line in lines)


def test_targets_that_do_not_fit_are_reported_by_the_parent(
    registry: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those of the children: the launcher knows before it starts one. Nothing is hooked then."""
    monkeypatch.setattr(hooks, "problems", lambda: ["sglang.srt.x is missing"])
    assert plugin.hook_launcher() == ["sglang.srt.x is missing"]
    assert not any(registry._hooks.values())


def test_attributes_that_do_not_fit_are_reported_by_the_parent(
    registry: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Like hooks: before any process is started, and nothing is hooked then."""
    gone = surface.Used("managers.schedule_batch.Req", ("no_such_attribute",))
    monkeypatch.setattr(surface, "SURFACE", (*surface.SURFACE, gone))
    assert plugin.hook_launcher() == [
        "sglang.srt.managers.schedule_batch.Req.no_such_attribute is missing"
    ]
    assert not any(registry._hooks.values())
