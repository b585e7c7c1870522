"""The quality instrument without an engine: scripts, figures, rows, tables, and the sampler's hook."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from places import ROOT

from kara_sglang.benchmarks.quality import __main__ as quality_main
from kara_sglang.benchmarks.quality import (
    campaign,
    estimates,
    instrument,
    pace,
    reasoning,
    regimes,
    report,
    rows,
    search,
    tasks,
    texts,
)
from kara_sglang.benchmarks.quality.engine import EngineFailed
from kara_sglang.benchmarks.quality.instrument import REFERENCE_ROW
from kara_sglang.benchmarks.quality.pace import Pace
from kara_sglang.benchmarks.quality.replay import Layer, Plan, Replay
from kara_sglang.benchmarks.quality.rows import Part, Row
from kara_sglang.benchmarks.quality.script import (
    FOLDER_ENV,
    ROW_KEY,
    SCRIPT_KEY,
    Cell,
    Probe,
    Script,
    cell_path,
    reference_path,
)
from kara_sglang.benchmarks.quality.tasks import PROMPT, SETTLE, Layout
from kara_sglang.benchmarks.quality.variants import Variant, VariantSelector
from kara_sglang.config import KaraConfig
from kara_sglang.embedded_model import transformers_name
from kara_sglang.kernels import record, selectors
from kara_sglang.kernels.score import NEIGHBOURS_SHARE, AttentionRule, key_distances

VOCAB = 50


def encode(text: str) -> list[int]:
    """One token per character."""
    return [ord(character) for character in text]


def decode(tokens: list[int]) -> str:
    return "".join(map(chr, tokens))


# -- texts and scripts -----------------------------------------------------------------------------


def test_the_splits_share_no_text_and_their_sources_are_named():
    development, held_out = (texts.load(split) for split in texts.SPLITS)
    assert len(development) >= 8 and len(held_out) >= 12
    assert not {t.content for t in development} & {t.content for t in held_out}
    sources = (texts.DATA / "SOURCES.md").read_text()
    for split, members in zip(texts.SPLITS, (development, held_out), strict=True):
        for text in members:
            stem = text.name.rsplit("-", 1)[0] if text.name[-1].isdigit() else text.name
            named = f"`{split}/{stem}-*`", f"`{split}/{stem}`", f"`*/{text.kind}-*`"
            assert any(name in sources for name in named), text.name


def test_the_first_texts_are_of_different_kinds():
    few = texts.load("held_out", 5)
    assert len({text.kind for text in few}) == 5


def test_words_can_be_told_apart():
    for words in (tasks.NAMES, tasks.WORDS):
        assert len(set(words)) == len(words)


@pytest.mark.parametrize("layout", [Layout(128, 1, tail=128, stride=2), Layout(64, 2, tail=40)])
def test_a_text_script_measures_its_tail(layout: Layout):
    text = texts.load("held_out", 1)[0]
    script = tasks.text_script(encode, text, layout)
    assert decode(script.prompt + script.forced) == text.content[: len(script.prompt + script.forced)]
    steps = script.measured()
    assert steps == list(range(layout.span, layout.span + layout.tail))
    assert script.compared() == steps[:: layout.stride]
    assert steps[-1] == len(script.forced) - 1


def test_a_recall_script_states_each_fact_in_its_window_and_asks_for_it():
    layout = Layout(512, 3, facts=4)
    text = texts.load("held_out", 1)[0]
    script = tasks.recall_script(encode, text, layout, seed=3)
    said, asked = script.forced[: layout.span], script.forced[layout.span :]
    assert len(script.probes) == 12
    assert {probe.kind for probe in script.probes} == set(tasks.FACTS)
    for probe in script.probes:
        answer = decode(script.forced[probe.start : probe.stop])
        lead = decode(script.forced[: probe.start]).rsplit("\n", 1)[1]
        assert decode(said).count(f"\n{lead}{answer}.\n") == 1
        start = decode(said).index(f"\n{lead}{answer}.\n")
        centre = start + len(f"\n{lead}{answer}.\n") / 2
        window = layout.windows - 1 - probe.back
        assert abs(centre - (window + probe.offset) * layout.window) <= 1
        assert start >= window * layout.window
        assert start + len(f"\n{lead}{answer}.\n") <= (window + 1) * layout.window
    assert sorted({probe.offset for probe in script.probes}) == [0.125, 0.375, 0.625, 0.875]
    assert decode(asked).startswith("\n\nNow repeat")
    assert script == tasks.recall_script(encode, text, layout, seed=3)
    assert script != tasks.recall_script(encode, text, layout, seed=4)


def test_too_much_is_refused_by_name():
    text = texts.load("held_out", 1)[0]
    with pytest.raises(ValueError, match="choose a smaller window"):
        tasks.text_script(encode, text, Layout(9216, 1, tail=512))
    with pytest.raises(ValueError, match="do not fit a window of 64"):
        tasks.recall_script(encode, text, Layout(64, 1, facts=4), seed=0)


@pytest.mark.parametrize("prompt", [16, 32, 37])
@pytest.mark.parametrize("delay", [0, 16, 64])
@pytest.mark.parametrize("forced", [65, 80, 130, 146, 147, 148, 200, 321])
def test_windows_done_counts_like_the_scheduler(prompt: int, delay: int, forced: int):
    """Step by step: a pass looks at the KV length before each decode step but the last."""
    window, page = 64, 16
    base, removed_windows = -(-prompt // page) * page, 0
    for step in range(1, forced):
        length = prompt + step - 1
        last = step == forced - 1
        if not last and length >= base + (removed_windows + 1) * window + delay:
            removed_windows += 1
    script = Script("s", "x", [1] * prompt, [1] * forced)
    assert tasks.windows_done(script, window, delay, page) == removed_windows


def test_scripts_and_cells_survive_their_files(tmp_path: Path):
    script = Script("s", "x", [1], [2, 3], [Probe("text", 0, 2, True)], 2)
    script.save(tmp_path)
    assert Script.load(tmp_path, "s") == script
    cell = Cell([-1.5], [True], [3], [0.25])
    cell.save(tmp_path, "row", "s")
    assert Cell.load(tmp_path, "row", "s") == cell


# -- the hook --------------------------------------------------------------------------------------


class Server:
    """What the hooks see of SGLang: requests, positions, logits; greedy sampling."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(FOLDER_ENV, str(folder))
        self.seen: list[tuple[int, ...]] = []

    def request(self, rid: str, script: str | None, row: str = "row") -> SimpleNamespace:
        params = {SCRIPT_KEY: script, ROW_KEY: row} if script else None
        return SimpleNamespace(rid=rid, sampling_params=SimpleNamespace(custom_params=params))

    def step(self, requests: list, positions: list[int], logits: torch.Tensor) -> list[int]:
        info = SimpleNamespace()
        batch = SimpleNamespace(reqs=requests)
        forward = SimpleNamespace(
            sampling_info=info, seq_lens_cpu=torch.tensor([p + 1 for p in positions])
        )
        instrument.after_init_forward_batch(forward, None, batch)

        def stock(_sampler, output, *_args, **_kwargs) -> torch.Tensor:
            ids = output.next_token_logits.argmax(-1)
            output.next_token_logits.zero_()  # as sampling in place does
            return ids

        output = SimpleNamespace(next_token_logits=logits.clone())
        ids = instrument.around_sampler(
            stock, None, output, info, False, None, None, torch.tensor(positions)
        )
        return ids.tolist()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    return Server(tmp_path, monkeypatch)


