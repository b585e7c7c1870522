"""The table of hooks against the installed SGLang, and what happens when they do not fit."""

from __future__ import annotations

import dataclasses
import inspect
import pkgutil
import sys
from typing import Any

import pytest

from kara_sglang import hooks
from kara_sglang.hooks import ALL_HOOKS, CLI_HOOKS, LAUNCHER_HOOKS, PREFILL_HOOKS, SCHEDULER_HOOKS, Hook

STAND_INS = tuple(stand_in for one in ALL_HOOKS for stand_in in one.otherwise)


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
    assert {*CLI_HOOKS, *LAUNCHER_HOOKS, *SCHEDULER_HOOKS, *PREFILL_HOOKS} == set(ALL_HOOKS)
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

    code = "from kara_sglang import hooks; print(hooks.digest(hooks.SCHEDULER_HOOKS))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) == hooks.digest(SCHEDULER_HOOKS)
