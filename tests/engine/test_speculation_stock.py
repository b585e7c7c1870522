"""Stock speculative decoding on the CPU engine gives the tokens of plain decoding, in fewer steps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from cpu_site import first_on_the_path
from server import PAGE_16, Server, launch, prompt

SEQUENCE = [prompt(74, 7), prompt(60, 8), prompt(5, 9)]
TOKENS = 120


def ngram(drafts: int, breadth: int) -> tuple[str, ...]:
    return (
        *("--speculative-algorithm", "NGRAM", "--speculative-num-draft-tokens", str(drafts)),
        *("--speculative-ngram-max-bfs-breadth", str(breadth)),
    )


PAGE_1 = ("--page-size", "1", "--max-total-tokens", "8192", "--dtype", "float32")
NGRAM = {
    "chain": (*PAGE_16, *ngram(4, 1)),
    "chain, no overlap": (*PAGE_1, *ngram(4, 1), "--disable-overlap-schedule"),
    "tree": (*PAGE_1, *ngram(8, 4)),
}


@pytest.fixture(scope="module", params=NGRAM)
def speculative(
    request: pytest.FixtureRequest, tiny_model: Path, logs: Path
) -> Iterator[tuple[Server, int]]:
    """A server with NGRAM, and its drafts per step."""
    flags = ("--skip-tokenizer-init", *NGRAM[request.param], "--max-running-requests", "4")
    log = logs / f"speculation_{request.param}.log"
    with launch(tiny_model, log, *flags, env=first_on_the_path()) as server:
        yield server, 8 if request.param == "tree" else 4


def tokens(answers: list[dict]) -> list[list[int]]:
    return [answer["output_ids"] for answer in answers]


def per_step(answers: list[dict]) -> list[float]:
    return [answer["meta_info"]["spec_accept_length"] for answer in answers]


def test_ngram(speculative: tuple[Server, int], stock: Server) -> None:
    """What was said before is accepted in whole drafts; between, a text goes on in another way."""
    server, drafts = speculative
    plain = tokens(stock.generate(SEQUENCE, tokens=TOKENS))
    first = server.generate(SEQUENCE, tokens=TOKENS)
    assert tokens(first) == plain
    assert max(per_step(first)) < 1.2
    again = server.generate(SEQUENCE, tokens=TOKENS)
    assert tokens(again) == plain
    assert min(per_step(again)) == drafts

    # Two ways to go on at every fifth place: a tree holds both.
    forks = [ids[at : at + 6] + prompt(4, 1000 + at) for ids in plain for at in range(0, TOKENS - 6, 5)]
    server.generate(forks, tokens=1)
    forked = server.generate(SEQUENCE, tokens=TOKENS)
    assert tokens(forked) == plain
    assert min(per_step(forked)) > 1.5