def drawn(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, VOCAB, generator=torch.Generator().manual_seed(seed))


def perform(server: Server, script: Script, row: str, seed: int) -> list[torch.Tensor]:
    """All steps of one request; returns their logits."""
    request = server.request(f"{row}-{seed}", script.name, row)
    logits = [drawn(1, seed + i) for i in range(len(script.forced))]
    for i, row_logits in enumerate(logits):
        ids = server.step([request], [len(script.prompt) - 1 + i], row_logits)
        assert ids == [script.forced[i]]
    return logits


def test_forced_ids_measured_from_untouched_logits(server: Server, tmp_path: Path):
    script = Script("s", "x", [1, 2, 3], [7, 8, 9, 10], [Probe("text", 1, 4, True)], 2)
    script.save(tmp_path)
    full = perform(server, script, REFERENCE_ROW, 0)
    other = perform(server, script, "row", 100)
    cell = Cell.load(tmp_path, "row", "s")
    for place, step in enumerate((1, 2, 3)):
        p = torch.log_softmax(other[step][0], -1)
        assert cell.logprob[place] == pytest.approx(p[script.forced[step]].item(), abs=1e-6)
        assert cell.top[place] == (int(p.argmax()) == script.forced[step])
        assert cell.slots[place] == 3 + step
    for place, step in enumerate((1, 3)):
        p, q = (torch.log_softmax(x[step][0].double(), -1) for x in (full, other))
        expected = (p.exp() * (p - q)).sum().item()
        assert cell.kl[place] == pytest.approx(expected, rel=1e-5)
    assert Cell.load(tmp_path, REFERENCE_ROW, "s").kl == []
    assert np.load(reference_path(tmp_path, "s")).shape == (2, VOCAB)


def test_the_same_logits_have_no_divergence(server: Server, tmp_path: Path):
    script = Script("s", "x", [1], [7, 8, 9], [Probe("text", 0, 3, True)])
    script.save(tmp_path)
    perform(server, script, REFERENCE_ROW, 5)
    perform(server, script, "identity", 5)
    assert Cell.load(tmp_path, "identity", "s").kl == pytest.approx([0.0] * 3, abs=1e-6)


def test_the_step_follows_the_position_through_chunks_and_retraction(server: Server, tmp_path: Path):
    """A chunk in the middle of the prompt is not a step; a retracted request goes on where it was."""
    script = Script("s", "x", list(range(8)), [20, 21, 22, 23], [Probe("text", 0, 4)])
    script.save(tmp_path)
    request, other = server.request("a", "s"), server.request("b", None)
    chunk = drawn(1, 0)
    assert server.step([request], [3], chunk) == chunk.argmax(-1).tolist()
    assert server.step([request], [7], drawn(1, 1)) == [20]
    both = drawn(2, 2)
    assert server.step([other, request], [50, 8], both) == [int(both[0].argmax()), 21]
    # Retracted: prompt and answer so far are prefilled again, and the next token comes from there.
    assert server.step([request], [9], drawn(1, 3)) == [22]
    assert not cell_path(tmp_path, "row", "s").exists()
    assert server.step([request, other], [10, 51], drawn(2, 4))[0] == 23
    cell = Cell.load(tmp_path, "row", "s")
    assert cell.slots == [8, 9, 10, 11]
    # A step in flight behind the last one is stock's own.
    late = drawn(1, 5)
    assert server.step([request], [11], late) == late.argmax(-1).tolist()
    instrument._takes.clear()


