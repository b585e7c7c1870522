"""The quality instrument on a real engine, against transformers with the same retained K/V."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import pytest
from server import prompt

from kara_sglang.benchmarks.quality import engine, variants
from kara_sglang.benchmarks.quality.instrument import REFERENCE_ROW
from kara_sglang.benchmarks.quality.rows import Row
from kara_sglang.benchmarks.quality.script import Cell, Probe, Script, reference_path
from kara_sglang.benchmarks.quality.tasks import windows_done
from kara_sglang.benchmarks.research import tables
from kara_sglang.benchmarks.research.replay import Replay
from kara_sglang.benchmarks.tiny_model import VOCAB
from kara_sglang.kernels import selectors

WINDOW, DELAY, PAGE = 64, 16, 16
SETTINGS = {
    "window": WINDOW,
    "delay": DELAY,
    "query_heads": "all",
    "query_dtype": "model",  # fp8 would round our queries and transformers' apart
    "query_mem_gb": 0.1,
    "policy": "threshold",  # each window as soon as it is due, as the instrument has it
    "debug_checks": True,
}
VARIANT = variants.Variant(near=5, newest=8).name
ROWS = {
    "kara": 0.5,
    "causal": 0.25,
    "snapkv": 0.5,
    "keys": 0.5,
    "recent": 0.25,
    "random": 0.5,
    VARIANT: 0.5,
}
SEED = 7


def script(name: str, length: int, seed: int) -> Script:
    rng = random.Random(seed)
    forced = [rng.randrange(3, VOCAB) for _ in range(250)]
    probes = [Probe("text", 60, 100, True), Probe("text", 190, 250, True)]
    return Script(name, name, prompt(length, seed), forced, probes, 2)


SCRIPTS = [script("aligned", 32, 1), script("odd", 21, 2)]


@pytest.fixture(scope="module")
def folder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One engine performs all rows of both scripts."""
    folder = tmp_path_factory.mktemp("quality")
    requests = []
    for one in SCRIPTS:
        one.save(folder)
        done = windows_done(one, WINDOW, DELAY, PAGE)
        assert done == 3
        requests.append((REFERENCE_ROW, one.name, False, 0))
        requests.append(("identity", one.name, {"selector": "identity"}, done))
        for name, retain in ROWS.items():
            options = {"selector": name, "retain": retain, "seed": SEED}
            requests.append((name, one.name, options, done))
    order = engine.Order(
        str(tiny_model),
        {"selector": "kara"} | SETTINGS,
        {"dtype": "float32", "max_total_tokens": 8192},
        requests,
    )
    with engine.start(order, folder, "engine", threads=1) as process:
        process.wait(timeout=400)
    log = (folder / "logs" / "engine.log").read_text()
    assert process.returncode == 0, log[-4000:]
    return folder


@pytest.fixture(scope="module")
def replay(tiny_model: Path) -> Replay:
    return Replay(str(tiny_model))


@pytest.mark.parametrize("one", SCRIPTS, ids=lambda s: s.name)
def test_the_full_cache_is_transformers(folder: Path, replay: Replay, one: Script) -> None:
    measured, truth = Cell.load(folder, REFERENCE_ROW, one.name), replay.full(one)
    assert measured.logprob == pytest.approx(truth.logprob, abs=2e-4)
    assert measured.top == truth.top
    assert measured.slots == truth.slots
    assert reference_path(folder, one.name).is_file()


@pytest.mark.parametrize("one", SCRIPTS, ids=lambda s: s.name)
def test_identity_has_no_divergence(folder: Path, one: Script) -> None:
    """Recorder, pass, splice and positions run, and nothing but rounding may come of it."""
    identity, full = (Cell.load(folder, row, one.name) for row in ("identity", REFERENCE_ROW))
    assert identity.kl == pytest.approx([0.0] * len(one.compared()), abs=2e-6)
    assert identity.logprob == pytest.approx(full.logprob, abs=1e-4)
    assert identity.slots == full.slots


@pytest.mark.parametrize("one", SCRIPTS, ids=lambda s: s.name)
@pytest.mark.parametrize("row", ROWS)
def test_compressed_rows_are_transformers_with_the_same_kv(
    folder: Path, replay: Replay, row: str, one: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kept positions per layer and head, true positions: the same probabilities, KL and lengths."""
    monkeypatch.setitem(selectors.REGISTRY, VARIANT, None)  # taken out again afterwards
    del selectors.REGISTRY[VARIANT]
    variants.register([VARIANT])
    plan = tables.plan_of(Row(row, "selectors", row, ROWS[row], SETTINGS))
    plan = dataclasses.replace(plan, seed=SEED)
    measured, truth = Cell.load(folder, row, one.name), replay.run(one, plan)
    assert measured.slots == truth.slots
    assert measured.logprob == pytest.approx(truth.logprob, abs=5e-4)
    assert measured.kl == pytest.approx(truth.kl, abs=5e-4)
    # And it is a difference that is measured: three windows were thinned out.
    assert max(measured.kl) > 0.05
