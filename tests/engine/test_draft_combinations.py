"""Draft models with much else on one server: fp8 KV, LoRA, chunked prefill, tensor parallelism."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import adapter
import draft_models
import plugins
import pytest
import torch
from exactness import PROMPTS, RetainedCache, assert_bit_exact
from server import PAGE_16, WINDOW, Server, launch, prompt
from speculated import accepted_lengths, assert_follows, draft_model, step_by_step

CHUNK = 64
FP8 = ("--kv-cache-dtype", "fp8_e4m3", "--chunked-prefill-size", str(CHUNK))
# SGLang applies an adapter to the target only, and has none beside STANDALONE
# (``check_lora_speculative_compatibility``).
KINDS = {
    "EAGLE": (
        *(*PAGE_16, *draft_model("EAGLE"), *FP8),
        *("--lora-backend", "torch_native", "--max-lora-rank", str(adapter.RANK)),
    ),
    "STANDALONE": (*PAGE_16, *draft_model("STANDALONE"), *FP8, "--tp-size", "2"),
}
SLOW = ("STANDALONE",)
CLOSE = 0.1  # a K or V that rounds to another of fp8's numbers changes those of later layers and tokens


@dataclass(frozen=True)
class Drafts:
    """A server with all of it, what starts one, and the model that its requests are answered by."""

    kind: str
    server: Server
    model: Path
    flags: tuple[str, ...]
    env: dict[str, str]
    answers_by: Path
    more: dict[str, str]


@pytest.fixture(
    scope="module",
    params=[pytest.param(kind, marks=[pytest.mark.slow] * (kind in SLOW)) for kind in KINDS],
)
def drafts(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Drafts]:
    folder, kind = tmp_path_factory.mktemp("drafts"), request.param
    model, draft = draft_models.make(kind, folder)
    flags = (*KINDS[kind], "--speculative-draft-model-path", str(draft))
    flags += ("--skip-tokenizer-init", "--stream-interval", "1")
    env, answers_by, more = {}, model, {}
    if "--lora-backend" in flags:
        answers_by, more = folder / "merged", {"lora_path": "more"}
        adapted = adapter.make(folder / "more", model, answers_by)
        flags += ("--enable-lora", "--lora-paths", f"more={adapted}")
        env = plugins.install(folder, "adapter")
    if "--tp-size" in flags:
        env = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}
    with launch(model, folder / "log", *flags, "--kv-compress", "kara", *WINDOW, env=env) as server:
        yield Drafts(kind, server, model, flags, env, answers_by, more)


def test_every_token_follows_from_what_is_kept(drafts: Drafts) -> None:
    """Of a streamed answer behind a prompt in chunks: by the adapter's weights, with K and V in fp8."""
    server, ids = drafts.server, prompt(2 * CHUNK + 20, 11)
    answer, counts = step_by_step(server, ids, **drafts.more)
    truth = RetainedCache(
        drafts.answers_by, window=64, kept=32, delay=16, page_size=16, stored=torch.float8_e4m3fn
    )
    assert_follows(truth, ids, answer, counts, behind=1, close=CLOSE)
    assert truth.windows == answer["meta_info"]["kv_compress"]["windows"] == 4
    server.assert_nothing_leaked()


def test_identity_gets_the_bits_of_requests_that_opt_out(drafts: Drafts) -> None:
    """With the adapter and without it, beside each other."""
    server, more = drafts.server, {name: [value, None] * 2 for name, value in drafts.more.items()}
    answers = []
    for option in (False, {"selector": "identity"}):
        server.flush()
        answers.append(server.generate(PROMPTS, kv_compress=option, **more))
    assert_bit_exact(answers[1], answers[0])
    for opted_out, identity in zip(*answers, strict=True):
        assert opted_out["meta_info"]["kv_compress"]["windows"] == 0
        assert identity["meta_info"]["kv_compress"]["windows"] == 4
    # A draft model has no adapter, and guesses worse where its target has one.
    assert answers[1][1]["meta_info"]["spec_accept_length"] > 1.5
    server.assert_nothing_leaked()


def test_a_draft_model_keeps_what_its_target_keeps(drafts: Drafts) -> None:
    """Bytes of its pool move as they are, so it guesses on as before."""
    rates, answers = accepted_lengths(drafts.server, (False, None))
    for answer in answers:
        report = answer["meta_info"]["kv_compress"]
        assert (report["windows"], report["without_queries"]) == (4, 0)
    assert rates[0] > 1.7 and rates[1] > 0.93 * rates[0]
    drafts.server.assert_nothing_leaked()


@pytest.mark.slow
def test_who_opts_out_gets_the_bits_of_stock_sglang(drafts: Drafts, tmp_path: Path) -> None:
    """With its own speculation."""
    ours = drafts.server
    ours.flush()
    answers = ours.generate(PROMPTS, kv_compress=False, **drafts.more)
    with launch(drafts.model, tmp_path / "log", *drafts.flags, env=drafts.env) as stock:
        expected = stock.generate(PROMPTS, **drafts.more)
    assert_bit_exact(answers, expected)
    accepted = [
        [answer["meta_info"]["spec_accept_length"] for answer in each] for each in (answers, expected)
    ]
    assert accepted[0] == accepted[1]