def test_an_unmeasured_step_is_an_error(server: Server, tmp_path: Path):
    script = Script("s", "x", [1], [7, 8, 9], [Probe("text", 0, 3)])
    script.save(tmp_path)
    request = server.request("c", "s")
    server.step([request], [0], drawn(1, 0))
    with pytest.raises(RuntimeError, match="steps were not measured"):
        server.step([request], [2], drawn(1, 1))
    instrument._takes.clear()


def test_the_entry_point_exists_for_instrumented_processes_only(tmp_path: Path):
    from importlib.metadata import entry_points

    group = "sglang.srt.plugins"
    assert instrument.ENTRY_POINT not in {e.name for e in entry_points(group=group)}
    import sys

    sys.path.append(str(instrument.install(tmp_path)))
    try:
        (found,) = (e for e in entry_points(group=group) if e.name == instrument.ENTRY_POINT)
        assert found.load() is instrument.register
    finally:
        sys.path.pop()


# -- variants and rows -----------------------------------------------------------------------------


def test_variants_have_names_that_can_be_read_back():
    for variant in (Variant(), Variant(power=1, chunks=0), Variant(layer=1, newest=16, later=0.5)):
        assert Variant.parse(variant.name) == variant
    with pytest.raises(ValueError, match="unknown 'depth'"):
        Variant.parse("kara:depth=3")
    with pytest.raises(ValueError, match="no variant"):
        Variant.parse("snapkv")


@pytest.mark.parametrize(
    ("score", "variant"),
    [
        ("l2_v", Variant()),
        ("sum", Variant(power=1, value=0)),
        ("sum_v", Variant(power=1)),
        ("l2", Variant(value=0, near=5)),
        (KaraConfig().score, rows.PRODUCT),
    ],
)
def test_a_variant_without_changes_is_the_product_selector(score: str, variant: Variant):
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(80, 2, 3, 16, generator=generator)
    keys, values = (torch.randn(64, 2, 16, generator=generator) for _ in range(2))
    config = KaraConfig(score=score, neighbours=variant.near, delay_votes=bool(variant.later))
    product = selectors.build("kara", config)
    expected = product.score(queries, keys, values, scale=0.25, seed=0)
    got = VariantSelector(variant=variant).score(queries, keys, values, scale=0.25, seed=0)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_a_variant_without_votes_is_the_selector_without_queries():
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(64, 2, 16, generator=generator) for _ in range(2))
    nobody = torch.full((80, 2, 3, 16), math.nan)
    expected = selectors.build("keys", KaraConfig()).score(None, keys, values, scale=0.25, seed=0)
    variant = dataclasses.replace(rows.PRODUCT, votes=0)
    got = VariantSelector(variant=variant).score(nobody, keys, values, scale=0.25, seed=0)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_the_ablations_start_from_the_default():
    selector = selectors.build("kara", KaraConfig())
    assert selector.chunks.budget == rows.PRODUCT.chunks
    assert selector.rule == AttentionRule(
        squared=rows.PRODUCT.power == 2,
        value_norm=int(rows.PRODUCT.value),
        key_distance=rows.PRODUCT.novel == 1,
        neighbours=rows.PRODUCT.near,
        delay_votes=bool(rows.PRODUCT.later),
        ahead=bool(rows.PRODUCT.ahead),
    )
    assert rows.PRODUCT.share == NEIGHBOURS_SHARE


@pytest.mark.parametrize("name", ["paper", "kara", "snapkv"])
def test_a_search_knows_whose_queries_vote(name: str):
    every, mean = (search.plan_of(row, 128, 0.5) for row in (name, name + search.MEAN))
    assert dataclasses.replace(every, mean=True) == mean and not every.mean


def test_a_search_can_take_the_scripts_of_a_table():
    tokenizer = SimpleNamespace(encode=lambda text, **_: encode(text))
    found = search.scripts_of_part(tokenizer, "windows", "held_out", 2)
    assert [script.name.split("-")[0] for script in found] == ["text", "recall"] * 2
    assert {len(script.probes) for script in found[1::2]} == {8}
    layout = Layout(1024, 1, facts=8)
    assert found[3] == tasks.recall_script(encode, texts.load("held_out", 2)[1], layout, seed=1)


def test_a_replay_keeps_what_the_recorder_keeps():
    """The same queries through the ring and out of a replay's layer; 3 query heads, 2 KV heads."""
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(6, 40, 16, generator=generator)
    layer = Layer(queries[:2], queries[:2], queries)
    for mean in (False, True):
        plan = Plan(None, 16, 8, 4, mean=mean)
        got = Replay._recorded(layer, plan, 10, 2)
        ring = record.Ring.zeros((1, 3 * record.PAGE + 1, 2, 16), torch.float32)
        pages = torch.tensor([[[0, -1, -1] if mean else [0, 1, 2]]], dtype=torch.int32)
        for position in range(10, 30):
            step = record.Step(torch.tensor([position]), torch.tensor([0]), pages)
            record.record(ring, step, [queries[None, :, position]])
        kept = [(page,) for page in pages.flatten().tolist() if page >= 0]
        assert torch.equal(got, record.recorded(ring[0], 10, 20, kept))


