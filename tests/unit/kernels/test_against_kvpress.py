"""The plain score against an implementation that is not ours: kvpress's non-causal press (NVIDIA).

Its ``NonCausalAttnPress`` (kvpress 0.5.5) comes from Compactor, arXiv 2507.08143, and sums non-causal
attention inside chunks: with one chunk per window this is the paper's section 4.1. Given the same
queries and keys, both must give the same scores. The pooling and normalisation that follow are its own.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType

import pytest
import torch

from kara_sglang.kernels.score import AttentionRule, attention_scores


@pytest.fixture
def press(monkeypatch: pytest.MonkeyPatch) -> type:
    spec = importlib.util.find_spec("kvpress")
    if spec is None:
        pytest.skip("kvpress is not installed: pip install --no-deps kvpress==0.5.5 (make test does)")
    # Not by way of kvpress/__init__.py: that replaces transformers' attention for the whole process,
    # and imports packages that none of this needs. What is run is kvpress's own unchanged file.
    package = ModuleType("kvpress")
    package.__path__ = list(spec.submodule_search_locations)
    presses = ModuleType("kvpress.presses")
    presses.__path__ = [f"{path}/presses" for path in package.__path__]
    for module in (package, presses):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    before = set(sys.modules)
    yield importlib.import_module("kvpress.presses.non_causal_attention_press").NonCausalAttnPress
    for name in set(sys.modules) - before:
        if name.startswith("kvpress."):
            del sys.modules[name]


@pytest.mark.parametrize(
    ("windows", "width", "heads", "group", "dim"),
    [(1, 64, 2, 4, 32), (3, 48, 3, 3, 64), (2, 128, 1, 1, 16)],
)
def test_the_plain_score_is_kvpress_s(press, windows, width, heads, group, dim) -> None:
    generator = torch.Generator().manual_seed(width)
    length = windows * width
    queries = 3 * torch.randn(length, heads, group, dim, generator=generator)
    keys = torch.randn(length, heads, dim, generator=generator)
    values = torch.randn(length, heads, dim, generator=generator)
    scale = dim**-0.5

    # It leaves the softmax scale to its caller, and takes one key head per query head.
    theirs = press.non_causal_chunked_attn(
        queries.flatten(1, 2).transpose(0, 1)[None] * scale,
        keys.repeat_interleave(group, dim=1).transpose(0, 1)[None],
        width,
    )
    theirs = theirs.view(heads, group, windows, width).sum(dim=1)

    for window in range(windows):
        inside = slice(window * width, (window + 1) * width)
        ours = attention_scores(
            queries[inside], keys[inside], values[inside], scale=scale, rule=AttentionRule()
        )
        torch.testing.assert_close(ours, theirs[:, window], rtol=1e-4, atol=1e-5)
