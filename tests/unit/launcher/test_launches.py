"""The flags through SGLang's own parser, its config file, and real processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kara_sglang import plugin
from kara_sglang.config import ENV, KaraConfig


@pytest.fixture(scope="module")
def prepare() -> Any:
    """SGLang's ``prepare_server_args`` with the plugin loaded as the launcher loads it."""
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args

    load_plugins()
    return prepare_server_args


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


LAUNCHES = {
    "unknown key": (["--kv-compress-config", '{"dely": 0}'], "unknown key 'dely'"),
    "no page multiple": (
        ["--page-size", "16", "--kv-compress-window", "100"],
        "--kv-compress-window 100 is not a multiple of the page size 16 (--page-size); use 96 or 112",
    ),
    "streaming sessions": (
        ["--enable-streaming-session"],
        "--enable-streaming-session does not work with --kv-compress; remove one of them",
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
