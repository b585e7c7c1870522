"""The policy `pressure` on real SGLang: nobody is touched while all fit; if not, room is made."""

from __future__ import annotations

import re
from pathlib import Path

from server import launch, prompt

TOKENS = 300
# Two requests of 100 and 300 tokens fit uncompressed; the third has to wait.
FLAGS = (
    *("--skip-tokenizer-init", "--dtype", "float32", "--page-size", "16", "--max-total-tokens", "1024"),
    *("--decode-log-interval", "1"),
    *("--kv-compress", "kara", "--kv-compress-window", "64", "--kv-compress-query-mem-gb", "0.05"),
    *("--kv-compress-config", '{"delay": 16, "policy": "pressure", "debug_checks": true}'),
)


def test_nobody_is_touched_until_somebody_waits(tiny_model: Path, logs: Path) -> None:
    with launch(tiny_model, logs / "pressure.log", *FLAGS) as server:
        alone = server.generate(prompt(100, 1), tokens=TOKENS)
        assert alone["meta_info"]["kv_compress"]["windows"] == 0
        state = server.state()
        assert state["passes"] == 0 and not any(state["skipped"].values())

        before = server.log.stat().st_size
        answers = server.generate([prompt(100, seed) for seed in range(1, 7)], tokens=TOKENS)
        running = re.findall(r"#running-req: (\d+)", server.log_text()[before:])
        assert max(map(int, running)) == 3
        assert sum(answer["meta_info"]["kv_compress"]["windows"] for answer in answers) >= 12
        assert not any(answer["meta_info"]["num_retractions"] for answer in answers)

        again = server.generate(prompt(100, 1), tokens=TOKENS)
        assert again["meta_info"]["kv_compress"]["windows"] == 0
        assert again["output_ids"] == alone["output_ids"]
        server.assert_nothing_leaked()