def test_what_variants_change():
    generator = torch.Generator().manual_seed(1)
    queries = torch.randn(80, 2, 3, 16, generator=generator)
    keys, values = (torch.randn(64, 2, 16, generator=generator) for _ in range(2))

    def score(**changes) -> torch.Tensor:
        selector = VariantSelector(variant=Variant(**changes))
        return selector.score(queries, keys, values, scale=0.25, seed=0)

    plain = score()
    layer = score(layer=1)
    assert torch.equal(layer[0], layer[1]) and not torch.equal(plain[0], plain[1])
    assert (score(newest=8)[:, -8:] == math.inf).all() and (score(newest=8)[:, :-8] < math.inf).all()
    own = score(power=1, value=0, apart=10**6)  # nobody is far enough to vote
    assert (own == 0).all()
    torch.testing.assert_close(score(later=0), _without_later(queries, keys, values))
    pooled = score(pool=3)
    torch.testing.assert_close(pooled[:, 5], plain[:, 4:7].mean(-1))
    torch.testing.assert_close(score(votes=0.5, value=0), score(value=0) ** 0.5)
    torch.testing.assert_close(score(key=-2), plain / keys.square().sum(-1).T)
    torch.testing.assert_close(score(unlike=2), plain * key_distances(values) ** 2)
    late, queries[:48] = score(since=48), 0.0
    torch.testing.assert_close(score(since=48), late)
    assert not torch.equal(score(), plain)


def _without_later(queries, keys, values) -> torch.Tensor:
    return VariantSelector(variant=Variant()).score(queries[:64], keys, values, scale=0.25, seed=0)


@pytest.mark.parametrize("part", [*rows.quick(), *rows.full()], ids=lambda part: part.name)
def test_rows_can_be_served(part: Part):
    keys = [row.key for row in part.rows]
    assert len(set(keys)) == len(keys)
    assert part.rows[0].name == REFERENCE_ROW
    variants_used = [row.selector for row in part.rows if str(row.selector).startswith("kara:")]
    assert all(Variant.parse(name) for name in variants_used)
    for row in part.rows:
        config = KaraConfig.from_settings(row.settings)
        config.check_page_size(16)
        assert row.delay <= SETTLE
        assert part.text.window % config.window == 0 and PROMPT % 16 == 0
    for split in texts.SPLITS:
        assert texts.load(split, part.texts)


def test_the_quick_rows_are_what_the_readme_promises():
    (part,) = rows.quick()
    assert {(row.name, row.retain) for row in part.rows} == {(REFERENCE_ROW, 1.0)} | {
        (name, retain)
        for name in ("paper", "kara", "keys", "random", "recent", "snapkv")
        for retain in (0.5, 0.25)
    }


def test_the_servers_are_few_and_the_reference_is_first():
    (part,) = rows.quick()
    found = campaign.servers(part.rows)
    assert [len(members) for members in found] == [11, 2]
    assert found[0][0].name == REFERENCE_ROW
    assert {row.name for row in found[1]} == {"paper"}


@pytest.fixture
def small_part() -> tuple[Part, list[Script]]:
    rows_ = [
        Row(REFERENCE_ROW, "selectors", None, 1.0, {"window": 64}),
        *(Row(name, "selectors", name, 0.5, {"window": 64}) for name in ("kara", *report.BASELINES)),
        Row("paper", "selectors", "kara", 0.5, {"window": 64, "preset": "paper"}),
    ]
    layout = Layout(64, 1, tail=4)
    scripts = []
    for name in "ab":
        scripts.append(Script(f"t{name}", name, [1] * 32, [5] * 132, [Probe("text", 128, 132, True)]))
        facts = [Probe("pair", 130, 131, offset=0.5, back=b) for b in (1, 0)]
        scripts.append(Script(f"r{name}", name, [1] * 32, [5] * 132, facts))
    return Part("small", rows_, layout, layout, None), scripts


def fill(folder: Path, part: Part, scripts: list[Script], kl: dict[str, float]) -> None:
    for row in part.rows:
        for number, script in enumerate(scripts):
            n, m = len(script.measured()), len(script.compared())
            reference = row.name == REFERENCE_ROW
            values = [] if reference else [kl[row.name] * (1 + number)] * m
            worse = 0.0 if reference else kl[row.name]
            cell = Cell([-1.0 - worse] * n, [reference or worse < 0.1] * n, [100] * n, values)
            cell.save(folder, row.key, script.name)


