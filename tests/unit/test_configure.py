"""Where settings come from: JSON, files, the environment, ``configure``."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kara_sglang
from kara_sglang import config as module
from kara_sglang import plugin
from kara_sglang.config import ENV, PRESETS, SELECTORS, KaraConfig


def typed_settings() -> st.SearchStrategy[dict[str, Any]]:
    ranges = {
        "selector": st.sampled_from(SELECTORS),
        "window": st.integers(1, 65536),
        "retain": st.floats(0.001, 1),
        "query_mem_gb": st.none() | st.floats(0.001, 100) | st.integers(1, 9),
        "delay": st.integers(0, 65536),
        "delay_votes": st.booleans(),
        "ahead": st.booleans(),
        "score": st.sampled_from(["sum", "sum_v", "l2", "l2_v", "l2_v4", "l2_v4_k"]),
        "neighbours": st.integers(0, 127).map(lambda reach: 2 * reach + 1),
        "chunk_budget": st.floats(0, 1),
        "chunk_width": st.integers(2, 100),
        "chunk_quantile": st.floats(0, 1) | st.integers(0, 1),
        "last_queries": st.integers(1, 100),
        "granularity": st.sampled_from(["head", "layer"]),
        "query_heads": st.sampled_from(["auto", "all", "mean"]),
        "query_dtype": st.sampled_from(["fp4", "fp8", "model"]),
        "policy": st.sampled_from(["periodic", "threshold", "pressure"]),
        "period": st.integers(1, 65536),
        "threshold": st.integers(0, 10**6),
        "min_pool_usage": st.floats(0, 1),
        "max_requests_per_pass": st.integers(1, 100),
        "seed": st.integers(0, 2**31 - 1),
        "debug_checks": st.booleans(),
        "untested_sglang": st.booleans(),
        "preset": st.sampled_from(list(PRESETS)),
    }
    return st.fixed_dictionaries({}, optional=ranges)


@settings(max_examples=100)
@given(typed_settings())
def test_children_read_what_the_parent_wrote(changes: dict[str, Any]) -> None:
    """activate -> environment -> from_env is the identity, also in the process that wrote it."""
    config = KaraConfig.from_settings(changes)
    plugin.activate(config)
    assert KaraConfig.from_env() == plugin.active() == config
    assert json.loads(os.environ[ENV])["selector"] == config.selector
    plugin.activate(None)
    assert ENV not in os.environ and plugin.active() is None


@pytest.mark.parametrize(
    "text,expected",
    [
        ("", None),
        ("  ", None),
        ("none", None),
        ('{"selector": "none", "window": 64}', None),
        ("recent", {"selector": "recent"}),
        (" kara ", {}),
        ("{}", {}),
        ('{"window": 64, "preset": "paper"}', {"window": 64, "preset": "paper"}),
    ],
)
def test_the_environment_variable(
    text: str, expected: dict[str, Any] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A selector's name or a JSON object; unset, empty and ``none`` are off."""
    monkeypatch.setenv(ENV, text)
    wanted = None if expected is None else KaraConfig.from_settings(expected)
    assert KaraConfig.from_env() == plugin.active() == wanted


