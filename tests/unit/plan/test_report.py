"""What a plan says: warnings, the command line, and the same figures as the doctor's."""

from __future__ import annotations

import json
import shlex
from functools import partial

import pytest
from planned import LOAD, planned

from kara_sglang import doctor
from kara_sglang.config import ENV
from kara_sglang.plan.command import main
from kara_sglang.plan.launch import _gpu_of


def test_decode_graphs_beyond_sglangs_default_are_asked_for(qwen, capsys):
    """By itself SGLang captures 32 on a GPU of 45 GiB; the plan reckons with what it proposes."""
    model = ("--model", qwen, "--gpu-memory", "45", "--retain", "0.25", *LOAD)
    found = planned(capsys, *model)
    graphs, running = found["decode_graphs"], found["requests_running"]["with"]
    assert graphs["captured_without_the_plan"] == 32 < running == graphs["captured"] == graphs["needed"]
    assert f"--cuda-graph-max-bs-decode {running}" in found["command"]
    assert any("up to 32 here" in line for line in found["warnings"])
    # A user's own choice stays, and the plan says what it means.
    kept = planned(capsys, *model, "--cuda-graph-max-bs-decode", "16")
    assert kept["decode_graphs"]["captured"] == 16
    assert kept["command"].endswith("--cuda-graph-max-bs-decode 16")
    assert any("up to 16 here" in line for line in kept["warnings"])
    # 2 MB a request (reserve_for_graph_mb), as a share that is rounded to thousandths.
    taken = kept["pool_tokens"]["with"] - found["pool_tokens"]["with"]
    per_token = found["model"]["kv_bytes_per_token_per_gpu"]
    assert taken * per_token == pytest.approx((running - 16) * 2 * 2**20, abs=0.0006 * 45 * 2**30)


def test_the_command_describes_what_was_planned(qwen, capsys):
    """Its words, planned again, give the same figures."""
    flags = ("--window", "256", "--tp", "2", "--", "--kv-compress-config", '{"delay": 32}')
    found = planned(capsys, "--model", qwen, "--gpu-memory", "45", *LOAD, *flags)
    words = shlex.split(found["command"])
    assert words[:3] == ["python", "-m", "sglang.launch_server"]
    again = planned(capsys, "--model", words[4], "--gpu-memory", "45", *LOAD, *words[5:])
    assert again["decode_graphs"].pop("captured_without_the_plan") is not None
    del found["decode_graphs"]["captured_without_the_plan"]
    assert again["settings"]["window"] == 256 and again["settings"]["delay"] == 32
    for key in found.keys() - {"warnings", "command"}:
        assert again[key] == found[key], key
    assert sorted(shlex.split(again["command"])) == sorted(words)


@pytest.mark.parametrize(
    "settings",
    [{}, {"window": 1024, "query_heads": "mean", "query_mem_gb": 0.5}, {"query_dtype": "fp4"}],
)
def test_the_doctor_says_the_same_of_the_ring(qwen, capsys, monkeypatch, settings):
    from sglang.srt import server_args

    monkeypatch.setenv(ENV, json.dumps({"selector": "kara"} | settings))
    found = planned(capsys, "--model", qwen, "--gpu-memory", "80", *LOAD)["ring"]

    def on_a_gpu(plan: doctor.Plan) -> list[doctor.Finding]:
        plan.gpu_memory = 80 * 1024
        return []

    monkeypatch.setattr(server_args, "ServerArgs", partial(server_args.ServerArgs, device="cuda"))
    monkeypatch.setattr(doctor, "CHECKS", (on_a_gpu, doctor.check_settings, doctor.check_model))
    with _gpu_of(80 * 1024):
        assert doctor.main(["--model-path", qwen]) == 0
    lines = capsys.readouterr().out.splitlines()
    line = next(line for line in lines if line.startswith("ok   queries"))
    every, mean = found["all_heads_bytes"], found["mean_bytes"]
    assert f" {every:,} bytes a request with all query heads, {mean:,} with their mean" in line
    assert f"a ring of {found['bytes'] / 2**30:.2f} GiB ({found['why']}) has room for " in line
    if "query_mem_gb" not in settings:
        assert found["why"] == "1/16 of the memory for KV"
    room = {"mean": f"{found['mean']} requests with the mean of their query heads"}.get(
        settings.get("query_heads", "auto"),
        f"{found['all_heads']} requests with all query heads or {found['mean']} with their mean",
    )
    assert f"has room for {room}; windows of others are chosen without queries" in line


