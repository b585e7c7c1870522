"""The benchmark of prefix reuse on a real server, small."""

from __future__ import annotations

from server import Server

from kara_sglang.benchmarks.reuse.measure import Client, Sizes, run_steps


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
