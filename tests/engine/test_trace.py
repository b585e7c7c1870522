"""`--kv-compress-trace` on a real server: the files say what was removed."""

from __future__ import annotations

import json
import uuid
from pathlib import Path

import numpy as np
from exactness import PROMPTS
from server import Server, prompt

from kara_sglang.trace.format import file_name, load

WINDOW, KEPT, SETS = 64, 32, 4 * 4  # the tiny model has 4 layers of 4 KV heads


def test_files_say_what_was_removed(kara: Server, traces: Path) -> None:
    """One batch of all kinds: as many tokens as meta_info says, for each layer and head; which ones is
    known for `recent` and `identity`; a request that opted out leaves no file."""
    kara.flush()
    options = [{"selector": "recent"}, {"selector": "identity"}, {"retain": 0.25}, False]
    rids = [f"{name}/{uuid.uuid4()}" for name in ("recent", "identity", "kara", "off")]
    answers = kara.generate(PROMPTS, kv_compress=options, rid=rids)
    paths = [traces / file_name(rid) for rid in rids]
    assert [path.exists() for path in paths] == [True, True, True, False]

    for path, rid, answer, ids in zip(paths[:3], rids, answers, PROMPTS, strict=False):
        trace, report = load(path), answer["meta_info"]["kv_compress"]
        assert (trace.about.rid, trace.about.finish) == (rid, "length")
        assert trace.prompt_ids.tolist() == ids
        assert trace.output_ids.tolist() == answer["output_ids"]
        # Windows follow each other from the first page behind the prompt on.
        first = -(-len(ids) // 16) * 16
        assert trace.windows[:, 0].tolist() == [first + WINDOW * i for i in range(report["windows"])]
        removed = WINDOW * report["windows"] - trace.keeps().sum(axis=(0, 3))
        assert (removed == report["tokens_removed"]).all() and removed.size == SETS

    recent, identity, kept_16 = (load(path).keeps() for path in paths[:3])
    assert (recent == np.repeat([0, 1], WINDOW - KEPT)).all()
    assert identity.all()
    # A selector that looks at the text makes choices of its own in each layer, head and window.
    choices = kept_16.reshape(-1, WINDOW)
    assert len(np.unique(choices, axis=0)) == len(choices)


def test_an_aborted_request_leaves_what_happened(kara: Server, traces: Path) -> None:
    """The windows up to then, and the text."""
    rid = f"abort-{uuid.uuid4()}"
    ids = prompt(20, 7)
    body = {
        "input_ids": ids,
        "rid": rid,
        "sampling_params": {"max_new_tokens": 3000, "ignore_eos": True, "temperature": 0},
        "stream": True,
    }
    with kara.post("/generate", body, stream=True) as response:
        for line in response.iter_lines(decode_unicode=True):
            if line.startswith("data: {"):
                info = json.loads(line[6:])["meta_info"]
                if info["completion_tokens"] == 200:
                    kara.post("/abort_request", {"rid": rid})
    kara.assert_nothing_leaked()
    trace = load(traces / file_name(rid))
    assert trace.about.finish == "abort"
    assert 200 <= len(trace.output_ids) < 3000
    assert len(trace.windows) == info["kv_compress"]["windows"] >= 2
    assert trace.output_ids[:60].tolist() == kara.generate(ids, tokens=60)["output_ids"]


def test_short_requests_leave_no_file(kara: Server, traces: Path) -> None:
    """Less than a window and its delay: nothing was dropped and there is nothing to show."""
    before = set(traces.iterdir())
    kara.generate(PROMPTS, tokens=40)
    assert set(traces.iterdir()) == before
    assert not list(traces.glob(".*")), "unfinished files"