@pytest.mark.parametrize(
    ("flags", "warning"),
    [
        ("", "requests wait: memory is full"),
        (
            "--running 100 --answer 3000 --kv-compress-query-mem-gb 1",
            "the query ring has room for 75 of 100 requests",
        ),
        (
            '--running 20 --kv-compress-config {"policy":"periodic"}',
            "so it gains little here; the policy `pressure` compresses only when memory is short",
        ),
        ("--running 20", "compresses as above when memory is short"),
        ("--running 35", "all 35 requests that run fit without compression, so it gains little here"),
        ("--answer 300", "no window is compressed: answers of 300 tokens"),
        ("--answer 60000", "longer than the model's context of 40,960"),
        ("--speculative-algorithm NGRAM", "drafts are not reckoned with"),
    ],
)
def test_warnings(qwen, capsys, flags, warning):
    argv = ["--model", f"{qwen}/config.json", "--gpu-memory", "80", *LOAD, *flags.split()]
    assert any(warning in line for line in planned(capsys, *argv)["warnings"])
    assert main(argv) == 0
    text = capsys.readouterr().out
    assert "! " in text and warning in text and "Launch:\n  python -m sglang.launch_server" in text


def test_text_and_json_have_the_same_figures(qwen, capsys):
    argv = ["--model", qwen, "--gpu-memory", "80", *LOAD]
    found = planned(capsys, *argv)
    assert main(argv) == 0
    text = capsys.readouterr().out
    for label, key in (
        ("KV slots of the pool", "pool_tokens"),
        ("slots a request holds at most", "slots_per_request_at_most"),
        ("requests that fit", "requests_that_fit"),
        ("of 128 requests run at once", "requests_running"),
    ):
        line = next(line for line in text.splitlines() if label in line)
        pair = found[key]
        assert line.split()[-2:] == [f"{pair['without']:,}", f"{pair['with']:,}"]
    assert f"{found['projection']['gain']:.2f} times" in text and "not a measurement" in text
    assert text.rstrip().endswith(found["command"])


def test_window_layers_with_a_pool_of_their_own(gpt_oss, capsys):
    """They take fewer slots; by SGLang's default eight for ten of the others."""
    words = ["--model", gpt_oss, "--gpu-memory", "80", *LOAD]
    backend = ["--attention-backend", "fa3"]
    assert main([*words, "--", *backend]) == 0
    text = capsys.readouterr().out
    assert "24 layers, of which passes work over the 12 with full attention; per GPU" in text
    assert f"{int((12 + 0.8 * 12) * 2 * 8 * 64 * 2):,} bytes of KV a token" in text
    assert "256 kept, delay 128, policy" in text
    sized = ["--disable-radix-cache", "--max-running-requests", "8"]
    assert main([*words, "--", *backend, *sized]) == 2
    assert "a plan does not know the KV pool of sliding-window layers" in capsys.readouterr().err


def test_a_model_with_sliding_windows(gemma, capsys):
    """Its delay is the window; a pass frees the slots of all layers."""
    assert main(["--model", gemma, "--gpu-memory", "80", *LOAD]) == 0
    text = capsys.readouterr().out
    assert "48 layers, of which passes work over the 8 with full attention; per GPU" in text
    assert f"{48 * 2 * 8 * 256 * 2:,} bytes of KV a token" in text
    assert "256 kept, delay 1024, policy" in text


@pytest.mark.parametrize("ratio", [0.8, 0.05, 0.01])
def test_requests_must_fit_both_pools(gpt_oss, capsys, ratio):
    """Each holds the newest 128 tokens in the pool of the window layers, up to 128 that SGLang has not
    given back, and two pages."""
    load = ("--prompt", "512", "--answer", "8192", "--running", "1000", "--page-size", "16")
    words = ("--model", gpt_oss, "--gpu-memory", "80", "--attention-backend", "triton", *load)
    found = planned(capsys, *words, "--swa-full-tokens-ratio", str(ratio))
    slots = found["pool_tokens"]["with"]
    bound = int(slots * ratio) // (128 + 128 + 2 * 16)
    by_all = slots // found["slots_per_request_at_most"]["with"]
    assert found["requests_that_fit"]["with"] == min(bound, by_all)
    assert (bound < by_all) == (ratio < 0.06)
