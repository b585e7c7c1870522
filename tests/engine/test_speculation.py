"""Compression with speculative decoding, on real servers: drafts of NGRAM and of draft models."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import draft_models
import numpy as np
import pytest
from exactness import PROMPTS, RetainedCache, assert_bit_exact, assert_same_choices
from server import PAGE_16, WINDOW, Server, in_parallel, launch, prompt
from speculated import accepted_lengths, assert_follows, check, draft_model, ngram, step_by_step
from voted import kept_of

from kara_sglang.trace import format as trace_file

PAGE_1 = ("--page-size", "1", "--max-total-tokens", "8192", "--dtype", "float32")


NGRAM = {
    "narrow": (*PAGE_16, *ngram(4, 1), "--kv-compress-prefix-reuse", "compressed"),
    "wide": (*PAGE_1, *ngram(8, 4)),
}
CHAINS = {
    "EAGLE3": (*PAGE_16, *draft_model("EAGLE3")),
    "MTP": (*PAGE_16, *draft_model("NEXTN")),
    "STANDALONE": (*PAGE_1, *draft_model("STANDALONE"), "--disable-overlap-schedule"),
}
DRAFT_MODELS = CHAINS | {"EAGLE": (*PAGE_1, *draft_model("EAGLE", topk=4, drafts=8))}
KINDS = NGRAM | DRAFT_MODELS
EOS = 2  # of all these models
# The draft models have EAGLE's worker, or one like it; trees are EAGLE's as well.
SLOW = ("MTP", "EAGLE3", "STANDALONE", "wide")


@dataclass(frozen=True)
class Drafts:
    """A server that verifies so many drafts a step."""

    kind: str
    server: Server
    model: Path
    draft: Path | None
    traces: Path
    page: int
    count: int
    behind: int  # steps whose results are not known when the next one begins


@pytest.fixture(scope="module")
def drafts(
    request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Drafts]:
    folder = tmp_path_factory.mktemp("speculation")
    kind, model, draft, flags = request.param, tiny_model, None, KINDS[request.param]
    if kind in DRAFT_MODELS:
        model, draft = draft_models.make(kind, folder)
        flags += ("--speculative-draft-model-path", str(draft))
    flags += ("--skip-tokenizer-init", "--stream-interval", "1", "--kv-compress", "kara", *WINDOW)
    flags += ("--kv-compress-trace", str(folder / "traces"))
    with launch(model, folder / "log", *flags) as server:
        page = 16 if PAGE_16[1] in flags else 1
        count = 8 if kind in ("wide", "EAGLE") else 4
        behind = 0 if "--disable-overlap-schedule" in flags else 1
        yield Drafts(kind, server, model, draft, folder / "traces", page, count, behind)


def each_of(kinds: dict[str, tuple[str, ...]]) -> pytest.MarkDecorator:
    marks = {kind: (pytest.mark.slow,) if kind in SLOW else () for kind in kinds}
    params = [pytest.param(kind, marks=marks[kind]) for kind in kinds]
    return pytest.mark.parametrize("drafts", params, indirect=True, scope="module")


def greedy(model: Path, ids: list[int], tokens: int) -> list[int]:
    """What transformers makes of a text."""
    truth, answer = RetainedCache(model, window=10**6, kept=1, delay=0, page_size=1), []
    chances = truth.feed(ids)
    while len(answer) < tokens:
        answer.append(int(chances.argmax()))
        chances = truth.feed(answer[-1:])
    return answer


@each_of(KINDS)
def test_identity_and_opted_out_requests_get_what_stock_gives(drafts: Drafts) -> None:
    """R = W changes no bit of an answer, and without compression the tokens are plain decoding's.
    NGRAM knows nothing at first, then drafts the same answers again."""
    server = drafts.server
    plain = [greedy(drafts.model, ids, 300) for ids in PROMPTS]
    answers = {}
    for option in (False, {"selector": "identity"}):
        server.flush()
        answers[str(option)] = [server.generate(PROMPTS, kv_compress=option) for _ in range(2)]
    opted_out, identity = answers.values()
    for one, other in zip(identity, opted_out, strict=True):
        assert [answer["output_ids"] for answer in other] == plain
        assert_bit_exact(one, other)
    for answer in identity[1]:
        assert answer["meta_info"]["kv_compress"]["windows"] == 4
        assert answer["meta_info"]["spec_accept_length"] > 1.5
    server.assert_nothing_leaked()


@pytest.mark.parametrize("turn", ["first", "again"])
@each_of(KINDS)
def test_every_token_follows_from_what_is_kept(drafts: Drafts, turn: str) -> None:
    """Whatever a step accepts, whoever chooses, and on the compressed row that the next turn
    continues."""
    server, ids, keeps = drafts.server, prompt(37, 11), None
    if turn == "first":
        answer, counts = step_by_step(server, ids)
    else:
        answer, counts = step_by_step(server, ids, again=True, selector="kara")
        assert answer["meta_info"]["spec_accept_length"] > 1.2
        trace = trace_file.load(drafts.traces / trace_file.file_name(answer["meta_info"]["id"]))
        keeps = trace.keeps()
    truth = RetainedCache(drafts.model, window=64, kept=32, delay=16, page_size=drafts.page)
    assert_follows(truth, ids, answer, counts, drafts.behind, keeps=keeps)
    assert truth.windows == answer["meta_info"]["kv_compress"]["windows"] == 4

    if turn == "first" and server.state()["settings"]["prefix_reuse"] == "compressed":
        # The next turn continues on the compressed row.
        ids = [*ids, *answer["output_ids"], *prompt(20, 13)]
        answer = server.generate(ids, tokens=40, kv_compress={"selector": "recent"})
        cached = answer["meta_info"]["cached_tokens"]
        assert cached > 37 + 4 * 64
        truth.crop(cached)
        expected = truth.feed(ids[cached:])
        for place, token in enumerate(answer["output_ids"]):
            check(expected, answer, place)
            expected = truth.feed([token])
    server.assert_nothing_leaked()


@each_of(KINDS)
def test_queries_of_accepted_drafts_vote(drafts: Drafts) -> None:
    """Up to its first pass a text is the model's own, so its window keeps what transformers' queries
    vote for, wherever among a step's drafts a token was accepted."""
    server, ids = drafts.server, prompt(64, 12)
    server.flush()
    if drafts.kind in NGRAM:
        # What drafts are made of: the answer, and ways in which it does not go on.
        plain = server.generate(ids, tokens=100, kv_compress=False)["output_ids"]
        forks = [plain[at : at + 6] + prompt(4, 1000 + at) for at in range(0, 90, 5)]
        server.generate(forks, tokens=1, kv_compress=False)
    answer = server.generate(ids, tokens=90)
    assert answer["meta_info"]["kv_compress"]["without_queries"] == 0
    assert answer["meta_info"]["spec_accept_length"] > 1.4
    trace = trace_file.load(drafts.traces / trace_file.file_name(answer["meta_info"]["id"]))
    assert trace.windows[0, 0] == 64
    expected = kept_of(drafts.model, [*ids, *answer["output_ids"]], start=64, window=64, delay=16)
    assert np.mean(trace.keeps()[0] == expected.numpy()) > 0.98


