"""A Gemma 3 on real servers: full layers are compressed, and those with a window do not notice."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exactness import PROMPTS, RetainedCache, assert_bit_exact
from gemma_model import FULL, WINDOW, make_tiny_gemma
from server import PAGE_16, Server, launch, prompt

from kara_sglang.trace import format as trace

W, R, PAGE = 64, 32, 16
FLAGS = ("--skip-tokenizer-init", *PAGE_16, "--chunked-prefill-size", "128")
RECENT = {"selector": "recent"}


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_gemma(tmp_path_factory.mktemp("model") / "tiny-gemma")


@pytest.fixture(scope="module")
def expected(gemma: Path, logs: Path) -> list[dict]:
    """Stock SGLang's answers."""
    with launch(gemma, logs / "stock-gemma.log", *FLAGS) as server:
        return server.generate(PROMPTS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("traces")


@pytest.fixture(scope="module")
def server(gemma: Path, logs: Path, folder: Path) -> Iterator[Server]:
    """Every 150th step a pass takes the windows that have piled up. The delay that is asked for is
    shorter than the model's window."""
    flags = (
        *(*FLAGS, "--kv-compress", "kara", "--kv-compress-window", str(W)),
        *("--kv-compress-trace", str(folder), "--kv-compress-query-mem-gb", "0.05"),
        *("--kv-compress-prefix-reuse", "compressed", "--kv-compress-config"),
        '{"delay": 16, "policy": "periodic", "period": 150, "debug_checks": true}',
    )
    with launch(gemma, logs / "kara-gemma.log", *flags) as started:
        yield started


def report(answer: dict) -> dict[str, Any]:
    return answer["meta_info"]["kv_compress"]


def answered(server: Server, text: list[int], clean: int) -> tuple[dict, int]:
    """An answer to ``text`` whose row ends with at least ``clean`` uncompressed tokens, and where its
    last window ends, in tokens."""
    for tokens in range(330, 480, 30):
        server.flush()
        answer = server.generate(text, tokens=tokens, kv_compress=RECENT, top_logprobs_num=3)
        end = -(-len(text) // PAGE) * PAGE + report(answer)["windows"] * W
        if len(text) + tokens - 1 - end >= clean:
            return answer, end
    raise AssertionError("no answer ends so")


def follow(truth: RetainedCache, text: list[int], answer: dict) -> list[int]:
    """Compare an answer to ``text`` with the truth, step by step; returns how many windows each pass
    took. When passes came is not known: in front of the first step that the full row does not explain,
    and then all windows that were due went."""
    passes = []
    truth.base = None
    expected = truth.feed(text[truth.position :])
    truth.prune()
    fed: list[int] = []

    def wrong(tops: list) -> bool:
        return any(abs(logprob - expected[token].item()) > 3e-4 for logprob, token, _ in tops)

    tops = answer["meta_info"]["output_top_logprobs"]
    for step, token in enumerate(answer["output_ids"]):
        if wrong(tops[step]) and fed:
            before = truth.windows
            truth.crop(truth.position - 1)
            while truth.prune():
                pass
            passes.append(truth.windows - before)
            expected = truth.feed(fed[-1:])
        assert not wrong(tops[step]), f"step {step}, passes {passes}"
        fed.append(token)
        expected = truth.feed([token])
    truth.crop(truth.position - 1)  # the last token has no KV
    return passes


def truth_of(gemma: Path) -> RetainedCache:
    return RetainedCache(gemma, window=W, kept=R, delay=WINDOW, page_size=PAGE)


def test_identity_and_opted_out_are_stocks(server: Server, expected: list[dict]) -> None:
    """To the bit, beside a request that is compressed."""
    server.flush()
    assert f"delay {WINDOW} tokens" in server.log_text()
    options = [{"selector": "identity"}, False, {"selector": "identity"}, {"selector": "random"}]
    answers = server.generate(PROMPTS, kv_compress=options)
    assert_bit_exact(answers[:3], expected[:3])
    assert answers[3]["output_ids"] != expected[3]["output_ids"]
    windows = [report(answer)["windows"] for answer in answers]
    assert windows[1] == 0 and min(windows[0], windows[2], windows[3]) >= 1
    server.assert_nothing_leaked()


def test_old_windows_go_at_once_and_rows_are_continued(
    server: Server, gemma: Path, folder: Path
) -> None:
    """Each log-probability is that of transformers where full layers keep what was retained and the
    others see the newest tokens; also behind a compressed prefix, in chunks."""
    truth, text = truth_of(gemma), prompt(37, 11)
    first, end = answered(server, text, clean=48)
    passes = follow(truth, text, first)
    assert sum(passes) == report(first)["windows"] and max(passes) >= 2
    saved = trace.load(folder / trace.file_name(first["meta_info"]["id"]))
    assert saved.bits.shape[1] == len(FULL)
    assert (np.unpackbits(saved.bits[..., W // 16 :]) == 1).all()

    text += first["output_ids"]
    clean = (len(text) - 1 - end) // PAGE * PAGE
    text += prompt(150, 12)
    second = server.generate(text, tokens=270, kv_compress=RECENT, top_logprobs_num=3)
    assert second["meta_info"]["cached_tokens"] == end + clean
    assert report(second)["reused_tokens"] == end + clean - 48
    truth.crop(end + clean)
    assert sum(follow(truth, text, second)) >= 1
    server.assert_nothing_leaked()


@pytest.mark.parametrize("clean", [WINDOW // PAGE * PAGE, (WINDOW // PAGE + 1) * PAGE])
def test_a_prefix_ends_with_what_a_window_layer_sees(server: Server, gemma: Path, clean: int) -> None:
    """A text that parts from an answer nearer to its last window than that continues on its prompt."""
    text = prompt(64, 13)
    first, end = answered(server, text, clean)
    parted = (text + first["output_ids"])[: end + clean] + prompt(50, 14)
    second = server.generate(parted, tokens=20, kv_compress=RECENT, top_logprobs_num=3)
    reused = clean >= WINDOW - 1
    assert second["meta_info"]["cached_tokens"] == (end + clean if reused else 64)
    if not reused:
        assert report(second)["reused_tokens"] == 0
        assert follow(truth_of(gemma), parted, second) == []
    server.assert_nothing_leaked()
