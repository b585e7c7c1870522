"""Scores of a window's keys: the torch reference and the CPU path.

Paper section 4.1: inside the window every query attends every key, with no causal mask, and a key's
score is the attention that it collects. What K and V say by themselves multiplies it, or is the score
where no query votes. Here for one request and one layer at a time; all tensors come in and go out,
nothing of SGLang is imported.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

SCRATCH_BYTES = 64 << 20
"""Upper bound of the probability matrix in memory; heads, then queries, go in groups that fit."""

NEIGHBOURS_SHARE = 0.6
"""Weight of the neighbours' mean against the token's own score, see :func:`blend_neighbours`."""

LEAST_SCORE, MOST_SCORE = 1e-30, 1e30
"""What a score counts as at least and at most where its logarithm is taken: well inside float32, and
far beyond scores other than 0 that models give."""


@dataclass(frozen=True, slots=True)
class WeightRule:
    """What K and V say of a token by themselves, and who shares a score.

    Attributes
    ----------
    value_norm
        Multiply by the Euclidean norm of the key's value to this power; 0: not at all.
    key_distance
        Multiply by how far the key's direction is from that of the window's mean key, see
        :func:`key_distances`.
    neighbours
        Blend with the scores of so many nearest tokens, an odd number that counts the token itself,
        see :func:`blend_neighbours`; 1: not at all.
    per_layer
        Add up the scores of the KV heads, so that all heads of a layer keep the same tokens. Under
        tensor parallelism: all heads of a rank.
    """

    value_norm: int = 0
    key_distance: bool = False
    neighbours: int = 1
    per_layer: bool = False

    def __post_init__(self) -> None:
        if self.neighbours < 1 or self.neighbours % 2 == 0:
            raise ValueError(f"neighbours must be an odd number of tokens, got {self.neighbours}")


@dataclass(frozen=True, slots=True)
class AttentionRule(WeightRule):
    """How attention turns into a score, which is then weighed.

    Attributes
    ----------
    squared
        Sum the squares of the probabilities instead of the probabilities (the paper's).
    causal
        Query i sees keys j <= i only (a query behind the window sees them all).
    delay_votes
        Whether the queries of the delay, behind the window, vote as the window's own do.
    ahead
        The queries are moved ahead by W positions, see ``kernels/rope_shift.py``; who calls
        :func:`attention_scores` has done it.
    last_queries
        Let only this many of the newest of them vote; None: all.
    """

    squared: bool = False
    causal: bool = False
    delay_votes: bool = True
    ahead: bool = False
    last_queries: int | None = None

    def voters(self, num_queries: int, width: int) -> range:
        """Which of ``num_queries`` recorded queries vote in a window of ``width`` tokens."""
        stop = num_queries if self.delay_votes else width
        return range(max(0, stop - (self.last_queries or stop)), stop)


def attention_scores(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    scale: float,
    rule: AttentionRule,
) -> torch.Tensor:
    """Score every key of a window by the attention it collects.

    Parameters
    ----------
    queries : torch.Tensor
        Post-RoPE queries of the window's tokens and, behind them, of the delay's tokens,
        shape ``(num_queries, num_kv_heads, heads_per_group, head_dim)``, num_queries >= W. Query i
        belongs to the window's token i. Where the mean was recorded ``heads_per_group`` is 1.
    keys, values : torch.Tensor
        The window's KV, shape ``(W, num_kv_heads, head_dim)``.
    scale : float
        Softmax scale of the model, usually ``head_dim ** -0.5``.
    rule : AttentionRule

    Returns
    -------
    torch.Tensor
        Scores, shape ``(num_kv_heads, W)``, float32. The softmax runs over the window's keys.
    """
    width, num_kv_heads, _ = keys.shape
    voters = rule.voters(queries.shape[0], width)
    queries = queries[voters.start : voters.stop]
    num_queries, _, group, _ = queries.shape
    own = torch.arange(voters.start, voters.stop, device=keys.device)
    key_positions = torch.arange(width, device=keys.device)

    scores = torch.zeros((num_kv_heads, width), dtype=torch.float32, device=keys.device)
    row_bytes = 4 * group * width  # of one query position in one KV head's probability matrix
    heads_at_once = max(1, SCRATCH_BYTES // (row_bytes * max(1, num_queries)))
    rows_at_once = max(1, SCRATCH_BYTES // (row_bytes * heads_at_once))
    for head in range(0, num_kv_heads, heads_at_once):
        heads = slice(head, head + heads_at_once)
        k = keys[:, heads].float().permute(1, 2, 0)
        for row in range(0, num_queries, rows_at_once):
            rows = slice(row, row + rows_at_once)
            q = queries[rows, heads].float().permute(1, 0, 2, 3).flatten(1, 2)
            logits = torch.bmm(q, k).mul_(scale)
            if rule.causal:
                hidden = key_positions > own[rows, None]
                logits.masked_fill_(hidden.repeat_interleave(group, dim=0), float("-inf"))
            probabilities = torch.softmax(logits, dim=-1)
            if rule.squared:
                probabilities.square_()
            scores[heads] += probabilities.sum(dim=1)
    return _weighed(scores, keys, values, rule)


def weight_scores(keys: torch.Tensor, values: torch.Tensor, rule: WeightRule) -> torch.Tensor:
    """Score every key of a window by what K and V say alone, as if all votes were equal.

    Parameters
    ----------
    keys, values : torch.Tensor
        The window's KV, shape ``(W, num_kv_heads, head_dim)``.
    rule : WeightRule

    Returns
    -------
    torch.Tensor
        Scores, shape ``(num_kv_heads, W)``, float32.
    """
    width, num_kv_heads, _ = keys.shape
    equal = torch.ones((num_kv_heads, width), dtype=torch.float32, device=keys.device)
    return _weighed(equal, keys, values, rule)


def _weighed(
    scores: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, rule: WeightRule
) -> torch.Tensor:
    """``scores``, ``(num_kv_heads, W)``, which are overwritten, weighed and shared by ``rule``."""
    if rule.value_norm:
        scores *= values.float().norm(dim=-1).T ** rule.value_norm
    if rule.key_distance:
        scores *= key_distances(keys)
    if rule.neighbours > 1:
        scores = blend_neighbours(scores, rule.neighbours)
    return share_heads(scores) if rule.per_layer else scores


def key_distances(keys: torch.Tensor) -> torch.Tensor:
    """``1 - cos(key, mean key)`` of each key of a window, ``(num_kv_heads, W)``, float32, 0 to 2.

    The mean is that of the window's keys, ``(W, num_kv_heads, head_dim)``, of each head. Keys that are
    like all others carry little of their own: KeyDiff (arXiv 2504.15364) keeps the distinct ones of a
    prompt by this distance alone, without any attention.
    """
    every = keys.float()
    cosine = torch.cosine_similarity(every, every.mean(dim=0, keepdim=True), dim=-1)
    return (1 - cosine.T).clamp_min_(0)


def blend_neighbours(
    scores: torch.Tensor, neighbours: int, share: float = NEIGHBOURS_SHARE
) -> torch.Tensor:
    """Each score as a weighted geometric mean of itself and of those around it.

    A token of a name or a number is of use together with the tokens beside it, so among equal scores
    the one in good company should stay. Token2Chunk (paper section 4.2) goes by the same thought; it
    fills gaps after the choice, this weighs before it. Geometric, because scores range over decades:
    with a mean of the scores themselves the largest would lift whatever lies beside it.

    Parameters
    ----------
    scores : torch.Tensor
        ``(num_kv_heads, W)``, float32, at least 0. NaN makes its neighbours NaN.
    neighbours : int
        Odd; the token itself is one of them. At the window's ends there are fewer.
    share : float
        s below, between 0 and 1.

    Returns
    -------
    torch.Tensor
        ``exp((1 - s) log score + s mean(log score of the neighbours))``, of the shape and
        dtype of ``scores``.
    """
    logs = scores.clamp(LEAST_SCORE, MOST_SCORE).log_()
    near = torch.nn.functional.avg_pool1d(
        logs[None], neighbours, 1, neighbours // 2, count_include_pad=False
    )[0]
    return torch.lerp(logs, near, share).exp_()


def share_heads(scores: torch.Tensor) -> torch.Tensor:
    """Give every KV head the sum over the heads, in place; ``(..., num_kv_heads, W)`` in and out."""
    return scores.copy_(scores.sum(dim=-2, keepdim=True).expand_as(scores))