def test_orders_hold_what_is_missing(small_part, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    part, scripts = small_part
    monkeypatch.setattr(campaign, "query_memory", lambda *_: 1.0)
    stages = campaign.orders(part.rows, scripts, tmp_path, "model", 2)
    assert [len(stage) for stage in stages] == [2, 2]
    assert sum(len(order.requests) for stage in stages for order in stage) == 6 * 4
    kara = next(r for r in stages[0][0].requests if r[0] == "kara@0.5")
    assert kara[2:] == ({"selector": "kara", "retain": 0.5}, 1)
    paper = stages[1][0].requests[0]
    assert stages[1][0].settings["preset"] == "paper" and paper[3] == 2
    fill(tmp_path, part, scripts, dict.fromkeys((r.name for r in part.rows), 0.2))
    # The full cache's cells lack their references, so only those of the text scripts are missing.
    (stage,) = campaign.orders(part.rows, scripts, tmp_path, "model", 2)
    assert sorted(r[:2] for order in stage for r in order.requests) == [("full", "ta"), ("full", "tb")]
    for script in scripts:
        path = reference_path(tmp_path, script.name)
        path.parent.mkdir(exist_ok=True)
        path.touch()
    assert campaign.orders(part.rows, scripts, tmp_path, "model", 2) == []


def test_a_run_folder_of_other_defaults_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    identity = {"model": "m"} | quality_main._defaults()
    quality_main._same_run(tmp_path, identity)
    quality_main._same_run(tmp_path, identity)
    monkeypatch.setitem(quality_main.PRESETS, "default", {"ahead": False})
    with pytest.raises(EngineFailed, match="holds another run"):
        quality_main._same_run(tmp_path, {"model": "m"} | quality_main._defaults())


# -- figures and tables ----------------------------------------------------------------------------


def test_means_have_standard_errors():
    assert estimates.mean([1.0, 2.0, 3.0, 6.0]) == pytest.approx((3.0, math.sqrt(14 / 3 / 4)))
    assert math.isnan(estimates.mean([1.0]).error) and estimates.known(math.nan) is None
    with pytest.raises(ValueError):
        estimates.mean([])


def test_a_ratio_is_exact_for_proportional_pairs_and_uncertain_for_others():
    assert estimates.ratio([1.0, 2.0, 4.0], [2.0, 4.0, 8.0]) == pytest.approx((0.5, 0.0))
    rng = np.random.default_rng(0)
    spread = []
    for _ in range(400):
        b = rng.uniform(1, 2, 40)
        a = b * rng.uniform(0.4, 0.8, 40)
        spread.append(estimates.ratio(a.tolist(), b.tolist()))
    observed = np.std([e.value for e in spread])
    assert np.mean([e.error for e in spread]) == pytest.approx(observed, rel=0.1)


def test_wilsons_interval():
    assert estimates.share_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    low, high = estimates.share_interval(0, 20)
    assert low == 0 and high == pytest.approx(0.1611, abs=1e-4)
    assert estimates.share_interval(20, 20)[1] == 1
    with pytest.raises(ValueError):
        estimates.share_interval(0, 0)


def test_ranks_share_ties():
    assert estimates.ranks({"a": 0.2, "b": 0.1, "c": 0.2}) == {"a": 2.5, "b": 1.0, "c": 2.5}


def test_figures_come_from_the_cells(small_part, tmp_path: Path):
    part, scripts = small_part
    kl = {"full": 0, "kara": 0.05, "paper": 0.1, "random": 0.4, "recent": 0.3, "snapkv": 0.2}
    fill(tmp_path, part, scripts, kl)
    records = {r["row"]: r for r in report.figures(part, scripts, tmp_path)}
    kara = records["kara"]
    # Text scripts are the first and the third: their KL is 1 and 3 times the row's.
    assert kara["kl_text"] == pytest.approx(0.1) and kara["kl_text_se"] == pytest.approx(0.05)
    assert kara["recall"] == 1.0 and records["paper"]["recall"] == 0.0
    assert kara["recall_back_1"] == 1.0
    assert kara["recall_by_kind"] == {"pair": [4, 4]}
    assert records["paper"]["recall_by_kind"] == {"pair": [0, 4]}
    places = {f"{p.back}/{p.offset:g}" for s in scripts for p in s.probes if p.offset is not None}
    assert len(places) > 1 and set(kara["recall_by_place"]) == places
    assert sum(asked for _, asked in kara["recall_by_place"].values()) == 4
    assert all(right == asked for right, asked in kara["recall_by_place"].values())
    assert all(right == 0 for right, _ in records["paper"]["recall_by_place"].values())
    assert "| paper | 0.5 | 0 of 4 |" in report.kinds_table(list(records.values()), "small", "0.5")
    assert records["paper"]["recall_below_full"] == 1.0
    assert kara["perplexity"] == pytest.approx(math.exp(1.05))
    assert kara["nll_over_full"] == pytest.approx(0.05)
    assert records["full"]["kl_text"] == 0
    goals = report.goals(part, scripts, tmp_path)
    assert goals["0.5"]["kl_text_over_paper"] == pytest.approx(0.5)
    assert goals["0.5"]["recall_over_paper"] == 1.0
    # Only the fact before the newest window counts.
    assert goals["0.5"]["recall_below_full_by_offset"] == {"0.5": (0.0, 0.0)}
    kl["kara"] = 0.2
    fill(tmp_path, part, scripts, kl)
    lost = report.goals(part, scripts, tmp_path)["0.5"]["recall_below_full_by_offset"]
    assert lost == {"0.5": (1.0, 0.0)}
    assert "| 0.5 | 1.000 ± 0.000 |" in report.goal_table(report.goals(part, scripts, tmp_path))
    assert goals["mean_rank"] == {"kara": 1, "paper": 2, "snapkv": 3, "recent": 4, "random": 5}


def test_tables_are_put_between_their_marks(small_part, tmp_path: Path):
    part, scripts = small_part
    fill(tmp_path, part, scripts, dict.fromkeys((r.name for r in part.rows), 0.2))
    result = {
        "results": report.figures(part, scripts, tmp_path),
        "goals": report.goals(part, scripts, tmp_path),
    }
    (tmp_path / "here.json").write_text(json.dumps(result))
    mark = "<!-- quality:{0} -->\nold\n<!-- end of quality -->\n"

    def put(document: str) -> str:
        return report.put_into(document, tmp_path)

    document = "above\n" + mark.format("here small/selectors") + "between\n" + mark.format("gone x/y")
    new = put(document)
    assert "old" not in new.split("between")[0] and "old" in new.split("between")[1]
    assert new.startswith("above\n") and "| kara | 0.5 | 0.4000 ± 0.2000 |" in new
    assert put(new) == new
    one = put(mark.format("here small/selectors@0.5"))
    assert "| full | 1 |" in one and "| kara | 0.5 |" in one
    assert "| selector | mean rank |" in put(mark.format("here small/goals"))
    assert "| kara |" not in put(mark.format("here small/selectors@0.25"))
    for unknown in ("other/goals", "other/selectors", "small/ablations"):
        with pytest.raises(ValueError, match=f"here.json has no {unknown}"):
            put(mark.format(f"here {unknown}"))


def test_a_run_can_be_of_some_rows_only():
    def keys(*arguments) -> list[list[str]]:
        return [[row.key for row in part.rows] for part in rows.only(*arguments)]

    assert keys(rows.quick(), ["kara", "paper"], [0.5]) == [["full", "kara@0.5", "paper@0.5"]]
    everything = [[row.key for row in part.rows] for part in rows.full()]
    assert keys(rows.full(), None, None) == everything
    assert keys(rows.full(), ["kara"], [0.2]) == [["full", "kara@0.2"]]
    assert keys(rows.full(), ["window 512"], None) == [["full", "window-512@0.5", "window-512@0.25"]]
    with pytest.raises(ValueError, match="--rows kvllm: there is full, kara, keys, random, recent"):
        rows.only(rows.quick(), ["kara", "kvllm"], None)
    with pytest.raises(ValueError, match=r"--shares 0.4: there is 1.0, 0.5, 0.25"):
        rows.only(rows.quick(), None, [0.4])


def test_the_documents_tables_are_the_committed_results():
    """Rendered by ``search --into`` and ``report --into``; a figure edited by hand is found here."""
    root = ROOT
    document, readme = ((root / name).read_text() for name in ("docs/quality.md", "README.md"))
    results = root / "benchmarks" / "results" / "quality"
    searches = (results / "README.md").read_text()
    assert "<!-- search:search-5 -->\n| row |" in searches
    assert search.put_into(searches, results) == searches
    assert "<!-- search:held-out-keys-128 -->\n| row |" in document
    assert "<!-- search:search-12" in searches
    assert search.put_into(document, results) == document
    windows = json.loads((results / "windows.json").read_text())["results"]
    places = {r["row"]: r["recall_by_place"] for r in windows if r["retain"] in (0.5, 1)}
    assert places["full"] == places["window 512"] == places["window 1024"]  # as docs/quality.md says
    for name in ("quick", "coder", "full", "half", "windows", "ring"):
        result = json.loads((results / f"{name}.json").read_text())
        assert (results / f"{name}.md").read_text() == report.markdown(result)
    for text, shown in ((document, "quick quick/selectors"), (readme, "gsm8k-h100 @0.5")):
        assert f"<!-- quality:{shown} -->\n| row |" in text
        assert report.put_into(text) == text


# -- reasoning -------------------------------------------------------------------------------------


def test_problems_are_read_in_the_forms_of_gsm8k_and_math(tmp_path: Path):
    (first, *rest) = reasoning.load(texts.DATA / "gsm8k.jsonl", 3)
    assert first.question.startswith("Janet") and first.answer == "18" and len(rest) == 2
    path = tmp_path / "math.jsonl"
    path.write_text(
        json.dumps({"problem": "p", "answer": "\\frac{1}{2}"})
        + "\n"
        + json.dumps({"Question": "q", "Answer": "#### 1,234"})
        + "\n"
    )
    assert [p.answer for p in reasoning.load(path, None)] == ["\\frac{1}{2}", "1234"]
    path.write_text('{"text": "?"}\n')
    with pytest.raises(reasoning.Failed, match="line 1: no question"):
        reasoning.load(path, None)


def test_answers_are_graded_by_value():
    pytest.importorskip("math_verify", reason="pip install 'math-verify[antlr4_13_2]'")
    right = reasoning.grader()
    assert right("18", "So she makes 9 * 2 = \\boxed{18} dollars.")
    assert right("18", "The final answer is \\boxed{18.0}")
    assert not right("18", "9 * 2 = 18, minus 1 is \\boxed{17}")
    assert right("\\frac{1}{2}", "which is \\boxed{0.5}")
    assert right("1234", "\\boxed{1,234}")
    assert not right("18", "I do not know.")


def _answer(right: bool, tokens: int, windows: int, cut: bool = False) -> dict:
    kv_compress = {"windows": windows} if windows else None
    return {"right": right, "tokens": tokens, "cut": cut, "kv_compress": kv_compress}


def test_accuracy_is_paired_over_the_problems(tmp_path: Path):
    asked = reasoning.rows_of(["full", "random", "kara"], [0.25])
    assert [row.key for row in asked] == ["full", "random@0.25", "kara@0.25"]
    answers = {
        "full": {n: _answer(n < 6, 100, 0) for n in range(8)},
        "random@0.25": {n: _answer(n < 2, 100, 1) for n in range(8)},
        "kara@0.25": {n: _answer(n < 5, 150, n % 2, cut=n == 7) for n in range(8)},
    }
    full, random, kara = found = reasoning.figures(answers, asked, window=64)
    assert (full["accuracy"], full["retain"]) == (0.75, 1.0)
    assert full["over_full"] == [0, 0, 0] and full["over_random"] is None
    value, low, high = kara["over_full"]
    assert value == pytest.approx(-0.125) and low == pytest.approx(-0.375) and high == 0
    assert kara["over_random"][0] == pytest.approx(0.375) and kara["over_random"][1] > 0
    assert random["over_random"] is None
    assert kara["longer_than_full"] == pytest.approx([0.5, 0.5, 0.5])
    assert kara["accuracy_low"] < kara["accuracy"] < kara["accuracy_high"]
    assert (kara["output_tokens"], kara["truncated"], kara["windows"]) == (150, 0.125, 0.5)
    assert kara["requests_compressed"] == 0.5
    assert kara["tokens_compressed"] == pytest.approx(4 * 64 / 1200)
    assert kara["graded"] == "11111000"
    assert "| kara | 0.25 | 62.5 (" in reasoning.table(found)
    (tmp_path / "some.json").write_text(json.dumps({"results": found}))
    document = report.put_into("<!-- quality:some -->\n<!-- end of quality -->", tmp_path)
    assert document == f"<!-- quality:some -->\n{reasoning.table(found)}<!-- end of quality -->"


def test_the_bootstrap_is_paired_and_covers_the_mean():
    """Equal answers in the same places differ by nothing, whatever is drawn; a known share has the
    binomial's interval."""
    ours = np.array([1.0, 0.0] * 200)
    assert reasoning.difference(ours, ours) == [0, 0, 0]
    value, low, high = reasoning.difference(ours, np.zeros(400))
    assert (
        value == 0.5 and low == pytest.approx(0.45, abs=0.01) and high == pytest.approx(0.55, abs=0.01)
    )


def test_rows_have_their_servers_and_options():
    made = {
        row.key: row for row in reasoning.rows_of(["full", "again", "recent", "paper"], [0.5, 0.25])
    }
    assert list(made) == ["full", "again", "recent@0.5", "paper@0.5", "recent@0.25", "paper@0.25"]
    assert made["again"].options is False
    assert made["recent@0.25"].options == {"selector": "recent", "retain": 0.25}
    assert made["paper@0.5"].options == {"selector": "kara", "retain": 0.5}
    assert made["paper@0.5"].settings == {"preset": "paper"} and made["recent@0.5"].settings == {}


class _Asked:
    """Stands in for a server: remembers how it was started and what it was asked."""

    def __init__(self) -> None:
        self.settings: list[dict] = []
        self.stopped = 0

    def serve(self, _options, own: dict, _log) -> _Asked:
        self.settings.append(own)
        self.url = "http://nowhere"
        return self

    def stop(self) -> None:
        self.stopped += 1


def test_answers_are_collected_once_and_graded_later(tmp_path: Path, monkeypatch):
    pytest.importorskip("math_verify", reason="pip install 'math-verify[antlr4_13_2]'")
    asked: list[tuple[int, str]] = []

    def ask(_url, problem, row, _options):
        asked.append((problem.number, row.key))
        text = "\\boxed{18}" if row.key != "paper@0.5" else "\\boxed{17}"
        return {"text": text, "tokens": 10, "cut": False, "seconds": 1.0, "kv_compress": None}

    servers = _Asked()
    monkeypatch.setattr(reasoning, "serve", servers.serve)
    monkeypatch.setattr(reasoning, "ask", ask)
    monkeypatch.setattr(reasoning, "fastest", lambda *_: Pace("bfloat16", 2, {"bfloat16/2": 1.0}))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"hidden_size": 8, "intermediate_size": 16}')
    data = tmp_path / "problems.jsonl"
    data.write_text('{"question": "q", "answer": "#### 18"}\n' * 3)
    arguments = [
        *("--out", str(tmp_path / "out.json"), "--data", str(data)),
        *("--rows", "full", "random", "paper", "--model", str(model)),
    ]
    assert reasoning.main([*arguments, "--collect"]) == 0
    assert not (tmp_path / "out.json").exists()
    assert servers.settings == [{}, {"preset": "paper"}] and servers.stopped == 2
    assert len(asked) == len(set(asked)) == 9
    assert reasoning.main(arguments) == 0
    assert len(asked) == 9, "what is there is not asked again"
    result = json.loads((tmp_path / "out.json").read_text())
    assert [r["accuracy"] for r in result["results"]] == [1, 1, 0]
    assert "--collect" not in result["meta"]["command"]
    answered = json.loads((tmp_path / "out.run" / "answered.json").read_text())
    assert answered.items() <= result["meta"].items()
    assert (answered["dtype"], answered["threads"]) == ("bfloat16", "2")


