"""The plan: its figures are SGLang's, the doctor's and the pass's own for the same settings."""

from __future__ import annotations

import contextlib
import json
import shlex
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import QWEN3_8B

from kara_sglang import doctor, plugin
from kara_sglang.benchmarks.models import MODELS
from kara_sglang.benchmarks.serving.projection import CARDS, Counted
from kara_sglang.config import ENV, KaraConfig
from kara_sglang.plan import gain, memory
from kara_sglang.plan.command import main
from kara_sglang.plan.launch import _gpu_of, read
from kara_sglang.plan.load import Held, Load, compressed, uncompressed
from kara_sglang.radix_integration.row import Geometry, RequestState
from kara_sglang.scheduler import runtime

KV_DTYPES = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
LOAD = ("--prompt", "1000", "--answer", "8000", "--running", "128")


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a config and no weights."""
    folder = tmp_path_factory.mktemp("qwen3-8b")
    (folder / "config.json").write_text(json.dumps(QWEN3_8B))
    return str(folder)


def planned(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    code = main([*argv, "--json"])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return json.loads(captured.out)


# -- SGLang ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("gib", [30, 45, 80, 141])
@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--tp-size", "4", "--page-size", "64"),
        ("--max-total-tokens", "5000"),
        ("--kv-cache-dtype", "fp8_e4m3"),
        ("--kv-cache-dtype", "fp8_e5m2"),
    ],
)
def test_the_pool_is_what_sglang_makes_of_the_same_memory(qwen, monkeypatch, gib, flags):
    """SGLang's own code sizes the pool from what is free before and after the weights."""
    from sglang.srt import runtime_context
    from sglang.srt.arg_groups.overrides import record_of
    from sglang.srt.mem_cache import kv_cache_configurator
    from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

    launch = read(["--model-path", qwen, "--kv-compress", "kara", *flags], gib * 1024)
    rank = memory.Rank.of(launch)
    weights = memory.weight_bytes(qwen, launch.model)
    ring = memory.ring_of(launch, rank, weights)
    found = memory.divide(launch, rank, ring, weights)
    before = found.total - found.context
    configurator = object.__new__(kv_cache_configurator.KVCacheConfigurator)
    of_a_server = {
        "device": "cuda",
        "gpu_id": 0,
        "model_config": launch.model,
        "server_args": record_of(launch.resolved),
        "kv_cache_dtype": KV_DTYPES.get(launch.resolved.kv_cache_dtype, torch.bfloat16),
        "kv_cache_dtype_str": launch.resolved.kv_cache_dtype,
        "layer_info": SimpleNamespace(num_effective_layers=36, start_layer=0, end_layer=36),
        "spec_algorithm": SpeculativeAlgorithm.from_string(None),
        "is_draft_worker": False,
        "is_hybrid_swa": False,
        "use_mla_backend": False,
        "mambaish_config": None,
        "post_capture_kv_active": False,
        "attn_dp_size": 1,
        "kv_shard_spec": None,
    }
    for name, value in of_a_server.items():
        setattr(configurator, name, value)
    one_rank = {"launch_world_size": 1, "world_group": SimpleNamespace(cpu_group=None)}
    context = runtime_context.create_context(record_of(launch.resolved), role="scheduler")
    sizes = []
    for taken in (0, found.ring + found.scratch):
        free = (before - found.weights - taken) / 2**30
        monkeypatch.setattr(
            kv_cache_configurator, "get_available_gpu_memory", lambda *_a, free=free, **_k: free
        )
        with runtime_context.use_context(context), context.parallel.override(**one_rank):
            sizes.append(configurator._resolve_memory_pool_config(before / 2**30).max_total_num_tokens)
    # SGLang reckons in GiB, so the last token may fall to either side.
    page = launch.resolved.page_size
    assert sizes == pytest.approx([found.stock_pool, found.pool], abs=page)
    if "--max-total-tokens" in flags:
        assert found.stock_pool == found.pool == 5000
    else:
        assert found.pool < found.stock_pool


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


# -- the doctor and the pass -----------------------------------------------------------------------


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


