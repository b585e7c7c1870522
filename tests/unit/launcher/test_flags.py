"""The flags: how they are shown, read, combined with the environment and a config file, and refused."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kara_sglang import plugin
from kara_sglang.compat import versions
from kara_sglang.config import CONFIG_KEYS, ENV, SELECTORS, KaraConfig
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


# -- help ----------------------------------------------------------------------------------------------


def test_help_shows_units_and_defaults(parser: argparse.ArgumentParser) -> None:
    """Each flag with its unit and default; the config flag with every key and its default."""
    text = " ".join(parser.format_help().split())
    for piece in (
        *("--kv-compress {none,kara,causal,snapkv,keys,recent,random,identity}", ENV),
        *("--kv-compress-window TOKENS", "multiple of the page size.", "Unit: tokens. Default: 512."),
        *("--kv-compress-retain SHARE", "0 < share <= 1", "Unit: share. Default: 0.5."),
        *("--kv-compress-query-mem-gb GIB", "Unit: GiB per rank. Default: as needed."),
        *("--kv-compress-trace FOLDER", "a file per request", "Default: no files."),
        *("--kv-compress-config JSON", "the path of a file", "preset (default or paper)"),
    ):
        assert piece in text, piece
    default = KaraConfig()
    for key in CONFIG_KEYS:
        assert f"{key} ({getattr(default, key)})" in text


def test_flags_do_not_collide_with_sglangs(server_defaults: dict[str, Any]) -> None:
    """No field of ServerArgs begins like ours, and ours are no prefix of theirs."""
    assert not [name for name in server_defaults if name.startswith("kv_compress")]


# -- reading -------------------------------------------------------------------------------------------


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


# -- refusals of the command line ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "words,message",
    [
        (["--kv-compress-window", "64"], "--kv-compress-window has no effect without --kv-compress"),
        (["--kv-compress-retain", "0.5"], "--kv-compress-retain has no effect"),
        (["--kv-compress-query-mem-gb", "1"], "--kv-compress-query-mem-gb has no effect"),
        (["--kv-compress-trace", "x"], "--kv-compress-trace has no effect"),
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


def failed_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that ``flags.fail`` prints."""
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith("kv-compress: error: ")
    return captured.err


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


# -- check_server_args: flags and the model's config ---------------------------------------------------


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch, resolved: Any) -> Any:
    """Run the hook on a record whose resolved view has some fields changed."""
    import sglang.srt.arg_groups.model_override_base as base
    import sglang.srt.arg_groups.overrides as overrides

    monkeypatch.setattr(plugin, "hook_launcher", list)
    model = SimpleNamespace(
        is_generation=True,
        is_encoder_decoder=False,
        attention_arch=SimpleNamespace(name="MHA"),
        is_hybrid_swa=False,
        attention_chunk_size=None,
        context_len=8192,
        hf_config=SimpleNamespace(architectures=["LlamaForCausalLM"]),
        hf_text_config=SimpleNamespace(),
    )

    def run(*, cli_record: bool, model_changes: dict[str, Any] | None = None, **changes: Any) -> None:
        record = SimpleNamespace()
        if cli_record:
            setattr(record, flags._FROM_CLI, True)
        vars(model).update(model_changes or {})
        monkeypatch.setattr(overrides, "resolving_view", lambda _: resolved(**changes))
        monkeypatch.setattr(base, "model_config_of", lambda _: model)
        flags.check_server_args(None, record)

    return run


def test_a_supported_server_passes(checked: Any) -> None:
    """With and without compression, from the launcher and for an Engine."""
    checked(cli_record=True)
    plugin.activate(KaraConfig())
    checked(cli_record=True)
    checked(cli_record=False)
    assert plugin.launched() == KaraConfig()
    plugin.activate(None)
    assert plugin.launched() == KaraConfig()
    checked(cli_record=True)
    assert plugin.launched() is None


def test_the_folder_for_traces_is_made(checked: Any, tmp_path: Path) -> None:
    """Before any process is started; a server without compression leaves the disk alone."""
    folder = tmp_path / "deep" / "traces"
    plugin.activate(KaraConfig(trace=str(folder)))
    with pytest.raises(ValueError, match="page size"):
        checked(cli_record=False, page_size=100)
    assert not folder.exists()
    checked(cli_record=True)
    assert folder.is_dir() and plugin.launched().trace == str(folder)


