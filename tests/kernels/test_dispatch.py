"""Who gets which kernels; the doctor prints the reason."""

from __future__ import annotations

import pytest
import torch

from kara_sglang.kernels.backend import TorchKernels
from kara_sglang.kernels.dispatch import pick
from kara_sglang.kernels.triton import TritonKernels


def test_a_cpu_gets_torch():
    kernels, reason = pick(torch.device("cpu"))
    assert isinstance(kernels, TorchKernels)
    assert reason == "the device is cpu, not a CUDA GPU"
    assert kernels.layers_at_once is None


@pytest.mark.parametrize(
    ("capability", "hip", "expected", "reason"),
    [
        ((9, 0), None, TritonKernels, "a CUDA GPU of compute capability 9.0"),
        ((8, 0), None, TritonKernels, "a CUDA GPU of compute capability 8.0"),
        ((7, 5), None, TorchKernels, "compute capability 7.5, Triton kernels need 8.0"),
        ((9, 4), "6.3", TorchKernels, "the Triton kernels are not tested on ROCm"),
    ],
)
def test_a_gpu_gets_triton_where_it_works(monkeypatch, capability, hip, expected, reason):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    kernels, given = pick(torch.device("cuda", 0))
    assert type(kernels) is expected
    assert given == reason
    assert kernels.layers_at_once == 8, "a captured graph must not keep all layers' queries"
