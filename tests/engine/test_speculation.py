"""Compression with speculative decoding: NGRAM on real servers, with overlap scheduling."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from exactness import PROMPTS, RetainedCache, assert_bit_exact, logprobs
from server import PAGE_16, WINDOW, Server, launch, prompt

from kara_sglang.trace import format as trace_file

PAGE_1 = ("--page-size", "1", "--max-total-tokens", "8192", "--dtype", "float32")


@dataclass(frozen=True)
class Drafts:
    """A server that verifies so many drafts a step, in trees so wide."""

    server: Server
    traces: Path
    page: int
    count: int
    behind: int  # steps whose results are not known when the next one begins


def ngram(drafts: int, breadth: int) -> tuple[str, ...]:
    return (
        *("--speculative-algorithm", "NGRAM", "--speculative-num-draft-tokens", str(drafts)),
        *("--speculative-ngram-max-bfs-breadth", str(breadth), "--stream-interval", "1"),
    )


KINDS = {
    "chain": (*PAGE_16, *ngram(4, 1), "--kv-compress-prefix-reuse", "compressed"),
    "tree": (*PAGE_1, *ngram(8, 4)),
    "without overlap": (*PAGE_1, *ngram(4, 1), "--disable-overlap-schedule"),
}


@pytest.fixture(scope="module", params=KINDS)
def drafts(
    request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Drafts]:
    folder = tmp_path_factory.mktemp("speculation")
    flags = ("--skip-tokenizer-init", *KINDS[request.param], "--kv-compress", "kara", *WINDOW)
    flags += ("--kv-compress-trace", str(folder / "traces"))
    with launch(tiny_model, folder / "log", *flags) as server:
        page = 16 if request.param == "chain" else 1
        behind = 0 if request.param == "without overlap" else 1
        yield Drafts(server, folder / "traces", page, 8 if request.param == "tree" else 4, behind)


def step_by_step(server: Server, ids: list[int], tokens: int, option: object) -> tuple[dict, list[int]]:
    """An answer, and how many of its tokens there were behind the prefill and each step.

    Asked again where the server has sent two steps in one part, as it does for a slow client.
    """
    for _ in range(8):
        parts = _streamed(server, ids, tokens, option)
        counts = [part["meta_info"]["completion_tokens"] for part in parts]
        if len(counts) == parts[-1]["meta_info"]["spec_verify_ct"] + 1:
            return parts[-1], counts
    raise AssertionError("the server never sent each step by itself")


def _streamed(server: Server, ids: list[int], tokens: int, option: object) -> list[dict]:
    body = {
        "input_ids": ids,
        "stream": True,
        "return_logprob": True,
        "sampling_params": {
            "max_new_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "custom_params": {"kv_compress": option},
        },
    }
    with server.post("/generate", body, stream=True) as response:
        lines = [line[6:] for line in response.iter_lines() if line.startswith(b"data: {")]
    return [json.loads(line) for line in lines]


def test_identity_and_opted_out_requests_get_what_stock_gives(drafts: Drafts, stock: Server) -> None:
    """R = W changes no bit of an answer, and without compression the tokens are plain decoding's;
    first with drafts that are refused, then with drafts that are accepted."""
    server = drafts.server
    plain = [answer["output_ids"] for answer in stock.generate(PROMPTS)]
    for accepted in (1, drafts.count):
        server.flush()
        if accepted > 1:
            server.generate(PROMPTS, kv_compress=False)
        opted_out = server.generate(PROMPTS, kv_compress=False)
        server.flush()
        if accepted > 1:
            server.generate(PROMPTS, kv_compress=False)
        identity = server.generate(PROMPTS, kv_compress={"selector": "identity"})
        assert [answer["output_ids"] for answer in opted_out] == plain
        assert_bit_exact(identity, opted_out)
        for answer in identity:
            assert answer["meta_info"]["kv_compress"]["windows"] == 4
            assert answer["meta_info"]["spec_accept_length"] == pytest.approx(accepted, abs=0.2)
    server.assert_nothing_leaked()


@pytest.mark.parametrize("turn", ["refused", "accepted"])
def test_every_token_follows_from_what_is_kept(drafts: Drafts, tiny_model: Path, turn: str) -> None:
    """Whatever a step accepts: each token, and its probability, is that of transformers with the same
    retained K/V at true positions. A pass ahead of a step knows all results but the last one's."""
    server, ids = drafts.server, prompt(37, 11)
    server.flush()
    if turn == "accepted":
        server.generate(ids, kv_compress={"selector": "recent"})
    answer, counts = step_by_step(server, ids, 300, {"selector": "recent"})
    if turn == "accepted":
        assert answer["meta_info"]["spec_accept_length"] > 1.2
    truth = RetainedCache(tiny_model, window=64, kept=32, delay=16, page_size=drafts.page)
    check(truth, truth.feed(ids), len(ids), answer, counts, drafts.behind)
    assert truth.windows == answer["meta_info"]["kv_compress"]["windows"] == 4
    if "compressed" not in server.state()["settings"]["prefix_reuse"]:
        return server.assert_nothing_leaked()

    # The next turn continues on the compressed row.
    ids = [*ids, *answer["output_ids"], *prompt(20, 13)]
    answer, counts = step_by_step(server, ids, 40, {"selector": "recent"})
    cached = min(answer["meta_info"]["cached_tokens"], truth.position)
    assert cached > 37 + 4 * 64
    truth.crop(cached)
    check(truth, truth.feed(ids[cached:]), len(ids), answer, counts, drafts.behind)
    assert truth.windows == 4
    server.assert_nothing_leaked()


