"""The flags: how they are shown, read, combined with the environment and a config file, and refused."""

from __future__ import annotations

import argparse
import json
import os
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from flags_read import failed_line

from kara_sglang import plugin
from kara_sglang.config import CONFIG_KEYS, ENV, SELECTORS, KaraConfig
from kara_sglang.kernels.selectors import REGISTRY
from kara_sglang.launcher import flags


@pytest.fixture
def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="sglang serve")
    flags.add_cli_args(None, made)
    return made


def read(parser: argparse.ArgumentParser, *words: str) -> KaraConfig | None:
    return flags.read_flags(parser.parse_args(words))


def refused(parser: argparse.ArgumentParser, *words: str) -> str:
    with pytest.raises(ValueError) as caught:
        read(parser, *words)
    text = str(caught.value)
    assert "\n" not in text and "--kv-compress" in text
    return text


def test_help_shows_units_and_defaults(parser: argparse.ArgumentParser) -> None:
    """Each flag with its unit and default; the config flag with every key and its default."""
    text = " ".join(parser.format_help().split())
    for piece in (
        *(f"--kv-compress {{{','.join(['none', *REGISTRY])}}}", ENV),
        *("--kv-compress-window TOKENS", "multiple of the page size.", "Unit: tokens. Default: 512."),
        *("--kv-compress-retain SHARE", "0 < share <= 1", "Unit: share. Default: 0.5."),
        *("--kv-compress-query-mem-gb GIB", "Unit: GiB per rank. Default: as needed."),
        *("--kv-compress-trace FOLDER", "a file per request", "Default: no files."),
        *("--kv-compress-config JSON", "the path of a file", "preset (default or paper)"),
    ):
        assert piece in text, piece
    default = KaraConfig()
    for key in CONFIG_KEYS:
        assert f"{key} ({json.dumps(getattr(default, key))})" in text


def test_flags_do_not_collide_with_sglangs(server_defaults: dict[str, Any]) -> None:
    """No field of ServerArgs begins like ours, and ours are no prefix of theirs."""
    assert not [name for name in server_defaults if name.startswith("kv_compress")]


def test_without_flags_compression_is_off(parser: argparse.ArgumentParser) -> None:
    """Also for a namespace that never saw our parser, as other entry points of SGLang make."""
    assert read(parser) is None
    assert flags.read_flags(Namespace()) is None


@pytest.mark.parametrize("selector", SELECTORS)
def test_a_selector_alone(selector: str, parser: argparse.ArgumentParser) -> None:
    """The one flag of the README."""
    assert read(parser, "--kv-compress", selector) == KaraConfig(selector=selector)


def test_all_flags(parser: argparse.ArgumentParser) -> None:
    """Every flag and a config object."""
    words = ["--kv-compress", "snapkv", "--kv-compress-window", "256", "--kv-compress-retain", "0.25"]
    words += ["--kv-compress-query-mem-gb=0.5", "--kv-compress-config", '{"last_queries": 8}']
    words += ["--kv-compress-trace", "7"]
    assert read(parser, *words) == KaraConfig(
        selector="snapkv", window=256, retain=0.25, query_mem_gb=0.5, last_queries=8, trace="7"
    )


def test_a_config_file(parser: argparse.ArgumentParser, tmp_path: Path) -> None:
    """The same object from a file; a preset in it is applied before its other keys."""
    file = tmp_path / "settings.json"
    file.write_text('{"delay": 5, "preset": "paper"}')
    config = read(parser, "--kv-compress", "kara", "--kv-compress-config", str(file))
    assert config == KaraConfig.from_settings({"preset": "paper", "delay": 5})


