"""Prefix reuse, first stage: the tree holds exact KV only.

On the map in ``row.py``, ``protected`` is SGLang's ``cache_protected_len``: all behind it is the
request's own.

The prompt is in the tree since the end of its prefill. From the first compaction on, the row's slots
no longer stand for the tokens at their index, so the request stays out of the tree when it ends:
SGLang's own flag ``skip_radix_cache_insert`` says so, and every slot behind the protected prefix is
freed. So does a retracted request, from then on until it has decoded again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kara_sglang.radix_integration.row import RequestState, ceil_align

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req, ReqKvInfo


def first_base(kv: ReqKvInfo, page_size: int) -> int:
    """KV index of a request's first window: behind its prefill and behind what the tree owns."""
    return ceil_align(max(kv.kv_committed_len, kv.cache_protected_len), page_size)


def bar_insert(req: Req, state: RequestState) -> None:
    """Keep the request out of the prefix tree from its first compaction on."""
    if state.insert_skipped is None:
        state.insert_skipped = req.skip_radix_cache_insert
    req.skip_radix_cache_insert = True


def allow_insert(req: Req, state: RequestState) -> None:
    """Undo :func:`bar_insert`."""
    if state.insert_skipped is not None:
        req.skip_radix_cache_insert = state.insert_skipped
