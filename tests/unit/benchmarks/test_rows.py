"""Variants and rows of the quality benchmark, and how they are run."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from gemma_model import make_tiny_gemma
from quality import encode, fill
from transformers import AutoModelForCausalLM

from kara_sglang.benchmarks.quality import campaign, rows, tasks, texts
from kara_sglang.benchmarks.quality.engine import EngineFailed
from kara_sglang.benchmarks.quality.instrument import REFERENCE_ROW
from kara_sglang.benchmarks.quality.rows import Part
from kara_sglang.benchmarks.quality.script import (
    Probe,
    Script,
    reference_path,
)
from kara_sglang.benchmarks.quality.tasks import PROMPT, SETTLE, Layout
from kara_sglang.benchmarks.quality.variants import Variant, VariantSelector
from kara_sglang.benchmarks.research import search
from kara_sglang.benchmarks.research import tables as replayed
from kara_sglang.benchmarks.research.replay import Layer, Plan, Replay
from kara_sglang.benchmarks.serving.setup import resolve_model
from kara_sglang.config import KaraConfig
from kara_sglang.kernels import record, selectors
from kara_sglang.kernels.score import NEIGHBOURS_SHARE, AttentionRule, key_distances


def test_variants_have_names_that_can_be_read_back():
    for variant in (Variant(), Variant(power=1, chunks=0), Variant(near=5, newest=16, later=0.5)):
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


def test_the_tables_can_be_made_by_replay(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Two rows of ``--quick`` on the embedded model: they lose little, and ``paper`` more."""
    out = tmp_path / "tables.json"
    arguments = ["--quick", "--rows", "kara", "paper", "--shares", "0.5", "--texts", "1"]
    arguments += ["--out", str(out)]
    assert replayed.main(arguments) == 0
    full, kara, paper = json.loads(out.read_text())["results"]
    assert [row["row"] for row in (full, kara, paper)] == ["full", "kara", "paper"]
    assert (full["slots"], kara["slots"], paper["slots"]) == (287.5, 224, 192)
    assert 0.001 < kara["kl_text"] < paper["kl_text"] < 0.1
    assert full["recall_logprob"] > kara["recall_logprob"] > paper["recall_logprob"] > -4
    assert "by replay in float32 with transformers" in out.with_suffix(".md").read_text()
    assert replayed.main([*arguments, "--dtype", "bfloat16"]) == 1
    assert "holds another run (other dtype)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("part", "says"),
    [("kv", "row 'bf16' needs an engine: kv_cache_dtype"), ("ring", "no queries in fp4")],
)
def test_what_only_an_engine_can_do_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], part: str, says: str
):
    model = resolve_model("tiny", tmp_path)
    arguments = ["--part", part, "--model", model, "--texts", "1", "--out", str(tmp_path / "o.json")]
    assert replayed.main(arguments) == 1
    assert says in capsys.readouterr().err


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


def test_a_replay_sees_through_sliding_windows(tmp_path: Path):
    """A random Gemma, whose windows are shorter than the script: the full cache is transformers', and
    so is a row that keeps every token, block by block."""
    folder = make_tiny_gemma(tmp_path)
    replay = Replay(str(folder))
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(3, 500, (300,), generator=generator).tolist()
    script = Script("s", "s", tokens[:40], tokens[40:], [Probe("text", 200, 260, True)])
    full = replay.full(script)
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        logprobs = plain(torch.tensor([tokens])).logits[0].log_softmax(-1)
    said = [logprobs[239 + i, tokens[240 + i]].item() for i in range(60)]
    assert full.logprob == pytest.approx(said, abs=1e-4)
    settings = {"window": 64, "delay": 48, "query_dtype": "model"}
    assert plain.config.sliding_window <= 48

    def kl(selector: str, retain: float) -> float:
        plan = Plan.of(selector, KaraConfig.from_settings(settings | {"retain": retain}))
        return max(replay.run(script, plan).kl)

    assert kl("identity", 1.0) < 1e-5 < 1e-3 < kl("recent", 0.25)
    settings["delay"] = 32
    with pytest.raises(EngineFailed, match="give --delay 40, this model's window, or more"):
        kl("recent", 0.25)


def test_what_variants_change():
    generator = torch.Generator().manual_seed(1)
    queries = torch.randn(80, 2, 3, 16, generator=generator)
    keys, values = (torch.randn(64, 2, 16, generator=generator) for _ in range(2))

    def score(**changes) -> torch.Tensor:
        selector = VariantSelector(variant=Variant(**changes))
        return selector.score(queries, keys, values, scale=0.25, seed=0)

    plain = score()
    assert (score(newest=8)[:, -8:] == math.inf).all() and (score(newest=8)[:, :-8] < math.inf).all()
    torch.testing.assert_close(score(later=0), _without_later(queries, keys, values))
    torch.testing.assert_close(score(votes=0.5, value=0), score(value=0) ** 0.5)
    torch.testing.assert_close(score(novel=2), plain * key_distances(keys) ** 2)
    geometric = plain[:, 4:7].log().mean(-1).exp()
    torch.testing.assert_close(score(near=3, share=1.0)[:, 5], geometric)


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


def test_rows_with_the_delay_of_a_sliding_window():
    """Scripts wait for the last window of all of them."""
    [part] = rows.delayed(rows.quick(), 512)
    assert {row.delay for row in part.rows} == {512}
    assert [row.key for row in part.rows] == [row.key for row in rows.quick()[0].rows]
    assert part.text.span == 128 + 512 and part.recall.span == 2 * 128 + 512
    [part] = rows.delayed(rows.quick(), 16)
    assert part.text.span == 128 + SETTLE


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


def test_each_type_of_the_kv_cache_has_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of its own, whose rows are measured against the reference in the model's dtype."""
    monkeypatch.setattr(campaign, "query_memory", lambda *_: 1.0)
    part = next(part for part in rows.full() if part.name == "kv")
    script = Script("a", "a", [3] * 64, [3] * 192, [], 1)
    stages = campaign.orders(part.rows, [script], tmp_path, "model", 1)
    stored = [order.engine.get("kv_cache_dtype", "auto") for (order,) in stages]
    assert stored == ["auto", "bf16", "fp8_e4m3", "fp8_e5m2"]
    for (order,), dtype in zip(stages, stored, strict=True):
        keys = [name for name, *_ in order.requests]
        assert keys == (
            ["full", "kara@0.5", "keys@0.5"]
            if dtype == "auto"
            else [f"{dtype}@1", f"kara,-{dtype}@0.5", f"keys,-{dtype}@0.5"]
        )


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
    identity = {"model": "m"} | rows.defaults()
    campaign.same_run(tmp_path, identity)
    campaign.same_run(tmp_path, identity)
    monkeypatch.setitem(rows.PRESETS, "default", {"ahead": False})
    with pytest.raises(EngineFailed, match="holds another run"):
        campaign.same_run(tmp_path, {"model": "m"} | rows.defaults())


@pytest.mark.parametrize("first", [{}, {"by": "replay"}])
def test_cells_of_engines_and_of_replays_do_not_mix(tmp_path: Path, first: dict[str, str]):
    campaign.same_run(tmp_path, {"model": "m"} | first)
    with pytest.raises(EngineFailed, match="other by"):
        campaign.same_run(tmp_path, {"model": "m"} | ({} if first else {"by": "replay"}))
