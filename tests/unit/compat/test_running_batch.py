"""Where releases differ: who has finished is out of the batch that a pass sees."""

from __future__ import annotations

import types

import pytest

from kara_sglang.scheduler import runtime


class Batch:
    """What a pass sees of SGLang's running batch."""

    def __init__(self, finished: list[bool]) -> None:
        self.reqs = finished
        self.batch_is_full = True
        self.looks = 0

    def batch_size(self) -> int:
        return len(self.reqs)

    def filter_batch(self) -> None:
        self.looks += 1
        self.reqs = [finished for finished in self.reqs if not finished]


@pytest.mark.parametrize("coordinator", [True, False])
@pytest.mark.parametrize("finished, left", [([False, False], 2), ([True, False], 1), ([True, True], 0)])
def test_a_pass_sees_no_finished_request(
    finished: list[bool], left: int, coordinator: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their rows may belong to others by now. Who waits for their place is let in; without compression
    the batch is SGLang's own affair. A step in which nobody has left looks at nobody."""
    passes = []
    seen = types.SimpleNamespace(
        before_decode=lambda batch: passes.append(len(batch.reqs)), row_freed=lambda _req: None
    )
    monkeypatch.setattr(runtime, "runtime", runtime.Runtime(coordinator=seen if coordinator else None))
    batch = Batch(finished)
    for req in filter(None, finished):
        runtime.before_free_row(None, req)
    runtime.before_update_running_batch(None, batch)
    runtime.before_update_running_batch(None, batch)
    if coordinator:
        assert passes == ([left, left] if left else [])
        assert batch.batch_is_full == (left == len(finished))
        assert batch.looks == any(finished)
    else:
        assert passes == [] and batch.reqs == finished and batch.batch_is_full
