"""Freed slots are really free, whatever happens to the requests."""

from __future__ import annotations

import json
import random
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import plugins
import psutil
import pytest
import requests
from exactness import PROMPTS, assert_likeliest, assert_same_choices
from server import (
    CPU_FLAGS,
    PAGE_16,
    PUNCTUAL,
    WINDOW,
    Server,
    free_port,
    in_parallel,
    launch,
    launch_small,
    prompt,
    run,
    wait_until_ready,
)

from kara_sglang.trace.format import file_name, load

# With the plugin `host_tier`.
HOST_TIER = ("--enable-hierarchical-cache", "--hicache-ratio", "2")


def test_pool_grows_by_what_a_window_frees(kara: Server) -> None:
    """While one request runs: pool - free = pages of held slots, and each window gave W - R back."""
    kara.flush()
    page, window, kept = 16, 64, 32
    done = threading.Event()
    answers: list[dict] = []

    def run() -> None:
        answers.append(kara.generate(prompt(40, 3), tokens=700))
        done.set()

    started = kara.state()
    thread = threading.Thread(target=run)
    thread.start()
    seen: dict[int, int] = {}
    while not done.is_set():
        state = kara.state()
        held, logical = state["running_held_tokens"], state["running_logical_tokens"]
        if not held:
            continue
        windows = state["windows"] - started["windows"]
        assert logical - held == windows * (window - kept)
        used = state["pool_tokens"] - state["pool_tokens_free"] - state["pool_tokens_evictable"]
        assert used == -(-held // page) * page
        seen[windows] = held
        time.sleep(0.01)
    thread.join()
    assert len(seen) >= 5, "too few samples to mean anything"
    report = answers[0]["meta_info"]["kv_compress"]
    assert report["windows"] == 10
    assert report["kv_slots_held"] == report["logical_length"] - 10 * (window - kept)
    assert kara.state()["slots_freed"] - started["slots_freed"] == 10 * (window - kept)
    kara.assert_nothing_leaked()


def test_memory_that_is_given_back_and_taken_again(kara: Server) -> None:
    """The same answers, from the same windows, after a round trip; and the first one runs into a server
    that knows nothing of the earlier requests. (Without torch_memory_saver, as on a CPU, the pages of
    ring and pool stay where they are; that what lies in them does not matter is shown in
    `tests/unit/scheduler/test_compaction.py`.)"""
    asked = [prompt(40 + 10 * i, 60 + i) for i in range(3)]

    def answers() -> list[tuple[list[int], int]]:
        given = [kara.generate(ids, tokens=200) for ids in asked]
        return [(one["output_ids"], one["meta_info"]["kv_compress"]["windows"]) for one in given]

    kara.flush()
    before = answers()
    for _ in range(2):
        assert kara.post("/release_memory_occupation", {}).ok
        assert kara.state()["recorders_in_use"] == 0
        assert kara.post("/resume_memory_occupation", {}).ok
        assert answers() == before
    assert all(windows > 1 for _, windows in before)
    kara.assert_nothing_leaked()


def test_what_passes_free_is_filled_while_long_answers_run(kara: Server) -> None:
    """Answers whose end SGLang cannot know: those that found no room come in before anybody leaves."""
    kara.flush()
    before = len(kara.log_text())

    def hang_up(index: int) -> None:
        params = {"max_new_tokens": 7500, "temperature": 0, "logit_bias": {"2": -100}}  # no end of text
        body = {"input_ids": prompt(50, 200 + index), "sampling_params": params, "stream": True}
        with requests.post(kara.url + "/generate", json=body, stream=True, timeout=300) as response:
            for count, line in enumerate(response.iter_lines()):
                if line and count > 2 * 800:  # each chunk is followed by an empty line
                    break

    in_parallel([lambda i=i: hang_up(i) for i in range(8)])
    log = kara.log_text()[before:]
    running = [int(count) for count in re.findall(r"Decode batch, #running-req: (\d+)", log)]
    left = next((i for i, n in enumerate(running) if i and n < running[i - 1]), len(running))
    assert running[0] <= 5 and max(running[:left]) == 8, running
    assert "Retract requests" not in log
    kara.assert_nothing_leaked()


def test_abort_in_the_middle_of_a_window(kara: Server) -> None:
    """Clients that hang up, and /abort_request, at any moment; the others do not notice."""
    kara.flush()
    expected = kara.generate(PROMPTS[1], tokens=120, kv_compress=False)
    rng = random.Random(5)

    def hang_up(index: int) -> None:
        body = {
            "input_ids": prompt(30, 50 + index),
            "sampling_params": {"max_new_tokens": 2000, "ignore_eos": True, "temperature": 0},
            "stream": True,
            "rid": f"abort-{index}",
        }
        stop_after = rng.randrange(20, 200)
        with requests.post(kara.url + "/generate", json=body, stream=True, timeout=120) as response:
            for count, line in enumerate(response.iter_lines()):
                if line and count > stop_after:
                    if index % 2:
                        kara.post("/abort_request", {"rid": f"abort-{index}"})
                    break

    results = in_parallel(
        [lambda i=i: hang_up(i) for i in range(6)]
        + [lambda: kara.generate(PROMPTS[1], tokens=120, kv_compress=False)]
    )
    assert_same_choices(results[-1], expected)
    kara.assert_nothing_leaked()


def test_stop_token_after_compression(kara: Server) -> None:
    """A request that ends by a token, with the next step already in flight, gives everything back."""
    end_of_text = 2  # in the model's generation config; an earlier one would end the request, too
    for ids in PROMPTS:
        kara.flush()
        whole = kara.generate(ids, tokens=300)["output_ids"]
        stop_at = next(n for n in range(150, 300) if whole[n] not in whole[:n])
        if end_of_text not in whole[:stop_at]:
            break
    else:
        raise AssertionError("every answer holds the end-of-text token early")
    params = {"stop_token_ids": [whole[stop_at]], "ignore_eos": False}
    kara.flush()  # the same batches as before, so the same bits and the same kept tokens
    answer = kara.generate(ids, tokens=300, sampling_params=params)
    assert answer["output_ids"] == whole[: stop_at + 1]
    assert answer["meta_info"]["finish_reason"]["type"] == "stop"
    assert answer["meta_info"]["kv_compress"]["windows"] >= 1
    kara.assert_nothing_leaked()


@pytest.fixture(scope="module", params=["hicache", pytest.param("", marks=pytest.mark.slow)])
def page_1(
    request: pytest.FixtureRequest,
    tiny_model: Path,
    tmp_path_factory: pytest.TempPathFactory,
    logs: Path,
) -> Iterator[Server]:
    """Page size 1, float32, exact prefixes; again and again a request is retracted by force. With
    HiCache and overlap scheduling, or without both."""
    flags = (
        *("--skip-tokenizer-init", "--page-size", "1", "--max-total-tokens", "4096"),
        *("--dtype", "float32", "--kv-compress", "kara", *WINDOW),
        *(*PUNCTUAL, "--kv-compress-prefix-reuse", "exact"),
        *("--kv-compress-trace", str(logs / "page_1-traces")),
    )
    env = {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "97"}
    if request.param:
        flags += HOST_TIER
        env |= plugins.install(tmp_path_factory.mktemp("plugin"), "host_tier")
    else:
        flags += ("--disable-overlap-schedule",)
    with launch(tiny_model, logs / "page_1.log", *flags, env=env) as server:
        yield server


def test_retracted_requests_end_right(page_1: Server, stock: Server, logs: Path) -> None:
    """Forced retractions: opted-out and identity requests still give stock's greedy answers, and a
    trace goes on."""
    stock.flush()
    expected = stock.generate(PROMPTS)
    options = [False, {"selector": "identity"}, None, {"selector": "identity"}]
    answers = page_1.generate(PROMPTS, kv_compress=options)
    assert sum(answer["meta_info"]["num_retractions"] for answer in answers) >= 2
    for index in (0, 1, 3):
        assert_same_choices(answers[index], expected[index])
    assert len(answers[2]["output_ids"]) == 300
    for answer in answers:
        info, path = answer["meta_info"], logs / "page_1-traces" / file_name(answer["meta_info"]["id"])
        assert path.exists() == (info["kv_compress"]["windows"] > 0)
        if path.exists():
            trace = load(path)
            assert trace.about.retractions == info["num_retractions"]
            assert len(trace.windows) == info["kv_compress"]["windows"]
            assert trace.output_ids.tolist() == answer["output_ids"]
    page_1.assert_nothing_leaked()


@pytest.mark.parametrize("selector", ["recent", "kara"])
def test_rows_that_come_back_go_on_with_their_windows(
    page_1: Server, tiny_model: Path, logs: Path, selector: str
) -> None:
    """Each token is what transformers says with the K/V that windows retain, as if nobody had been
    retracted; of a row that was, one token is computed."""
    page_1.flush()
    before = page_1.state()
    answers = page_1.generate(PROMPTS, kv_compress={"selector": selector})
    infos = [answer["meta_info"] for answer in answers]
    for ids, answer in zip(PROMPTS, answers, strict=True):
        trace = load(logs / "page_1-traces" / file_name(answer["meta_info"]["id"]))
        keeps = None if selector == "recent" else trace.keeps()
        output = answer["output_ids"]
        windows = assert_likeliest(tiny_model, ids, output, kept=32, page_size=1, keeps=keeps)
        assert answer["meta_info"]["kv_compress"]["windows"] == windows >= 3
    retractions = sum(info["num_retractions"] for info in infos)
    after = page_1.state()
    assert after["retracted_tokens_computed"] - before["retracted_tokens_computed"] == retractions >= 2
    assert after["retracted_tokens_returned"] - before["retracted_tokens_returned"] > 100
    page_1.assert_nothing_leaked()


def test_page_1_compresses(page_1: Server) -> None:
    answers = page_1.generate(PROMPTS, tokens=200, kv_compress={"retain": 0.3})
    for answer in answers:
        report = answer["meta_info"]["kv_compress"]
        if report["windows"]:
            assert report["retained"] == pytest.approx(19 / 64)  # 0.3 * 64, rounded to tokens
    assert any(answer["meta_info"]["kv_compress"]["windows"] for answer in answers)
    page_1.assert_nothing_leaked()


def test_mixed_load_of_which_many_are_retracted_leaks_nothing(page_1: Server) -> None:
    before = page_1.state()["retracted_tokens_returned"]
    soak(page_1, count=24, clients=6)
    assert page_1.state()["retracted_tokens_returned"] > before


@pytest.fixture(scope="module")
def small_pool(tiny_model: Path, logs: Path) -> Iterator[Server]:
    """Page size 64, bfloat16, a pool that cannot hold the load, so that SGLang must retract; no host
    memory for those that are."""
    config = {"delay": 16, "policy": "periodic", "debug_checks": True, "retracted_mem_gb": 0}
    flags = (
        *("--skip-tokenizer-init", "--page-size", "64", "--max-total-tokens", "2048"),
        *("--dtype", "bfloat16", "--kv-compress", "kara"),
        # Room for about four recorders, so that they keep the mean, are passed on, and run out.
        *("--kv-compress-window", "128", "--kv-compress-query-mem-gb", "0.0004"),
        *("--kv-compress-config", json.dumps(config)),
    )
    # With ignore_eos stock reserves every future token and never retracts; clip the reserve.
    env = {"SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION": "16"}
    with launch(tiny_model, logs / "small_pool.log", *flags, env=env) as server:
        yield server


def test_small_pool_retracts_and_leaks_nothing(small_pool: Server) -> None:
    """More requests than fit: retractions happen, every request gets all its tokens."""
    lengths = [300 + 40 * (index % 5) for index in range(10)]
    answers = in_parallel(
        [
            lambda i=i, n=n: small_pool.generate(prompt(30 + 7 * i, 60 + i), tokens=n)
            for i, n in enumerate(lengths)
        ]
    )
    assert [len(answer["output_ids"]) for answer in answers] == lengths
    assert sum(answer["meta_info"]["num_retractions"] for answer in answers) > 0
    assert "Retract requests" in small_pool.log_text()
    for index, answer in enumerate(answers):
        # What was computed again was compressed again.
        length = lengths[index] - 1 + (30 + 7 * index) - 64 * (-(-(30 + 7 * index) // 64))
        assert answer["meta_info"]["kv_compress"]["windows"] in (
            (length - 16) // 128,
            (length - 18) // 128,
        )
    assert small_pool.state()["retracted_tokens_returned"] == 0
    small_pool.assert_nothing_leaked()


def test_scarce_recorders_are_passed_on(small_pool: Server) -> None:
    """More requests than recorders: some windows are chosen without queries, and all are compressed."""
    before = small_pool.state()
    answers = in_parallel(
        [
            lambda i=i: small_pool.generate(prompt(20, 80 + i), tokens=900 if i < 2 else 500)
            for i in range(9)
        ]
    )
    after = small_pool.state()
    without = after["without_queries"] - before["without_queries"]
    assert 0 < without < after["windows"] - before["windows"]
    assert after["skipped"] == before["skipped"]
    # A retraction starts a request's count anew, so those say nothing here.
    stayed = [answer["meta_info"] for answer in answers if not answer["meta_info"]["num_retractions"]]
    assert len(stayed) >= 3
    for info in stayed:
        report = info["kv_compress"]
        length = report["logical_length"] - 64  # where windows start: prompts are of 20 tokens
        assert report["windows"] in ((length - 16) // 128, (length - 18) // 128)
        assert report["without_queries"] <= report["windows"]
    small_pool.assert_nothing_leaked()


@pytest.fixture(scope="module")
def small_ring(tiny_model: Path, logs: Path) -> Iterator[Server]:
    """Page size 16, a pool for all, and a query ring for four requests."""
    flags = (
        *("--skip-tokenizer-init", *PAGE_16, "--kv-compress", "kara", "--kv-compress-window", "64"),
        *("--kv-compress-query-mem-gb", "0.0003"),
        *("--kv-compress-config", '{"delay": 16, "policy": "periodic", "debug_checks": true}'),
    )
    with launch(tiny_model, logs / "small_ring.log", *flags) as server:
        yield server


@pytest.mark.parametrize("retain", [0.5, 0.25])
def test_a_small_ring_keeps_what_the_setting_says(small_ring: Server, retain: float) -> None:
    """Four times more requests than recorders: the share of all whole windows that is kept is within
    two points of the setting's, and more requests vote than there are recorders."""
    before = small_ring.state()
    assert (before["recorders_in_use"], before["recorder_room"]["mean"]) == (0, 4)
    prompts = [prompt(20 + 3 * index, 120 + index) for index in range(16)]
    answers = small_ring.generate(prompts, tokens=600, kv_compress={"retain": retain})
    reports = [answer["meta_info"]["kv_compress"] for answer in answers]
    whole = [
        (report["logical_length"] - -(-len(ids) // 16) * 16 - 16) // 64 * 64
        for report, ids in zip(reports, prompts, strict=True)
    ]
    removed = sum(report["tokens_removed"] for report in reports)
    assert 1 - removed / sum(whole) == pytest.approx(retain, abs=0.02)
    windows = sum(report["windows"] for report in reports)
    without = sum(report["without_queries"] for report in reports)
    assert 0.7 < without / windows < 0.9
    assert sum(report["without_queries"] < report["windows"] for report in reports) >= 8
    after = small_ring.state()
    assert after["without_queries"] - before["without_queries"] == without
    assert after["skipped"] == {}
    small_ring.assert_nothing_leaked()


def test_large_prompt_among_uncompressed_requests(small_pool: Server) -> None:
    """Admission never counts on memory that is not free: a prompt that needs half the pool waits."""
    calls = [lambda i=i: small_pool.generate(prompt(20, 90 + i), tokens=400) for i in range(8)]
    calls += [lambda i=i: small_pool.generate(prompt(1100, 99 + i), tokens=20) for i in range(3)]
    for answer, tokens in zip(in_parallel(calls), [400] * 8 + [20] * 3, strict=True):
        assert len(answer["output_ids"]) == tokens
    small_pool.assert_nothing_leaked()


def soak(server: Server, count: int, clients: int) -> None:
    """Mixed requests from several clients: selectors, opt-outs, aborts, shared prompts."""
    rng = random.Random(count)
    options = [None, False, {"selector": "random"}, {"selector": "snapkv", "retain": 0.25}]
    plans = [
        (
            prompt(rng.choice((8, 64, 130)), rng.randrange(6)),
            rng.randrange(20, 300),
            rng.choice(options),
            rng.random() < 0.25,
        )
        for _ in range(count)
    ]

    def client(number: int) -> None:
        for index in range(number, count, clients):
            ids, tokens, option, abort = plans[index]
            if not abort:
                answer = server.generate(ids, tokens=tokens, kv_compress=option)
                assert len(answer["output_ids"]) == tokens
                continue
            params = {"max_new_tokens": 1500, "ignore_eos": True, "temperature": 0}
            if option is not None:
                params["custom_params"] = {"kv_compress": option}
            body = {"input_ids": ids, "sampling_params": params, "stream": True}
            with requests.post(server.url + "/generate", json=body, stream=True, timeout=300) as answer:
                for line_number, _ in enumerate(answer.iter_lines()):
                    if line_number > tokens:
                        break

    in_parallel([lambda n=n: client(n) for n in range(clients)])
    server.assert_nothing_leaked()


def test_mixed_load_leaks_nothing(small_pool: Server) -> None:
    soak(small_pool, count=24, clients=6)


@pytest.mark.slow
def test_long_mixed_load_leaks_nothing(small_pool: Server) -> None:
    soak(small_pool, count=600, clients=8)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("reuse", "tiers"),
    [
        *(("exact", ""), ("auto:64", ""), ("compressed", "")),
        *(("exact", "write_back"), ("compressed", "write_through")),
    ],
)
def test_a_thousand_requests_of_which_many_are_retracted_leak_nothing(
    tiny_model: Path, tmp_path: Path, logs: Path, reuse: str, tiers: str
) -> None:
    """By force and for want of memory; rows wait on the host and come back, with HiCache as well."""
    env = {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "31"}
    flags: tuple[str, ...] = ()
    if tiers:
        flags = (*HOST_TIER, "--hicache-write-policy", tiers)
        env |= plugins.install(tmp_path, "host_tier")
    with launch_small(tiny_model, logs, 16, reuse, *flags, env=env) as server:
        soak(server, count=1000, clients=8)
        assert server.state()["retracted_tokens_returned"] > 3_000


@pytest.mark.slow
def test_a_scheduler_killed_while_rows_wait_takes_the_server_along(
    tiny_model: Path, tmp_path: Path, logs: Path
) -> None:
    """Clients hear of it, and no process lives on."""
    env = {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "3"}
    env |= plugins.install(tmp_path, "host_tier")
    flags = ("--skip-tokenizer-init", *PAGE_16, "--kv-compress", "kara", *WINDOW, *HOST_TIER)
    log = logs / "killed.log"
    command = ("-m", "sglang.launch_server", "--model-path", str(tiny_model), *CPU_FLAGS)
    port = free_port()
    with run((*command, "--port", str(port), *flags), log, env) as process:
        wait_until_ready(process, port, log, timeout=240)
        server = Server(process, port, log)

        def ask(index: int) -> Exception | None:
            try:
                server.generate(prompt(40, index), tokens=3000)
            except requests.RequestException as error:
                return error
            return None

        def kill() -> None:
            end = time.monotonic() + 120
            while server.state()["retracted_tokens_returned"] == 0 and time.monotonic() < end:
                time.sleep(0.1)
            [scheduler] = [one for one in children if "scheduler" in " ".join(one.cmdline())]
            scheduler.kill()

        children = psutil.Process(process.pid).children(recursive=True)
        *heard, _ = in_parallel([lambda i=i: ask(i) for i in range(4)] + [kill])
        assert all(heard)
        assert process.wait(timeout=60) != 0
        assert psutil.wait_procs(children, timeout=30)[1] == []
