"""Entry point of the group ``sglang.srt.plugins``: what SGLang calls in each of its processes.

The environment variable ``SGLANG_KV_COMPRESS`` is the one place that says whether compression is on
and how; flags and :func:`kara_sglang.configure` write it, the processes that SGLang starts inherit it.
Every process that loads plugins gets the flags. A process that launches a server adds the hooks that
check requests and shape answers; a scheduler gets the hooks of the pass when the variable is set. Off
costs nothing.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import sys
from importlib.metadata import entry_points

from kara_sglang import hooks
from kara_sglang.compat import surface
from kara_sglang.compat.source import Source
from kara_sglang.config import ENV, KaraConfig

ENTRY_POINT = hooks.PLUGIN
_SCHEDULING = ("scheduler", "data_parallel_controller")

_launched: KaraConfig | None = None

_settled: tuple[str | None, KaraConfig] | None = None
"""What :func:`settle` left in the environment last, and what had been asked for."""


def register() -> None:
    """Called by SGLang's ``load_plugins()`` once per process, which then applies the hooks."""
    hooks.register(hooks.CLI_HOOKS)
    # A process that schedules has imported its part of SGLang by now; others (the detokenizer) stay
    # light. Were this ever wrong, the launcher would see that a scheduler is not hooked, and refuse.
    schedules = any(f"sglang.srt.managers.{name}" in sys.modules for name in _SCHEDULING)
    config = active() if multiprocessing.parent_process() is not None and schedules else None
    if config is not None:
        hooks.register(hooks.scheduler_hooks())
        if config.shares_prefixes:
            from kara_sglang.radix_integration.compressed import register_backend

            register_backend(hooks.CACHE_BACKEND)


def active() -> KaraConfig | None:
    """The settings in force; None: compression is off.

    Raises
    ------
    ValueError
        Where the environment variable is malformed.
    """
    return _parsed(os.environ.get(ENV))


@functools.lru_cache(maxsize=1)
def _parsed(_text: str | None) -> KaraConfig | None:
    return KaraConfig.from_env()


def activate(config: KaraConfig | None) -> None:
    """Switch compression on (or, with None, off) for servers started from this process."""
    global _settled
    _settled = None
    if config is None:
        os.environ.pop(ENV, None)
    else:
        os.environ[ENV] = config.to_json()


def not_loaded() -> list[str]:
    """Why an engine built in this process would not see the settings; loads SGLang's plugins."""
    from sglang.srt.plugins import load_plugins

    if unseen := invisible():
        return unseen
    load_plugins()
    return [f"hook {path} could not be put in place" for path in hooks.missing(hooks.CLI_HOOKS)]


def hook_launcher() -> list[str]:
    """Install the hooks of a process that launches a server.

    Returns
    -------
    list of str
        Why this process, or the schedulers it is about to start, would run without the plugin.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry

    if unseen := invisible():
        return unseen
    unfit = hooks.problems() + surface.problems(Source.installed())
    if not unfit:
        hooks.register(hooks.LAUNCHER_HOOKS)
        HookRegistry.apply_hooks()
        unfit = [
            f"hook {path} could not be put in place; does another plugin hold it?"
            for path in hooks.missing((*hooks.CLI_HOOKS, *hooks.LAUNCHER_HOOKS))
        ]
    return unfit


def launched() -> KaraConfig | None:
    """Settings of the server that this process has launched; None: without compression."""
    return _launched


def set_launched(config: KaraConfig | None) -> None:
    """Bind the settings to the server: later changes of the environment do not concern it."""
    global _launched
    _launched = config


def settle(config: KaraConfig | None) -> None:
    """Bind settings to the server that is about to start, and hand them to its schedulers: those asked
    for, with what was left open settled; None where that server has nothing to compress."""
    global _settled
    before = asked()
    assert before is not None
    activate(config)
    _settled = os.environ.get(ENV), before
    set_launched(config)


def asked() -> KaraConfig | None:
    """The settings that the next server is asked to have; what an earlier one settled is open again."""
    if _settled is not None and os.environ.get(ENV) == _settled[0]:
        return _settled[1]
    return active()


def invisible() -> list[str]:
    """Why SGLang's processes would not load the plugin, one line each."""
    allowed = [name.strip() for name in os.environ.get("SGLANG_PLUGINS", "").split(",")]
    if any(allowed) and ENTRY_POINT not in allowed:
        return [
            f"SGLANG_PLUGINS={os.environ['SGLANG_PLUGINS']} keeps the plugin out of SGLang's "
            f"processes; add {ENTRY_POINT} to it or unset it"
        ]
    if not any(e.name == ENTRY_POINT for e in entry_points(group="sglang.srt.plugins")):
        return [
            "kara-sglang is not installed in this environment, so SGLang does not see it; "
            "pip install kara-sglang (or . in a checkout)"
        ]
    return []
