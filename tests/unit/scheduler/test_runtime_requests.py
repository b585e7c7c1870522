"""Requests that come to the scheduler with options that nobody has checked."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from kara_sglang.config import KaraConfig
from kara_sglang.scheduler import runtime
from kara_sglang.scheduler.terms import TermsOf


def test_a_bad_option_ends_its_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once; who ends for another reason keeps it, and without compression nobody looks."""
    longer = SimpleNamespace(remember=lambda _req, _asked: None)
    coordinator = SimpleNamespace(terms_of=TermsOf(KaraConfig(window=64), 16), longer=longer)
    ended: list[tuple[str, str]] = []

    def arrive(name: str, options: object, to_finish: object = None) -> None:
        params = SimpleNamespace(custom_params={"kv_compress": options}, max_new_tokens=5)
        req = SimpleNamespace(sampling_params=params, to_finish=to_finish)
        req.set_finish_with_abort = lambda problem: ended.append((name, problem))
        runtime.around_init_req_max_new_tokens(lambda _scheduler, _req: None, None, req)

    monkeypatch.setattr(runtime, "runtime", runtime.Runtime(coordinator=coordinator))
    arrive("good", {"retain": 0.25})
    arrive("bad", {"retain": 7})
    arrive("gone", {"retain": 7}, to_finish="too long")
    monkeypatch.setattr(runtime, "runtime", runtime.Runtime())
    arrive("stock", {"retain": 7})
    [(name, problem)] = ended
    assert name == "bad" and problem.startswith("kv_compress.retain must be a share")
