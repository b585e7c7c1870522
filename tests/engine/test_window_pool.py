"""A gpt-oss on real servers: layers with a sliding window have a KV pool of their own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from exactness import PROMPTS, RetainedCache, assert_bit_exact, assert_same_choices, logprobs
from gpt_oss_model import FULL, WINDOW, make_tiny_gpt_oss
from server import PAGE_16, PUNCTUAL, Server, launch, prompt

from kara_sglang.trace import format as trace

W, R, PAGE = 64, 32, 16
FLAGS = ("--skip-tokenizer-init", *PAGE_16, "--chunked-prefill-size", "128")
EAGER = {"SGLANG_SWA_EVICTION_INTERVAL": "1"}
"""Slots that leave a window are given back at once: one that is still needed would be missed."""


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_gpt_oss(tmp_path_factory.mktemp("model") / "tiny-gpt-oss")


@pytest.fixture(scope="module")
def expected(gpt_oss: Path, logs: Path) -> list[dict]:
    """Stock SGLang's answers."""
    with launch(gpt_oss, logs / "stock-gpt-oss.log", *FLAGS) as server:
        return server.generate(PROMPTS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("traces")


@pytest.fixture(scope="module")
def server(gpt_oss: Path, logs: Path, folder: Path) -> Iterator[Server]:
    """Windows are compressed as they fall due. The delay that is asked for is shorter than the model's
    window."""
    flags = (
        *(*FLAGS, "--kv-compress", "kara", "--kv-compress-window", str(W)),
        *("--kv-compress-trace", str(folder), "--kv-compress-query-mem-gb", "0.05"),
        *PUNCTUAL,
    )
    with launch(gpt_oss, logs / "kara-gpt-oss.log", *flags, env=EAGER) as started:
        yield started


def report(answer: dict) -> dict[str, Any]:
    return answer["meta_info"]["kv_compress"]


def test_identity_and_opted_out_are_stocks(expected: list[dict], server: Server) -> None:
    """To the bit, and up to rounding beside one that is compressed: an expert's sums depend on how many
    tokens it is asked about at once."""
    assert f"delay {WINDOW} tokens" in server.log_text()
    assert "compressed prefixes do not work with a KV pool" in server.log_text()
    same = {"selector": "identity"}
    answers = server.generate(PROMPTS, kv_compress=[same, False, same, False])
    assert_bit_exact(answers, expected)
    windows = [report(answer)["windows"] for answer in answers]
    assert windows[1] == windows[3] == 0 and min(windows[0], windows[2]) >= 3
    server.flush()
    answers = server.generate(PROMPTS, kv_compress=[same, False, False, {"selector": "random"}])
    for answer, reference in zip(answers[:3], expected[:3], strict=True):
        assert_same_choices(answer, reference)
    assert answers[3]["output_ids"] != expected[3]["output_ids"]
    server.assert_nothing_leaked()


def test_compressed_answers_are_transformers(server: Server, gpt_oss: Path, folder: Path) -> None:
    """Each log-probability is that of transformers where full layers keep what was retained, and the
    others see the newest tokens at their true positions."""
    server.flush()
    texts = [prompt(37, 11), prompt(150, 12)]
    names = ["recent", "kara"]
    options = [{"selector": name} for name in names]
    answers = server.generate(texts, tokens=500, kv_compress=options)
    for text, answer, name in zip(texts, answers, names, strict=True):
        saved = trace.load(folder / trace.file_name(answer["meta_info"]["id"]))
        assert saved.bits.shape[1] == len(FULL)
        keeps = None if name == "recent" else saved.keeps()
        truth = RetainedCache(gpt_oss, window=W, kept=R, delay=WINDOW, page_size=PAGE)
        likely = truth.feed(text)
        for step, (token, logprob) in enumerate(
            zip(answer["output_ids"], logprobs(answer), strict=True)
        ):
            assert abs(likely[token].item() - logprob) < 1e-3, f"step {step}, {truth.windows} windows"
            if truth.windows < report(answer)["windows"]:  # the one due with the last token is left
                truth.prune(keeps=keeps)
            likely = truth.feed([token])
        assert truth.windows == report(answer)["windows"] >= 6
    server.assert_nothing_leaked()
