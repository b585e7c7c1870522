"""The simulated scheduler is like SGLang where it matters."""

from __future__ import annotations

import dataclasses
import inspect

import pytest
import torch
from stand_ins import Kv
from world import one_request


@pytest.mark.parametrize("page_size", [1, 16])
def test_the_real_allocator_takes_what_the_pass_frees(page_size: int) -> None:
    """int32 slots of a row, an empty segment for R = W, whole pages: as the stand-in above does."""
    from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
    from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator

    size, device = 64 * page_size, "cpu"
    if page_size == 1:
        real = TokenToKVPoolAllocator(size, torch.int64, device, None, need_sort=False)
    else:
        real = PagedTokenToKVPoolAllocator(size, page_size, torch.int64, device, None, need_sort=False)
    slots = real.alloc(8 * page_size)
    row = torch.zeros(100 * page_size, dtype=torch.int32)
    row[: len(slots)] = slots
    assert real.available_size() == size - 8 * page_size
    window = row[2 * page_size : 6 * page_size].clone()
    real.free_segment(window[4 * page_size :], start_pos=6 * page_size)
    assert real.available_size() == size - 8 * page_size
    real.free_segment(window[page_size:], start_pos=3 * page_size)
    assert real.available_size() == size - 5 * page_size
    again = real.alloc(real.available_size()).tolist()
    held = {*slots[: 3 * page_size].tolist(), *slots[6 * page_size :].tolist()}
    assert len(set(again)) == len(again) and not held & set(again)


def test_the_stand_ins_have_the_fields_of_sglang() -> None:
    """A field that SGLang renames must not live on in this file."""
    from sglang.srt.managers.schedule_batch import Req, ReqKvInfo, ScheduleBatch

    assert {f.name for f in dataclasses.fields(Kv)} <= {f.name for f in dataclasses.fields(ReqKvInfo)}
    assert hasattr(ReqKvInfo, "holds_kv")
    batch_fields = {f.name for f in dataclasses.fields(ScheduleBatch)}
    world, req = one_request()
    assert set(vars(world.batch)) <= batch_fields
    for name in ("finished", "next_output_finishes_by_length"):
        assert callable(getattr(Req, name))
    source = inspect.getsource(Req.__init__)
    for name in (
        *("origin_input_ids", "output_ids", "sampling_params", "kv", "skip_radix_cache_insert"),
        *("beam_group", "multimodal_inputs", "finished_reason", "to_finish", "retraction_count"),
    ):
        assert hasattr(req, name) and f"self.{name}" in source, name
