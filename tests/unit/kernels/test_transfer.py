"""Copies to the device leave pinned memory, so that the host does not wait."""

from __future__ import annotations

import pytest
import torch

from kara_sglang.kernels.transfer import fill, to_device

CPU, DEVICE = torch.device("cpu"), torch.device("meta")


@pytest.fixture
def pinned(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """What has been pinned; without a GPU torch cannot."""
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: seen.append(self) or self)
    return seen


def test_on_the_host_nothing_is_copied(pinned: list[torch.Tensor]) -> None:
    one, target = torch.arange(5), torch.zeros(5, dtype=torch.int64)
    assert to_device(one, CPU) is one
    fill(target, one)
    assert torch.equal(target, one) and not pinned


def test_what_goes_to_a_device_is_pinned(pinned: list[torch.Tensor]) -> None:
    one = torch.arange(5)
    there = to_device(one, DEVICE)
    assert (there.device, there.dtype, there.shape) == (DEVICE, one.dtype, one.shape)
    fill(torch.empty(5, dtype=torch.int64, device=DEVICE), one)
    assert len(pinned) == 2 and all(seen is one for seen in pinned)
