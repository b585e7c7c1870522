"""Mixed chunks: a step prefills some requests while others decode in it."""

from __future__ import annotations

from pathlib import Path

from mixing import TOKENS, answers_beside_prefills, assert_exact
from server import PAGE_16, PUNCTUAL, WINDOW, launch

FLAGS = (
    *("--skip-tokenizer-init", *PAGE_16, "--kv-compress", "kara", *WINDOW, *PUNCTUAL),
    *("--enable-mixed-chunk", "--chunked-prefill-size", "64", "--decode-log-interval", "1"),
    *("--kv-compress-prefix-reuse", "compressed"),
)


def test_who_decodes_beside_a_prefill_is_compressed_alike(tiny_model: Path, logs: Path) -> None:
    with launch(tiny_model, logs / "mixed.log", *FLAGS) as server:
        answers = answers_beside_prefills(server, 500)
        alone = server.log_text().count("Decode batch")
        assert alone < TOKENS / 2, f"{alone} steps without a prefill: too few were mixed"
        assert_exact(tiny_model, answers)
        server.assert_nothing_leaked()
