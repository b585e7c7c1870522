"""``check_server_args``: what flags and the model's config decide."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from flags_read import failed_line

from kara_sglang import plugin
from kara_sglang.compat import versions
from kara_sglang.config import ENV, KaraConfig
from kara_sglang.hooks import CACHE_BACKEND
from kara_sglang.launcher import flags

AUTO = KaraConfig(prefix_reuse="auto")
NGRAM = {
    "speculative_algorithm": "NGRAM",
    "speculative_eagle_topk": 1,
    "speculative_num_draft_tokens": 4,
}


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch, resolved: Any) -> Any:
    """Run the hook on a record whose resolved view has some fields changed."""
    import sglang.srt.arg_groups.model_override_base as base
    import sglang.srt.arg_groups.overrides as overrides

    monkeypatch.setattr(plugin, "hook_launcher", list)
    monkeypatch.setattr(
        overrides, "declare_resolution", lambda record, _who, **new: record.declare(new)
    )
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

    def run(*, cli_record: bool, model_changes: dict[str, Any] | None = None, **changes: Any) -> Any:
        declared: dict[str, Any] = {}
        record = SimpleNamespace(declare=declared.update)
        if cli_record:
            setattr(record, flags._FROM_CLI, True)
        vars(model).update(model_changes or {})
        monkeypatch.setattr(overrides, "resolving_view", lambda _: resolved(**changes))
        monkeypatch.setattr(base, "model_config_of", lambda _: model)
        flags.check_server_args(None, record)
        return declared

    return run


def test_a_supported_server_passes(checked: Any) -> None:
    """With and without compression, from the launcher and for an Engine."""
    checked(cli_record=True)
    plugin.activate(KaraConfig())
    checked(cli_record=True)
    checked(cli_record=False)
    assert plugin.launched() == plugin.active() == AUTO
    plugin.activate(None)
    assert plugin.launched() == AUTO
    checked(cli_record=True)
    assert plugin.launched() is None


def test_a_prefill_server_runs_without_compression_and_says_so(
    checked: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Nor does anything else of the settings matter to it, and the next one here has them."""
    plugin.activate(KaraConfig())
    checked(cli_record=True, disaggregation_mode="prefill", page_size=100)
    assert plugin.active() is None and plugin.launched() is None
    [said] = caplog.records
    assert "does nothing here; the decode server compresses" in said.getMessage()
    checked(cli_record=False)
    assert plugin.active() == plugin.launched() == AUTO


def test_a_prefill_server_that_may_come_to_decode_is_refused(checked: Any) -> None:
    plugin.activate(KaraConfig())
    with pytest.raises(ValueError, match=r"^--enable-pd-role-switch does not work"):
        checked(cli_record=False, disaggregation_mode="prefill", enable_pd_role_switch=True)


def test_speculation_needs_an_sglang_that_reads_no_row_too_late(
    checked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oldest tested one does all else."""
    plugin.activate(KaraConfig())
    monkeypatch.setattr(versions, "version", lambda _name: versions.TESTED[0])
    checked(cli_record=False)
    with pytest.raises(
        ValueError, match=r"^--speculative-algorithm .* pip install sglang==0\.5\.23, or"
    ):
        checked(cli_record=False, **NGRAM)


def test_prefix_reuse_that_is_left_open_is_settled(checked: Any) -> None:
    """For each server by its flags, whatever an earlier one of this process got; what is asked for by
    name stays, or is refused."""
    plugin.activate(KaraConfig(seed=3))
    assert checked(cli_record=False, disable_radix_cache=True) == {}
    assert plugin.launched() == plugin.active() == KaraConfig(seed=3, prefix_reuse="exact")
    for _ in range(2):
        assert checked(cli_record=False) == {"radix_cache_backend": CACHE_BACKEND}
        assert plugin.launched() == plugin.active() == KaraConfig(seed=3, prefix_reuse="auto")
    for named in ("exact", "auto", "auto:64", "compressed"):
        plugin.activate(KaraConfig(seed=3, prefix_reuse=named))
        checked(cli_record=False)
        assert plugin.launched().prefix_reuse == named
        if named != "exact":
            with pytest.raises(ValueError, match=f"^--disable-radix-cache .*-reuse {named};"):
                checked(cli_record=False, disable_radix_cache=True)
    plugin.activate(KaraConfig(seed=3, prefix_reuse="exact"))
    checked(cli_record=False)
    assert plugin.launched().prefix_reuse == "exact", "the very settings that were once settled"


def test_the_delay_of_a_model_with_sliding_windows(checked: Any) -> None:
    """Its longest window at least; a longer delay stays."""
    kinds = SimpleNamespace(layer_types=["sliding_attention", "full_attention"])
    changes = {"hf_text_config": kinds, "sliding_window_size": 1024}
    for delay, raised in ((64, 1024), (2000, 2000)):
        plugin.activate(KaraConfig(delay=delay))
        checked(cli_record=True, model_changes=changes)
        assert plugin.launched() == KaraConfig(delay=raised, prefix_reuse="auto")
    with pytest.raises(ValueError, match="no answer fills a window of 512"):
        plugin.activate(KaraConfig())
        checked(cli_record=False, model_changes=changes | {"context_len": 1536})


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
    checked(cli_record=True, enable_pdmux=True, page_size=7)


BAD_SERVERS: list[tuple[dict[str, Any], str]] = [
    ({"enable_pdmux": True}, "--enable-pdmux does not work with --kv-compress"),
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
        checked(cli_record=False, enable_pdmux=True)


def test_a_newer_sglang_starts_behind_a_key_and_says_so(
    checked: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Never silently, and only where both tables fit."""
    monkeypatch.setattr(versions, "version", lambda _name: "9.0")
    plugin.activate(KaraConfig())
    with pytest.raises(ValueError, match=r"SGLang 9\.0 .* '\{\"untested_sglang\": true\}'$"):
        checked(cli_record=False)
    allowed = KaraConfig(untested_sglang=True, prefix_reuse="exact")
    plugin.activate(allowed)
    checked(cli_record=False)
    assert plugin.launched() == allowed
    [record] = [r for r in caplog.records if r.name == "kara_sglang.compat.versions"]
    assert record.levelname == "WARNING" and "SGLang 9.0 was not tested" in record.getMessage()
    monkeypatch.setattr(plugin, "hook_launcher", lambda: ["sglang.srt.x is missing"])
    with pytest.raises(ValueError, match=r"^sglang\.srt\.x is missing$"):
        checked(cli_record=False)
    assert plugin.launched() is None