def test_a_folder_for_traces_that_cannot_be_written(
    checked: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The launcher ends with one line that names the flag; an Engine raises."""
    (tmp_path / "file").touch()
    plugin.activate(KaraConfig(trace=str(tmp_path / "file")))
    with pytest.raises(SystemExit) as caught:
        checked(cli_record=True)
    assert caught.value.code == 2
    assert "--kv-compress-trace: cannot write to the folder" in failed_line(capsys)
    with pytest.raises(ValueError, match="--kv-compress-trace: cannot write"):
        checked(cli_record=False)
    assert plugin.launched() is None


def test_off_means_that_nothing_is_checked(checked: Any) -> None:
    """A stock server may use what compression refuses."""
    checked(cli_record=True, enable_mixed_chunk=True, page_size=7)


BAD_SERVERS: list[tuple[dict[str, Any], str]] = [
    ({"enable_mixed_chunk": True}, "--enable-mixed-chunk does not work with --kv-compress"),
    ({"page_size": 100}, "--kv-compress-window 512 is not a multiple of the page size 100"),
    ({"model_changes": {"is_encoder_decoder": True}}, "is an encoder-decoder"),
    ({"model_changes": {"context_len": 576}}, "no answer fills a window of 512"),
    ({"pp_size": 2, "enable_lmcache": True}, "--pp-size does not work"),
]


@pytest.mark.parametrize("changes,message", BAD_SERVERS)
def test_a_refused_server_ends_the_launcher(
    changes: dict[str, Any], message: str, checked: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line and exit code 2."""
    plugin.activate(KaraConfig())
    with pytest.raises(SystemExit) as caught:
        checked(cli_record=True, **changes)
    assert caught.value.code == 2 and message in failed_line(capsys)


@pytest.mark.parametrize("changes,message", BAD_SERVERS)
def test_a_refused_engine_raises(changes: dict[str, Any], message: str, checked: Any) -> None:
    """``ValueError`` for ``sglang.Engine``, never ``SystemExit``."""
    plugin.activate(KaraConfig())
    with pytest.raises(ValueError, match=message):
        checked(cli_record=False, **changes)
    assert plugin.launched() is None


def test_an_engine_with_a_broken_environment_raises(
    checked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The variable is the only setting that reaches an Engine unchecked."""
    monkeypatch.setenv(ENV, '{"windw": 3}')
    with pytest.raises(ValueError, match="unknown key 'windw'"):
        checked(cli_record=False)


def test_several_refusals_are_one_line(checked: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """All of them at once, so that a user does not meet them one by one."""
    plugin.activate(KaraConfig())
    with pytest.raises(SystemExit):
        checked(cli_record=True, pp_size=2, enable_lmcache=True, use_ray=True)
    line = failed_line(capsys)
    assert all(flag in line for flag in ("--pp-size", "--enable-lmcache", "--use-ray"))


def test_the_wrong_sglang_is_refused(checked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything else is looked at, with the command that helps."""
    plugin.activate(KaraConfig())
    monkeypatch.setattr(versions, "version", lambda _name: "0.4.0")
    with pytest.raises(ValueError, match=rf"SGLang 0\.4\.0 .* pip install sglang=={versions.NEWEST}$"):
        checked(cli_record=False, enable_mixed_chunk=True)


def test_a_newer_sglang_starts_behind_a_key_and_says_so(
    checked: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Never silently, and only where both tables fit."""
    monkeypatch.setattr(versions, "version", lambda _name: "9.0")
    plugin.activate(KaraConfig())
    with pytest.raises(ValueError, match=r"SGLang 9\.0 .* '\{\"untested_sglang\": true\}'$"):
        checked(cli_record=False)
    allowed = KaraConfig(untested_sglang=True)
    plugin.activate(allowed)
    checked(cli_record=False)
    assert plugin.launched() == allowed
    [record] = [r for r in caplog.records if r.name == "kara_sglang.compat.versions"]
    assert record.levelname == "WARNING" and "SGLang 9.0 was not tested" in record.getMessage()
    monkeypatch.setattr(plugin, "hook_launcher", lambda: ["sglang.srt.x is missing"])
    with pytest.raises(ValueError, match=r"^sglang\.srt\.x is missing$"):
        checked(cli_record=False)
    assert plugin.launched() is None


# -- SGLang's own parser and config file ---------------------------------------------------------------


@pytest.fixture(scope="module")
def prepare() -> Any:
    """SGLang's ``prepare_server_args`` with the plugin loaded as the launcher loads it."""
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args

    load_plugins()
    return prepare_server_args


@pytest.fixture
def base(tiny_config: Path) -> list[str]:
    return ["--model-path", str(tiny_config), "--device", "cpu", "--attention-backend", "torch_native"]


def test_sglangs_parser_reads_the_flags(prepare: Any, base: list[str]) -> None:
    """The whole way: entry point, hooks, parser, record, environment."""
    prepare([*base, "--kv-compress", "recent", "--kv-compress-window", "64"])
    assert plugin.active() == KaraConfig(selector="recent", window=64)
    prepare(base)
    assert plugin.active() == KaraConfig(selector="recent", window=64), "the variable still says so"
    prepare([*base, "--kv-compress", "none"])
    assert plugin.active() is None


@pytest.fixture
def yaml_file(tmp_path: Path) -> Iterator[Any]:
    file = tmp_path / "server.yaml"

    def write(text: str) -> list[str]:
        file.write_text(text)
        return ["--config", str(file)]

    return write


def test_sglangs_config_file(prepare: Any, base: list[str], yaml_file: Any) -> None:
    """YAML keys with dashes, a nested mapping for the config object, flags over the file."""
    words = yaml_file(
        "kv-compress: snapkv\n"
        "kv-compress-window: 128\n"
        "kv-compress-retain: 1\n"
        "kv-compress-query-mem-gb: 0.25\n"
        "kv-compress-config:\n  delay: 0\n  debug_checks: true\n  query_heads: mean\n"
    )
    expected = KaraConfig(
        selector="snapkv",
        window=128,
        retain=1.0,
        query_mem_gb=0.25,
        delay=0,
        debug_checks=True,
        query_heads="mean",
    )
    prepare([*base, *words])
    assert plugin.active() == expected
    plugin.activate(None)
    prepare([*words, *base, "--kv-compress", "recent", "--kv-compress-window", "256"])
    active = plugin.active()
    assert active is not None and (active.selector, active.window, active.delay) == ("recent", 256, 0)


@pytest.mark.parametrize(
    "text", ["kv-compress: kara\nkv-compress-config: '{\"seed\": 4}'\n", "kv_compress: kara\n"]
)
def test_other_spellings_of_the_config_file(
    text: str, prepare: Any, base: list[str], yaml_file: Any
) -> None:
    """JSON in a string works; a key with underscores is refused by SGLang's parser, not ignored."""
    if "kv_compress" in text:
        with pytest.raises(SystemExit) as caught:
            prepare([*base, *yaml_file(text)])
        assert caught.value.code == 2
    else:
        prepare([*base, *yaml_file(text)])
        assert plugin.active() == KaraConfig(seed=4)


@pytest.mark.parametrize(
    "text,message",
    [
        ("kv-compress: kara\nkv-compress-config: {dely: 0}\n", "unknown key 'dely'"),
        ("kv-compress: kara\nkv-compress-config: {delay: zero}\n", "delay must be a whole number"),
        ("kv-compress: kara\nkv-compress-retain: 7\n", "--kv-compress-retain must be"),
        ("kv-compress-retain: 0.5\n", "has no effect without --kv-compress"),
        ("kv-compress: none\nkv-compress-config: {x: 0}\n", "unknown key 'x'"),
    ],
)
def test_bad_config_files(
    text: str,
    message: str,
    prepare: Any,
    base: list[str],
    yaml_file: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The same lines and exit code as on the command line."""
    with pytest.raises(SystemExit) as caught:
        prepare([*base, *yaml_file(text)])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert ENV not in os.environ


# -- through real processes ----------------------------------------------------------------------------


LAUNCHES = {
    "unknown key": (["--kv-compress-config", '{"dely": 0}'], "unknown key 'dely'"),
    "no page multiple": (
        ["--page-size", "16", "--kv-compress-window", "100"],
        "--kv-compress-window 100 is not a multiple of the page size 16 (--page-size); use 96 or 112",
    ),
    "mixed chunk": (
        ["--enable-mixed-chunk"],
        "--enable-mixed-chunk does not work with --kv-compress; remove one of them",
    ),
}


@pytest.fixture(scope="module")
def launched(tiny_config: Path) -> dict[str, tuple[int, str]]:
    """Exit code and stderr of all bad launches, run side by side."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SGLANG_")}
    environment |= {"SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": "1"}
    processes = {}
    for name, (words, _) in LAUNCHES.items():
        command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(tiny_config)]
        command += ["--device", "cpu", "--attention-backend", "torch_native", "--port", "0"]
        command += ["--kv-compress", "kara", *words]
        processes[name] = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
    results = {}
    for name, process in processes.items():
        try:
            _, errors = process.communicate(timeout=120)
        finally:
            process.kill()
        results[name] = (process.returncode, errors)
    return results


@pytest.mark.parametrize("name", LAUNCHES)
def test_a_real_launch_is_refused(name: str, launched: dict[str, tuple[int, str]]) -> None:
    """Exit code 2, one clear line, the last one, and no model was touched: there is none."""
    code, errors = launched[name]
    lines = errors.strip().splitlines()
    said = [line for line in lines if line.startswith("kv-compress: error: ")]
    assert code == 2, errors[-2000:]
    assert len(said) == 1 and LAUNCHES[name][1] in said[0]
    assert "Traceback" not in errors and "Load weight" not in errors
    assert lines[-1] == said[0]
