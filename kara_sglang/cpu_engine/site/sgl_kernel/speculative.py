"""Draft trees: their links, and which of their tokens the target model accepts.

A request's tree has ``n`` nodes (``draft_token_num``), parents before children. Node 0 is the newest
token that is certain, the others are drafts. Links go from a node to its first child
(``retrive_next_token``, spelled as SGLang's operators spell it) and to its parent's next child
(``retrive_next_sibling``); -1 ends them. Node ``i`` of request ``b`` is number ``b * n + i`` of the
batch (``retrive_index``). Links are ``[batch_size, n]`` int64.

What they must do is written in SGLang's ``kernels/ops/speculative/spec_tree.py``,
``reconstruct_tree.py``, ``eagle.py`` and ``multi_layer_eagle.py``, which call them.
"""

from __future__ import annotations

import torch

QLEN_ONLY = 1
"""SGLang's ``TreeMaskMode`` on a CPU: a mask covers the nodes only, not the tokens before them."""


def _link(
    parents: list[int], first: int, index: torch.Tensor, child: torch.Tensor, sibling: torch.Tensor
) -> None:
    """Write one tree's ``[n]`` numbers and links; a node whose parent is -1 hangs on nothing."""
    index.copy_(torch.arange(first, first + len(parents)))
    child.fill_(-1)
    sibling.fill_(-1)
    for node in reversed(range(len(parents))):
        if (parent := parents[node]) >= 0:
            sibling[node] = child[parent]
            child[parent] = node


def reconstruct_indices_from_tree_mask(
    tree_mask: torch.Tensor,
    verified_seq_len: torch.Tensor,
    positions: torch.Tensor,
    retrive_index: torch.Tensor,
    retrive_next_token: torch.Tensor,
    retrive_next_sibling: torch.Tensor,
    batch_size: int,
    draft_token_num: int,
) -> None:
    """Links and positions of trees that are given by who is whose ancestor (NGRAM).

    Parameters
    ----------
    tree_mask : torch.Tensor
        ``[batch_size * n * n]`` bool: whether node i (slower index) sees node j.
    verified_seq_len : torch.Tensor
        Tokens before each tree, ``[batch_size]``.
    positions : torch.Tensor
        Tokens before each node, ``[batch_size * n]`` int64; written.
    """
    shape = (batch_size, draft_token_num, draft_token_num)
    ancestors = tree_mask.view(shape).tril(-1)
    depths = ancestors.sum(-1)
    positions.view(depths.shape).copy_(verified_seq_len[:, None] + depths)
    nodes = torch.arange(draft_token_num)
    parents = torch.where(ancestors, nodes, -1).amax(-1)  # the last of the ancestors
    for b, of_tree in enumerate(parents.tolist()):
        first = b * draft_token_num
        _link(of_tree, first, retrive_index[b], retrive_next_token[b], retrive_next_sibling[b])