def test_the_pace_is_what_was_measured_fastest(monkeypatch):
    took = {(torch.float32, 1): 4.0, (torch.bfloat16, 1): 3.0, (torch.float32, 2): 2.0}
    before = torch.get_num_threads()

    def time(hidden, inner, batch, dtype):
        assert (hidden, inner, batch) == (8, 16, 32)
        return took.get((dtype, torch.get_num_threads()), 5.0)

    monkeypatch.setattr(pace, "_time", time)
    monkeypatch.setattr(pace.os, "sched_getaffinity", lambda _: {0, 1})
    found = pace.fastest(8, 16, 32)
    assert (found.dtype, found.threads) == ("float32", 2)
    assert found.milliseconds["bfloat16/1"] == 3000.0 and len(found.milliseconds) == 4
    assert torch.get_num_threads() == before


# -- regimes ---------------------------------------------------------------------------------------


def test_facts_of_the_regimes_are_stated_once_and_asked_for_once():
    script = regimes.script_of(encode, 3, window=256, windows=4, facts=5)
    text = decode(script.forced)
    kinds = Counter(probe.kind for probe in script.probes)
    assert set(kinds) == {regimes.RESTATED, *regimes.ONCE}
    first = -len(script.prompt) % 16
    for probe in script.probes:
        answer = text[probe.start : probe.stop].strip()
        start = text.rfind("\n", 0, probe.start) + 1
        line, before = text[start : probe.start], text[:start]
        assert first + 4 * 256 <= probe.start, "asked for before all windows are full"
        if probe.kind == regimes.RESTATED:
            assert probe.back is None and answer.isdigit()
            continue
        if line.endswith(", which is"):  # of a chain's second half, or of a step
            item = line.removesuffix(", which is").split("price of ")[-1]
            stated = f"The price of {item} is "
        else:
            stated = line.replace("Recall: the", "The") + " "
        assert before.count(stated) == 1 and before.split(stated)[1].startswith(answer + ".")
        assert probe.back == (probe.start - before.index(stated)) // 256
        if probe.kind in ("name", "copy", "use"):
            item = stated.split()[3]
            assert len(re.findall(rf"\b{item}\b", before)) == 1