@pytest.mark.parametrize("text", ["", "none", '{"selector": "none"}'])
def test_a_variable_that_says_off_hooks_no_child(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With ``sglang.Engine`` nobody rewrites the variable: the scheduler's process sees ``none``."""
    registered: list[Any] = []
    monkeypatch.setenv(ENV, text)
    monkeypatch.setattr(plugin.multiprocessing, "parent_process", lambda: object())
    monkeypatch.setitem(sys.modules, "sglang.srt.managers.scheduler", plugin)
    monkeypatch.setattr(plugin.hooks, "register", lambda table: registered.extend(table))
    plugin.register()
    assert registered == list(plugin.hooks.CLI_HOOKS)


@pytest.mark.parametrize(
    "text,message",
    [
        ("kra", "--kv-compress must be one of kara, causal"),
        ('{"window": 64', "SGLANG_KV_COMPRESS: not a JSON object"),
        ("{'window': 64}", "SGLANG_KV_COMPRESS: not a JSON object"),
        ('{"windw": 64}', "unknown key 'windw'"),
        ('{"retain": 2}', "--kv-compress-retain must be"),
        ('{"retain": NaN}', "--kv-compress-retain must be"),
        ('{"window": ' + "9" * 5000 + "}", "SGLANG_KV_COMPRESS: not a JSON object"),
        ('{"a":' * 100_000, "SGLANG_KV_COMPRESS: not a JSON object"),
        ("[]", "--kv-compress must be one of"),
    ],
)
def test_a_malformed_environment_variable(
    text: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused with one line, every time it is read."""
    monkeypatch.setenv(ENV, text)
    for read in (KaraConfig.from_env, plugin.active, plugin.active):
        with pytest.raises(ValueError) as caught:
            read()
        assert message in str(caught.value) and "\n" not in str(caught.value)


def test_the_config_flag_takes_an_object_or_a_file(tmp_path: Path) -> None:
    """The same settings either way, leading space included."""
    text = ' {"delay": 3}\n'
    file = tmp_path / "settings.json"
    file.write_text(text)
    assert module.read_config_object(text) == module.read_config_object(str(file)) == {"delay": 3}


@pytest.mark.parametrize(
    "content,message",
    [
        (b"", "not a JSON object"),
        (b"[1]", "expected a JSON object, got list"),
        (b'"x"', "expected a JSON object, got str"),
        (b"null", "expected a JSON object, got NoneType"),
        (b'{"delay": }', "not a JSON object"),
        (b'{"delay": "\xff"}', ""),
        (b"\xff\xfe{\x00}\x00", ""),
    ],
)
def test_files_that_hold_no_object(content: bytes, message: str, tmp_path: Path) -> None:
    """The line names the flag and the file, also for bytes that are no text."""
    file = tmp_path / "settings.json"
    file.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        module.read_config_object(str(file))
    text = str(caught.value)
    assert "--kv-compress-config" in text and str(file) in text and message in text
    assert "\n" not in text


@pytest.mark.parametrize("value", ["", "no-such-file.json", "/", "[]", "delay=3", "a\0b", "x" * 5000])
def test_neither_object_nor_file(value: str) -> None:
    """A folder, a missing file, a list: one line that names the flag."""
    with pytest.raises(ValueError) as caught:
        module.read_config_object(value)
    assert str(caught.value).startswith("--kv-compress-config: ")
    assert "neither a JSON object nor a readable file" in str(caught.value)


def test_configure_switches_on_and_off() -> None:
    """For ``sglang.Engine``: what it returns is what the children will read."""
    config = kara_sglang.configure("recent", window=64, retain=1)
    assert config == plugin.active() == KaraConfig(selector="recent", window=64, retain=1.0)
    assert kara_sglang.configure(preset="paper") == KaraConfig.from_settings({"preset": "paper"})
    assert kara_sglang.configure("none") is None
    assert plugin.active() is None and ENV not in os.environ


@pytest.mark.parametrize(
    "selector,changes",
    [
        ("kra", {}),
        (None, {}),
        ("kara", {"windw": 64}),
        ("kara", {"window": "64"}),
        ("kara", {"retain": 0}),
        ("kara", {"query_mem_gb": 0}),
        ("kara", {"query_mem_gb": math.inf}),
        ("kara", {"preset": "mine"}),
        ("kara", {"preset": []}),
        ("kara", {"preset": "paper", "delay": -1}),
        ("none", {"windw": 64}),
        ("none", {"retain": 2}),
    ],
)
def test_configure_refuses_and_changes_nothing(selector: Any, changes: dict[str, Any]) -> None:
    """``ValueError``, and the settings of before stay in force."""
    before = kara_sglang.configure("recent", window=64)
    text = os.environ[ENV]
    with pytest.raises(ValueError):
        kara_sglang.configure(selector, **changes)
    assert os.environ[ENV] == text and plugin.active() == before


def test_the_record_cannot_be_changed() -> None:
    """All processes of a server agree on it."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        KaraConfig().window = 1
