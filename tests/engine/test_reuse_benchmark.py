"""The benchmark of prefix reuse on a real server, small."""

from __future__ import annotations

from server import Server
from transformers import AutoTokenizer

from kara_sglang.benchmarks.reuse.chats import Talk, hold
from kara_sglang.benchmarks.reuse.measure import Client, Sizes, run_steps
from kara_sglang.embedded_model import embedded_model_path


def test_steps_are_counted(compressed: Server) -> None:
    """The second step of each program finds all but the page in which the first one ended."""
    compressed.flush()
    sizes = Sizes(programs=2, steps=2, prompt=48, more=16, answer=64)
    first, second = run_steps(Client(compressed), sizes, seed=0)
    assert (first["prompt_tokens"], first["cached_tokens"]) == (48, 0)
    # KV of 48 + 63 tokens in 95 slots, as one window gave 16 back: five whole pages, 96 tokens.
    assert (second["prompt_tokens"], second["cached_tokens"]) == (128, 96)
    assert first["ttft_ms"] > 0 and second["ttft_ms"] > 0
    compressed.assert_nothing_leaked()


def test_turns_of_a_chat_are_counted(smollm2: Server) -> None:
    """The second turn holds the first one's text up to what the client removes of its answer, and finds
    that but for a page."""
    smollm2.flush()
    asked = (("user", "What is bread?"), ("user", "And tea?"))
    tokenizer = AutoTokenizer.from_pretrained(embedded_model_path())
    whole, rest = (
        hold(Talk("chat", asked, (24, 4), sent_back), Client(smollm2), tokenizer)
        for sent_back in (1.0, 0.25)
    )
    assert whole[0].prompt_tokens == rest[0].prompt_tokens and whole[0].cached_tokens == 0
    assert 14 <= whole[1].prompt_tokens - rest[1].prompt_tokens <= 22, "18 tokens, tokenised again"
    assert whole[1].cached_tokens >= whole[0].prompt_tokens + 24 - 2 * 16 > rest[1].cached_tokens - 16
    assert all(turn.ttft_ms > 0 and turn.reused_tokens == 0 for turn in (*whole, *rest))
    assert rest[1].computed == rest[1].prompt_tokens - rest[1].cached_tokens > 0
