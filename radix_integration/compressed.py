"""Prefix reuse, second stage: compressed rows in SGLang's own tree, under physical keys.

The tree is stock: locks, LRU, splits, eviction, ``flush_cache`` and the leak checks know nothing of
compression, because a compressed row is a row like any other whose key has one id per slot
(:mod:`~kara_sglang.radix_integration.keys`). What differs is told here:

* **match**: the request's tokens are looked up as they are, and under each layout that the index knows
  for a beginning of them. The logically longest wins, exact KV wins ties. Only the winner is touched,
  so a compressed copy of what is there exactly ages out.
* **insert**: a row with windows is inserted under its physical key.
* **strangers**: a text with an id that is no token takes no part, because it could pass for a physical
  key. The launcher refuses such texts; here it does not matter who let one in.
* **lengths**: ``req.prefix_len`` stays logical, ``cache_protected_len`` and all else that counts slots
  is physical (:mod:`~kara_sglang.radix_integration.prefill`).

On the map in ``row.py``, ``[0, protected)`` of a request that continues on a compressed prefix holds
windows and clean spans, too. When it ends, the tree takes over all whole pages; where it holds a part
already, the request's copy is freed and its row points to the tree's.
"""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sglang.srt.environ import envs
from sglang.srt.mem_cache.base_prefix_cache import InitLoadBackParams, MatchPrefixParams, MatchResult
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.registry import (
    TreeCacheBuildContext,
    create_unified_radix_cache,
    get_radix_cache_factory,
    register_radix_cache_backend,
)
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

from kara_sglang.radix_integration.index import LayoutIndex
from kara_sglang.radix_integration.keys import Text, first_stranger, physical_key, seed_of
from kara_sglang.radix_integration.layout import Layout
from kara_sglang.radix_integration.padding import padding_values
from kara_sglang.radix_integration.prefix import (
    PREFIX,
    Prefix,
    Sharing,
    layout_of,
    prefix_of,
    removed_of,
)

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.mem_cache.cache_init_params import CacheInitParams


def register_backend(name: str) -> None:
    """Make the cache known to SGLang's registry under ``name``, once per process."""
    if get_radix_cache_factory(name) is None:
        register_radix_cache_backend(name, _create)


def _create(context: TreeCacheBuildContext) -> CompressedRadixCache:
    return create_unified_radix_cache(context, cache_class=CompressedRadixCache)


