"""What all tests share: how two workers divide them, a tokenizer for the tiny model, and a switch by
which a skipped test fails."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

NO_SKIPS = "KARA_TESTS_NO_SKIPS"
"""Environment variable, set by .ci/run: a test that is skipped, for want of a tool say, fails."""

OWN_SERVERS = (
    *("test_auto_prefix", "test_combinations", "test_data_parallel", "test_disaggregation"),
    "test_documented_lines",
    *("test_dp_attention", "test_draft_combinations", "test_forced_decoding", "test_fp8_kv"),
    *("test_gpu_kit_rehearsal", "test_mixed_chunks", "test_refusal", "test_serving_benchmark"),
    *("test_sliding_window", "test_speculation", "test_tokenizer_workers", "test_window_pool"),
)
"""Files of engine tests that use none of the servers of ``engine/conftest.py``."""

ROOT = Path(__file__).resolve().parents[1]

if not torch.cuda.is_available():
    # Read when SGLang is imported for the first time, by whichever test.
    os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")

# With a default system prompt, as SmolLM2's; <s> and </s> are special tokens of the tokenizer below.
CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{% if loop.first and m['role'] != 'system' %}<s>system\nBe brief.</s>\n{% endif %}"
    "<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """How workers of pytest-xdist divide the tests (``make test``): one has all engine tests that share
    servers; other files go to whoever is free."""
    from xdist.scheduler import LoadScopeScheduling

    class ByServers(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::")[0]
            shares = "tests/engine/" in file and Path(file).stem not in OWN_SERVERS
            return "engine" if shares else file

    return ByServers(config, log)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Iterator[None]:
    report = yield
    if os.environ.get(NO_SKIPS) and report.skipped and not hasattr(report, "wasxfail"):
        *_, reason = report.longrepr
        report.outcome = "failed"
        report.longrepr = f"{NO_SKIPS} is set, and the test was not run: {reason}"
    return report


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 512 tokens: the size of the tiny model's vocabulary, with its special ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([(ROOT / "LICENSE").read_text()], trainer)
    assert tokenizer.get_vocab_size() == 512
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=CHAT_TEMPLATE,
    )