def check(
    truth: RetainedCache,
    expected: torch.Tensor,
    length: int,
    answer: dict,
    counts: list[int],
    behind: int,
) -> None:
    """Each token of an answer to ``length`` tokens, the first of which is ``expected``."""
    outputs, chances = answer["output_ids"], logprobs(answer)
    assert expected.argmax() == outputs[0]
    for step in range(1, len(counts)):
        truth.prune_recent(length + counts[max(0, step - 1 - behind)] - 1)
        for place in range(counts[step - 1], counts[step]):
            expected = truth.feed([outputs[place - 1]])
            assert expected.argmax() == outputs[place], f"token {place}, {truth.windows} windows in"
            assert chances[place] == pytest.approx(expected.max().item(), abs=2e-4)


def test_queries_of_accepted_drafts_vote(drafts: Drafts, kara: Server, traces: Path) -> None:
    """Up to its first pass a request has plain decoding's tokens, and so its window keeps the same:
    with the queries of drafts, many in a step, as with those of single tokens."""
    ids, kept = prompt(64, 12), []
    drafts.server.flush()
    kara.flush()
    drafts.server.generate(ids, tokens=100, kv_compress=False)  # what the next one's drafts are made of
    for server, folder in ((kara, traces), (drafts.server, drafts.traces)):
        answer = server.generate(ids, tokens=90)
        trace = trace_file.load(folder / trace_file.file_name(answer["meta_info"]["id"]))
        assert trace.windows[0, 0] == 64
        kept.append((answer["meta_info"]["kv_compress"], trace.keeps()[0]))
    accepted = answer["meta_info"]["spec_accept_length"]
    assert accepted > 0.5 * drafts.count
    (_, plain), (report, voted) = kept
    assert report["without_queries"] == 0
    assert np.mean(plain == voted) > 0.98


def test_windows_that_begin_anywhere_have_all_their_queries(drafts: Drafts) -> None:
    """Windows begin inside a step's drafts; every one of them is recorded from its first token on."""
    drafts.server.flush()
    for _ in range(2):
        for answer in drafts.server.generate(PROMPTS):
            report = answer["meta_info"]["kv_compress"]
            assert (report["windows"], report["without_queries"]) == (4, 0)
    drafts.server.assert_nothing_leaked()