class CompressedRadixCache(UnifiedRadixCache):
    """SGLang's prefix cache, which takes in and finds compressed rows as well.

    Attributes
    ----------
    sharing_of : callable
        ``Req`` -> its :class:`Sharing`, None where it takes and leaves exact KV only.
        Until the coordinator has set it, nobody takes part.
    vocab_size : int
        Token ids of the model are smaller; nothing is a token before the coordinator has set it.
    layouts : LayoutIndex
    reach : int
        Uncompressed slots that a compressed prefix must end with (``compat/sliding_window.py``).
    debug_checks : bool
        Check the interval map of each row that is inserted.
    computed_again : callable
        Told with each prefill how many tokens are computed though a compressed prefix held them that
        reached too little farther.
    """

    def __init__(self, params: CacheInitParams) -> None:
        self.sharing_of: Callable[[Req], Sharing | None] = lambda _req: None
        self.vocab_size = 0
        self.layouts = LayoutIndex()
        self.reach = 0
        self.debug_checks = False
        self.computed_again: Callable[[int], None] = lambda _tokens: None
        super().__init__(params)

    def reset(self) -> None:
        self.layouts.clear()
        super().reset()

    # -- match -------------------------------------------------------------------------------------

    def match_prefix(self, params: MatchPrefixParams) -> MatchResult:
        """The longest cached prefix of the request's tokens.

        Returns
        -------
        MatchResult
            ``device_prefix_len`` in tokens, ``cache_protected_len`` in slots where they differ.
        """
        if self.disable:
            return super().match_prefix(params)
        if not self._may_take_part(params.req, _ids_of(params.key)):
            params = dataclasses.replace(params, key=_nothing_of(params.key))
        if params.req is None:
            return super().match_prefix(params)
        prefix = self._prefix(params.req)
        prefix.windows, prefix.found = (), None
        prefix.passed_over = 0
        found = None
        if prefix.sharing is not None and not prefix.waits and not envs.SGLANG_RADIX_FORCE_MISS.get():
            found = self._find(prefix, prefix.sharing, params.key)
        if found is None:
            return super().match_prefix(params)
        key, layout = found
        result = super().match_prefix(dataclasses.replace(params, key=key))
        slots = result.device_prefix_len
        tokens, reach = layout.tokens(slots), layout.tokens(slots + result.host_hit_length)
        prefix.windows, prefix.found = layout.within(reach).windows, (layout, slots)
        return result._replace(
            device_prefix_len=tokens,
            host_hit_length=reach - tokens,
            full_kv_hit_length=reach,
            cache_protected_len=layout.slots(tokens),
        )

    def init_load_back(self, params: InitLoadBackParams) -> tuple[int, Any] | None:
        """Load what the host holds of the request's prefix: SGLang's, which counts slots.

        Returns
        -------
        tuple or None
            Tokens that are on the device now and were not, and the node at their end.
        """
        loaded = super().init_load_back(params)
        prefix = prefix_of(params.req)
        if loaded is None or prefix is None or prefix.found is None:
            return loaded
        more, node = loaded
        layout, slots = prefix.found
        reach = layout.tokens(slots + more)
        prefix.windows = layout.within(reach).windows
        return reach - layout.tokens(slots), node

    def touch_prefix(self, key: RadixKey) -> None:
        """Keep a waiting text's prefix young; it must not split a window's node."""
        if self._may_take_part(None, _ids_of(key)):
            super().touch_prefix(key)

    def _may_take_part(self, req: Req | None, ids: array[int] | memoryview) -> bool:
        """Whether ``ids`` are tokens, but for what SGLang has put in place of the request's own images
        and sounds: numbers of up to 62 bits, drawn by a hash."""
        if first_stranger(ids, self.vocab_size) is None:
            return True
        if req is None or req.multimodal_inputs is None:
            return False
        own = [value for item in req.multimodal_inputs.mm_items for value in padding_values(item)]
        unsigned = np.frombuffer(ids, dtype=np.uint64)
        return bool(np.isin(unsigned[unsigned >= self.vocab_size], np.array(own, np.uint64)).all())

    def _find(self, prefix: Prefix, sharing: Sharing, key: RadixKey) -> tuple[RadixKey, Layout] | None:
        """The physical key under which more of the text is cached than under its tokens."""

        def cached(ids: array[int]) -> int:
            return self._reach(RadixKey(ids, key.extra_key, cache_salt=key.cache_salt))

        if not self.layouts.num_windows:
            return None  # while memory suffices, a match costs what SGLang's does
        tokens = _ids_of(key)
        exact = self._reach(key)
        # The exact part of a compressed row is an exact prefix, so nothing can start behind it.
        if exact == 0 or exact >= len(tokens) // self.page_size * self.page_size:
            return None
        seed = seed_of(sharing.settings, key.extra_key, key.cache_salt)
        found = self.layouts.longest(seed, tokens, exact, cached)
        if found is None:
            return None
        layout, ids = found
        ids = ids[: layout.ending_clean(len(ids), self.reach)]
        reached = layout.tokens(len(ids))
        layout, gain = layout.within(reached), reached - exact
        if gain <= 0:
            return None
        if gain < sharing.least:
            prefix.passed_over = gain
            return None
        return RadixKey(ids, key.extra_key, cache_salt=key.cache_salt), layout

    def _reach(self, key: RadixKey) -> int:
        """How many slots of a key device and host hold, without a gap; with :attr:`reach` the device
        alone: a load may fail, and then the prefix would end where the device's part does.

        Without a host tier this looks only, so that the loser of a comparison ages. SGLang has no such
        look at the host.
        """
        if self.cache_controller is None or self.reach:
            slots, _, _ = self.tree_core.match_full_device_prefix(key)
            return slots
        result = self.tree_core.match_prefix(MatchPrefixParams(key=key))
        self._apply_cache_actions(result.cache_actions)
        return result.device_prefix_len + result.host_hit_length

    def _prefix(self, req: Req) -> Prefix:
        prefix = prefix_of(req)
        if prefix is None:
            prefix = Prefix(self.sharing_of(req))
            setattr(req, PREFIX, prefix)
        return prefix

    # -- insert ------------------------------------------------------------------------------------

    def checkpoint_into_tree(self, req: Req, *, up_to: int, **kwargs: Any) -> None:
        """Insert the row, under its physical key where it has compressed windows.

        Parameters
        ----------
        req : Req
        up_to : int
            Tokens at the end of a prefill, slots at the end of the request, as SGLang's callers
            (``mem_cache/common.py``) have them.
        """
        if not self.disable and not self._may_take_part(req, req.full_untruncated_fill_ids):
            return  # as with SGLang's own ``skip_radix_cache_insert``
        layout = layout_of(req)
        if not layout.windows or self.disable:
            super().checkpoint_into_tree(req, up_to=up_to, **kwargs)
            return
        text, prompt = req.full_untruncated_fill_ids, req.origin_input_ids
        sharing = self._prefix(req).sharing
        if sharing is None:
            raise RuntimeError(f"kv-compress: request {req.rid} does not share its windows")
        seed = seed_of(sharing.settings, req.extra_key, req.cache_salt)
        tokens = memoryview(text)
        ids = physical_key(Text(seed, tokens), layout.windows)
        slots = layout.slots(up_to)
        if req.finished():
            # A step that verifies drafts may have gone on behind the end of the answer.
            slots = min(up_to, layout.slots(len(prompt) + len(req.output_ids_through_stop)))
        if self.debug_checks:
            layout.check(self.page_size)
            self._check_lengths(req, ids, slots, layout)
        # All that SGLang does from here on is about slots, and for that these are the row's ids.
        req.full_untruncated_fill_ids = ids
        req.origin_input_ids = ids[: layout.slots(len(prompt))]
        try:
            super().checkpoint_into_tree(req, up_to=slots, **kwargs)
        finally:
            req.full_untruncated_fill_ids, req.origin_input_ids = text, prompt
        self.layouts.add(seed, tokens, layout)

    def _check_lengths(self, req: Req, ids: array[int], slots: int, layout: Layout) -> None:
        if not req.kv.cache_protected_len <= slots <= min(len(ids), req.kv.kv_committed_len):
            raise RuntimeError(
                f"kv-compress: request {req.rid} would put {slots} slots into the prefix tree; it "
                f"holds {req.kv.kv_committed_len}, of which the tree owns "
                f"{req.kv.cache_protected_len}, for {len(ids) + layout.removed} tokens"
            )

    # -- lengths -----------------------------------------------------------------------------------

    def prefix_device_indices(self, req: Req) -> torch.Tensor:
        """KV indices of the request's matched prefix, shape ``(prefix_len - removed,)``, int64."""
        removed = removed_of(req)
        if not removed:
            return super().prefix_device_indices(req)
        path = self.path_device_indices(req.last_node)
        slots = req.prefix_len - removed
        if len(path) < slots:
            raise RuntimeError(
                f"kv-compress: request {req.rid} matched {slots} slots, the path holds {len(path)}"
            )
        return path[:slots]


def _ids_of(key: RadixKey) -> memoryview:
    """The ids of a key without bigrams, within its limit."""
    return memoryview(key.token_ids)[: len(key)]


def _nothing_of(key: RadixKey) -> RadixKey:
    """The empty beginning of a key."""
    return RadixKey(array("q"), key.extra_key, cache_salt=key.cache_salt)
