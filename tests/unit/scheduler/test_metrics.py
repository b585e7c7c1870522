"""Prometheus metrics: names, labels, and counters that move by differences."""

from __future__ import annotations

import functools
from random import Random

import prometheus_client
import pytest
from prometheus_client import CollectorRegistry

from kara_sglang.scheduler.compaction import Pass
from kara_sglang.scheduler.metrics import Metrics, Totals

LABELS = {"model_name": "tiny", "tp_rank": "0"}


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> CollectorRegistry:
    """A fresh registry that new metrics go to."""
    fresh = CollectorRegistry()
    for name in ("Counter", "Gauge"):
        kind = getattr(prometheus_client, name)
        monkeypatch.setattr(prometheus_client, name, functools.partial(kind, registry=fresh))
    return fresh


def value(registry: CollectorRegistry, name: str, **labels: str) -> float | None:
    return registry.get_sample_value(f"sglang:kv_compress_{name}", LABELS | labels)


def test_names_and_labels(registry: CollectorRegistry) -> None:
    """Each with SGLang's own labels, at zero before the first pass."""
    Metrics(LABELS).update(Totals(), 0, 0, 0)
    names = {metric.name for metric in registry.collect()}
    assert names == {
        f"sglang:kv_compress_{name}"
        for name in (
            *("passes", "windows", "without_queries", "slots_freed", "pass_seconds", "skipped"),
            *("tokens_computed_again", "long_answers"),
            *("retracted_tokens_returned", "retracted_tokens_computed"),
            *("recorders_in_use", "held_tokens", "logical_tokens"),
        )
    }
    assert all(metric.documentation for metric in registry.collect())
    for name in ("passes", "windows", "without_queries", "slots_freed", "pass_seconds"):
        assert value(registry, f"{name}_total") == 0
    for name in ("recorders_in_use", "held_tokens", "logical_tokens"):
        assert value(registry, name) == 0


def test_counters_follow_the_totals(registry: CollectorRegistry) -> None:
    """Whatever happens between two updates, the exported value is the total; gauges are set."""
    random = Random(0)
    totals, metrics = Totals(), Metrics(LABELS)
    for _ in range(200):
        for _ in range(random.randint(0, 3)):
            windows = random.randint(1, 8)
            without = random.randint(0, windows)
            totals.add(Pass(windows, without, random.randint(0, 2048), random.random() / 100))
        totals.long_answers += random.randint(0, 1)
        for _ in range(random.randint(0, 3)):
            totals.skip(random.choice(["multimodal", "opt_out", "beam"]))
        gauges = [random.randint(0, 10**6) for _ in range(3)]
        metrics.update(totals, *gauges)
        assert value(registry, "passes_total") == totals.passes
        assert value(registry, "windows_total") == totals.windows
        assert value(registry, "long_answers_total") == totals.long_answers
        assert value(registry, "without_queries_total") == totals.without_queries
        assert value(registry, "slots_freed_total") == totals.slots_freed
        assert value(registry, "pass_seconds_total") == pytest.approx(totals.pass_seconds)
        for reason, count in totals.skipped.items():
            assert value(registry, "skipped_total", reason=reason) == count
        assert [
            value(registry, name) for name in ("recorders_in_use", "held_tokens", "logical_tokens")
        ] == gauges


def test_an_update_without_news_changes_nothing(registry: CollectorRegistry) -> None:
    """The log line and /metrics may ask as often as they like."""
    totals, metrics = Totals(), Metrics(LABELS)
    totals.add(Pass(2, 1, 512, 0.5))
    totals.skip("opt_out")
    for _ in range(3):
        metrics.update(totals, 1, 2, 3)
    assert value(registry, "windows_total") == 2
    assert value(registry, "skipped_total", reason="opt_out") == 1


def test_the_totals_belong_to_the_coordinator(registry: CollectorRegistry) -> None:
    """Metrics keep a copy: they neither change the totals nor see them change behind their back."""
    totals, metrics = Totals(), Metrics(LABELS)
    totals.skip("beam")
    metrics.update(totals, 0, 0, 0)
    copy = totals.copy()
    totals.skip("beam")
    totals.add(Pass(1, 0, 1, 1.0))
    assert copy.skipped["beam"] == 1 and copy.passes == 0
    metrics.update(totals, 0, 0, 0)
    assert value(registry, "skipped_total", reason="beam") == 2
    assert totals.passes == 1
