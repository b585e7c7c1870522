"""The CPU engine's stand-ins for speculative decoding, each against a plain account of what it must do.

Trees are drawn at random; references walk them node by node, in Python.
"""

from __future__ import annotations

import inspect
import pkgutil
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from cpu_site import load
from hypothesis import given, settings
from hypothesis import strategies as st

kernel = load("sgl_kernel")
trees = kernel.speculative
plugin = load("kara_cpu_speculation")

SEEDS = st.integers(0, 2**32 - 1)
INDEX = pytest.mark.parametrize("dtype", [torch.int32, torch.int64])


# -- slots -------------------------------------------------------------------------------------------


@INDEX
def test_slots_are_read_back_from_the_rows(dtype: torch.dtype) -> None:
    table = torch.arange(100, 160, dtype=torch.int32).view(5, 12)
    out = torch.full((8,), -1)
    rows, starts, ends = (torch.tensor(x, dtype=dtype) for x in ([4, 0, 2], [2, 5, 11], [5, 5, 12]))
    kernel.assign_extend_cache_locs_cpu(rows, table, starts, ends, out, 12)
    assert out.tolist() == [150, 151, 152, 135, -1, -1, -1, -1]


@INDEX
def test_a_draft_writes_behind_the_tokens(dtype: torch.dtype) -> None:
    table = torch.arange(100, 160, dtype=torch.int32).view(5, 12)
    out = torch.full((12,), -1)
    rows, lengths = torch.tensor([3, 1], dtype=dtype), torch.tensor([2, 6], dtype=dtype)
    kernel.assign_draft_cache_locs_contiguous_cpu(rows, table, lengths, out, 12, 2, 3)
    assert out.tolist() == [138, 139, 140, 141, 142, 143, 118, 119, 120, 121, 122, 123]


@INDEX
def test_slots_of_accepted_tokens_come_to_the_front(dtype: torch.dtype) -> None:
    accepted = torch.tensor([[0, 2, -1], [3, -1, -1], [6, 7, 8]], dtype=dtype)
    slots, out = torch.arange(50, 59), torch.zeros(9, dtype=torch.int64)
    kernel.fill_accept_out_cache_loc_cpu(accepted, slots, out)
    assert out.tolist() == [50, 52, 53, 56, 57, 58, 0, 0, 0]


def test_kv_moves_over_itself() -> None:
    """Targets are sources of other tokens, in both orders; buffers have slots of different sizes."""
    buffers = [torch.randn(9, 4, 3), torch.randn(9, 5).to(torch.bfloat16)]
    expected = [buffer.clone() for buffer in buffers]
    target, source = [1, 2, 5, 4, 0], [2, 4, 4, 5, 0]
    for after, before in zip(expected, buffers, strict=True):
        after[target] = before[source]
    kernel.copy_all_layer_kv_cache_cpu(
        torch.tensor([buffer.data_ptr() for buffer in buffers], dtype=torch.int64),
        torch.tensor([buffer[0].numel() * buffer.element_size() for buffer in buffers]),
        torch.tensor(target),
        torch.tensor(source),
    )
    for buffer, after in zip(buffers, expected, strict=True):
        assert torch.equal(buffer, after)


def test_tokens_turn_by_one() -> None:
    ids = torch.tensor([1, 2, 3, 4, 5, 6])
    starts, lengths, new = torch.tensor([0, 3, 3]), torch.tensor([3, 0, 3]), torch.tensor([7, 8, 9])
    kernel.rotate_input_ids_cpu(ids, starts, lengths, new[:, None])
    assert ids.tolist() == [2, 3, 7, 5, 6, 9]
    kernel.rotate_input_ids_cpu(ids, starts, lengths, new, torch.tensor([1, 0, 3]))
    assert ids.tolist() == [3, 7, 7, 9, 9, 9]


@INDEX
def test_the_last_accepted_token_of_each_request(dtype: torch.dtype) -> None:
    bonus = torch.empty(2, dtype=torch.int64)
    tokens = torch.tensor([5, 6, 7, 8, 9, 10, 11, 12], dtype=torch.int32)
    kernel.fill_bonus_tokens_cpu(tokens, torch.tensor([3, 1], dtype=dtype), bonus, 4)
    assert bonus.tolist() == [7, 9]


# -- trees -------------------------------------------------------------------------------------------


def random_parents(rng: random.Random, n: int) -> list[int]:
    """A tree whose nodes come behind their parents; -1 is the root's."""
    return [-1] + [rng.randrange(node) for node in range(1, n)]


def path(parents: list[int], node: int) -> list[int]:
    """From the root to the node."""
    return ([] if parents[node] < 0 else path(parents, parents[node])) + [node]


def mask_of(parents: list[int]) -> torch.Tensor:
    mask = torch.zeros(len(parents), len(parents), dtype=torch.bool)
    for node in range(len(parents)):
        mask[node, path(parents, node)] = True
    return mask


