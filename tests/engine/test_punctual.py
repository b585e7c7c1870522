"""The policy `punctual` on real SGLang: what an answer says does not depend on what else runs."""

from __future__ import annotations

from pathlib import Path

from exactness import assert_same_choices
from server import PAGE_16, Server, launch, prompt

FLAGS = (
    *("--skip-tokenizer-init", *PAGE_16, "--kv-compress", "kara", "--kv-compress-window", "64"),
    *("--kv-compress-query-mem-gb", "0.05", "--kv-compress-config"),
    '{"delay": 16, "policy": "punctual", "query_heads": "mean", "debug_checks": true}',
)
PROMPTS = [prompt(40, seed) for seed in range(5)]


def alone_and_together(server: Server) -> list[tuple[dict, dict]]:
    """The same requests one after the other and at once; their windows fall due together."""
    server.flush()
    together = server.generate(PROMPTS, tokens=200)
    server.flush()
    alone = [server.generate(one, tokens=200) for one in PROMPTS]
    for answer in (*alone, *together):
        assert answer["meta_info"]["kv_compress"]["windows"] == 2
    server.assert_nothing_leaked()
    return list(zip(alone, together, strict=True))


def test_the_same_answer_alone_and_under_load(tiny_model: Path, logs: Path, kara: Server) -> None:
    with launch(tiny_model, logs / "punctual.log", *FLAGS) as server:
        for alone, together in alone_and_together(server):
            assert_same_choices(alone, together, close=2e-4)
        # With `random`, the answers to one prompt have seeds of their own, the same ones each time.
        options = {"kv_compress": {"selector": "random"}}
        sampling = {"max_new_tokens": 200, "temperature": 0, "ignore_eos": True, "n": 3}
        body = {"input_ids": PROMPTS[0], "sampling_params": sampling | {"custom_params": options}}
        runs = [[one["output_ids"] for one in server.post("/generate", body).json()] for _ in range(2)]
        assert sorted(runs[0]) == sorted(runs[1]) and len({tuple(ids) for ids in runs[0]}) == 3
    # By default windows wait for each other, and here that makes a difference.
    pairs = alone_and_together(kara)
    assert any(alone["output_ids"] != together["output_ids"] for alone, together in pairs)
