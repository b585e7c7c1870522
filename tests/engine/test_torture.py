"""Hundreds of odd requests at once change nothing for those who opted out, and leave nothing behind."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from gpt_oss_model import make_tiny_gpt_oss
from server import ODD, PAGE_16, Server, launch, launch_small, prompt
from torture import Torture, assert_as_stock

# SGLang's own: behind a streamed request a background task aborts it, and looks for a field that is not
# there when the request's form was refused (``TokenizerManager.create_abort_task``, 0.5.23).
STOCKS_OWN = "AttributeError: 'GenerateReqInput' object has no attribute 'is_single'"


NGRAM = (
    *("--speculative-algorithm", "NGRAM", "--speculative-num-draft-tokens", "4"),
    *("--speculative-ngram-max-bfs-breadth", "1"),
)


def stays_boring(server: Server, stock: Server, weights: Path, seed: int, count: int) -> None:
    """Nobody's answer is wrong, and the server is idle, whole and healthy in the end."""
    print(f"TORTURE_SEED={seed} sends the same requests again")  # pytest shows it with a failure
    server.flush()
    pages, start = server.state()["recorder_pages_free"], len(server.log_text())
    torture = Torture(server, weights, seed, count)
    torture.run()
    # Whether anybody goes on behind kept windows while KV is short is chance; now nobody is in the way.
    calm = prompt(64, seed)
    answer = server.generate(calm, tokens=150)
    torture.next_turn([*calm, *answer["output_ids"], *prompt(9, seed)], None)
    print(dict(torture.seen))
    wanted = ("windows", "retractions", "bad", "turn of a session", "ended by length", "ended by abort")
    wanted += ("hang-up in a stream", "hang-up without a stream", "next turn")
    wanted += ("n", "priority", "cache_salt", "extra_key", "stream", "return_logprob", "logit_bias")
    wanted += ("token_ids_logprob", "return_hidden_states", "custom_logit_processor")
    if server.state()["settings"]["prefix_reuse"] == "compressed":
        wanted += ("reused",)
    assert all(torture.seen[kind] for kind in wanted), torture.seen
    acts = [name for name in torture.acts if torture.seen[name]]
    # An act for every tenth request, unless one takes so long that few are left behind it.
    assert len(acts) == len(torture.acts) if count >= 400 else len(acts) >= 5, torture.seen
    server.assert_nothing_leaked()
    assert server.state()["recorder_pages_free"] == pages
    log = server.log_text()[start:]
    assert log.count("Traceback") == log.count(STOCKS_OWN), log.partition("Traceback")[2][:5000]
    fresh = {
        "input_ids": prompt(60, seed),
        "sampling_params": {"max_new_tokens": 60, "temperature": 0, "ignore_eos": True},
    }
    torture.exact.append((fresh, server.generate(prompt(60, seed), tokens=60, kv_compress=False)))
    torture.look()
    if server.speculates:
        # With NGRAM SGLang's own steps leave the first out (``eagle_sample``), and of the second give
        # the first drafts', whichever were accepted (``batch_result_processor.py``).
        stocks_own = {"custom_logit_processor", "return_hidden_states"}
        torture.exact = [one for one in torture.exact if not stocks_own & one[0].keys()]
    compared = assert_as_stock(stock, torture.exact)
    print(f"{compared} tokens of {len(torture.exact)} answers are stock's")
    assert compared > 5 * count


def test_odd_requests_stay_boring(compressed: Server, stock: Server, tiny_model: Path) -> None:
    seed = int(os.environ.get("TORTURE_SEED", 14))
    stays_boring(compressed, stock, tiny_model, seed, count=160)


@pytest.mark.slow
@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("reuse", ["exact", "compressed"])
@pytest.mark.parametrize("drafts", [(), NGRAM], ids=["plain", "drafts"])
def test_many_odd_requests_stay_boring(
    stock: Server, tiny_model: Path, logs: Path, reuse: str, page_size: int, drafts: tuple[str, ...]
) -> None:
    seed = int(os.environ.get("TORTURE_SEED", random.randrange(10**6)))
    few_pages = ("--kv-compress-query-mem-gb", "0.0003")
    with launch_small(tiny_model, logs, page_size, reuse, *few_pages, *drafts) as server:
        server.speculates = bool(drafts)
        stays_boring(server, stock, tiny_model, seed, count=400)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("page_size", "more"),
    [(1, ()), (16, ()), (16, ("--enable-mixed-chunk",)), (16, ("--disable-radix-cache",))],
)
def test_odd_requests_beside_a_pool_of_windows_stay_boring(
    tmp_path: Path, logs: Path, page_size: int, more: tuple[str, ...]
) -> None:
    """A gpt-oss. The pool of its window layers is so small that requests wait for it, too."""
    seed = int(os.environ.get("TORTURE_SEED", random.randrange(10**6)))
    model = make_tiny_gpt_oss(tmp_path / "tiny-gpt-oss")
    flags = ("--skip-tokenizer-init", *PAGE_16, *ODD)
    with (
        launch(model, logs / "stock-gpt-oss.log", *flags) as stock,
        launch_small(model, logs, page_size, "exact", *more) as server,
    ):
        stays_boring(server, stock, model, seed, count=160)