@pytest.mark.parametrize("text", ["kara", "recent", '{"selector": "recent", "window": 64, "seed": 3}'])
def test_the_environment_alone(
    text: str, parser: argparse.ArgumentParser, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No flag at all: the variable decides."""
    monkeypatch.setenv(ENV, text)
    config = read(parser)
    assert config == KaraConfig.from_env() and config is not None


def test_flags_over_the_environment(
    parser: argparse.ArgumentParser, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is given on the command line wins; what is not comes from the variable."""
    monkeypatch.setenv(ENV, '{"selector": "recent", "window": 64, "retain": 0.25, "seed": 3}')
    assert read(parser, "--kv-compress-window", "128") == KaraConfig(
        selector="recent", window=128, retain=0.25, seed=3
    )
    assert read(parser, "--kv-compress", "random", "--kv-compress-config", '{"seed": 4}') == KaraConfig(
        selector="random", window=64, retain=0.25, seed=4
    )
    assert read(parser, "--kv-compress", "none") is None


def test_a_preset_on_the_command_line_wins_over_the_environment(
    parser: argparse.ArgumentParser, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also over settings that :func:`configure` wrote out in full."""
    paper = KaraConfig.from_settings({"preset": "paper"})
    words = ("--kv-compress-config", '{"preset": "paper"}')
    monkeypatch.setenv(ENV, "kara")
    assert read(parser, *words) == paper
    plugin.activate(KaraConfig())
    assert read(parser, *words) == paper
    monkeypatch.setenv(ENV, '{"selector": "kara", "delay": 32}')
    assert read(parser, *words) == paper


@pytest.mark.parametrize("text", ["none", "", '{"selector": "none"}'])
def test_the_environment_switched_off(
    text: str, parser: argparse.ArgumentParser, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``none`` is off; a selector on the command line switches on again."""
    monkeypatch.setenv(ENV, text)
    assert read(parser) is None
    assert read(parser, "--kv-compress", "recent") == KaraConfig(selector="recent")
    assert "has no effect without --kv-compress" in refused(parser, "--kv-compress-retain", "0.5")


def test_none_on_the_command_line_ignores_a_broken_environment(
    parser: argparse.ArgumentParser, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way out of a bad variable that is not one's own."""
    monkeypatch.setenv(ENV, '{"windw"')
    assert read(parser, "--kv-compress", "none") is None


@pytest.mark.parametrize(
    "words,message",
    [
        (["--kv-compress-window", "64"], "--kv-compress-window has no effect without --kv-compress"),
        (["--kv-compress-retain", "0.5"], "--kv-compress-retain has no effect"),
        (["--kv-compress-query-mem-gb", "1"], "--kv-compress-query-mem-gb has no effect"),
        (["--kv-compress-trace", "x"], "--kv-compress-trace has no effect"),
        (["--kv-compress", "foo"], "random, identity, none, got 'foo'"),
        (["--kv-compress", "kara", "--kv-compress-trace", ""], "--kv-compress-trace must be"),
        (["--kv-compress-config", '{"delay": 0}'], "--kv-compress-config has no effect"),
        (
            ["--kv-compress-window", "64", "--kv-compress-config", '{"delay": 0, "seed": 1}'],
            "--kv-compress-config, --kv-compress-window has no effect",
        ),
        (["--kv-compress", "kara", "--kv-compress-window", "0"], "--kv-compress-window must be"),
        (["--kv-compress", "kara", "--kv-compress-retain", "1.5"], "--kv-compress-retain must be"),
        (["--kv-compress", "kara", "--kv-compress-retain", "nan"], "--kv-compress-retain must be"),
        (["--kv-compress", "kara", "--kv-compress-query-mem-gb", "0"], "leaves no room"),
        (["--kv-compress", "kara", "--kv-compress-query-mem-gb", "inf"], "query-mem-gb must be"),
        (["--kv-compress", "kara", "--kv-compress-query-mem-gb", "nan"], "query-mem-gb must be"),
        (["--kv-compress", "kara", "--kv-compress-config", '{"dely": 0}'], "unknown key 'dely'"),
        (
            ["--kv-compress", "kara", "--kv-compress-config", '{"window": 64}'],
            "unknown key 'window'; use --kv-compress-window",
        ),
        (
            ["--kv-compress", "kara", "--kv-compress-config", '{"selector": "recent"}'],
            "unknown key 'selector'; use --kv-compress;",
        ),
        (["--kv-compress", "kara", "--kv-compress-config", '{"delay": "0"}'], "delay must be"),
        (["--kv-compress", "kara", "--kv-compress-config", "{delay: 0}"], "not a JSON object"),
        (["--kv-compress", "kara", "--kv-compress-config", "/no/such/file"], "No such file"),
        (["--kv-compress", "kara", "--kv-compress-config", ""], "neither a JSON object nor"),
        (["--kv-compress", "none", "--kv-compress-config", '{"dely": 0}'], "unknown key 'dely'"),
        (["--kv-compress-config", '{"preset": "papre"}', "--kv-compress", "kara"], "one of default"),
        (["--kv-compress-config", '{"preset": ["paper"]}', "--kv-compress", "kara"], "one of default"),
    ],
)
def test_bad_flags(words: list[str], message: str, parser: argparse.ArgumentParser) -> None:
    """One line that names the flag or key and, where there is one, the way out."""
    assert message in refused(parser, *words)


@pytest.mark.parametrize(
    "words",
    [
        ["--kv-compress", "kra"],
        ["--kv-compress", "kara", "--kv-compress-window", "64k"],
        ["--kv-compress", "kara", "--kv-compress-window", "64.0"],
        ["--kv-compress", "kara", "--kv-compress-retain", "half"],
        ["--kv-compress", "kara", "--kv-compress-query-mem-gb", "much"],
    ],
)
def test_mistyped_values_are_one_line_too(words: list[str], parser: argparse.ArgumentParser) -> None:
    """Not argparse's whole usage text: the flag and what it takes."""
    message = refused(parser, *words)
    assert message.startswith(words[-2]) and words[-1] in message and "\n" not in message


def test_fail_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    """What every refusal of the launcher goes through."""
    with pytest.raises(SystemExit) as caught:
        flags.fail("no such thing")
    assert caught.value.code == 2
    assert failed_line(capsys) == "kv-compress: error: no such thing\n"


@pytest.mark.parametrize(
    "given,message",
    [
        ({"kv_compress": "kara", "kv_compress_window": -1}, "--kv-compress-window must be"),
        ({"kv_compress": "kara", "kv_compress_config": '{"x": 1}'}, "unknown key 'x'"),
        ({"kv_compress_retain": 0.5}, "has no effect without --kv-compress"),
        ({"kv_compress": "kara", "kv_compress_query_mem_gb": float("inf")}, "query-mem-gb must be"),
        ({"kv_compress": "kara", "kv_compress_config": '{"preset": {}}'}, "preset must be one of"),
        ({"kv_compress": "kara", "kv_compress_config": '{"chunk_width": 1}'}, "chunk_width must be"),
        (
            {"kv_compress": "kara", "kv_compress_config": f'{{"chunk_budget": {10**400}}}'},
            "chunk_budget must be",
        ),
    ],
)
def test_the_launcher_ends_before_anything_is_loaded(
    given: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """AFTER ``ServerArgs.from_cli_args``: exit code 2, nothing activated."""
    with pytest.raises(SystemExit) as caught:
        flags.from_cli_args(SimpleNamespace(), object, Namespace(**given))
    assert caught.value.code == 2 and message in failed_line(capsys)
    assert ENV not in os.environ


def test_the_launcher_activates_what_it_read(resolved: Any) -> None:
    """And switches off what the environment said, when told to."""
    record = resolved()
    flags.from_cli_args(record, object, Namespace(kv_compress="recent", kv_compress_window=64))
    assert plugin.active() == KaraConfig(selector="recent", window=64)
    flags.from_cli_args(record, object, Namespace(kv_compress="none"))
    assert plugin.active() is None and ENV not in os.environ


@pytest.mark.parametrize(
    "changes,flag",
    [
        ({"use_ray": True}, "--use-ray"),
        ({"grpc_mode": True}, "--grpc-mode"),
        ({"smg_grpc_mode": True}, "--grpc-mode"),
    ],
)
def test_other_ways_into_a_server_end_at_once(
    changes: dict[str, bool], flag: str, resolved: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """They never reach ``check_server_args``."""
    with pytest.raises(SystemExit) as caught:
        flags.from_cli_args(resolved(**changes), object, Namespace(kv_compress="recent"))
    assert caught.value.code == 2 and flag in failed_line(capsys) and ENV not in os.environ
    flags.from_cli_args(resolved(**changes), object, Namespace())
