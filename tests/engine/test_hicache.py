"""HiCache beside compression: prompts go to the host and come back, and no answer changes."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import plugins
import pytest
import requests
from exactness import assert_bit_exact, assert_same_choices
from server import WINDOW, Server, in_parallel, launch, prompt

POOL, PROMPT = 1024, 400
PROMPTS = [prompt(PROMPT, 300 + seed) for seed in range(4)]
COMPRESSED = {"prefix": "compressed"}  # takes a compressed row however little it gains
OPTIONS = (None, False, {"selector": "identity"}, {"selector": "random", "retain": 0.25, "seed": 3})

# How SGLang writes to the host: its default layout and I/O backend, and the others that are allowed.
WAYS = {
    "write_through": ("--hicache-io-backend", "direct", "--hicache-mem-layout", "layer_first"),
    "write_back": (),
    "write_through_selective": ("--hicache-mem-layout", "layer_first"),
}


def start(
    policy: str, tiny_model: Path, folder: Path, logs: Path, *more: str
) -> AbstractContextManager[Server]:
    """A device pool for two requests, and a host tier for seven prompts."""
    flags = (
        *("--skip-tokenizer-init", "--page-size", "16", "--max-total-tokens", str(POOL)),
        *("--dtype", "float32", "--kv-compress", "kara", *WINDOW),
        *("--enable-hierarchical-cache", "--hicache-ratio", "3", "--hicache-write-policy", policy),
        *(*WAYS[policy], *more),
    )
    env = plugins.install(folder, "host_tier")
    return launch(tiny_model, logs / f"hicache_{policy}.log", *flags, env=env)


@pytest.fixture(
    scope="module", params=["write_through", pytest.param("write_back", marks=pytest.mark.slow)]
)
def hicache(
    request: pytest.FixtureRequest,
    tiny_model: Path,
    tmp_path_factory: pytest.TempPathFactory,
    logs: Path,
) -> Iterator[Server]:
    with start(request.param, tiny_model, tmp_path_factory.mktemp("plugin"), logs) as server:
        yield server


def rounds(server: Server) -> list[list[dict]]:
    """All prompts, one after the other, and again, and a third time with the options turned by one."""
    server.flush()
    turns = (OPTIONS, OPTIONS, OPTIONS[1:] + OPTIONS[:1])
    return [
        [
            server.generate(ids, tokens=160, kv_compress=option)
            for ids, option in zip(PROMPTS, turn, strict=True)
        ]
        for turn in turns
    ]


def from_host(answer: dict) -> int:
    return (answer["meta_info"]["cached_tokens_details"] or {}).get("host", 0)


@pytest.fixture(scope="module")
def references(kara: Server, stock: Server) -> tuple[list[list[dict]], list[list[dict]]]:
    """The same without HiCache, compressed and by stock, on devices that hold all."""
    return rounds(kara), rounds(stock)


def test_prompts_come_back_from_the_host(
    hicache: Server, references: tuple[list[list[dict]], list[list[dict]]]
) -> None:
    """Long answers drive the other prompts off the device. The answers are those of a server whose
    device holds all, to the bit; those that opted out and `identity` are stock's."""
    answers, (expected, plain) = rounds(hicache), references
    for turn, (mine, theirs) in enumerate(zip(answers, expected, strict=True)):
        assert_bit_exact(mine, theirs)
        for one, other in zip(mine, theirs, strict=True):
            assert one["meta_info"]["kv_compress"] == other["meta_info"]["kv_compress"]
            assert one["meta_info"]["cached_tokens"] == other["meta_info"]["cached_tokens"]
            assert bool(from_host(one)) == bool(turn)
    for turn, (untouched, identity) in enumerate(((1, 2), (1, 2), (0, 1))):
        assert_bit_exact(
            [answers[turn][untouched], answers[turn][identity]],
            [plain[turn][untouched], plain[turn][identity]],
        )
    hicache.assert_nothing_leaked()


