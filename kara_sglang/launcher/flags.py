"""The flags: how they enter SGLang's parser, how they are read, and when the launcher refuses them."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import sys
import typing
from collections.abc import Callable
from typing import Any, NoReturn

from kara_sglang import config as settings
from kara_sglang import hooks, plugin, prefix_reuse
from kara_sglang.checks import shown
from kara_sglang.compat import sliding_window, versions
from kara_sglang.config import CONFIG_KEYS, NONE, PRESETS, SELECTORS, KaraConfig
from kara_sglang.launcher import refusals
from kara_sglang.trace.format import prepare_folder

logger = logging.getLogger(__name__)

_FROM_CLI = "_kv_compress_from_cli"
"""Mark on a ``ServerArgs`` record: errors end the process with one line instead of an exception."""


def add_cli_args(_result: None, parser: argparse.ArgumentParser) -> None:
    """AFTER ``ServerArgs.add_cli_args``.

    No flag has a default here, so that an absent one can fall back on the environment, and none
    has a type: argparse would answer a mistake with SGLang's whole usage text.
    """
    group = parser.add_argument_group("KV-cache compression (kara_sglang)")
    for setting in dataclasses.fields(KaraConfig):
        about = setting.metadata
        if about["flag"] is None:
            continue
        default = f"Default: {about['absent'] or setting.default}."
        if setting.name == "selector":  # without it there is no compression
            default = f"Default: {NONE}, or what the environment variable {settings.ENV} says."
        unit = "" if about["unit"] in ("name", "folder") else f" Unit: {about['unit']}."
        group.add_argument(
            about["flag"],
            metavar=_metavar(setting),
            help=f"{plain(about['text'])}{unit} {default}".replace("%", "%%"),
        )
    keys = ", ".join(f"{key} ({json.dumps(getattr(KaraConfig(), key))})" for key in CONFIG_KEYS)
    group.add_argument(
        "--kv-compress-config",
        metavar="JSON",
        help="All other settings, as a JSON object or the path of a file that holds one. Keys "
        f"(defaults): preset ({' or '.join(PRESETS)}), {keys}. See docs/configuration.md.".replace(
            "%", "%%"
        ),
    )


def _metavar(setting: dataclasses.Field[Any]) -> str:
    """The choices, or the unit."""
    kind = typing.get_type_hints(KaraConfig)[setting.name]
    choices = (NONE, *SELECTORS) if setting.name == "selector" else ()
    if typing.get_origin(kind) is typing.Literal:
        choices = typing.get_args(kind)
    return "{" + ",".join(choices) + "}" if choices else setting.metadata["unit"].split()[0].upper()


def plain(text: str) -> str:
    """Markdown without its marks; the text has no links."""
    return text.replace("`", "")


def from_cli_args(record: Any, *args: Any, **_kwargs: Any) -> None:
    """AFTER ``ServerArgs.from_cli_args(cls, args)``: read our flags, switch the plugin on or off."""
    namespace = args[-1]
    setattr(record, _FROM_CLI, True)
    try:
        config = read_flags(namespace)
        if config is not None and (lines := refusals.of_entry(record)):
            raise ValueError("; ".join(lines))
        plugin.activate(config)
    except ValueError as error:
        fail(str(error))


def read_flags(namespace: argparse.Namespace) -> KaraConfig | None:
    """The settings that the flags ask for, over those of the environment; None: compression is off.

    Raises
    ------
    ValueError
        One line that names the flag.
    """
    selector = getattr(namespace, "kv_compress", None)
    explicit: dict[str, Any] = {}
    kinds = {"window": int, "retain": float, "query_mem_gb": float, "prefix_reuse": None, "trace": None}
    for key, kind in kinds.items():
        text = getattr(namespace, f"kv_compress_{key}", None)
        if text is not None:
            explicit[key] = text if kind is None else _number(settings.flag_of(key), text, kind)
    text = getattr(namespace, "kv_compress_config", None)
    if text is not None:
        object_settings = settings.read_config_object(text)
        for key in object_settings:
            if key not in (*CONFIG_KEYS, "preset"):
                hint = f"; use {settings.flag_of(key)}" if key in settings.FLAGS else ""
                known = ", ".join(["preset", *CONFIG_KEYS])
                raise ValueError(
                    f"--kv-compress-config: unknown key {key!r}{hint}; known keys: {known}"
                )
        explicit |= object_settings
    if selector == NONE:
        return None
    if selector is not None:
        settings.check_selector(settings.flag_of("selector"), selector, NONE)
    inherited = settings.environment_settings()
    if selector is None and inherited is None:
        if explicit:
            given = ", ".join(sorted({settings.flag_of(key).split(":")[0] for key in explicit}))
            raise ValueError(
                f"{given} has no effect without --kv-compress; add --kv-compress kara (or another "
                "selector), or leave it out"
            )
        return None
    # A preset that is given here wins over what the environment says of the same settings.
    preset = settings.PRESETS.get(str(explicit.get("preset")), {})
    merged = (inherited or {}) | preset | explicit
    if selector is not None:
        merged["selector"] = selector
    return KaraConfig.from_settings(merged)


def _number(flag: str, text: Any, kind: type[int] | type[float]) -> int | float:
    try:
        return kind(text)
    except (TypeError, ValueError):
        what = "a whole number" if kind is int else "a number"
        raise ValueError(f"{flag} must be {what}, got {shown(text)}") from None


def check_server_args(_result: None, record: Any) -> None:
    """AFTER ``ServerArgs.check_server_args``: the last stop before any process is started."""
    from sglang.srt.arg_groups.model_override_base import model_config_of
    from sglang.srt.arg_groups.overrides import declare_resolution, resolving_view

    try:
        plugin.set_launched(None)
        asked = plugin.asked()
        if asked is None:
            return
        resolved = resolving_view(record)
        if resolved.disaggregation_mode == "prefill" and not resolved.enable_pd_role_switch:
            logger.warning(
                "kv-compress: a prefill server (--disaggregation-mode prefill) writes no answers, so "
                "--kv-compress does nothing here; the decode server compresses."
            )
            plugin.settle(None)
            return
        checks: tuple[Callable[[], list[str]], ...] = (
            lambda: versions.of_version(asked),
            plugin.hook_launcher,
            lambda: refusals.of_flags(resolved) + refusals.of_sharing(resolved, asked),
            lambda: refusals.of_model_config(model_config_of(record)),
            lambda: refusals.of_window_pool(resolved, model_config_of(record), asked),
            lambda: refusals.of_rotary(model_config_of(record), asked),
        )
        for refused in checks:
            if lines := refused():
                raise ValueError("; ".join(lines))
        model = model_config_of(record)
        config = asked.reaching(sliding_window.longest(model))
        config.check_page_size(resolved.page_size)
        config.check_context(model.context_len, resolved.page_size)
        if config.trace is not None:
            prepare_folder(config.trace)
        settled = prefix_reuse.settled(config, resolved, model)
        if settled.shares_prefixes:
            declare_resolution(record, "kara_sglang", radix_cache_backend=hooks.CACHE_BACKEND)
        versions.warn_if_untested()
        plugin.settle(settled)
    except ValueError as error:
        if not getattr(record, _FROM_CLI, False):
            raise
        fail(str(error))


def fail(message: str) -> NoReturn:
    """End the launcher with one clear line, the last that it says, and exit code 2."""
    logging.disable(logging.CRITICAL)  # SGLang would log that it ends its children; there are none
    print(f"kv-compress: error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)
