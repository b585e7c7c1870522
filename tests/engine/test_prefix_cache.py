"""RadixAttention's prefix reuse stays on and exact beside compressed requests."""

from __future__ import annotations

import pytest
from exactness import logprobs
from server import Server, in_parallel, prompt

PROMPT = prompt(100, 21)


@pytest.fixture(scope="module")
def history(stock: Server) -> list[dict]:
    """What stock SGLang answers to the same prompt twice: first long, then short."""
    stock.flush()
    return [stock.generate(PROMPT, tokens=300), stock.generate(PROMPT, tokens=40)]


def assert_same(answer: dict, expected: dict) -> None:
    assert answer["output_ids"] == expected["output_ids"]
    assert logprobs(answer) == logprobs(expected)
    assert answer["meta_info"]["cached_tokens"] == expected["meta_info"]["cached_tokens"]


def test_prompt_survives_a_compressed_request(kara: Server, history: list[dict]) -> None:
    """The prompt's cached KV is bit for bit what stock has: same reuse, same bits in what follows."""
    kara.flush()
    compressed = kara.generate(PROMPT, tokens=300)
    assert compressed["meta_info"]["kv_compress"]["windows"] == 4
    assert history[1]["meta_info"]["cached_tokens"] == 96
    assert_same(kara.generate(PROMPT, tokens=40, kv_compress=False), history[1])


def test_prompt_shared_by_running_requests(kara: Server, stock: Server) -> None:
    """Two requests hold the same prompt while one of them is compressed; a third comes later."""
    tokens = 260
    kara.flush()
    kara.generate(PROMPT, tokens=1)
    pair = kara.generate([PROMPT, PROMPT], tokens=tokens, kv_compress=[None, False])
    third = kara.generate(PROMPT, tokens=40, kv_compress=False)

    stock.flush()
    stock.generate(PROMPT, tokens=1)
    stock_pair = stock.generate([PROMPT, PROMPT], tokens=tokens)
    stock_third = stock.generate(PROMPT, tokens=40)

    assert pair[0]["meta_info"]["kv_compress"]["windows"] == 3
    assert_same(pair[1], stock_pair[1])
    # The opted-out twin left its whole answer in the tree on both servers.
    assert_same(third, stock_third)
    kara.assert_nothing_leaked()


def test_compressed_output_stays_out_of_the_tree(kara: Server, stock: Server) -> None:
    """With exact reuse a follow-up over prompt and answer finds the prompt and no compressed slot,
    though it would take some."""
    kara.flush()
    first = kara.generate(PROMPT, tokens=300, kv_compress={"prefix": "exact"})
    follow_up = PROMPT + first["output_ids"] + prompt(8, 22)
    again = kara.generate(follow_up, tokens=30, kv_compress={"prefix": "compressed"})
    assert again["meta_info"]["cached_tokens"] == 96
    stock.flush()
    stock.generate(PROMPT, tokens=1)
    reference = stock.generate(follow_up, tokens=30)
    assert_same(again, reference)
    kara.assert_nothing_leaked()


@pytest.mark.parametrize(
    ("tokens", "option"), [(60, None), (200, {"selector": "identity"}), (200, {"retain": 1.0})]
)
def test_uncompressed_output_is_reused(
    tokens: int, option: dict | None, kara: Server, stock: Server
) -> None:
    """An answer of which nothing was dropped goes into the tree as ever: one shorter than a window, and
    one whose windows keep all."""
    for server in (kara, stock):
        server.flush()
    reused = []
    for server in (kara, stock):
        first = server.generate(PROMPT, tokens=tokens, kv_compress=option)
        follow_up = PROMPT + first["output_ids"] + prompt(8, 22)
        reused.append(server.generate(follow_up, tokens=4)["meta_info"]["cached_tokens"])
    assert reused[0] == reused[1] > 96


def test_many_prompts_at_once(kara: Server) -> None:
    """Requests that share prefixes of different lengths, compressed and not, at the same time."""
    kara.flush()
    shared = prompt(80, 30)
    prompts = [shared[: 16 * k] + prompt(20, 40 + k) for k in range(1, 6)]
    alone = [kara.generate(p, tokens=150, kv_compress={"seed": 1}) for p in prompts]
    together = in_parallel(
        [lambda p=p: kara.generate(p, tokens=150, kv_compress={"seed": 1}) for p in prompts]
    )
    for one, other in zip(alone, together, strict=True):
        assert one["meta_info"]["kv_compress"]["windows"] == 1
        assert other["meta_info"]["kv_compress"]["windows"] == 1
        # The first window falls due after 80 tokens; until then nothing but rounding may differ.
        assert one["output_ids"][:80] == other["output_ids"][:80]
    kara.assert_nothing_leaked()
