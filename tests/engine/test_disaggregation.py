"""A decode server of PD disaggregation. SGLang's `fake` backend transfers nothing: a prompt's K and V
are what its slots held, here zeros, and its token is always the same."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from exactness import PROMPTS, assert_likeliest
from server import PUNCTUAL, WINDOW, Server, in_parallel, launch, prompt

FLAGS = (
    *("--skip-tokenizer-init", "--page-size", "16", "--max-total-tokens", "2048"),
    *("--dtype", "float32", "--max-running-requests", "16"),
    *("--kv-compress", "kara", *WINDOW, *PUNCTUAL, "--skip-server-warmup"),
    *("--disaggregation-mode", "decode", "--disaggregation-transfer-backend", "fake"),
    *("--disaggregation-decode-retraction-backup", "none", "--num-reserved-decode-tokens", "16"),
)
OPTIONS = ({"selector": "recent"}, {"selector": "identity"}, False, None)
# Nobody may have written into a slot before the first test.
ENV = {"SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "0"}
FAKE = {"bootstrap_host": "2.2.2.2", "bootstrap_room": 0, "return_logprob": False}


@pytest.fixture(scope="module")
def decode(tiny_model: Path, logs: Path) -> Iterator[Server]:
    with launch(tiny_model, logs / "decode.log", *FLAGS, env=ENV) as server:
        yield server


def test_answers_behind_a_transfer_are_compressed(decode: Server, tiny_model: Path) -> None:
    """At true positions; identity and who opts out keep everything, and all rows and recorders come
    back."""
    answers = in_parallel(
        [
            lambda ids=ids, option=option: decode.generate(ids, kv_compress=option, **FAKE)
            for ids, option in zip(PROMPTS, OPTIONS, strict=True)
        ]
    )
    reports = [answer["meta_info"]["kv_compress"] for answer in answers]
    assert [report["windows"] for report in reports] == [4, 4, 0, 4]
    assert [report["without_queries"] for report in reports] == [0] * 4
    assert [report["tokens_removed"] for report in reports] == [128, 0, 0, 128]
    for ids, kept, answer in zip(PROMPTS, (32, 64, 64), answers, strict=False):
        told = answer["output_ids"]
        assert assert_likeliest(tiny_model, ids, told, kept, transferred=False) == 4
    decode.assert_nothing_leaked()


def test_who_is_retracted_ends_with_a_status_and_hurts_nobody(decode: Server) -> None:
    """More answers than fit, compressed or not."""

    def ask(seed: int) -> tuple[int, dict]:
        sampling = {"max_new_tokens": 500, "temperature": 0, "ignore_eos": True}
        body = {"input_ids": prompt(60, seed), "sampling_params": sampling} | FAKE
        answer = decode.post("/generate", body)
        return answer.status_code, answer.json()

    answers = in_parallel([lambda seed=seed: ask(seed) for seed in range(12)])
    assert {status for status, _ in answers} == {200, 503}
    for status, answer in answers:
        if status == 200:
            assert len(answer["output_ids"]) == 500
            assert answer["meta_info"]["kv_compress"]["windows"] == 7
        else:
            assert "Retracted under decode memory pressure" in str(answer)
    decode.assert_nothing_leaked()
