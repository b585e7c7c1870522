"""An answer that outgrows the pool, on real SGLang: beside others, aborted, paused, continued."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from exactness import assert_same_choices
from server import Server, in_parallel, launch, prompt

SLOTS, CAP = 800, 800 - 16 - 16 - 1
"""Of the pool, and tokens of an answer behind ten that stock SGLang would end with."""
FLAGS = (
    *("--skip-tokenizer-init", "--dtype", "float32", "--page-size", "16"),
    *("--max-total-tokens", str(SLOTS), "--kv-compress", "kara", "--kv-compress-window", "128"),
    *("--kv-compress-retain", "0.125", "--kv-compress-query-mem-gb", "0.05"),
    *("--kv-compress-config", '{"delay": 16, "debug_checks": true}'),
)


@pytest.fixture(scope="module")
def pool(tiny_model: Path, logs: Path) -> Iterator[Server]:
    with launch(tiny_model, logs / "longer.log", *FLAGS) as server:
        yield server


def once(server: Server, **marks: int) -> dict[str, Any]:
    """The server's state as soon as its figures have come to these."""
    for _ in range(2400):
        state = server.state()
        if all(state[name] >= value for name, value in marks.items()):
            return state
        time.sleep(0.1)
    raise AssertionError(f"the server does not come to {marks}")


def length(answer: dict) -> tuple[str, int]:
    return answer["meta_info"]["finish_reason"]["type"], len(answer["output_ids"])


def test_an_answer_that_is_longer_than_the_pool_beside_others(pool: Server, stock: Server) -> None:
    """It is written to its end and never computed again. Who opted out beside it gets what stock gives;
    a second one that would go on ends where stock ends it, and an opted-out one always does."""
    most = pool.state()["longest_answer"]
    assert most["uncompressed"] == CAP and most["tokens"] > 4000
    assert f"answers of up to {most['tokens']:,} tokens" in pool.log_text()

    def second() -> dict:
        once(pool, long_answers=1)
        return pool.generate(prompt(10, 2), tokens=2000)

    def beside() -> dict:
        once(pool, long_answers=1)
        answer = pool.generate(prompt(30, 3), tokens=100, kv_compress=False)
        assert pool.state()["running_logical_tokens"] > 0, "the long one goes on"
        return answer

    long, other, exact = in_parallel(
        [lambda: pool.generate(prompt(10, 1), tokens=2000), second, beside]
    )
    assert length(long) == ("length", 2000)
    assert long["meta_info"]["num_retractions"] == 0
    report = long["meta_info"]["kv_compress"]
    assert report["logical_length"] == 10 + 1999 and report["kv_slots_held"] <= SLOTS - 16
    assert length(other) == ("length", CAP)
    assert pool.state()["long_answers"] == 1
    assert_same_choices(exact, stock.generate(prompt(30, 3), tokens=100))
    alone = pool.generate(prompt(10, 1), tokens=2000, kv_compress=False)
    assert length(alone) == ("length", CAP)
    pool.assert_nothing_leaked()

    # The next turn would have to be computed, and does not fit.
    turn = {"input_ids": [*prompt(10, 1), *long["output_ids"]], "sampling_params": {}}
    response = pool.post("/generate", turn)
    assert response.status_code == 400 and "maximum allowed length" in response.text


def test_clients_that_leave_and_a_pause(pool: Server) -> None:
    """Either way the long one is gone, its slots are free, and the next one may be long."""
    before = pool.state()["long_answers"]
    params = {"max_new_tokens": 2000, "temperature": 0, "ignore_eos": True}
    body = {"input_ids": prompt(10, 4), "sampling_params": params, "stream": True}
    with pool.post("/generate", body, stream=True) as response:
        for line in response.iter_lines():
            said = json.loads(line.removeprefix(b"data: ")) if line.startswith(b"data: {") else None
            if said and said["meta_info"]["completion_tokens"] > CAP + 100:
                break
    pool.assert_nothing_leaked()

    def pause() -> None:
        once(pool, long_answers=before + 2, running_logical_tokens=CAP + 60)
        assert pool.post("/pause_generation", {"mode": "retract"}).status_code == 200

    body = {"input_ids": prompt(10, 5), "sampling_params": params}
    answer, _ = in_parallel([lambda: pool.post("/generate", body), pause])
    assert answer.status_code == 503 and "longer than the KV pool" in answer.text
    assert pool.post("/continue_generation", {}).status_code == 200
    assert length(pool.generate(prompt(10, 6), tokens=CAP + 20)) == ("length", CAP + 20)
    assert pool.state()["long_answers"] == before + 3
    pool.assert_nothing_leaked()


@pytest.mark.slow
def test_its_row_enters_the_tree_where_compressed_prefixes_are_shared(
    tiny_model: Path, logs: Path
) -> None:
    """A text that begins as it did goes on from its windows; one that is longer than the pool is
    refused there too."""
    flags = (*FLAGS, "--kv-compress-prefix-reuse", "compressed")
    with launch(tiny_model, logs / "longer-shared.log", *flags) as server:
        ids = prompt(10, 1)
        answer = server.generate(ids, tokens=2000)
        assert length(answer) == ("length", 2000)
        text = [*ids, *answer["output_ids"]]
        follow_up = server.generate([*text[:700], 7, 8, 9], tokens=1500)
        assert length(follow_up) == ("length", 1500)
        assert follow_up["meta_info"]["cached_tokens"] >= 640
        assert follow_up["meta_info"]["kv_compress"]["reused_slots"] < 200
        assert server.post("/generate", {"input_ids": text}).status_code == 400
        server.assert_nothing_leaked()
