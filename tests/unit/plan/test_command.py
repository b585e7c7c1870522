"""``python -m kara_sglang.plan``: one line where there is no plan."""

from __future__ import annotations

import pytest
import torch
from planned import LOAD

from kara_sglang.plan.command import main


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ("", "say --gpu-memory GIB, or --device cpu"),
        ("--gpu-memory 12", "--mem-fraction-static above"),
        ("--gpu-memory 30 --answer 60000", "must fit uncompressed"),
        ("--gpu-memory 80 --device cpu", "leave out one"),
        ("--device cpu", "--max-total-tokens"),
        ("--gpu-memory 80 --kv-compress none", "needs compression"),
        ("--gpu-memory 80 --kv-compress-query-mem-gb 0.001", "it takes 0.0221 GiB"),
        ("--gpu-memory 80 --window 100 --page-size 16", "use 96 or 112"),
        ("--gpu-memory 80 --window x", "--kv-compress-window must be a whole number"),
        ("--gpu-memory 80 --no-such-flag 3", "unrecognized arguments: --no-such-flag"),
        ("--gpu-memory 80 --pp-size 2", "--pp-size does not work with --kv-compress"),
        ("--gpu-memory 80 --tp 3", "--tp-size 3"),
        ("--gpu-memory 80 --model-path no/such/folder", "SGLang refuses this: "),
    ],
)
def test_where_there_is_no_plan_one_line_says_why(qwen, capsys, monkeypatch, flags, reason):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code = main(["--model", qwen, *LOAD, *flags.split()])
    captured = capsys.readouterr()
    assert code == 2 and captured.out == ""
    assert captured.err.startswith("plan: ") and captured.err.count("\n") == 1
    assert reason in captured.err
