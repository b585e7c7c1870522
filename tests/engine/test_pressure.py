"""The default policy on real SGLang: stock's answers while all fit; if not, room is made."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from exactness import assert_bit_exact
from server import Server, in_parallel, launch, prompt

TOKENS, SLOTS = 300, 1024
# Two requests of 100 and 300 tokens fit uncompressed; the third has to wait.
FLAGS = (
    *("--skip-tokenizer-init", "--dtype", "float32", "--page-size", "16"),
    *("--max-total-tokens", str(SLOTS), "--decode-log-interval", "1"),
    *("--kv-compress", "kara", "--kv-compress-window", "64", "--kv-compress-query-mem-gb", "0.05"),
    *("--kv-compress-config", '{"delay": 16, "debug_checks": true}'),
)
BEGINS = (
    "compression begins when running and waiting requests need 80 % of the KV pool, and an answer is "
    "longer than 80 tokens"
)
REUSE = "; prefix reuse auto: a compressed prefix is taken where it reaches 2,048 tokens farther than "


@pytest.fixture(scope="module")
def scarce(tiny_model: Path, logs: Path) -> Iterator[Server]:
    with launch(tiny_model, logs / "pressure.log", *FLAGS) as server:
        yield server


def test_while_all_fit_answers_and_prefixes_are_stocks(scarce: Server, stock: Server) -> None:
    """Bit by bit, and a follow-up turn finds as much in the prefix cache."""
    assert BEGINS in scarce.log_text() and REUSE in scarce.log_text()
    assert scarce.state()["settings"]["prefix_reuse"] == "auto"
    first, expected = (server.generate(prompt(100, 1), tokens=TOKENS) for server in (scarce, stock))
    assert_bit_exact([first], [expected])
    assert first["meta_info"]["kv_compress"]["windows"] == 0
    turn = [*prompt(100, 1), *first["output_ids"], 3, 4, 5]
    second, expected = (server.generate(turn, tokens=30) for server in (scarce, stock))
    assert_bit_exact([second], [expected])
    assert second["meta_info"]["cached_tokens"] == expected["meta_info"]["cached_tokens"] >= 384
    state = scarce.state()
    assert state["passes"] == 0 and not any(state["skipped"].values())
    assert state["compression"] == f"{BEGINS}; it has not yet"


def test_windows_left_whole_are_compressed_when_somebody_needs_the_room(scarce: Server) -> None:
    """The first answer has written four windows when the second request comes; they go as well, by
    `keys` where their queries are gone, and both end."""

    def second() -> dict:
        while (state := scarce.state())["running_logical_tokens"] < 100 + 4 * 64 + 16 + 70:
            time.sleep(0.05)
        assert state["running_held_tokens"] == state["running_logical_tokens"], "left whole"
        return scarce.generate(prompt(100, 3), tokens=TOKENS)

    calls = [lambda: scarce.generate(prompt(100, 2), tokens=600), second]
    answers = [answer["meta_info"]["kv_compress"] for answer in in_parallel(calls)]
    assert answers[0]["windows"] >= 7
    assert 2 <= answers[0]["without_queries"] < answers[0]["windows"]
    assert [one["logical_length"] for one in answers] == [699, 399]
    assert re.fullmatch(f"{BEGINS}; it has, \\d+ windows so far", scarce.state()["compression"])


def test_a_queue_is_let_in_and_memory_that_suffices_ends_it(scarce: Server) -> None:
    alone = scarce.generate(prompt(100, 1), tokens=TOKENS)
    assert alone["meta_info"]["kv_compress"]["windows"] == 0
    before = scarce.log.stat().st_size
    answers = scarce.generate([prompt(100, seed) for seed in range(1, 7)], tokens=TOKENS)
    running = re.findall(r"#running-req: (\d+)", scarce.log_text()[before:])
    assert max(map(int, running)) == 3
    assert sum(answer["meta_info"]["kv_compress"]["windows"] for answer in answers) >= 12
    assert not any(answer["meta_info"]["num_retractions"] for answer in answers)

    again = scarce.generate(prompt(100, 1), tokens=TOKENS)
    assert again["meta_info"]["kv_compress"]["windows"] == 0
    assert again["output_ids"] == alone["output_ids"]
    scarce.assert_nothing_leaked()


def test_follow_ups_of_an_answer_that_had_to_be_compressed(scarce: Server) -> None:
    """Its row is in the prefix cache, compressed. Who asks for it continues on it; others compute so
    few tokens exactly, which is told and counted, also of a request that never decodes."""
    scarce.flush()
    prompts = [prompt(100, seed) for seed in (11, 12, 13)]
    answers = scarce.generate(prompts, tokens=TOKENS)
    ids, answer = prompts[-1], answers[-1]
    windows = answer["meta_info"]["kv_compress"]["windows"]
    assert windows >= 1
    turn = [*ids, *answer["output_ids"], 3, 4, 5]
    taken = scarce.generate(turn, tokens=1, kv_compress={"prefix": "compressed"})["meta_info"]
    reused = taken["kv_compress"]["reused_tokens"]
    assert reused >= windows * 64 and taken["kv_compress"]["computed_again"] == 0
    counted = scarce.state()["tokens_computed_again"]
    told = scarce.generate(turn, tokens=1)["meta_info"]
    again = told["kv_compress"]["computed_again"]
    assert again in (reused, reused + 16), "the first one may have filled a page"
    assert told["kv_compress"]["reused_tokens"] == 0
    assert told["cached_tokens"] == taken["cached_tokens"] - reused
    assert scarce.state()["tokens_computed_again"] == counted + again
    scarce.assert_nothing_leaked()