@each_of(KINDS)
def test_windows_that_begin_anywhere_have_all_their_queries(drafts: Drafts) -> None:
    """Windows begin inside a step's drafts; every one of them is recorded from its first token on."""
    drafts.server.flush()
    for _ in range(2):
        for answer in drafts.server.generate(PROMPTS):
            report = answer["meta_info"]["kv_compress"]
            assert (report["windows"], report["without_queries"]) == (4, 0)
    drafts.server.assert_nothing_leaked()


@each_of(CHAINS)
def test_a_step_accepts_what_the_draft_model_must_guess(drafts: Drafts) -> None:
    """Of requests that opt out, as many in each step as transformers says."""
    answers = drafts.server.generate(PROMPTS, tokens=120, kv_compress=False)
    expected = draft_models.DRAFTS[drafts.kind](drafts.model, drafts.draft)
    for ids, answer in zip(PROMPTS, answers, strict=True):
        text = draft_models.text_of(expected, ids, 120 + drafts.count)
        accepted = draft_models.accepted(expected, text, len(ids), 120, drafts.count - 1)
        histogram = [accepted.count(number) for number in range(drafts.count)]
        assert answer["meta_info"]["spec_correct_drafts_histogram"] == histogram
        assert sum(accepted) > 20


@each_of(DRAFT_MODELS)
def test_a_draft_model_keeps_what_its_target_keeps(drafts: Drafts) -> None:
    """So it guesses on as before; with another choice of tokens a step would accept half as many."""
    rates, answers = accepted_lengths(drafts.server, (False, None))
    assert all(answer["meta_info"]["kv_compress"]["windows"] == 4 for answer in answers)
    assert rates[1] > 0.93 * rates[0]


