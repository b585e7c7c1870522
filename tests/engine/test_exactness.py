"""What compression must not change: identity, opted-out requests, true positions."""

from __future__ import annotations

import pytest
from exactness import PROMPTS, RetainedCache, assert_bit_exact
from server import Server, prompt


@pytest.fixture(scope="module")
def expected(stock: Server) -> list[dict]:
    stock.flush()
    return stock.generate(PROMPTS)


def test_identity_is_bit_exact(kara: Server, expected: list[dict]) -> None:
    """R = W: recorder, pass, splice and positions run and not one bit of any answer changes."""
    kara.flush()
    answers = kara.generate(PROMPTS, kv_compress={"selector": "identity"})
    assert_bit_exact(answers, expected)
    for answer in answers:
        report = answer["meta_info"]["kv_compress"]
        assert report["windows"] == 4
        assert report["tokens_removed"] == 0
        assert report["retained"] == 1.0
    kara.assert_nothing_leaked()


def test_opted_out_beside_compressed_is_bit_exact(kara: Server, expected: list[dict]) -> None:
    """Same batch at every step: requests that opt out get stock's bits, the others are compressed."""
    kara.flush()
    options = [False, {"selector": "random", "retain": 0.25}, False, None]
    answers = kara.generate(PROMPTS, kv_compress=options)
    assert_bit_exact([answers[0], answers[2]], [expected[0], expected[2]])
    reports = [answer["meta_info"]["kv_compress"] for answer in answers]
    assert [report["windows"] for report in reports] == [0, 4, 0, 4]
    assert [report["retained"] for report in reports] == [1.0, 0.25, 1.0, 0.5]
    assert answers[1]["output_ids"] != expected[1]["output_ids"]
    kara.assert_nothing_leaked()


def test_short_requests_are_untouched(kara: Server, stock: Server) -> None:
    """Less than a window and its delay: nothing is compressed and nothing changes."""
    for server in (kara, stock):
        server.flush()
    answers = kara.generate(PROMPTS, tokens=64)
    assert_bit_exact(answers, stock.generate(PROMPTS, tokens=64))
    assert all(answer["meta_info"]["kv_compress"]["windows"] == 0 for answer in answers)


@pytest.mark.parametrize("selector", ["kara", "causal", "snapkv", "keys", "recent", "random"])
def test_every_selector_compresses_reproducibly(kara: Server, selector: str) -> None:
    """Each selector runs on the engine, frees the same slots, and gives the same answer twice."""
    answers = []
    for _ in range(2):
        kara.flush()
        answers.append(
            kara.generate(PROMPTS, tokens=200, kv_compress={"selector": selector, "seed": 7})
        )
    assert_bit_exact(answers[0], answers[1])
    for answer in answers[0]:
        report = answer["meta_info"]["kv_compress"]
        assert (report["windows"], report["tokens_removed"]) == (2, 64)
        assert report["kv_slots_held"] == report["logical_length"] - 64
    kara.assert_nothing_leaked()


@pytest.mark.parametrize("length", [37, 64])
def test_positions_are_true_after_compression(kara: Server, tiny_model, length: int) -> None:
    """Every log-probability of 400 tokens equals that of transformers with the same retained K/V."""
    kara.flush()
    answer = kara.generate(
        prompt(length, 11), tokens=400, kv_compress={"selector": "recent"}, top_logprobs_num=5
    )
    truth = RetainedCache(tiny_model, window=64, kept=32, delay=16, page_size=16)
    expected = truth.feed(prompt(length, 11))
    tops = answer["meta_info"]["output_top_logprobs"]
    for step, token in enumerate(answer["output_ids"]):
        assert expected.argmax() == token, f"step {step}, {truth.windows} windows in"
        for logprob, candidate, _ in tops[step]:
            assert logprob == pytest.approx(expected[candidate].item(), abs=2e-4), f"step {step}"
        truth.prune()
        expected = truth.feed([token])
    assert truth.windows == answer["meta_info"]["kv_compress"]["windows"] == 5