@dataclass
class Links:
    """What both ways to build trees write, with rubbish in it."""

    index: torch.Tensor
    child: torch.Tensor
    sibling: torch.Tensor
    positions: torch.Tensor

    @classmethod
    def of(cls, batch: int, n: int) -> Links:
        return cls(*(torch.full((batch, n), 77) for _ in range(3)), torch.full((batch * n,), 77))

    def children(self, b: int, node: int) -> list[int]:
        """A node's children in the order of the links."""
        found, child = [], int(self.child[b, node])
        while child != -1:
            found.append(child)
            child = int(self.sibling[b, child])
        return found

    def check(self, forest: list[list[int]], lengths: list[int]) -> None:
        for b, parents in enumerate(forest):
            n = len(parents)
            for node in range(n):
                expected = [child for child in range(n) if parents[child] == node]
                assert self.children(b, node) == expected
                depth = len(path(parents, node)) - 1
                assert int(self.positions[b * n + node]) == lengths[b] + depth
                assert int(self.index[b, node]) == b * n + node
            assert int(self.sibling[b, 0]) == -1


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.integers(1, 9))
def test_links_from_masks(seed: int, n: int) -> None:
    rng = random.Random(seed)
    forest = [random_parents(rng, n) for _ in range(3)]
    lengths = [rng.randrange(1, 100) for _ in forest]
    links = Links.of(len(forest), n)
    masks = torch.stack([mask_of(parents) for parents in forest]).flatten()
    trees.reconstruct_indices_from_tree_mask(
        *(masks, torch.tensor(lengths), links.positions, links.index, links.child, links.sibling),
        *(len(forest), n),
    )
    links.check(forest, lengths)


def grow(rng: random.Random, topk: int, steps: int, n: int) -> tuple[list[int], list[int], list[int]]:
    """What a draft model of SGLang grows: expanded proposals, selected ones, and the nodes' parents.

    It expands the root, then in each step ``topk`` proposals of the step before; a proposal may be
    selected if its parent is.
    """
    expanded, of_step, parent_of = [-1], [], {}
    for step in range(steps):
        parents = [0] if step == 0 else range(len(expanded) - topk, len(expanded))
        of_step = [e * topk + i for e in parents for i in range(topk)]
        parent_of |= {proposal: expanded[proposal // topk] for proposal in of_step}
        if step < steps - 1:
            expanded += rng.sample(of_step, topk)
    selected: list[int] = []
    while len(selected) < n - 1:
        allowed = [p for p, q in parent_of.items() if p not in selected and q in (-1, *selected)]
        selected.append(rng.choice(allowed))
    selected.sort()
    nodes = {-1: 0} | {proposal: node for node, proposal in enumerate(selected, start=1)}
    return expanded, selected, [-1] + [nodes[parent_of[proposal]] for proposal in selected]


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.integers(1, 4), st.integers(1, 4), st.data())
def test_trees_of_a_draft_model(seed: int, topk: int, steps: int, data: st.DataObject) -> None:
    most = topk + (steps - 1) * topk * topk
    n = data.draw(st.integers(2, min(most, 12) + 1)) if topk > 1 else steps + 1
    rng = random.Random(seed)
    grown = [grow(rng, topk, steps, n) for _ in range(3)]
    forest = [parents for _, _, parents in grown]
    lengths = [rng.randrange(1, 100) for _ in forest]
    links, masks = Links.of(len(forest), n), torch.ones(len(forest) * n * n, dtype=torch.bool)
    kernel.build_tree_kernel_efficient_cpu(
        torch.tensor([expanded for expanded, _, _ in grown]),
        torch.tensor([selected for _, selected, _ in grown]),
        *(torch.tensor(lengths), masks, links.positions, links.index, links.child, links.sibling),
        *(topk, steps, n, 1),
    )
    links.check(forest, lengths)
    assert torch.equal(masks.view(-1, n, n), torch.stack([mask_of(parents) for parents in forest]))


def test_other_masks_are_refused() -> None:
    with pytest.raises(NotImplementedError, match="tree_mask_mode 0"):
        kernel.build_tree_kernel_efficient_cpu(*[None] * 11, 0)


@settings(max_examples=100, deadline=None)
@given(SEEDS, st.integers(1, 9), st.integers(1, 9))
def test_the_longest_path_that_the_target_wants_is_accepted(seed: int, n: int, depth: int) -> None:
    """By trying every node: its path counts if the target wants each token of it."""
    rng = random.Random(seed)
    forest = [random_parents(rng, n) for _ in range(3)]
    tokens = [[0] * n for _ in forest]
    for parents, of_tree in zip(forest, tokens, strict=True):  # siblings differ, as drafts do
        for node in range(1, n):
            of_tree[node] = 10 * parents[node] + sum(parents[k] == parents[node] for k in range(node))
    target = [[10 * node + rng.randrange(2) for node in range(n)] for _ in forest]
    links = Links.of(3, n)
    trees.reconstruct_indices_from_tree_mask(
        torch.stack([mask_of(parents) for parents in forest]).flatten(),
        torch.zeros(3, dtype=torch.int64),
        *(links.positions, links.index, links.child, links.sibling, 3, n),
    )
    predicts = torch.full((3 * n,), -1, dtype=torch.int32)
    accept_index = torch.full((3, depth), -1, dtype=torch.int32)
    accepted = torch.zeros(3, dtype=torch.int32)
    kernel.verify_tree_greedy_cpu(
        predicts=predicts,
        accept_index=accept_index,
        accept_token_num=accepted,
        candidates=torch.tensor(tokens),
        retrive_index=links.index,
        retrive_next_token=links.child,
        retrive_next_sibling=links.sibling,
        target_predict=torch.tensor(target),
    )
    for b, parents in enumerate(forest):
        wanted = [
            nodes
            for nodes in (path(parents, node) for node in range(n))
            if len(nodes) <= depth and all(tokens[b][c] == target[b][p] for p, c in pairwise(nodes))
        ]
        best = max(wanted, key=len)
        assert accept_index[b].tolist() == [b * n + node for node in best] + [-1] * (depth - len(best))
        assert int(accepted[b]) == len(best) - 1
        assert [int(predicts[b * n + node]) for node in best] == [target[b][node] for node in best]
        others = set(range(n)) - set(best)
        assert all(int(predicts[b * n + node]) == -1 for node in others)


# -- the plugin --------------------------------------------------------------------------------------


def test_a_node_attends_to_the_text_and_its_ancestors() -> None:
    """Each node of each tree by itself, as the newest token behind its own path."""
    rng = random.Random(5)
    n, heads, kv_heads, dim, lengths = 5, 4, 2, 8, [7, 1]
    forest = [random_parents(rng, n) for _ in lengths]
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(40, kv_heads, dim, generator=generator) for _ in range(2))
    q = torch.randn(2, n, heads, dim, generator=generator)
    rows = torch.randperm(40, generator=generator)[:30].view(2, 15).to(torch.int32)
    seen = torch.stack([mask_of(parents) for parents in forest])
    out = plugin.tree_attention(q, keys, values, rows, torch.tensor(lengths), seen, 0.3)
    out = out.view(2, n, heads, dim)
    for b, parents in enumerate(forest):
        for node in range(n):
            columns = [*range(lengths[b]), *(lengths[b] + k for k in path(parents, node))]
            slots = rows[b, columns].long()
            for head in range(heads):
                kv_head = head // (heads // kv_heads)
                weights = torch.softmax(keys[slots, kv_head] @ q[b, node, head] * 0.3, dim=0)
                expected = weights @ values[slots, kv_head]
                torch.testing.assert_close(out[b, node, head], expected)