def follow_up(server: Server, ids: list[int], drive_off: bool) -> dict:
    """An answer of which two windows are compressed, and one that continues it."""
    server.flush()
    first = server.generate(ids, tokens=200)
    assert first["meta_info"]["kv_compress"]["windows"] == 2
    if drive_off:
        fill_the_device(server)
    text = [*ids, *first["output_ids"], *prompt(20, 310)]
    return server.generate(text, tokens=60, kv_compress=COMPRESSED)


def fill_the_device(server: Server) -> None:
    for other in PROMPTS[1:]:
        server.generate(other, tokens=40, kv_compress=False)


def test_compressed_rows_come_back_from_the_host(hicache: Server) -> None:
    """A row that left the device is found on the host, and continued as one that has stayed: the same
    tokens at the same positions."""
    stayed, came_back = (follow_up(hicache, PROMPTS[0], drive_off) for drive_off in (False, True))
    assert_bit_exact([came_back], [stayed])
    told, expected = came_back["meta_info"], stayed["meta_info"]
    assert told["kv_compress"] == expected["kv_compress"]
    assert told["cached_tokens"] == expected["cached_tokens"] >= PROMPT + 128 + 64
    assert told["kv_compress"]["reused_tokens"] == told["cached_tokens"] - PROMPT
    assert told["kv_compress"]["reused_slots"] == told["kv_compress"]["reused_tokens"] - 64
    assert from_host(stayed) == 0 < from_host(came_back) <= told["cached_tokens"]
    hicache.assert_nothing_leaked()


def hang_up(server: Server, ids: list[int], rid: str, after: int, option: Any = None) -> int:
    """Ask for a long answer and end it after so many chunks, by closing or by /abort_request; how many
    tokens of the prompt came from the host."""
    body = {
        "input_ids": ids,
        "sampling_params": {
            **{"max_new_tokens": 500, "temperature": 0, "ignore_eos": True},
            "custom_params": {"kv_compress": option},
        },
        "stream": True,
        "rid": rid,
    }
    with requests.post(server.url + "/generate", json=body, stream=True, timeout=300) as response:
        for count, line in enumerate(filter(None, response.iter_lines())):
            chunk = json.loads(line.removeprefix(b"data: "))
            if count >= after:
                if after % 2:
                    server.post("/abort_request", {"rid": rid})
                return from_host(chunk)
    raise AssertionError(f"the answer ended before {after} chunks")


def test_aborts_while_a_prompt_is_loaded(hicache: Server) -> None:
    """SGLang hears of a load's end many steps after it began; requests leave before that, in the first
    steps. The prompt is whole afterwards."""
    hicache.flush()
    expected = [hicache.generate(ids, tokens=100, kv_compress=False) for ids in PROMPTS]
    loaded = []
    for index, ids in enumerate(PROMPTS * 2):
        loaded.append(hang_up(hicache, ids, f"early-{index}", after=index % 4))
        answer = hicache.generate(ids, tokens=100, kv_compress=False)
        assert_same_choices(answer, expected[index % 4])
        hicache.generate(PROMPTS[(index + 2) % 4], tokens=160)  # drives it off the device
    assert sum(map(bool, loaded)) >= 4, loaded
    hicache.assert_nothing_leaked()


def test_aborts_while_a_compressed_row_is_loaded(hicache: Server) -> None:
    """The row is whole afterwards, and its windows are still windows."""
    hicache.flush()
    text = [*PROMPTS[0], *hicache.generate(PROMPTS[0], tokens=200)["output_ids"], 5]
    expected = hicache.generate(text, tokens=40, kv_compress=COMPRESSED)
    loaded = []
    for after in range(4):
        fill_the_device(hicache)
        loaded.append(hang_up(hicache, text, f"row-{after}", after, COMPRESSED))
        answer = hicache.generate(text, tokens=40, kv_compress=COMPRESSED)
        assert_same_choices(answer, expected)
        assert answer["meta_info"]["kv_compress"]["reused_tokens"] >= 128
    assert sum(map(bool, loaded)) >= 2, loaded
    hicache.assert_nothing_leaked()


