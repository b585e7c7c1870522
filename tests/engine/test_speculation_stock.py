"""Stock speculative decoding on the CPU engine: the tokens of plain decoding, in fewer steps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from draft_models import Expected, make_eagle, make_target
from server import PAGE_16, Server, launch, prompt

PROMPTS = [prompt(74, 7), prompt(60, 8), prompt(5, 9)]
TOKENS = 120


def ngram(drafts: int, breadth: int) -> tuple[str, ...]:
    return (
        *("--speculative-algorithm", "NGRAM", "--speculative-num-draft-tokens", str(drafts)),
        *("--speculative-ngram-max-bfs-breadth", str(breadth)),
    )


PAGE_1 = ("--page-size", "1", "--max-total-tokens", "8192", "--dtype", "float32")
NO_OVERLAP = ("--disable-overlap-schedule",)
NGRAM = {
    "chain": (*PAGE_16, *ngram(4, 1)),
    "chain, no overlap": (*PAGE_1, *ngram(4, 1), *NO_OVERLAP),
    "tree": (*PAGE_1, *ngram(8, 4)),
}


@pytest.fixture(scope="module", params=NGRAM)
def speculative(
    request: pytest.FixtureRequest, tiny_model: Path, logs: Path
) -> Iterator[tuple[Server, int]]:
    """A server with NGRAM, and its drafts per step."""
    flags = ("--skip-tokenizer-init", *NGRAM[request.param], "--max-running-requests", "4")
    log = logs / f"speculation_{request.param}.log"
    with launch(tiny_model, log, *flags) as server:
        assert overlaps(server) == (request.param != "chain, no overlap")
        yield server, 8 if request.param == "tree" else 4


def overlaps(server: Server) -> bool:
    info = requests.get(server.url + "/server_info", timeout=60).json()
    return not info["disable_overlap_schedule"]


def tokens(answers: list[dict]) -> list[list[int]]:
    return [answer["output_ids"] for answer in answers]


def per_step(answers: list[dict]) -> list[float]:
    return [answer["meta_info"]["spec_accept_length"] for answer in answers]


def test_ngram(speculative: tuple[Server, int], stock: Server) -> None:
    """What was said before is accepted in whole drafts; between, a text goes on in another way."""
    server, drafts = speculative
    plain = tokens(stock.generate(PROMPTS, tokens=TOKENS))
    first = server.generate(PROMPTS, tokens=TOKENS)
    assert tokens(first) == plain
    assert max(per_step(first)) < 1.2
    again = server.generate(PROMPTS, tokens=TOKENS)
    assert tokens(again) == plain
    assert min(per_step(again)) == drafts

    # Two ways to go on at every fifth place: a tree holds both.
    forks = [ids[at : at + 6] + prompt(4, 1000 + at) for ids in plain for at in range(0, TOKENS - 6, 5)]
    server.generate(forks, tokens=1)
    forked = server.generate(PROMPTS, tokens=TOKENS)
    assert tokens(forked) == plain
    assert min(per_step(forked)) > 1.5


STEPS = 3
DRAFT_MODEL = (
    *("--speculative-num-steps", str(STEPS), "--speculative-eagle-topk", "1"),
    *("--speculative-num-draft-tokens", str(STEPS + 1), "--max-running-requests", "4"),
)


@pytest.mark.parametrize(("algorithm", "more"), [("EAGLE", ()), ("STANDALONE", NO_OVERLAP)])
def test_draft_models(algorithm: str, more: tuple[str, ...], tmp_path: Path, logs: Path) -> None:
    """Each step accepts as many drafts as transformers says that it must, and the tokens are greedy."""
    target = make_target(tmp_path / "target")
    eagle = make_eagle(tmp_path / "eagle", target) if algorithm == "EAGLE" else None
    flags = (
        *("--skip-tokenizer-init", *PAGE_16, *DRAFT_MODEL, *more),
        *("--speculative-algorithm", algorithm, "--speculative-draft-model-path", str(eagle or target)),
    )
    with launch(target, logs / f"{algorithm}.log", *flags) as server:
        assert overlaps(server) == (more != NO_OVERLAP)
        answers = server.generate(PROMPTS, tokens=TOKENS)
    expected = Expected(target, eagle)
    for ids, answer in zip(PROMPTS, answers, strict=True):
        text = expected.text(ids, TOKENS + STEPS + 1)
        assert answer["output_ids"] == text[len(ids) :][:TOKENS]
        accepted = expected.accepted(text, len(ids), TOKENS, STEPS)
        histogram = [accepted.count(drafts) for drafts in range(STEPS + 1)]
        assert answer["meta_info"]["spec_correct_drafts_histogram"] == histogram
        assert sum(accepted) > 20
