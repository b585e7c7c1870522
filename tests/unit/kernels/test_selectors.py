"""One matrix that every selector of the registry passes."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from kara_sglang.config import SELECTORS, KaraConfig
from kara_sglang.kernels.score import AttentionRule, WeightRule
from kara_sglang.kernels.select import ChunkRule, select
from kara_sglang.kernels.selectors import REGISTRY, Selector, build

SHAPES = [  # window, delay, KV heads, heads per group, head_dim
    (1, 0, 1, 1, 1),
    (16, 0, 2, 1, 8),
    (16, 5, 3, 4, 8),
    (37, 64, 1, 12, 16),
    (128, 16, 4, 2, 32),
]

every_selector = pytest.mark.parametrize("name", REGISTRY)
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def inputs(shape: tuple[int, ...], seed: int = 0) -> tuple[torch.Tensor, ...]:
    window, delay, kv_heads, group, dim = shape
    generator = torch.Generator().manual_seed(seed)

    def randn(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator)

    return (
        randn(window + delay, kv_heads, group, dim),
        randn(window, kv_heads, dim),
        randn(window, kv_heads, dim),
    )


def scored(selector: Selector, tensors: tuple[torch.Tensor, ...], seed: int = 7) -> torch.Tensor:
    """The score, with queries only where the selector asked for them."""
    queries, keys, values = tensors
    return selector.score(
        queries if selector.needs_queries else None, keys, values, scale=0.25, seed=seed
    )


def test_the_registry_is_what_the_flag_offers() -> None:
    """Names and their order in --help; those that need recorded queries get memory for them."""
    assert tuple(REGISTRY) == SELECTORS
    for name, kind in REGISTRY.items():
        assert bool(KaraConfig(selector=name).keeps_queries) == kind.needs_queries


@every_selector
@every_shape
def test_shape_dtype_and_determinism(name: str, shape: tuple[int, ...]) -> None:
    """(num_kv_heads, W) in float32, finite, and the same in every run."""
    selector = build(name, KaraConfig(selector=name))
    tensors = inputs(shape)
    copies = [tensor.clone() for tensor in tensors]
    scores = scored(selector, tensors)
    assert scores.shape == (shape[2], shape[0]) and scores.dtype == torch.float32
    assert scores.isfinite().all()
    assert torch.equal(scores, scored(selector, inputs(shape)))
    assert all(torch.equal(*pair) for pair in zip(tensors, copies, strict=True))


@every_selector
@every_shape
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_any_kv_dtype(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Scores stay float32 and finite whatever the pool and the ring hold."""
    selector = build(name, KaraConfig(selector=name))
    scores = scored(selector, tuple(tensor.to(dtype) for tensor in inputs(shape)))
    assert scores.dtype == torch.float32 and scores.isfinite().all()


@every_selector
@every_shape
@pytest.mark.parametrize("retain", [0.01, 0.5, 1.0])
def test_exactly_r_are_kept(name: str, shape: tuple[int, ...], retain: float) -> None:
    """Through ``select`` with the selector's own chunk rule: R strictly ascending positions."""
    selector = build(name, KaraConfig(selector=name, chunk_budget=0.5, chunk_quantile=0.2))
    window = shape[0]
    kept = window if selector.keeps_all else max(1, round(retain * window))
    chosen = select(scored(selector, inputs(shape)), kept, selector.chunks)
    assert chosen.shape == (shape[2], kept)
    assert (chosen.diff(dim=-1) > 0).all() and chosen.min() >= 0 and chosen.max() < window


@every_selector
def test_seeds_matter_for_random_only(name: str) -> None:
    """Other selectors must not depend on the request's seed."""
    selector = build(name, KaraConfig(selector=name))
    tensors = inputs(SHAPES[4])
    same = torch.equal(scored(selector, tensors, seed=1), scored(selector, tensors, seed=2))
    assert same == (name != "random") == (not selector.seeded)
    assert torch.equal(scored(selector, tensors, seed=1), scored(selector, tensors, seed=1))


@every_selector
def test_heads_are_scored_for_themselves(name: str) -> None:
    """A head's score does not change with the other heads of a tensor-parallel rank's keys."""
    selector = build(name, KaraConfig(selector=name))
    queries, keys, values = inputs((16, 4, 3, 2, 8))
    whole = scored(selector, (queries, keys, values))
    keys, values, queries = keys.clone(), values.clone(), queries.clone()
    keys[:, 2], values[:, 2], queries[:, 2] = 5.0, -3.0, 1.0
    torch.testing.assert_close(scored(selector, (queries, keys, values))[:2], whole[:2])


@every_selector
def test_it_is_described(name: str) -> None:
    """A docstring each, and no state that one request could leave for the next."""
    assert REGISTRY[name].__doc__
    selector = build(name, KaraConfig(selector=name))
    assert selector == build(name, KaraConfig(selector=name)) and hash(selector) is not None
    with pytest.raises((AttributeError, TypeError)):
        selector.chunks = ChunkRule()


