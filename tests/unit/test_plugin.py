"""Which process gets which hooks, and when the launcher refuses to start."""

from __future__ import annotations

from typing import Any

import pytest

from kara_sglang import hooks, plugin
from kara_sglang.compat import surface
from kara_sglang.config import KaraConfig
from kara_sglang.hooks import CLI_HOOKS, Hook


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
    expected = [*CLI_HOOKS, *(hooks.scheduler_hooks() if child and on else ())]
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
