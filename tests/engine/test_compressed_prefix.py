"""Compressed prefixes on real SGLang: page sizes 1 and 16, overlap scheduling, chunked prefill."""

from __future__ import annotations

import json
import random
import threading
import time
from array import array
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
from exactness import RetainedCache, logprobs
from server import Server, in_parallel, launch_small, prompt

from kara_sglang.config import KaraConfig
from kara_sglang.radix_integration.keys import FIRST_ID, Text, physical_key, seed_of
from kara_sglang.radix_integration.row import Window

W, R, DELAY = 32, 16, 8  # of these servers
PROMPT = prompt(100, 21)
EXACT = {"prefix": "exact"}


@pytest.fixture(scope="module")
def compressed_page_1(tiny_model: Path, logs: Path) -> Iterator[Server]:
    with launch_small(tiny_model, logs, 1, "compressed") as started:
        started.page = 1
        yield started


@pytest.fixture(scope="module", params=["compressed", "compressed_page_1"])
def server(request: pytest.FixtureRequest) -> Server:
    return request.getfixturevalue(request.param)


def ceil(value: int, page: int) -> int:
    return -(-value // page) * page


def report(answer: dict) -> dict[str, Any]:
    return answer["meta_info"]["kv_compress"]


def cached(answer: dict) -> int:
    return answer["meta_info"]["cached_tokens"]


def used(server: Server) -> int:
    """Slots that are not free; on an idle server the prefix cache holds them."""
    state = server.state()
    return state["pool_tokens"] - state["pool_tokens_free"]


def test_continuing_is_going_on(server: Server) -> None:
    """Cut a request in two: until the next window falls due, the second half is what one request
    would have written, token for token, with its log-probabilities."""
    page, base = server.page, ceil(len(PROMPT), server.page)
    server.flush()
    whole = server.generate(PROMPT, tokens=100)
    server.flush()
    cut = 63
    first = server.generate(PROMPT, tokens=cut)
    windows = report(first)["windows"]
    assert windows == (100 + cut - 1 - base - DELAY) // W >= 1
    assert first["output_ids"] == whole["output_ids"][:cut]
    text = PROMPT + first["output_ids"]
    second = server.generate(text, tokens=100 - cut)

    logical = 100 + cut - 1  # the last token's KV was never computed
    slots = (logical - windows * (W - R)) // page * page
    assert cached(second) == slots + windows * (W - R)
    assert report(second)["reused_tokens"] == cached(second) - base
    assert report(second)["reused_slots"] == slots - base
    # One request is compressed again when the window behind the last one and its delay are there.
    same = base + windows * W + W + DELAY - len(text) + 1
    assert 10 <= same < 100 - cut
    assert second["output_ids"][:same] == whole["output_ids"][cut : cut + same]
    expected = logprobs(whole)[cut : cut + same]
    assert logprobs(second)[:same] == pytest.approx(expected, abs=2e-4)
    server.assert_nothing_leaked()


def test_positions_and_chunks_behind_a_compressed_prefix(server: Server, tiny_model: Path) -> None:
    """Log-probabilities are those of transformers with exactly the retained K/V, over three requests of
    which each continues the last: chunked prefill, windows behind reused windows, decoding."""
    page = server.page
    server.flush()
    truth = RetainedCache(tiny_model, window=W, kept=R, delay=DELAY, page_size=page)
    text: list[int] = []
    for step, extra in enumerate((100, 300, 40)):
        text += prompt(extra, 60 + step)
        answer = server.generate(
            text, tokens=90, kv_compress={"selector": "recent"}, top_logprobs_num=3
        )
        assert report(answer)["windows"] == 2 or page == 1
        # All but less than a page of what the last request left; its last token has no KV.
        before = len(text) - extra
        assert before - page <= cached(answer) <= max(0, before - 1)
        assert report(answer)["reused_tokens"] > 0 or step == 0
        # What the page floor left is computed again, now behind compressed windows.
        crop(truth, cached(answer))
        expected = truth.feed(text[truth.position :])
        truth.base = None  # windows start behind each prompt
        for token, tops in zip(
            answer["output_ids"], answer["meta_info"]["output_top_logprobs"], strict=True
        ):
            assert expected.argmax() == token
            for logprob, candidate, _ in tops:
                assert logprob == pytest.approx(expected[candidate].item(), abs=3e-4)
            truth.prune()
            expected = truth.feed([token])
        text += answer["output_ids"]
        held = report(answer)["kv_slots_held"]
        assert held == truth.cache.get_seq_length() - 1
        assert report(answer)["logical_length"] == truth.position - 1
    server.assert_nothing_leaked()


def crop(truth: RetainedCache, tokens: int) -> None:
    """Forget all behind the first ``tokens`` tokens."""
    slots = truth.cache.get_seq_length() - (truth.position - tokens)
    for layer in truth.cache.layers:
        layer.keys, layer.values = layer.keys[:, :, :slots], layer.values[:, :, :slots]
    truth.position = tokens


@pytest.mark.parametrize("option", [False, EXACT], ids=["opted out", "prefix exact"])
def test_exact_requests_never_touch_a_compressed_block(
    server: Server, stock: Server, option: Any
) -> None:
    """After a compressed twin: stock's answer, from the exact part; its exact KV wins afterwards."""
    server.flush()
    stock.flush()
    first = server.generate(PROMPT, tokens=80)
    assert report(first)["windows"] >= 1
    text = PROMPT + first["output_ids"] + prompt(9, 22)
    answer = server.generate(text, tokens=20, kv_compress=option)
    assert cached(answer) == ceil(100, server.page)  # up to the first window
    assert report(answer)["reused_tokens"] == report(answer)["reused_slots"] == 0
    expected = stock.generate(text, tokens=20)
    assert answer["output_ids"] == expected["output_ids"]
    assert logprobs(answer) == pytest.approx(logprobs(expected), abs=2e-4)
    again = server.generate([*text, 5], tokens=2)
    assert cached(again) == len(text) // server.page * server.page
    assert report(again)["reused_tokens"] == 0
    server.assert_nothing_leaked()


def test_other_settings_do_not_share(server: Server) -> None:
    """Another share, another selector: only the exact prompt is theirs."""
    server.flush()
    first = server.generate(PROMPT, tokens=80)
    text = PROMPT + first["output_ids"] + [7]
    exact = ceil(100, server.page)
    for option in ({"retain": 1.0}, {"selector": "random"}, {"selector": "identity"}):
        server.flush()
        assert server.generate(PROMPT, tokens=80)["output_ids"] == first["output_ids"]
        assert cached(server.generate(text, tokens=1, kv_compress=option)) == exact, option
        # And what they have left is exact, so it goes before what the first request left.
        longer = server.generate([*text, 8], tokens=1)
        assert cached(longer) == len(text) // server.page * server.page
        assert report(longer)["reused_tokens"] == 0
    server.assert_nothing_leaked()


def test_a_window_of_one_slot_is_not_shared(server: Server) -> None:
    """Its single id would be too short a name; in pages of 16 the same share keeps more than one."""
    server.flush()
    one = {"retain": 0.01}
    first = server.generate(PROMPT, tokens=80, kv_compress=one)
    assert report(first)["tokens_removed"] == report(first)["windows"] * (W - server.page) > 0
    again = server.generate([*PROMPT, *first["output_ids"], 7], tokens=1, kv_compress=one)
    if server.page == 1:
        assert cached(again) == len(PROMPT) and report(again)["reused_tokens"] == 0
    else:
        assert report(again)["reused_tokens"] > 0
    server.assert_nothing_leaked()


@pytest.mark.parametrize("name", ["cache_salt", "extra_key"])
def test_other_salts_and_keys_do_not_share(server: Server, name: str) -> None:
    """Over HTTP: the same one finds what it left, all others their own exact prompt and no more."""
    values = (None, "mine", "yours")
    for writer in values:
        server.flush()
        for value in values:
            assert cached(server.generate(PROMPT, tokens=1, **{name: value})) == 0
        first = server.generate(PROMPT, tokens=80, **{name: writer})
        assert report(first)["windows"] >= 1
        for value in values:
            answer = server.generate([*PROMPT, *first["output_ids"], 7], tokens=1, **{name: value})
            if value == writer:
                assert report(answer)["reused_tokens"] > 0
            else:
                assert cached(answer) == len(PROMPT) // server.page * server.page
                assert report(answer)["reused_tokens"] == 0
    server.assert_nothing_leaked()


def forged(settings: dict[str, Any], text: list[int], base: int, windows: int) -> list[int]:
    """The physical key of a text whose windows start at ``base``: what a client can compute that knows
    the text and reads the server's settings in /server_info."""
    settings = dict(settings)
    kept = settings.pop("kept")
    config = KaraConfig(**settings)
    seed = seed_of(repr((config.to_json(), config.selector, kept, None)).encode(), None, None)
    layout = [Window(base + k * W, base + k * kept, W, kept, "all") for k in range(windows)]
    return physical_key(Text(seed, memoryview(array("q", text))), layout).tolist()


def test_forged_keys_are_refused_and_change_nobodys_answer(server: Server) -> None:
    """A client that sends a physical key as its prompt, before and after the windows are written,
    does not change what an honest client is told."""
    tail = prompt(60, 23)

    def story(*, attack: bool) -> tuple[dict, dict]:
        server.flush()
        answers = []
        for wanted in (PROMPT, None):
            text = wanted or [*PROMPT, *answers[0]["output_ids"], *tail]
            if attack:
                body = {"input_ids": fake + tail, "sampling_params": {"max_new_tokens": 1}}
                response = server.post("/generate", body)
                assert (response.status_code, "input_ids" in response.text) == (400, True)
            answers.append(server.generate(text, tokens=120))
        return answers[0], answers[1]

    first, honest = story(attack=False)
    windows = report(first)["windows"]
    assert windows >= 2 and report(honest)["reused_tokens"] > 0
    base = ceil(len(PROMPT), server.page)
    text = [*PROMPT, *first["output_ids"][:-1]]
    fake = forged(server.state()["settings"], text, base, windows)
    assert max(fake) >= FIRST_ID and len(fake) == len(text) - windows * (W - R)
    again, shared = story(attack=True)
    assert again["output_ids"] == first["output_ids"]
    assert shared["output_ids"] == honest["output_ids"]
    assert logprobs(shared) == logprobs(honest)
    assert (cached(shared), report(shared)) == (cached(honest), report(honest))
    server.assert_nothing_leaked()


def test_diverging_in_a_window_reuses_up_to_its_start(server: Server) -> None:
    base = ceil(len(PROMPT), server.page)
    server.flush()
    first = server.generate(PROMPT, tokens=120)
    text = PROMPT + first["output_ids"]
    assert report(first)["windows"] >= 2
    for leaves, reused in (
        (base + W + W // 2, base + W),  # inside the second window
        (base + W, base + W),  # at its first token
        (base + W - 1, base),  # inside the first
        (base + 2 * W + 1, base + 2 * W),  # right behind the second
    ):
        other = (text[leaves] + 1) % 500 + 3
        answer = server.generate([*text[:leaves], other, 9, 9], tokens=1)
        assert cached(answer) == reused, leaves
        assert report(answer)["reused_tokens"] == max(0, reused - base)
    server.assert_nothing_leaked()


def test_a_session_is_its_turns(server: Server) -> None:
    """A turn answers, and finds in the cache, what a request with the whole text would."""
    server.flush()
    turns = [prompt(length, 40 + length) for length in (100, 20, 30)]
    session = server.post("/open_session", {"capacity_of_str_len": 10_000}).json()
    rid, answers = None, []
    for turn in turns:
        part = {"id": session, "rid": rid}
        answers.append(server.generate(turn, tokens=90, session_params=part))
        rid = answers[-1]["meta_info"]["id"]
    assert server.post("/close_session", {"session_id": session}).status_code == 200
    server.flush()
    text: list[int] = []
    for turn, answer in zip(turns, answers, strict=True):
        text += turn
        whole = server.generate(text, tokens=90)
        assert whole["output_ids"] == answer["output_ids"]
        assert (cached(whole), report(whole)) == (cached(answer), report(answer))
        assert report(answer)["windows"] == 2
        text += answer["output_ids"]
    assert report(answers[-1])["reused_tokens"] > 0
    server.assert_nothing_leaked()


def test_forks_share_one_copy(server: Server) -> None:
    """Five requests continue one compressed chain at once: the pool holds it once."""
    page, base = server.page, ceil(len(PROMPT), server.page)
    server.flush()
    chain = server.generate(PROMPT, tokens=200)
    text = PROMPT + chain["output_ids"]
    shared = used(server)
    windows = report(chain)["windows"]
    assert windows >= 4
    assert shared == (299 - windows * (W - R)) // page * page
    forks, answers, most = [], [], 0
    for index in range(5):
        forks.append([*text, *prompt(8, 70 + index)])
    done = threading.Event()

    def run() -> None:
        answers.extend(server.generate(forks, tokens=30))
        done.set()

    thread = threading.Thread(target=run)
    thread.start()
    while not done.wait(0.02):
        most = max(most, used(server))
    thread.join()
    # Own: what the page floor left of the chain, 8 tokens of the prompt, 30 of the answer.
    own = ceil(page + 8 + 30, page) + page
    assert shared < most <= shared + 5 * own
    assert used(server) <= shared + 5 * own
    for answer in answers:
        assert report(answer)["reused_slots"] == shared - base
        assert report(answer)["reused_tokens"] == shared - base + windows * (W - R)
    server.assert_nothing_leaked()


def test_retracted_requests_come_back_to_the_shared_prefix(server: Server) -> None:
    """Eight forks outgrow the pool; who is retracted gets its own row back behind what all of them
    share, and goes on as if nothing had happened."""
    base = ceil(len(PROMPT), server.page)
    server.flush()
    chain = server.generate(PROMPT, tokens=90)
    text = PROMPT + chain["output_ids"]
    forks = [[*text, *prompt(80, 90 + index)] for index in range(8)]
    # The first window behind a prompt falls due so many tokens later.
    calm = W + DELAY - server.page
    expected = server.generate(forks, tokens=calm)
    assert not any(answer["meta_info"]["num_retractions"] for answer in expected)
    before = server.state()
    answers = in_parallel([lambda fork=fork: server.generate(fork, tokens=240) for fork in forks])
    for alone, answer in zip(expected, answers, strict=True):
        written = answer["output_ids"]
        assert len(written) == 240
        assert report(answer)["reused_tokens"] == cached(answer) - base > 0
        assert written[:calm] == alone["output_ids"]
    retractions = sum(answer["meta_info"]["num_retractions"] for answer in answers)
    after = server.state()
    computed = after["retracted_tokens_computed"] - before["retracted_tokens_computed"]
    returned = after["retracted_tokens_returned"] - before["retracted_tokens_returned"]
    # The rest of a page, and with overlap scheduling a token whose row was not full when it went.
    assert 0 < computed <= retractions * (server.page + 1)
    assert returned > 80 * retractions / 2
    server.assert_nothing_leaked()


def test_aborts_in_the_middle_of_a_prefill(server: Server) -> None:
    """Between two chunks behind a compressed prefix: what was computed is right and may stay in the
    cache, but nobody holds on to it, nor to what others share."""
    page = server.page
    server.flush()
    text = PROMPT + server.generate(PROMPT, tokens=120)["output_ids"]
    halfway = {}
    for index in range(3):
        longer = [*text, *prompt(800, 700 + index)]  # seven chunks
        body = {"input_ids": longer, "rid": f"halfway-{index}"}
        position = len(server.log_text())
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(server.post, "/generate", body)
            while "Prefill batch" not in server.log_text()[position:] and not answer.done():
                time.sleep(0.001)
            server.post("/abort_request", {"rid": body["rid"]})
        again = server.generate(longer, tokens=5)
        assert report(again)["reused_tokens"] > 0
        if len(text) < cached(again) < (len(longer) - 1) // page * page:
            halfway[index] = again["output_ids"]
    assert halfway
    # As much as the pool holds gets in, over all that was cached.
    assert len(server.generate(prompt(1500, 23), tokens=5)["output_ids"]) == 5
    server.flush()
    assert text == PROMPT + server.generate(PROMPT, tokens=120)["output_ids"]
    index, written = halfway.popitem()
    longer = [*text, *prompt(800, 700 + index)]
    assert server.generate(longer, tokens=5)["output_ids"] == written
    server.assert_nothing_leaked()


def mixed(server: Server, count: int) -> dict[str, int]:
    """``count`` requests from 8 clients on a small pool: new texts, continued and forked ones, all
    kinds of options, aborts and hang-ups; most of them fight for room."""
    left = list(range(count))
    texts: list[list[int]] = [prompt(40 + 20 * index, 300 + index) for index in range(4)]
    seen = {"aborted": 0, "reused": 0, "windows": 0}
    lock = threading.Lock()
    options = [None] * 6 + [False, EXACT, {"retain": 0.25}, {"selector": "random"}]

    def client(number: int) -> None:
        rng = random.Random(number)
        while True:
            with lock:
                if not left:
                    return
                index = left.pop()
                text = rng.choice(texts[-4:])
            if len(text) > 350:
                text = prompt(60, index)
            elif rng.random() < 0.15:
                text = text[: rng.randrange(1, len(text) + 1)]
            text = [*text, *prompt(rng.randrange(1, 40), index)]
            body = {
                "input_ids": text,
                "rid": f"mixed-{count}-{index}",
                "stream": True,
                "sampling_params": {
                    "max_new_tokens": rng.randrange(1, 150),
                    "temperature": 0.0,
                    "custom_params": {"kv_compress": rng.choice(options)},
                },
            }
            stop_after = rng.randrange(1, 60) if rng.random() < 0.25 else None
            last: dict[str, Any] = {}
            with requests.post(
                server.url + "/generate", json=body, stream=True, timeout=300
            ) as response:
                for number_of_line, line in enumerate(response.iter_lines()):
                    if line.startswith(b"data: {"):
                        last = json.loads(line[6:])
                    if stop_after is not None and number_of_line > stop_after:
                        if index % 2:
                            server.post("/abort_request", {"rid": body["rid"]})
                        break
            assert "error" not in last, last
            with lock:
                seen["aborted"] += stop_after is not None
                if last and "kv_compress" in last["meta_info"]:
                    texts.append(text + last["output_ids"])
                    seen["reused"] += report(last)["reused_tokens"] > 0
                    seen["windows"] += report(last)["windows"]

    in_parallel([lambda n=number: client(n) for number in range(8)])
    return seen


def test_mixed_requests_leak_nothing(server: Server) -> None:
    """SGLang's strict checks look at every step; at the end the pool is whole."""
    server.flush()
    seen = mixed(server, 100)
    assert min(seen.values()) > 0, seen
    server.assert_nothing_leaked()


@pytest.mark.slow
def test_many_mixed_requests_leak_nothing(server: Server) -> None:
    server.flush()
    assert mixed(server, 1000)["reused"] > 20
    server.assert_nothing_leaked()
