"""Which kernels a device gets, and why."""

from __future__ import annotations

import torch

from kara_sglang.kernels.backend import Kernels, TorchKernels

OLDEST = (8, 0)
"""The first CUDA compute capability with bfloat16 matrix instructions."""


def pick(device: torch.device) -> tuple[Kernels, str]:
    """The kernels for ``device`` and, in one clause, the reason.

    Triton is imported only where it is used.
    """
    if device.type != "cuda":
        return TorchKernels(), f"the device is {device.type}, not a CUDA GPU"
    in_graphs = TorchKernels(layers_at_once=8)  # a CUDA graph keeps the memory of what is held
    if torch.version.hip is not None:
        return in_graphs, "the Triton kernels are not tested on ROCm"
    capability = torch.cuda.get_device_capability(device)
    name = "compute capability {}.{}".format(*capability)
    if capability < OLDEST:
        return in_graphs, "{}, Triton kernels need {}.{}".format(name, *OLDEST)
    from kara_sglang.kernels.triton import TritonKernels

    return TritonKernels(), f"a CUDA GPU of {name}"
