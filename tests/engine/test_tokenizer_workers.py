"""Several tokenizer workers: processes that load no plugins stand between clients and the scheduler."""

from __future__ import annotations

from pathlib import Path

import pytest
from exactness import PROMPTS
from server import PAGE_16, WINDOW, in_parallel, launch

FLAGS = (
    *("--skip-tokenizer-init", *PAGE_16, "--kv-compress", "kara", *WINDOW),
    *("--tokenizer-worker-num", "2"),
)


@pytest.mark.slow
def test_options_are_checked_where_requests_are_run(tiny_model: Path, logs: Path) -> None:
    """A bad one is a client's error and hurts nobody beside it; reports come as lists."""
    options = [{"selector": "recent"}, {"retain": 7}, False, {"selector": "no such"}]

    # A worker that does not say so soon enough that it is there is started anew.
    env = {"SGLANG_UVICORN_WORKER_HEALTHCHECK_TIMEOUT": "240"}
    with launch(tiny_model, logs / "workers.log", *FLAGS, env=env) as server:

        def ask(ids: list[int], option: object) -> tuple[int, dict]:
            sampling = {"max_new_tokens": 200, "temperature": 0, "ignore_eos": True}
            sampling |= {"custom_params": {"kv_compress": option}}
            answer = server.post("/generate", {"input_ids": ids, "sampling_params": sampling})
            return answer.status_code, answer.json()

        answers = in_parallel(
            [
                lambda ids=ids, option=option: ask(ids, option)
                for ids, option in zip(PROMPTS, options, strict=True)
            ]
        )
        assert [status for status, _ in answers] == [200, 400, 200, 400]
        assert "kv_compress.retain must be a share" in str(answers[1][1])
        assert "kv_compress.selector" in str(answers[3][1])
        windows = []
        for _, answer in (answers[0], answers[2]):
            assert len(answer["output_ids"]) == 200
            [report] = answer["meta_info"]["kv_compress"]
            windows.append(report["windows"])
        assert windows == [2, 0]
        server.assert_nothing_leaked()