def test_random_is_uniform_and_differs_by_head() -> None:
    """The null baseline: no position is favoured and no two heads share a choice."""
    selector = build("random", KaraConfig(selector="random"))
    _, keys, values = inputs((64, 0, 4, 1, 4))
    counts = torch.zeros(64)
    for seed in range(400):
        scores = selector.score(None, keys, values, scale=1.0, seed=seed)
        chosen = select(scores, 16, selector.chunks)
        assert len({tuple(head) for head in chosen.tolist()}) == 4
        counts += torch.bincount(chosen.flatten(), minlength=64)
    expected = 400 * 4 * 16 / 64
    assert (counts - expected).abs().max() < 6 * expected**0.5


def test_random_takes_any_seed_that_a_request_may_have() -> None:
    """Request seeds reach 2**32 - 1 (crc32) and grow from window to window and layer to layer."""
    selector = build("random", KaraConfig(selector="random"))
    _, keys, values = inputs(SHAPES[1])
    for seed in (0, 2**31 - 1, 2**32 - 1 + 1_000_003 * 10_000 + 128):
        assert scored(selector, (None, keys, values), seed).isfinite().all()


def test_recent_and_identity_keep_what_they_say() -> None:
    """The newest R; all."""
    _, keys, values = inputs((32, 0, 2, 1, 4))
    for name, kept in (("recent", 8), ("identity", 32)):
        selector = build(name, KaraConfig(selector=name))
        scores = selector.score(None, keys, values, scale=1.0, seed=0)
        chosen = select(scores, kept, selector.chunks)
        assert torch.equal(chosen, torch.arange(32 - kept, 32).expand(2, kept))
    assert [name for name in REGISTRY if REGISTRY[name].keeps_all] == ["identity"]


@pytest.mark.parametrize("votes", [False, True])
@pytest.mark.parametrize("score", ["sum", "sum_v", "l2", "l2_v", "l2_v4", "l2_v4_k"])
def test_settings_reach_the_rules(score: str, votes: bool) -> None:
    """kara and causal differ in the mask alone; snapkv is plain attention without chunks."""
    config = KaraConfig(
        score=score,
        delay_votes=votes,
        ahead=not votes,
        neighbours=3 + 2 * votes,
        chunk_budget=0.3,
        chunk_width=5,
        chunk_quantile=0.6,
        last_queries=9,
    )
    kara, causal, snapkv = (build(name, config) for name in ("kara", "causal", "snapkv"))
    rule = AttentionRule(
        squared="l2" in score,
        value_norm={"sum": 0, "l2": 0, "l2_v4": 4, "l2_v4_k": 4}.get(score, 1),
        key_distance=score.endswith("_k"),
        neighbours=3 + 2 * votes,
        delay_votes=votes,
        ahead=not votes,
    )
    assert (kara.rule, kara.chunks) == (rule, ChunkRule(0.3, 5, 0.6))
    assert causal.rule == dataclasses.replace(rule, causal=True)
    assert causal.chunks == kara.chunks
    assert snapkv.rule == AttentionRule(causal=True, last_queries=9)
    assert snapkv.chunks == ChunkRule()


@pytest.mark.parametrize("settings", [{}, {"preset": "paper"}, {"score": "sum", "chunk_budget": 0.3}])
def test_keys_is_karas_default_score_without_votes(settings: dict[str, Any]) -> None:
    """Its factors are fixed, because ``score`` may name none; no chunks, whatever kara has."""
    config = KaraConfig.from_settings(settings | {"neighbours": 7})
    keys, kara = build("keys", config), build("kara", KaraConfig(neighbours=7))
    assert keys.rule == WeightRule(value_norm=4, key_distance=True, neighbours=7)
    for factor in dataclasses.fields(WeightRule):
        assert getattr(keys.rule, factor.name) == getattr(kara.rule, factor.name)
    assert keys.chunks == ChunkRule() and not keys.needs_queries and not keys.ahead


def test_the_paper_preset_is_the_papers_score() -> None:
    """Plain sum over the queries of the window, Token2Chunk on."""
    config = KaraConfig.from_settings({"preset": "paper"})
    kara = build("kara", config)
    assert (
        kara.rule == AttentionRule(delay_votes=False) and kara.chunks.budget > 0 and config.delay == 0
    )


def test_snapkv_looks_through_the_newest_queries_only() -> None:
    """Older queries have no say; more than there are means all."""
    queries, keys, values = inputs((16, 8, 2, 2, 8))
    few = build("snapkv", KaraConfig(selector="snapkv", last_queries=4))
    changed = queries.clone()
    changed[:20] = 100.0
    assert torch.equal(scored(few, (queries, keys, values)), scored(few, (changed, keys, values)))
    many = build("snapkv", KaraConfig(selector="snapkv", last_queries=10_000))
    everyone = build("snapkv", KaraConfig(selector="snapkv", last_queries=24))
    tensors = (queries, keys, values)
    assert torch.equal(scored(many, tensors), scored(everyone, tensors))


@pytest.mark.parametrize("name", ["kara", "causal", "snapkv", "keys"])
def test_granularity_layer_adds_up_the_heads(name: str) -> None:
    """All heads of a layer get the sum of what each would get alone, so they keep the same tokens."""
    tensors = inputs(SHAPES[-1])
    per_head = scored(build(name, KaraConfig(selector=name)), tensors)
    shared = scored(build(name, KaraConfig(selector=name, granularity="layer")), tensors)
    torch.testing.assert_close(shared[0], per_head.sum(dim=0))
    assert all(torch.equal(row, shared[0]) for row in shared[1:])
    assert not torch.equal(per_head[0], per_head[1])