def test_a_full_host_tier(hicache: Server) -> None:
    """More prompts than both tiers hold, several requests at a time: the oldest are forgotten. Then all
    answers are continued on their compressed rows, or on what is left of them."""
    hicache.flush()
    prompts = [prompt(PROMPT, 400 + seed) for seed in range(12)]
    first = [hicache.generate(ids, tokens=100) for ids in prompts]
    calls = [lambda ids=ids: hicache.generate(ids, tokens=100) for ids in reversed(prompts)]
    again = in_parallel(calls)[::-1]
    assert 0 < sum(from_host(answer) > 0 for answer in again) < 8
    for one, other in zip(first, again, strict=True):
        assert len(other["output_ids"]) == 100
        windows = [answer["meta_info"]["kv_compress"]["windows"] for answer in (one, other)]
        assert windows[0] == windows[1] > 0
    texts = [[*ids, *answer["output_ids"], 5] for ids, answer in zip(prompts, again, strict=True)]
    calls = [lambda t=text: hicache.generate(t, tokens=90, kv_compress=COMPRESSED) for text in texts]
    answers = in_parallel(calls)
    assert all(len(answer["output_ids"]) == 90 for answer in answers)
    reused = [answer["meta_info"]["kv_compress"]["reused_tokens"] for answer in answers]
    both = [tokens for tokens, answer in zip(reused, answers, strict=True) if from_host(answer)]
    assert 0 < sum(map(bool, both)) <= sum(map(bool, reused)) < 12, (reused, both)
    hicache.assert_nothing_leaked()


@pytest.mark.slow
def test_storage_is_not_attached_to_a_running_server(
    tiny_model: Path, tmp_path: Path, logs: Path
) -> None:
    key = ("--admin-api-key", "admin")
    with start("write_through", tiny_model, tmp_path, logs, *key) as server:
        response = requests.put(
            server.url + "/hicache/storage-backend",
            json={"hicache_storage_backend": "file"},
            headers={"Authorization": "Bearer admin"},
            timeout=60,
        )
    assert response.status_code == 400
    assert "storage backend does not work with --kv-compress" in response.text


@pytest.mark.slow
@pytest.mark.parametrize("policy", WAYS)
def test_long_mixed_load_over_two_tiers(
    policy: str, tiny_model: Path, tmp_path: Path, logs: Path, stock: Server
) -> None:
    """Six clients, more prompts than both tiers hold, a third of the answers given up: who opted out
    gets stock's tokens, and both tiers are whole at the end."""
    prompts = [prompt(length, 500 + length) for length in range(100, 420, 16)]
    stock.flush()
    expected = [stock.generate(ids, tokens=60) for ids in prompts]

    def client(server: Server, number: int) -> None:
        rng = random.Random(number)
        for index in range(25):
            which = rng.randrange(len(prompts))
            if rng.random() < 1 / 3:
                hang_up(server, prompts[which], f"{number}-{index}", rng.randrange(200))
                continue
            option = rng.choice([None, False, {"selector": "snapkv", "retain": 0.25}])
            tokens = 60 if option is False else rng.randrange(100, 300)
            answer = server.generate(prompts[which], tokens=tokens, kv_compress=option)
            assert len(answer["output_ids"]) == tokens
            if option is None:
                text = [*prompts[which], *answer["output_ids"], 5]
                server.generate(text, tokens=100, kv_compress=COMPRESSED)
            if option is False:
                assert_same_choices(answer, expected[which])

    with start(policy, tiny_model, tmp_path, logs) as server:
        in_parallel([lambda n=n: client(server, n) for n in range(6)])
        server.assert_nothing_leaked()