def test_the_running_total_is_right():
    text = decode(regimes.script_of(encode, 0, window=256, windows=3, facts=5).forced)
    prices = dict(re.findall(r"The price of (\w+) is (\d+)\.", text))
    pattern = r"Step \d+: (add|take away) (the price of \w+, which is )?(\d+)\. The total is (\d+)\."
    steps = re.findall(pattern, text)
    assert len(steps) == text.count("Step ") > 20
    total = None
    for verb, what, price, said in steps:
        if what:
            assert prices[what.split()[3].strip(",")] == price
        if total is not None:
            total += int(price) if verb == "add" else -int(price)
            assert int(said) == total and 100 <= total < 1000
        total = int(said)


def test_shares_of_the_regimes_are_paired_over_scripts(tmp_path: Path):
    """Every answer of the full cache is right; another row loses what was stated once, except one
    script's; the null row loses all of it."""
    scripts = [regimes.script_of(encode, n, window=256, windows=3, facts=5) for n in range(3)]
    compared = [rows.reference(256), *rows.selectors(["kara", "random"], 256, [0.5])]
    for row in compared:
        for number, script in enumerate(scripts):
            top = []
            for step in script.measured():
                (probe,) = (p for p in script.probes if p.start <= step < p.stop)
                lost = row.name == "random" or (row.name == "kara" and number)
                top.append(probe.back is None or not lost)
            none = [0.0] * len(top)
            Cell(none, top, [0] * len(top), []).save(tmp_path, row.key, script.name)
    full, kara, random = regimes.figures(scripts, tmp_path, compared)
    assert [r["restated"]["share"][0] for r in (full, kara, random)] == [1, 1, 1]
    asked = sum(p.back is not None for p in scripts[0].probes)
    share = asked / full["once"]["asked"]
    assert kara["once"]["share"][0] == pytest.approx(share)
    assert kara["once"]["over_full"] == pytest.approx([share - 1, -1, 0])
    assert kara["once"]["over_random"] == pytest.approx([share, 0, 1])
    assert full["once"]["over_random"] is None
    total = sum(found["asked"] for found in full["by_back"].values())
    assert total == full["once"]["asked"] == sum(full[kind]["asked"] for kind in regimes.ONCE)
    assert "| kara | 0.5 | 100.0 |" in regimes.table([full, kara, random])


@pytest.mark.parametrize(
    ("gguf", "name"),
    [
        ("blk.3.attn_q.bias", "model.layers.3.self_attn.q_proj.bias"),
        ("blk.0.ffn_down.weight", "model.layers.0.mlp.down_proj.weight"),
        ("output.weight", "lm_head.weight"),
    ],
)
def test_names_of_the_coder_models_tensors(gguf: str, name: str):
    assert transformers_name(gguf) == name
    with pytest.raises(ValueError, match="unknown tensor"):
        transformers_name("blk.0.attn_x.weight")