def build_tree_kernel_efficient_cpu(
    parent_list: torch.Tensor,
    selected_index: torch.Tensor,
    verified_seq_len: torch.Tensor,
    tree_mask: torch.Tensor,
    positions: torch.Tensor,
    retrive_index: torch.Tensor,
    retrive_next_token: torch.Tensor,
    retrive_next_sibling: torch.Tensor,
    topk: int,
    depth: int,
    draft_token_num: int,
    tree_mask_mode: int,
) -> None:
    """Mask, links and positions of trees that a draft model grew (EAGLE, STANDALONE).

    The draft model proposes ``topk`` tokens behind each token that it expands, and all proposals are
    numbered in order: those of the root first. ``selected_index[b, i]`` is the proposal that became
    node ``i + 1``; ``parent_list[b, e]`` is the proposal that was expanded as the e-th, the root being
    the 0-th.

    Parameters
    ----------
    parent_list : torch.Tensor
        ``[batch_size, expanded]``.
    selected_index : torch.Tensor
        ``[batch_size, n - 1]``, ascending.
    verified_seq_len, positions
        As in :func:`reconstruct_indices_from_tree_mask`.
    tree_mask : torch.Tensor
        ``[batch_size * n * n]`` bool; written: a node sees its ancestors and itself.
    depth : int
        Steps of the draft model.
    tree_mask_mode : int
        Must be ``QLEN_ONLY``.
    """
    if tree_mask_mode != QLEN_ONLY:
        raise NotImplementedError(f"tree_mask_mode {int(tree_mask_mode)}: SGLang's CPU engine uses 1")
    masks = tree_mask.view(-1, draft_token_num, draft_token_num)
    for b, selected in enumerate(selected_index.tolist()):
        node_of = {proposal: node for node, proposal in enumerate(selected, start=1)}
        expanded = [proposal // topk for proposal in selected]
        parents = [-1] + [node_of[int(parent_list[b, e])] if e else 0 for e in expanded]
        first = b * draft_token_num
        _link(parents, first, retrive_index[b], retrive_next_token[b], retrive_next_sibling[b])
        mask = masks[b].zero_()
        for node, parent in enumerate(parents):
            if parent >= 0:
                mask[node] = mask[parent]
            mask[node, node] = True
        positions[first : first + draft_token_num] = verified_seq_len[b] + mask.sum(-1) - 1


def verify_tree_greedy_cpu(
    predicts: torch.Tensor,
    accept_index: torch.Tensor,
    accept_token_num: torch.Tensor,
    candidates: torch.Tensor,
    retrive_index: torch.Tensor,
    retrive_next_token: torch.Tensor,
    retrive_next_sibling: torch.Tensor,
    target_predict: torch.Tensor,
) -> None:
    """Follow each tree from its root as long as a child is the token that the target model wants.

    Parameters
    ----------
    predicts : torch.Tensor
        ``[batch_size * n]`` int32; at each accepted node the token that comes behind it is written.
    accept_index : torch.Tensor
        ``[batch_size, depth]`` int32, -1 at first; receives the accepted nodes' numbers, root first.
    accept_token_num : torch.Tensor
        ``[batch_size]`` int32; receives the accepted nodes without the root.
    candidates : torch.Tensor
        The trees' tokens, ``[batch_size, n]``.
    target_predict : torch.Tensor
        The target model's greedy token behind each node, ``[batch_size, n]``.
    """
    wanted = target_predict.flatten().tolist()
    tokens, numbers = candidates.tolist(), retrive_index.tolist()
    children, siblings = retrive_next_token.tolist(), retrive_next_sibling.tolist()
    depth = accept_index.shape[1]
    for b in range(len(tokens)):
        path: list[int] = []
        node = 0
        while node != -1 and len(path) < depth:
            path.append(number := numbers[b][node])
            predicts[number] = wanted[number]
            node = children[b][node]
            while node != -1 and tokens[b][node] != wanted[number]:
                node = siblings[b][node]
        accept_index[b, : len(path)] = torch.tensor(path)
        accept_token_num[b] = len(path) - 1


def fill_bonus_tokens_cpu(
    accept_tokens: torch.Tensor,
    accept_lens: torch.Tensor,
    bonus_tokens: torch.Tensor,
    accept_stride: int,
) -> None:
    """Each request's last accepted token, the one that no draft had to propose.

    ``accept_tokens`` holds ``accept_stride`` entries per request, of which the first ``accept_lens[i]``
    are accepted; ``bonus_tokens`` is ``[batch_size]``; written.
    """
    last = accept_lens.long() - 1
    rows = accept_tokens.view(-1, accept_stride)
    bonus_tokens.copy_(rows[: len(last)].gather(1, last[:, None]).squeeze(1))


def rotate_input_ids_cpu(
    input_ids: torch.Tensor,
    extend_start_loc: torch.Tensor,
    extend_seq_lens: torch.Tensor,
    topk_index: torch.Tensor,
    select_index: torch.Tensor | None = None,
) -> None:
    """Move each request's tokens one to the front, in place, and put its new token at their end.

    Request i has ``extend_seq_lens[i]`` tokens from ``extend_start_loc[i]`` on; ``topk_index[i]`` is
    its new token. With ``select_index`` it goes there instead. Requests without tokens are left alone.
    """
    for i, (start, length) in enumerate(
        zip(extend_start_loc.tolist(), extend_seq_lens.tolist(), strict=True)
    ):
        if length == 0:
            continue
        end = start + length
        input_ids[start : end - 1] = input_ids[start + 1 : end].clone()
        at = end - 1 if select_index is None else int(select_index[i])
        input_ids[at] = topk_index.flatten()[i].to(input_ids.dtype)