def test_a_draft_models_branch_sees_what_it_wrote() -> None:
    expected = [[1, 1, 0, 0, 0, 0], [0, 0, 0, 1, 1, 0]]
    assert plugin.branches(2, 3, 2).int().tolist() == expected
    assert plugin.branches(1, 3, 1).int().tolist() == [[1, 0, 0]]


@pytest.mark.parametrize(("target", "handler", "kind"), plugin.HOOKS)
def test_hooks_fit_the_installed_sglang(target: str, handler: Callable, kind: str) -> None:
    """SGLang logs a hook that does not fit and goes on."""
    function = inspect.unwrap(pkgutil.resolve_name(f"sglang.srt.{target}"))
    theirs = [name for name in inspect.signature(function).parameters if name != "self"]
    ours = list(inspect.signature(handler).parameters)
    assert ours[-len(theirs) :] == theirs
    methods = target.split(".")[-2][0].isupper()
    assert len(ours) - len(theirs) == methods + (kind == "AROUND")


def test_the_draft_models_state_is_gathered_by_row() -> None:
    buffers = [torch.randn(6, 2), torch.randint(9, (6, 2)), torch.arange(6), torch.randn(6, 4)]
    rows = torch.tensor([4, 0, 4])
    for got, buffer in zip(plugin.gather_spec_extras(rows, *buffers), buffers, strict=True):
        assert torch.equal(got, torch.stack([buffer[4], buffer[0], buffer[4]]))
    assert plugin.gather_spec_extras(rows, *buffers[:3], None)[3] is None


def test_ngram_without_a_compiler_ends_with_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    there = {"ccache", "ninja"}
    monkeypatch.setattr(shutil, "which", lambda name: name if name in there else None)
    monkeypatch.setenv("CXX", "ccache g++")
    plugin.require_compiler(SimpleNamespace())
    monkeypatch.delenv("CXX")
    there.clear()
    with pytest.raises(SystemExit) as end:
        plugin.require_compiler(SimpleNamespace())
    error = capsys.readouterr().err
    assert end.value.code == 2
    assert error.count("\n") == 1 and "NGRAM" in error and "c++ and ninja" in error
