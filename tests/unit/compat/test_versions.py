"""The versions of SGLang that are named as tested, and what is said of others."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from places import ROOT

from kara_sglang.compat import versions
from kara_sglang.config import KaraConfig

ALLOWED = KaraConfig(untested_sglang=True)


def test_the_installed_sglang_is_a_tested_one() -> None:
    """The tests run against a version that the plugin names."""
    assert versions.of_version(KaraConfig()) == []


@pytest.mark.parametrize("installed", [*versions.TESTED, "0.5.23+cu130"])
def test_a_tested_version_is_served(installed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "version", lambda _name: installed)
    assert versions.of_version(KaraConfig()) == versions.of_version(ALLOWED) == []


@pytest.mark.parametrize("installed", ["0.5.21", "0.5.9", "0.5.22rc1", "0.4.10.post2"])
def test_an_older_version_is_refused_whatever_is_allowed(
    installed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions, "version", lambda _name: installed)
    [line] = versions.of_version(KaraConfig())
    assert line == (
        f"SGLang {installed} is installed, --kv-compress was tested with 0.5.22 and 0.5.23: "
        "pip install sglang==0.5.23"
    )
    assert versions.of_version(ALLOWED) == [line]


@pytest.mark.parametrize("installed", ["0.5.24", "0.5.100", "0.5.23.post1", "0.6", "0.5.24.dev3+gabc"])
def test_a_newer_version_is_served_behind_a_key(
    installed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions, "version", lambda _name: installed)
    [line] = versions.of_version(KaraConfig())
    assert f"python -m kara_sglang.compat {installed}" in line
    assert line.endswith("start with --kv-compress-config '{\"untested_sglang\": true}'")
    assert versions.of_version(ALLOWED) == []


@pytest.mark.parametrize("installed", [*versions.TESTED, "0.5.23+cu130", "0.6"])
def test_speculation_is_refused_on_older_versions(
    installed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions, "version", lambda _name: installed)
    plain, drafts = (SimpleNamespace(speculative_algorithm=kind) for kind in (None, "EAGLE"))
    assert versions.of_speculation(plain) == []
    lines = versions.of_speculation(drafts)
    if installed != "0.5.22":
        assert lines == []
        return
    [line] = lines
    assert line == (
        "--speculative-algorithm does not work with --kv-compress on SGLang 0.5.22: "
        "pip install sglang==0.5.23, or remove one of them"
    )


def test_the_package_names_the_same_versions() -> None:
    """The extra that installs SGLang, and the CPU engine's list."""
    oldest, newest = versions.TESTED[0], versions.NEWEST
    assert f'sglang = ["sglang>={oldest},<={newest}"]' in (ROOT / "pyproject.toml").read_text()
    listed = (ROOT / "kara_sglang/cpu_engine/requirements-nodeps.txt").read_text()
    assert f"\nsglang=={newest}\n" in listed
