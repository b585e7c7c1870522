"""How far one step carries a request: a token, or several where SGLang speculates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Pace:
    """Of a decode step, in tokens of one request.

    With speculation a step verifies draft tokens and keeps those that the model would have written. All
    of them get K, V and a query; only the accepted ones count (``speculative/eagle_utils.py``).

    Attributes
    ----------
    tokens
        That a step computes, and at most adds; 1 without speculation.
    behind
        By how many a request's KV length on the host may be short of the one with which the next step
        begins, while a step is in flight: with overlap scheduling the host does not know yet what that
        accepts.
    branches
        Whether drafts can be trees, so that the accepted tokens may lie apart among those of a step.
    drafted
        That a draft model writes in a step: all branches of a tree, of which ``tokens`` are verified.
    """

    tokens: int = 1
    behind: int = 0
    branches: bool = False
    drafted: int = 0

    @property
    def reach(self) -> int:
        """Tokens from a request's KV length on that the next step may compute, less one: 0 where it
        computes the one that comes next."""
        return self.behind + self.tokens - 1

    @property
    def reserve(self) -> int:
        """Slots beyond its KV length that a request may hold (``mem_cache/allocation_sizing.py``)."""
        return 2 * max(self.tokens, self.drafted) if self.speculates else 0

    @property
    def speculates(self) -> bool:
        """Whether a step computes more than it may keep."""
        return self.tokens > 1

    def steps(self, tokens: int) -> int:
        """Fewest steps in which a request can get so many tokens on."""
        return -(-tokens // self.tokens)


PLAIN = Pace()
"""Without speculation."""


def pace_of(resolved: Any) -> Pace:
    """The pace of a server.

    Parameters
    ----------
    resolved
        ``resolving_view(server_args)``, or anything with its fields.
    """
    if resolved.speculative_algorithm is None:
        return PLAIN
    tokens = resolved.speculative_num_draft_tokens
    behind = 0 if resolved.disable_overlap_schedule else tokens
    topk = resolved.speculative_eagle_topk
    # NGRAM's drafts branch at the root even with a breadth of 1: a path for each suffix that it knows.
    branches = resolved.speculative_algorithm == "NGRAM" or topk > 1
    return Pace(tokens, behind, branches, resolved.speculative_num_steps * topk)