@pytest.mark.parametrize("kv", [(), ("--kv-cache-dtype", "fp8_e5m2")])
def test_ring_and_scratch_are_those_that_the_pass_allocates(qwen, monkeypatch, kv):
    """By the hook behind ``ModelRunner.load_model``, on a rank of two."""
    from sglang.srt.arg_groups.overrides import record_of
    from sglang.srt.layers.radix_attention import RadixAttention

    flags = ["--kv-compress", "kara", "--kv-compress-window", "8192", "--tp-size", "2", *kv]
    launch = read(["--model-path", qwen, *flags], 80 * 1024)
    rank = memory.Rank.of(launch)
    asked = []

    class Kernels:
        name = "asked"

        def reserve(self, _device: torch.device, largest: Any) -> int:
            asked.append(largest)
            return 0

    monkeypatch.setattr(runtime, "runtime", fresh := runtime.Runtime())
    monkeypatch.setattr(plugin, "active", lambda: launch.config)
    monkeypatch.setattr(runtime, "pick", lambda _device: (Kernels(), "a test"))
    monkeypatch.setattr(runtime, "rope_shift_of", lambda *_: None)
    layers = [RadixAttention(16, 128, 0.1, 4, layer_id=i) for i in range(36)]
    weights = memory.weight_bytes(qwen, launch.model)
    total, share, _, _ = memory._left(launch, weights)
    before = total - memory.CONTEXT_BYTES
    runner = SimpleNamespace(
        model=torch.nn.ModuleList(layers),
        device="meta",
        dtype=torch.bfloat16,
        memory_saver_adapter=SimpleNamespace(region=lambda _tag: contextlib.nullcontext()),
        server_args=record_of(launch.resolved),
        pre_model_load_memory=before / 2**30,
    )
    taken = share + memory.scratch_bytes(launch, rank)
    monkeypatch.setattr(runtime, "free_bytes", lambda _device: before - taken)
    runtime.after_load_model(None, runner)
    assert fresh.refused == []
    ring = memory.ring_of(launch, rank, weights)
    monkeypatch.setattr("kara_sglang.kernels.triton.TritonKernels", Kernels)
    memory.scratch_bytes(launch, rank)
    assert asked[0] == asked[1]
    ours = fresh.parts.recorder
    assert (ring.why, ring.num_pages, ring.page_bytes) == (ours.why, ours.num_pages, ours.page_bytes)
    assert runtime.room_of(runner, layers).slot_bytes == rank.token_bytes
    # A checkpoint may choose fp8, where no flag does.
    runner.model.quant_config = SimpleNamespace(kv_cache_quant_algo="FP8")
    assert runtime.room_of(runner, layers).slot_bytes == 36 * 4 * 2 * 128