IN_FLIGHT = {kind: KINDS[kind] for kind in ("narrow", "STANDALONE", "EAGLE")}


@each_of(IN_FLIGHT)
def test_who_is_retracted_aborted_or_stopped_in_flight_leaves_nothing(drafts: Drafts) -> None:
    """Those who stay end as if nobody had come between; a stop among a step's drafts ends the answer
    there, and what the step accepted behind it is nobody's."""
    server = drafts.server
    server.flush()
    alone = server.generate(PROMPTS, kv_compress=False)
    place, ends = next(
        (place, end)
        for place, answer in enumerate(alone)
        if (end := first_new(answer["output_ids"], behind=100)) is not None
    )
    told = alone[place]["output_ids"][: ends + 1]
    server.flush()

    def reach(tokens: int) -> None:
        end = time.monotonic() + 120
        while server.state()["running_logical_tokens"] < sum(map(len, PROMPTS)) + tokens:
            assert time.monotonic() < end, "they never ran"
            time.sleep(0.01)

    def operator() -> None:
        reach(4 * 20)
        for path, body in (
            ("/pause_generation", {"mode": "retract"}),
            ("/continue_generation", {}),
        ):
            assert server.post(path, body).status_code == 200
        reach(4 * 50)
        assert server.post("/abort_request", {"rid": "gone"}).status_code == 200

    stops = {"stop_token_ids": [told[-1]], "ignore_eos": False}
    calls = [
        lambda: server.generate(PROMPTS[0], kv_compress=False),
        lambda: server.generate(PROMPTS[1]),
        lambda: server.generate(
            PROMPTS[place], kv_compress={"selector": "identity"}, sampling_params=stops
        ),
        lambda: server.generate(PROMPTS[3], rid="gone", tokens=1000),
    ]
    opted_out, compressed, stopped, gone, _ = in_parallel([*calls, operator])
    for answer in (opted_out, compressed, stopped, gone):
        assert answer["meta_info"]["num_retractions"] == 1
    assert_same_choices(opted_out, alone[0])
    assert len(compressed["output_ids"]) == 300
    assert compressed["meta_info"]["kv_compress"]["windows"] > 0
    assert stopped["meta_info"]["finish_reason"] == {"type": "stop", "matched": told[-1]}
    assert stopped["output_ids"] == told
    assert gone["meta_info"]["finish_reason"]["type"] == "abort"
    server.assert_nothing_leaked()


def first_new(tokens: list[int], behind: int) -> int | None:
    """The place of a token behind so many others that is none of them; None where the model ends."""
    if EOS in tokens[:behind]:
        return None
    return next((at for at in range(behind, len(tokens)) if tokens[at] not in tokens[:at]), None)
