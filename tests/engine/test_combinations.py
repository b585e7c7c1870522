"""Drafts with much else on one server: fp8 KV, LoRA, chunked prefill, priorities, HiCache."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import adapter
import plugins
import pytest
import torch
from exactness import PROMPTS, RetainedCache, assert_bit_exact, assert_same_choices
from server import WINDOW, Server, in_parallel, launch, prompt
from speculated import assert_follows, ngram, step_by_step

POOL, CHUNK = 1024, 64
MANY = (
    *("--skip-tokenizer-init", "--stream-interval", "1", "--page-size", "16", "--dtype", "float32"),
    *("--max-total-tokens", str(POOL), *ngram(4, 1), "--kv-cache-dtype", "fp8_e4m3"),
    *("--chunked-prefill-size", str(CHUNK), "--enable-priority-scheduling"),
    *("--max-running-requests", "3"),
    *("--lora-backend", "torch_native", "--max-lora-rank", str(adapter.RANK)),
    *("--enable-hierarchical-cache", "--hicache-ratio", "3", "--hicache-write-policy", "write_through"),
    *("--hicache-io-backend", "direct", "--hicache-mem-layout", "layer_first"),
    *("--kv-compress", "kara", *WINDOW),
)
CLOSE = 0.1  # a K or V that rounds to another of fp8's numbers changes those of later layers and tokens


@dataclass(frozen=True)
class Many:
    """A server with all of it, and its model with the adapter ``more`` merged in."""

    server: Server
    merged: Path


@pytest.fixture(scope="module")
def many(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Many]:
    folder = tmp_path_factory.mktemp("combinations")
    more = adapter.make(folder / "more", tiny_model, folder / "merged")
    flags = (*MANY, "--enable-lora", "--lora-paths", f"more={more}")
    env = plugins.install(folder, "host_tier", "adapter")
    with launch(tiny_model, folder / "log", *flags, env=env) as server:
        yield Many(server, folder / "merged")


def test_every_token_follows_from_what_is_kept(many: Many) -> None:
    """Of a streamed answer behind a prompt in chunks: by the adapter's weights, with K and V in fp8 and
    the drafts of an answer before."""
    ids = prompt(2 * CHUNK + 20, 11)
    answer, counts = step_by_step(many.server, ids, again=True, lora_path="more")
    assert answer["meta_info"]["spec_accept_length"] > 1.2
    truth = RetainedCache(
        many.merged, window=64, kept=32, delay=16, page_size=16, stored=torch.float8_e4m3fn
    )
    assert_follows(truth, ids, answer, counts, behind=1, close=CLOSE)
    assert truth.windows == answer["meta_info"]["kv_compress"]["windows"] == 4
    many.server.assert_nothing_leaked()


def test_identity_gets_the_bits_of_requests_that_opt_out(many: Many) -> None:
    """With the adapter and without it, beside each other."""
    adapters = ["more", None, "more", None]
    answers = {}
    for option in (False, {"selector": "identity"}):
        many.server.flush()
        answers[str(option)] = [
            many.server.generate(PROMPTS, tokens=150, kv_compress=option, lora_path=adapters)
            for _ in range(2)
        ]
    for one, other in zip(*answers.values(), strict=True):
        assert_bit_exact(one, other)
    for answer in answers["False"][1]:
        assert answer["meta_info"]["spec_accept_length"] > 1.5
    many.server.assert_nothing_leaked()


def test_options_and_samplers_beside_each_other(many: Many) -> None:
    """Who opts out has the answer that it gets alone. SGLang's CPU engine verifies drafts greedily,
    whatever a request's temperature; it samples the first token only."""
    server, ids = many.server, PROMPTS[1]
    server.flush()
    alone = server.generate(ids, tokens=150, kv_compress=False)
    options = [False, {"selector": "random", "retain": 0.25}, {"selector": "keys"}, None]
    warm = {"max_new_tokens": 150, "temperature": 1.0, "ignore_eos": True}
    calls = [lambda o=o: server.generate(ids, tokens=150, kv_compress=o) for o in options]
    calls.append(lambda: server.generate(PROMPTS[2], kv_compress=None, sampling_params=warm))
    answers = in_parallel(calls)
    assert_same_choices(answers[0], alone, CLOSE)
    reports = [answer["meta_info"]["kv_compress"] for answer in answers]
    assert [report["windows"] for report in reports] == [0, 1, 1, 1, 2]
    assert [report["tokens_removed"] for report in reports] == [0, 48, 32, 32, 64]
    first = answers[-1]["output_ids"][0]
    greedy = server.generate([*PROMPTS[2], first], tokens=60, kv_compress=False)
    assert_same_choices(
        {
            "output_ids": answers[-1]["output_ids"][1:61],
            "meta_info": {
                "output_token_logprobs": answers[-1]["meta_info"]["output_token_logprobs"][1:61]
            },
        },
        greedy,
        CLOSE,
    )
    server.assert_nothing_leaked()


def test_who_is_preempted_comes_back(many: Many) -> None:
    """Two urgent requests take the places of two that run, and these end as if nobody had come."""
    server, texts = many.server, [prompt(100, seed) for seed in range(5, 10)]
    server.flush()

    def urgent(ids: list[int]) -> dict:
        while server.state()["running_logical_tokens"] < 3 * 100 + 3 * 20:
            time.sleep(0.02)
        return server.generate(ids, tokens=20, priority=100)

    calls = [
        lambda ids=ids, option=option, priority=priority: server.generate(
            ids, tokens=200, kv_compress=option, priority=priority
        )
        for ids, option, priority in zip(
            texts[:3], (False, {"selector": "recent"}, None), (0, 0, 1), strict=True
        )
    ]
    answers = in_parallel([*calls, *(lambda ids=ids: urgent(ids) for ids in texts[3:])])
    came_back = [answer["meta_info"]["num_retractions"] for answer in answers]
    assert came_back == [1, 1, 0, 0, 0]
    assert_same_choices(answers[0], server.generate(texts[0], tokens=200, kv_compress=False), CLOSE)
    for answer in answers[1:3]:
        assert len(answer["output_ids"]) == 200
        assert answer["meta_info"]["kv_compress"]["windows"] > 0
    server.assert_nothing_leaked()


def test_prompts_come_back_from_the_host(many: Many) -> None:
    """Other answers drive them off the device, bytes of fp8 as they are."""
    server, ids = many.server, prompt(400, 8)
    server.flush()
    first = server.generate(ids, tokens=100, kv_compress=False)
    for seed in (9, 10):
        server.generate(prompt(400, seed), tokens=160)
    again = server.generate(ids, tokens=100, kv_compress=False)
    assert again["meta_info"]["cached_tokens_details"]["host"] >= 128
    assert_same_choices(again, first, CLOSE)
    server.assert_nothing_leaked()
