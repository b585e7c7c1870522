"""The CUDA path: the same pass as the torch reference beside it, in Triton."""

from kara_sglang.kernels.triton.backend import TritonKernels

__all__ = ["TritonKernels"]