@given(
    prompt=st.integers(1, 60),
    answer=st.integers(1, 400),
    page=st.sampled_from([1, 4]),
    delay=st.integers(0, 20),
    kept=st.sampled_from([0.25, 0.5]),
)
def test_a_request_holds_what_the_plan_says(prompt, answer, page, delay, kept):
    """Step by step, with the states of the pass."""
    config = KaraConfig(window=16, retain=kept, delay=delay)
    geometry = Geometry(page, config.window, delay)
    state = RequestState(selector=None, kept=config.kept(page), seed=0, base=-(-prompt // page) * page)
    length, lengths = prompt, []
    for written in range(1, answer):  # the last token's KV is never computed
        # A token is on its way; whoever ends with it is left alone.
        if length >= state.due_at(geometry) and written + 1 < answer:
            length -= state.commit(geometry).freed
        length += 1
        lengths.append(length)
    load = Load(prompt, answer, 1)
    held = compressed(load, config, page)
    assert held.windows <= len(state.windows) <= held.windows + 1
    assert held.most + page >= max(lengths, default=prompt)
    assert held.most <= max(lengths, default=prompt) + config.window + 3 * page
    if lengths:
        assert held.mean == pytest.approx(sum(lengths) / len(lengths), abs=8)
    assert uncompressed(load, page).most >= prompt + answer


def test_what_is_never_compressed_is_planned_as_stock():
    load = Load(100, 1000, 4)
    stock = uncompressed(load, 1)
    assert compressed(load, KaraConfig(selector="identity", window=64), 1).most == stock.most
    assert (
        compressed(load, KaraConfig(policy="threshold", threshold=5000, window=64), 1).most
        == stock.most
    )
    # Passes that fall behind leave what they cannot take.
    slow = KaraConfig(window=64, period=64, max_requests_per_pass=1)
    assert compressed(load, slow, 1).most > compressed(load, KaraConfig(window=64), 1).most


# -- the projection --------------------------------------------------------------------------------


@pytest.mark.parametrize("retain", [None, 0.5])
def test_the_projection_is_that_of_the_benchmarks(retain, monkeypatch):
    """One steady batch, as a counted schedule and as a load."""
    from kara_sglang.benchmarks.arithmetic import Settings
    from kara_sglang.benchmarks.serving import projection

    monkeypatch.setattr(projection, "ring_bytes", lambda *_: 0)  # the plan takes it out beforehand
    model, card, load = MODELS[0], CARDS[1], Load(1000, 8000, 30)
    held = Held(most=9000, mean=5000.0, windows=0)
    settings = None
    if retain is not None:
        held = compressed(load, KaraConfig(window=512, delay=64), 1)
        settings = Settings(window=512, kept=256, delay=64, mean=True)
    pool = card.pool(model)
    counted = Counted(
        fits=pool / 9000,
        pool=pool,
        requests=30,
        prompt=1000,
        output=8000,
        window=512,
        delay=64,
        retain=retain,
        schedule={30: (8000, 8000 * 30 * held.mean)},
    )
    ours = gain.rate(model, card, load, held, int(pool), settings)
    assert ours == pytest.approx(counted.rate(model, card, 8000), rel=1e-9)


def test_what_has_no_datasheet_is_not_projected(qwen, tmp_path, capsys):
    assert planned(capsys, "--model", qwen, "--gpu-memory", "80", *LOAD)["projection"]["gain"] > 1.3
    cpu = ("--device", "cpu", "--max-total-tokens", "65536")
    assert planned(capsys, "--model", qwen, *LOAD, *cpu)["projection"] is None
    fp8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_8B | {"quantization_config": fp8}))
    words = ("--model", str(tmp_path), "--gpu-memory", "80", *LOAD)
    assert main(list(words)) == 2
    assert "--weights-gb" in capsys.readouterr().err
    assert planned(capsys, *words, "--weights-gb", "8.2")["projection"] is None


# -- weights ---------------------------------------------------------------------------------------


def test_weights_are_counted_from_files_or_from_the_config(qwen, tmp_path):
    from safetensors.torch import save_file

    model = read(["--model-path", qwen, "--kv-compress", "kara"], 80 * 1024).model
    counted = memory.weight_bytes(qwen, model)
    assert counted == pytest.approx(MODELS[0].parameters * 2e9, rel=1e-3)
    tensors = {"a": torch.zeros(10, 3), "b": torch.zeros(7, dtype=torch.bfloat16)}
    save_file(tensors, tmp_path / "a.safetensors")
    save_file({"c": torch.zeros(5)}, tmp_path / "b.safetensors")
    assert memory.weight_bytes(str(tmp_path), model) == 120 + 14 + 20
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 77}}))
    assert memory.weight_bytes(str(tmp_path), model) == 77


# -- what it says ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ("", "say --gpu-memory GIB, or --device cpu"),
        ("--gpu-memory 12", "--mem-fraction-static above"),
        ("--gpu-memory 30 --answer 60000", "must fit uncompressed"),
        ("--gpu-memory 80 --device cpu", "leave out one"),
        ("--device cpu", "--max-total-tokens"),
        ("--gpu-memory 80 --kv-compress none", "needs compression"),
        ("--gpu-memory 80 --kv-compress-query-mem-gb 0.001", "it takes 0.0221 GiB"),
        ("--gpu-memory 80 --window 100 --page-size 16", "use 96 or 112"),
        ("--gpu-memory 80 --window x", "--kv-compress-window must be a whole number"),
        ("--gpu-memory 80 --no-such-flag 3", "unrecognized arguments: --no-such-flag"),
        ("--gpu-memory 80 --pp-size 2", "--pp-size does not work with --kv-compress"),
        ("--gpu-memory 80 --tp 3", "--tp-size 3"),
        ("--gpu-memory 80 --model-path no/such/folder", "SGLang refuses this: "),
    ],
)
def test_where_there_is_no_plan_one_line_says_why(qwen, capsys, monkeypatch, flags, reason):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code = main(["--model", qwen, *LOAD, *flags.split()])
    captured = capsys.readouterr()
    assert code == 2 and captured.out == ""
    assert captured.err.startswith("plan: ") and captured.err.count("\n") == 1
    assert reason in captured.err


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
