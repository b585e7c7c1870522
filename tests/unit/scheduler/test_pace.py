"""How far one step carries a request."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from kara_sglang.scheduler.pace import PLAIN, Pace, pace_of


@pytest.mark.parametrize("overlap", [True, False])
def test_the_pace_is_the_servers(overlap: bool) -> None:
    flags = SimpleNamespace(
        speculative_algorithm=None,
        speculative_num_draft_tokens=None,
        speculative_eagle_topk=None,
        speculative_num_steps=None,
        disable_overlap_schedule=not overlap,
    )
    assert pace_of(flags) == PLAIN
    flags.speculative_num_draft_tokens, flags.speculative_num_steps = 8, 3
    # NGRAM's drafts branch at the root whatever their breadth.
    for algorithm, topk, branches in (
        *(("NGRAM", 1, True), ("EAGLE", 1, False), ("STANDALONE", 1, False)),
        *(("EAGLE", 4, True), ("STANDALONE", 4, True)),
    ):
        flags.speculative_algorithm, flags.speculative_eagle_topk = algorithm, topk
        assert pace_of(flags) == Pace(8, 8 if overlap else 0, branches, 3 * topk)
    assert PLAIN.reserve == PLAIN.reach == 0 and PLAIN.steps(5) == 5
    assert [Pace(4).steps(tokens) for tokens in (1, 4, 5)] == [1, 1, 2]


def test_what_a_step_may_add_beyond_the_known_length() -> None:
    """By itself, and on top of what the step in flight accepts."""
    for pace, reach, reserve in (
        *((Pace(4), 3, 8), (Pace(4, behind=4), 7, 8), (PLAIN, 0, 0)),
        *((Pace(8, drafted=12), 7, 24), (Pace(8, drafted=3), 7, 16)),
    ):
        assert (pace.reach, pace.reserve, pace.speculates) == (reach, reserve, pace is not PLAIN)
